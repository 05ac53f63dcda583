"""gptjax: the recipe of the GPT papers as a small JAX and Flax trainer.

`gptjax.load(PATH)` is its one public entry in Python; everything else is for the verbs of the command line.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.api import Encoder, Model, Translator


def load(path: str, **how: Any) -> "Model | Translator | Encoder":
    """The trained model of a run folder or a Hugging Face directory; see gptjax.api.load_any."""
    from gptjax import api

    return api.load_any(path, **how)
