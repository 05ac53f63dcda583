"""`gptjax bench save CONFIG`."""

from pathlib import Path
from typing import Annotated

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config.fields import Positive, frozen
from gptjax.config.load import load_config


@frozen
class Command:
    """Time training steps with and without checkpoints written behind them, and weigh the memory that this takes.

    On the attached devices, from random weights and tokens; the checkpoints lie in the folder for the results, and go
    again."""

    config: Annotated[str, Positional("CONFIG")]
    """A file of configs/."""
    out: Path = Path("bench")
    """Folder for the results, on the storage that is to be measured."""
    interval: Positive = 20
    """Steps from one save to the next."""
    rounds: Positive = 3
    """Times that steps with and without a save take turns."""
    overrides: Overrides = ()

    def run(self) -> None:
        """Measure, write, and print the table."""
        from gptjax.bench.save import run

        print(run(load_config(self.config, [*self.overrides]), self.interval, self.rounds, self.out))
