"""Stretches of records as examples, for what reads a text from both sides.

Which windows there are follows from the records' lengths; which of them share a row, and when it comes, from the epoch
(see `packing`); what is made of a row, such as which of its words are hidden, from its number in all epochs, so that no
epoch does the same.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gptjax.config import WindowConfig
from gptjax.data.examples import ExampleSet, Report, measure
from gptjax.data.packing import Packing
from gptjax.data.sources import TextSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.marks import sentence_ends
from gptjax.errors import UserError

EVALUATED = 2**62  # rows of an evaluation: no epoch of training gets as far
HELD = 64  # records whose ids are remembered


@dataclass(frozen=True, eq=False)
class Windows(ExampleSet):
    """Windows of the records of a split, of which `numbers` are the records."""

    tokenizer: Tokenizer
    starts: np.ndarray
    """int [windows]: where each begins among its record's tokens."""
    sizes: np.ndarray
    """int [windows]: tokens of each."""
    seed: int

    @cached_property
    def ends_sentence(self) -> Callable[[np.ndarray], np.ndarray]:
        return sentence_ends(self.tokenizer)

    @cached_property
    def _ids_of(self) -> Callable[[int], np.ndarray]:
        """A record's ids, of the last few: the windows of one that is long come at different times."""
        return lru_cache(maxsize=HELD)(lambda number: self.tokenizer.encode(self.source[number].text))

    def window(self, index: int) -> np.ndarray:
        """int32 ids."""
        start = int(self.starts[index])
        return self._ids_of(int(self.numbers[index]))[start : start + int(self.sizes[index])]

    def row(self, indices: Sequence[int]) -> Any:
        return self.training_row(indices, EVALUATED + (int(indices[0]) if len(indices) else 0))

    def training_row(self, indices: Sequence[int], number: int) -> Any:
        return self.made(indices, np.random.default_rng((self.seed, number)))

    def made(self, indices: Sequence[int], rng: np.random.Generator) -> Any:
        """A row of these windows, none of which gives an empty one."""
        raise NotImplementedError


def cut_windows(
    config: WindowConfig,
    source: TextSource,
    tokenizer: Tokenizer,
    seq_len: int,
    least: int,
    room: int,
    arrange: Callable[[np.ndarray], Packing],
    report: Report,
) -> dict[str, Any]:
    """The fields of `Windows`: records cut at every `room` tokens, of which a rest below `least` is left out;
    `arrange` says which of them, of so many tokens, share a row. Raises UserError where there are fewer than two."""
    if room < least:
        raise UserError(f"model.seq_len = {seq_len}: no room for a text between special tokens; nearest {seq_len + 8}")

    def measured(text: str) -> tuple[int, int]:
        return len(tokenizer.encode(text)), 0

    counted = measure(config.cache_dir, source, tokenizer, "ids", measured, report, lambda text: "")[:, 0]
    counts = -(-counted // room)
    numbers = np.repeat(np.arange(len(counts)), counts)
    starts = room * (np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts))
    sizes = np.minimum(counted[numbers] - starts, room)
    kept = sizes >= least
    numbers, starts, sizes = numbers[kept], starts[kept], sizes[kept]
    if len(numbers) < 2:
        raise UserError(f"data.source = {config.source}: a split has only {counted.sum():,} tokens; give more text")
    return {
        "source": source,
        "seq_len": seq_len,
        "numbers": numbers,
        "packing": arrange(sizes),
        "left_out": Counter[str](),
        "num_cut": 0,
        "tokenizer": tokenizer,
        "starts": starts,
        "sizes": sizes,
        "seed": config.seed,
    }
