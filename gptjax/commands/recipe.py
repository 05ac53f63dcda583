"""`gptjax recipe CONFIG`."""

from typing import Annotated

from gptjax.commands.arguments import Positional, Words
from gptjax.config.fields import frozen


@frozen
class Command:
    """Run a chain of stages, from text to a model that has learned from rankings, and write its report. What is done is
    left alone, what was cut off goes on, what is made from something else now is made again. Fields of a training are
    set behind its name: --sft.train.epochs 2."""

    config: Annotated[str, Positional("CONFIG")]
    """A file of configs/ that defines recipe()."""
    folder: str = ""
    """Where its steps lie, a folder each; empty is runs/NAME."""
    overrides: Annotated[tuple[str, ...], Words("--step.section.field value")] = ()

    def run(self) -> int:
        """Do what is to be done; returns the exit status."""
        from pathlib import Path

        from gptjax.recipe import load_recipe
        from gptjax.recipe.chain import run

        recipe = load_recipe(self.config)
        return run(recipe, Path(self.folder or f"runs/{recipe.name}"), [*self.overrides])
