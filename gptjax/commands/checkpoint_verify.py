"""`gptjax checkpoint verify RUN`."""

from typing import Annotated

from pydantic import Field

from gptjax.commands.arguments import Positional
from gptjax.config.fields import frozen


@frozen
class Command:
    """Read every array of a run's checkpoints and compare it with the fingerprint taken when it was saved; exit status
    1 where one is damaged. It needs one CPU, and memory for one device's part of an array."""

    folder: Annotated[str, Positional("RUN")]
    """A run folder."""
    step: Annotated[int, Field(ge=-1)] = -1
    """Only the checkpoint of this step; -1 is all."""

    def run(self) -> int:
        """Print a line for each; returns the exit status."""
        from gptjax.train.examine import verify

        damaged = False
        for verdict in verify(self.folder, None if self.step < 0 else self.step):
            print(verdict, flush=True)
            damaged |= bool(verdict.wrong)
        return int(damaged)
