"""`gptjax checkpoint inspect RUN`."""

from typing import Annotated

from pydantic import Field

from gptjax.commands.arguments import Positional
from gptjax.config.fields import frozen


@frozen
class Command:
    """Show what a checkpoint holds: its position, its config, and every array with shape, type and size."""

    folder: Annotated[str, Positional("RUN")]
    """A run folder."""
    step: Annotated[int, Field(ge=-1)] = -1
    """The checkpoint of this step; -1 is the newest."""

    def run(self) -> None:
        """Print it."""
        from gptjax.train.examine import inspect

        print(inspect(self.folder, None if self.step < 0 else self.step))
