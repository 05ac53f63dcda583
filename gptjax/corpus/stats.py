"""Figures of a data set that was built: how long its documents are, and how many tokens of which origin."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptjax.config.corpus import MANIFEST
from gptjax.data.pool import Report
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.files import read_json

SAMPLE = 2000  # documents of each origin whose tokens are counted


@dataclass
class Origin:
    """Of one origin."""

    documents: int = 0
    num_bytes: int = 0
    lengths: list[int] = field(default_factory=list)
    """Bytes of each document."""
    sampled_bytes: int = 0
    sampled_tokens: int = 0

    @property
    def bytes_per_token(self) -> float | None:
        """None where no token was counted."""
        return self.sampled_bytes / self.sampled_tokens if self.sampled_tokens else None

    @property
    def tokens(self) -> float | None:
        """Of all its documents, if the others are like those that were counted."""
        each = self.bytes_per_token
        return self.num_bytes / each if each else None


def manifest_of(folder: Path) -> dict[str, Any]:
    """Raises UserError for what is no data set of `gptjax data build`."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: has no {MANIFEST}; give the folder that gptjax data build printed")
    found: dict[str, Any] = read_json(folder / MANIFEST, "build it again")
    return found


def measure(folder: Path, tokenizer: Tokenizer | None = None, report: Report = lambda *_: None) -> dict[str, Origin]:
    """By origin, in the recipe's order. With a tokenizer also tokens, of SAMPLE documents of each."""
    import tensorflow_datasets as tfds

    rows = tfds.builder_from_directory(folder).as_data_source("train")
    found = {name: Origin() for name in manifest_of(folder)["origins"]}
    for number, row in enumerate(rows):
        text, origin = row["text"], found[row["origin"].decode()]
        origin.documents += 1
        origin.num_bytes += len(text)
        origin.lengths.append(len(text))
        if tokenizer and origin.documents <= SAMPLE:
            origin.sampled_bytes += len(text)
            origin.sampled_tokens += len(tokenizer.encode(text.decode()))
        if number % 1000 == 0:
            report("reading", number, len(rows))
    return found
