"""`gptjax data stats DIR`."""

from typing import Annotated

from gptjax.commands.arguments import Positional
from gptjax.config.fields import frozen


@frozen
class Command:
    """Show what a data set holds and what its build dropped: a table, a picture and one HTML page beside it."""

    folder: Annotated[str, Positional("DIR")]
    """As gptjax data build printed it."""
    tokenizer: str = "bytes"
    """Whose tokens are counted, as data.tokenizer names it."""
    out: str = ""
    """Where picture and page go; empty is DIR."""

    def run(self) -> None:
        """Print the table and the names of the files."""
        from pathlib import Path

        from gptjax.corpus import look, stats
        from gptjax.data.tokenizers import load_tokenizer
        from gptjax.terminal import Progress

        folder = Path(self.folder)
        manifest, tokenizer = stats.manifest_of(folder), load_tokenizer(self.tokenizer)
        with Progress() as progress:
            found = stats.measure(folder, tokenizer, progress)
        print(f"{look.summary(manifest)}\n\n{look.table(found)}")
        for path in look.write(Path(self.out) if self.out else folder, manifest, found):
            print(path)
