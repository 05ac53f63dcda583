"""`gptjax data view CONFIG --at POSITION`."""

from typing import Annotated

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config.fields import Count, Positive, frozen
from gptjax.config.load import load_config


@frozen
class Command:
    """Show exactly what a model sees at a position of its text: where documents begin and end in a row, what is kept
    apart, and which tokens are asked for."""

    config: Annotated[str, Positional("CONFIG")]
    """A file of configs/, of stage pretrain or sft."""
    at: str = "0"
    """In pretraining RECORD or RECORD:TOKEN of a lane, or the number that a checkpoint's meta has for it; else the
    number of a row."""
    lane: Count = 0
    """Of data.lanes."""
    rows: Positive = 1
    """How many, one after another."""
    overrides: Overrides = ()

    def run(self) -> None:
        """Print them."""
        from gptjax.stages.view import show_rows

        show_rows(load_config(self.config, [*self.overrides]), self.at, self.lane, self.rows)
