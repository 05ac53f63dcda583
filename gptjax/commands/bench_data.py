"""`gptjax bench data`."""

from pathlib import Path
from typing import Annotated

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config.fields import Positive, frozen
from gptjax.config.load import load_config


@frozen
class Command:
    """Measure how fast a config's text is built and streamed, beside its tokenizer alone."""

    config: Annotated[str, Positional("CONFIG")]
    """A file of configs/; its data section names the text."""
    tokenizers: tuple[str, ...] = ()
    """Tokenizers to measure, with commas between, as in data.tokenizer; left out, the config's."""
    rounds: Positive = 5
    """Turns that stream and tokenizer take."""
    out: Path = Path("bench")
    """Folder for the results."""
    overrides: Overrides = ()

    def run(self) -> None:
        """Measure, write, and print the tables."""
        from gptjax.bench.data import run

        config = load_config(self.config, [*self.overrides])
        print(run(config, [*self.tokenizers] or [config.data.tokenizer], self.rounds, self.out))
