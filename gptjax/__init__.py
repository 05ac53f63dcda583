"""gptjax: the recipe of the GPT papers as a small JAX and Flax trainer."""
