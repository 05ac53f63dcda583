"""`gptjax report RUN`."""

from typing import Annotated

from gptjax.commands.arguments import Positional
from gptjax.config.fields import frozen


@frozen
class Command:
    """Draw a run's loss and throughput from its log: PNG and one HTML page."""

    folder: Annotated[str, Positional("RUN")]
    """A run folder."""

    def run(self) -> None:
        """Draw, and print the names of the files."""
        from gptjax.train.report import report

        print(report(self.folder))
