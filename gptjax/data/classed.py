"""Labelled texts as rows for an encoder, one a row: [CLS] text [SEP], or [CLS] first [SEP] second [SEP]."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import LabelledConfig
from gptjax.data.examples import TOO_LONG, ExampleSet, Report, measure, select
from gptjax.data.labelled import Told, parse
from gptjax.data.packing import apart
from gptjax.data.sources import TextSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError

LEAST = 6  # ids of [CLS] one [SEP] [SEP] other [SEP]
SHOWN, LONGEST = 20, 40  # labels that a message names, and characters of each
OTHER_LABEL = "label that is none of labels.names"
NO_NUMBER = "label that is no number"


class LabelledRows(NamedTuple):
    """Texts of up to T tokens: arrays of numpy, of JAX, or of shapes."""

    tokens: Any
    """int32 ids [..., T], from the left; behind them 0."""
    segments: Any
    """int32 [..., T]: 0 for ids, 1 behind them."""
    types: Any
    """int32 [..., T]: 1 for the second text and its [SEP], else 0; of RoBERTa's form all are 0."""
    label: Any
    """int32 [...] the class, or float32 [...] the number; 0 where there is no text."""
    weight: Any
    """float32 [...]: 1; 0 where there is no text."""


@dataclass(frozen=True, eq=False)
class LabelledTexts(ExampleSet):
    """Texts with labels, of at most T ids; where they were longer, the longer text has lost its end."""

    tokenizer: Tokenizer
    names: tuple[str, ...]
    """The label of each class; empty for numbers."""
    cls: int
    sep: int
    double_sep: bool
    """Whether two separators stand between texts, and no types tell them apart."""

    def told(self, index: int) -> Told:
        """Texts and label as the record has them, whole."""
        return parse(self.source[int(self.numbers[index])].text)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and types of an example, int32 [at most T]."""
        return self._ids(self.told(index).texts)

    def _ids(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        every = [self.tokenizer.encode(text) for text in texts]
        room = self.seq_len - _around(len(every), self.double_sep)
        shares = _shares(len(every[0]), len(every[1]), room) if len(every) == 2 else (room,)
        first, *second = (np.append(ids[:most], self.sep) for ids, most in zip(every, shares, strict=True))
        between = [[self.sep]] * self.double_sep * len(second)
        ids = np.concatenate([[self.cls], first, *between, *second])
        types = np.arange(len(ids)) > (len(ids) if self.double_sep else len(first))
        return ids.astype(np.int32), types.astype(np.int32)

    def row(self, indices: Sequence[int]) -> LabelledRows:
        tokens, types = np.zeros((2, self.seq_len), np.int32)
        segments, weight = np.ones(self.seq_len, np.int32), np.float32(len(indices))
        label: Any = np.int32(0) if self.names else np.float32(0)
        for index in indices:  # one, or none
            told = self.told(index)
            ids, of_ids = self._ids(told.texts)
            tokens[: len(ids)], types[: len(ids)], segments[: len(ids)] = ids, of_ids, 0
            label = np.int32(self.names.index(told.label)) if self.names else np.float32(float(told.label))
        return LabelledRows(tokens, segments, types, label, weight)


def open_labelled(
    config: LabelledConfig,
    names: tuple[str, ...],
    source: TextSource,
    tokenizer: Tokenizer,
    cls: int,
    sep: int,
    double_sep: bool,
    seq_len: int,
    report: Report = lambda *_: None,
) -> LabelledTexts:
    """The labelled texts of a split. names: the label of each class, or empty for numbers; cls, sep: the ids around a
    text; double_sep: as in RoBERTa two between texts, and no types.

    Raises UserError where there are none, the context has no room for two texts, or a label is not what `names` say
    and such records are refused.
    """
    if seq_len < LEAST:
        raise UserError(f"model.seq_len = {seq_len}: no room for two texts and their separators; nearest {LEAST}")
    about = json.dumps(["labelled", names, double_sep])

    def sizes(text: str) -> tuple[int, int]:
        found = parse(text)
        size = sum(len(tokenizer.encode(each)) for each in found.texts)
        return size + _around(len(found.texts), double_sep), int(_known(found.label, names))

    size, known = measure(config.cache_dir, source, tokenizer, about, sizes, report).T
    there, long = size > 0, size > seq_len
    other = there & (known == 0)
    if config.invalid == "refuse" and other.any():
        raise _wrong(config, names, Counter(parse(source[int(i)].text).label for i in np.flatnonzero(other)))
    lost = {OTHER_LABEL if names else NO_NUMBER: other, TOO_LONG: long & (config.too_long == "drop")}
    numbers, left_out = select(config, source, "labelled text", there, lost)
    packing, num_cut = apart(np.minimum(size[numbers], seq_len)), int(long[numbers].sum())
    return LabelledTexts(source, seq_len, numbers, packing, left_out, num_cut, tokenizer, names, cls, sep, double_sep)


def _known(label: str, names: tuple[str, ...]) -> bool:
    if names:
        return label in names
    try:
        return abs(float(label)) <= float(np.finfo(np.float32).max)
    except ValueError:
        return False


def _wrong(config: LabelledConfig, names: tuple[str, ...], found: Counter[str]) -> UserError:
    """What is found instead, in one line."""
    each = ((label if len(label) <= LONGEST else f"{label[:LONGEST]}...", n) for label, n in found.most_common(SHOWN))
    shown = ", ".join(f"{json.dumps(label, ensure_ascii=False)} ({n:,})" for label, n in each)
    more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    setting = f"labels.names = {','.join(names)}" if names else "labels.names is empty, so labels are numbers"
    return UserError(
        f"{setting}: data.source = {config.source} has other labels: {shown}{more}; give every class in labels.names, "
        "or leave such records out with data.invalid drop"
    )


def _around(texts: int, double_sep: bool) -> int:
    """Ids beside those of so many texts."""
    return 1 + texts + (double_sep and texts == 2)


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Ids that are left of two texts where the longer loses one after another, of two as long the second, until both
    have room."""
    return min(first, max(room - second, (room + 1) // 2)), min(second, max(room - first, room // 2))
