"""`gptjax bench corpus`."""

from pathlib import Path
from typing import Annotated

from gptjax.commands.arguments import Positional
from gptjax.config.fields import Positive, frozen


@frozen
class Command:
    """Measure what cleaning a text costs: each step on one core, beside tokenising it with datasets and transformers
    (extra peers), and whole builds as the text grows, with their memory."""

    recipe: Annotated[str, Positional("RECIPE")]
    """A Python file as for gptjax data build; its steps are measured on the text of its origins."""
    sizes: tuple[Positive, ...] = (100, 200, 400)
    """Megabytes of text of the builds; beyond what there is, copies with other words in the place of 3 in 10."""
    tokenizer: str = ""
    """Folder of a Hugging Face tokenizer for the peer; empty measures none."""
    out: Path = Path("bench")
    """Folder for the results."""

    def run(self) -> None:
        """Measure, write, and print the tables."""
        from gptjax.bench.corpus import run

        print(run(self.recipe, [*self.sizes], self.tokenizer, self.out))
