"""Pairs as rows for an encoder and a decoder, one a row: what is read, and what is to be written for it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.config import PairConfig
from gptjax.data.examples import ExampleSet, Report, measure, select
from gptjax.data.packing import apart
from gptjax.data.pairs import parse
from gptjax.data.rows import PairRows, pair_row
from gptjax.data.sources import TextSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError

TOO_LONG = "longer than its side of the model"


@dataclass(frozen=True, eq=False)
class Pairs(ExampleSet):
    """Pairs of which each text has at most S = `source_len` and T = `target_len` ids; those that were longer have lost
    their end, but for the id that ends a text."""

    tokenizer: Tokenizer
    prefix: str
    start: int
    end: int
    lead: tuple[int, ...]
    source_len: int
    target_len: int

    def pair(self, index: int) -> tuple[str, str]:
        """Source, with the prefix before it, and target as the record has them, whole."""
        source, target = parse(self.source[int(self.numbers[index])].text)
        return self.prefix + source, target

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """What the encoder reads, int32 [at most S], and what the decoder is to write, int32 [at most T]."""
        source, target = map(self.tokenizer.encode, self.pair(index))
        return self._framed(source, self.source_len), self._framed(target, self.target_len)

    def _framed(self, ids: np.ndarray, room: int) -> np.ndarray:
        return framed(ids[: room - len(self.lead) - 1], self.lead, self.end)

    def row(self, indices: Sequence[int]) -> PairRows:
        read, written = self[indices[0]] if len(indices) else (np.zeros(0, np.int32),) * 2
        return pair_row(read, written, self.start, self.source_len, self.target_len)


def open_pairs(
    config: PairConfig,
    source: TextSource,
    tokenizer: Tokenizer,
    start: int,
    end: int,
    lead: tuple[int, ...],
    source_len: int,
    target_len: int,
    report: Report = lambda *_: None,
) -> Pairs:
    """The pairs of a split. start: the id with which a decoder begins; end: the one after every text; lead: those
    before every text. Raises UserError where there are no pairs, or a side has no room for a text."""
    for name, length, least in (("encoder", source_len, len(lead) + 2), ("model", target_len, len(lead) + 2)):
        if length < least:
            raise UserError(f"{name}.seq_len = {length}: no room for a text and what stands around it; nearest {least}")
    about = json.dumps(["pairs", config.prefix])
    sizes = measure(
        config.cache_dir, source, tokenizer, about, lambda text: _sizes(text, tokenizer, config.prefix), report
    )
    there, size, most = sizes[:, 0] > 0, sizes + len(lead), np.array([source_len, target_len])
    long = there & (size > most).any(1)
    numbers, left_out = select(config, source, "pair", there, {TOO_LONG: long & (config.too_long == "drop")})
    packing, num_cut = apart(np.minimum(size[numbers], most).sum(1)), int(long[numbers].sum())
    common = source, source_len + target_len, numbers, packing, left_out, num_cut
    return Pairs(*common, tokenizer, config.prefix, start, end, lead, source_len, target_len)


def framed(ids: np.ndarray, lead: Sequence[int], end: int) -> np.ndarray:
    """A text's ids with those that stand around it, int32."""
    return np.concatenate([[*lead], ids, [end]]).astype(np.int32)


def _sizes(text: str, tokenizer: Tokenizer, prefix: str) -> tuple[int, int]:
    """The ids of source and target, each with the one that ends it."""
    source, target = parse(text)
    return len(tokenizer.encode(prefix + source)) + 1, len(tokenizer.encode(target)) + 1
