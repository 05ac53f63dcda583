"""`gptjax checkpoint ls RUN`."""

from typing import Annotated

from gptjax.commands.arguments import Positional
from gptjax.config.fields import frozen


@frozen
class Command:
    """List the checkpoints of a run: step, tokens, loss, size, age, and why each is kept."""

    folder: Annotated[str, Positional("RUN")]
    """A run folder."""

    def run(self) -> None:
        """Print a line for each."""
        from gptjax.train.examine import listing

        print(listing(self.folder))
