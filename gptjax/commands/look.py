"""`gptjax look PATH --text TEXT`."""

from pathlib import Path
from typing import Annotated

from gptjax.commands.arguments import Positional
from gptjax.config.fields import Count, frozen
from gptjax.errors import UserError


@frozen
class Command:
    """Write a page that shows how likely a model finds each token of a text, and where its heads attend."""

    folder: Annotated[str, Positional("PATH")]
    """A run folder or a Hugging Face directory."""
    text: str = ""
    """What to look at."""
    layer: Count = 0
    """Layer whose attention is shown first, from 0; the page has them all."""
    head: Count = 0
    """Its head."""
    out: str = "look.html"
    """The page: one file that needs nothing else."""

    def run(self) -> None:
        """Write the page, and print its name."""
        if not self.text:
            raise UserError("gptjax look: --text is missing: what to look at")
        from gptjax import api
        from gptjax.files import write_whole
        from gptjax.infer.look import page

        model = api.load(self.folder)
        model.require_head(self.layer, self.head)
        made = page(model.look(self.text), model.tokenizer, self.folder, self.layer, self.head)
        try:
            write_whole(Path(self.out), made.encode(errors="replace"))
        except OSError as error:
            raise UserError(f"--out {self.out}: {error.strerror}; name a file that can be written") from None
        print(self.out)
