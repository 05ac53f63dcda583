"""`gptjax data CONFIG`."""

from typing import Annotated

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config.fields import frozen
from gptjax.config.load import load_config


@frozen
class Command:
    """Build the data set of a config, and show what it holds."""

    config: Annotated[str, Positional("CONFIG")]
    """A file of configs/."""
    overrides: Overrides = ()

    def run(self) -> None:
        """Print records, digest and the first text of each split, after building what is not built yet."""
        from gptjax.data.sources import build, left_out

        data = load_config(self.config, [*self.overrides]).data
        corpus = build(data)
        if note := left_out(data):
            print(f"{data.source}: {note.removesuffix(', ')}")
        for name in (data.train_split, data.eval_split):
            split = corpus.split(name)
            print(f"{corpus.name} {name}: {len(split):,} records; the first begins {split[0].text[:60]!r}")
        print(f"digest {corpus.digest}, in {corpus.folder}")
