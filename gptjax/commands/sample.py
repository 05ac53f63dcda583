"""`gptjax sample PATH`."""

from typing import Annotated

from pydantic import Field

from gptjax.commands.arguments import Positional
from gptjax.config.fields import Count, Positive, Seed, frozen


@frozen
class Command:
    """Continue a prompt with a trained model."""

    folder: Annotated[str, Positional("PATH")]
    """A run folder or a Hugging Face directory."""
    prompt: Annotated[str, Field(min_length=1)] = "\n"
    """Text to continue, or for a model that has learned conversations what the user says."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: Count = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens up to this probability."""
    seed: Seed = 0
    """The same seed gives the same texts."""
    samples: Positive = 1
    """How many."""
    tokens: Positive = 200
    """Length of each."""

    def run(self) -> None:
        """Print the prompt with each continuation."""
        from gptjax.infer.sampling import Sampling
        from gptjax.stages.launch import sample

        how = Sampling(self.temperature, self.top_k, self.top_p)
        texts = sample(self.folder, self.prompt, how, num_samples=self.samples, num_tokens=self.tokens, seed=self.seed)
        print("\n---\n".join(texts))
