"""`gptjax tokenizer train CONFIG`."""

from pathlib import Path
from typing import Annotated

from gptjax.commands.arguments import Overrides, Positional
from gptjax.config.fields import Positive, frozen
from gptjax.config.load import load_config
from gptjax.terminal import Progress


@frozen
class Command:
    """Train a SentencePiece tokenizer on the training split of a config."""

    config: Annotated[str, Positional("CONFIG")]
    """A file of configs/; its data section names the text."""
    out: Path
    """The .model file to write."""
    vocab_size: Positive = 50257
    """Pieces, bytes and reserved tokens together."""
    overrides: Overrides = ()

    def run(self) -> None:
        """Train, write, and print how to use it."""
        from gptjax.data.texts import build
        from gptjax.data.tokenizers import train_sentencepiece

        data = load_config(self.config, [*self.overrides]).data
        with Progress() as progress:
            source = build(data, progress).split(data.train_split, data.split_by)
        train_sentencepiece((source[i].text for i in range(len(source))), self.vocab_size, self.out)
        print(f"{self.out}: use it with --data.tokenizer {self.out} --model.vocab_size {self.vocab_size}")
