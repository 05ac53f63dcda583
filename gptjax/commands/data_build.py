"""`gptjax data build RECIPE --out DIR`."""

from typing import Annotated

from pydantic import Field

from gptjax.commands.arguments import Positional
from gptjax.config.fields import Count, frozen
from gptjax.errors import UserError


@frozen
class Command:
    """Clean texts, drop copies, and write what stays as a TFDS data set with a manifest. A build that was stopped goes
    on where it was."""

    recipe: Annotated[str, Positional("RECIPE")]
    """A Python file that defines corpus()."""
    out: Annotated[str, Field(min_length=1)] = "datasets"
    """The folder of data sets; this one becomes OUT/NAME/VERSION."""
    workers: Count = 0
    """Processes; 0 is one for each core. Their number changes nothing but the time."""

    beam: str | None = None
    """Have Apache Beam run it (extra beam), with such options of its own, as --runner=FlinkRunner
    --flink_master=HOST:PORT; '' is this machine. Workers must see the sources and OUT under the same names."""

    def run(self) -> None:
        """Print what was read, dropped and kept, and where it is."""
        from pathlib import Path

        from gptjax.config.corpus import MANIFEST
        from gptjax.corpus.build import build, load_corpus
        from gptjax.corpus.look import summary
        from gptjax.data.formats import reason
        from gptjax.data.pool import cores
        from gptjax.files import read_json
        from gptjax.terminal import Progress

        recipe = load_corpus(self.recipe)
        try:
            with Progress() as progress:
                folder = build(recipe, Path(self.out), progress, self.workers or cores(), self.beam)
        except OSError as error:
            raise UserError(
                f"--out {self.out}: cannot write the data set ({reason(error)}); free space, and it goes on where it "
                "was, or choose another"
            ) from error
        print(summary(read_json(folder / MANIFEST, "build it again")))
        print(f"in {folder}; train on it with --data.source tfds:{folder}")
