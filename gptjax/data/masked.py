"""Windows with words hidden, for an encoder: two texts and whether the second follows the first (BERT, arXiv
1810.04805), or as many as a row takes (RoBERTa, arXiv 1907.11692)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import MaskingConfig, WindowConfig
from gptjax.data.examples import Report
from gptjax.data.masking import hidden, masked
from gptjax.data.packing import apart, pack
from gptjax.data.rows import PADDING
from gptjax.data.sources import TextSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.marks import Marks, marks, word_starts
from gptjax.data.windows import Windows, cut_windows

FOLLOWS, FOREIGN = 0, 1  # as `transformers` counts them


class MaskedRows(NamedTuple):
    """Texts with hidden words: arrays of numpy, of JAX, or of shapes."""

    tokens: Any
    """int32 ids [..., T]."""
    segments: Any
    """int32 [..., T]: 0 for a text's tokens, which see each other, 1 for padding."""
    types: Any
    """int32 [..., T]: 0 for the first text, 1 for the second."""
    places: Any
    """int32 [..., M] of the hidden tokens, behind them 0."""
    targets: Any
    """int32 [..., M]: the ids that stood there; PADDING where none did."""
    foreign: Any
    """int32 [...]: FOLLOWS or FOREIGN, whether the second text comes from elsewhere; PADDING where that is not asked.
    """


def num_hidden(config: MaskingConfig, seq_len: int) -> int:
    """M: tokens that are hidden in a row at most."""
    return max(1, round(config.rate * seq_len))


@dataclass(frozen=True, eq=False)
class MaskedWindows(Windows):
    """Windows of which an encoder is asked for hidden words."""

    masking: MaskingConfig

    @cached_property
    def _marks(self) -> Marks:
        return marks(self.tokenizer)

    @cached_property
    def _begins_word(self) -> Callable[[np.ndarray], np.ndarray]:
        return word_starts(self.tokenizer)

    @cached_property
    def _plain(self) -> np.ndarray:
        """int32: the ids that a hidden one may be replaced by."""
        possible = self.tokenizer.possible.copy()
        possible[[*self.tokenizer.special.values()]] = False
        return np.flatnonzero(possible).astype(np.int32)

    def made(self, indices: Sequence[int], rng: np.random.Generator) -> MaskedRows:
        about, texts, foreign = self._marks, [self.window(index) for index in indices], PADDING
        if self.masking.next_sentence and texts:
            texts, foreign = self._pair(int(indices[0]), texts[0], rng)
        ids = np.concatenate([[about.cls], *(part for text in texts for part in (text, [about.sep]))]).astype(np.int32)
        ids = ids[: len(ids) * bool(texts)]
        chosen, room = self._hidden(ids, rng), num_hidden(self.masking, self.seq_len)
        inputs, asked = masked(ids, chosen, about.mask, self._plain, rng)
        tokens = np.full(self.seq_len, about.pad, np.int32)
        segments, types = np.ones(self.seq_len, np.int32), np.zeros(self.seq_len, np.int32)
        places, targets = np.zeros(room, np.int32), np.full(room, PADDING, np.int32)
        tokens[: len(ids)], segments[: len(ids)] = inputs, 0
        if self.masking.next_sentence and texts:
            types[len(texts[0]) + 2 : len(ids)] = 1
        here = np.flatnonzero(chosen)
        places[: len(here)], targets[: len(here)] = here, asked[here]
        return MaskedRows(tokens, segments, types, places, targets, np.int32(foreign))

    def _hidden(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """bool [N]: no special token, and no more than there is room for."""
        about = self._marks
        choosable = ~np.isin(ids, (about.cls, about.sep))
        chosen = hidden(choosable, self._begins_word(ids), self.masking.unit, self.masking.rate, rng)
        chosen[np.flatnonzero(chosen)[num_hidden(self.masking, self.seq_len) :]] = False
        return chosen

    def _pair(self, index: int, text: np.ndarray, rng: np.random.Generator) -> tuple[list[np.ndarray], int]:
        """A text cut in two, at the end of a sentence where it has one; and, in half of the cases, the beginning of a
        text from elsewhere as its second part."""
        inside = np.flatnonzero(self.ends_sentence(text)[:-1]) + 1
        at = int(rng.choice(inside)) if len(inside) else int(rng.integers(1, len(text)))
        if rng.random() < 0.5:
            return [text[:at], text[at:]], FOLLOWS
        other = self._from_sentence(self.window(self._other(index, rng)))
        return [text[:at], other[: len(text) - at]], FOREIGN  # as long as what followed: its length tells nothing

    def _other(self, index: int, rng: np.random.Generator) -> int:
        """A window of another record, each as likely; of a split that is one record another window."""
        record = self.numbers[index]
        first, end = map(int, np.searchsorted(self.numbers, [record, record + 1]))
        if end - first == len(self.numbers):
            first, end = index, index + 1
        drawn = int(rng.integers(len(self.numbers) - (end - first)))
        return drawn if drawn < first else drawn + end - first

    def _from_sentence(self, text: np.ndarray) -> np.ndarray:
        """A text from the beginning of a sentence on, where it has one, as that of a text that follows does."""
        inside = np.flatnonzero(self.ends_sentence(text)[:-1]) + 1
        return text[inside[0] :] if len(inside) else text


def open_masked(
    config: WindowConfig,
    masking: MaskingConfig,
    source: TextSource,
    tokenizer: Tokenizer,
    seq_len: int,
    report: Report = lambda *_: None,
) -> MaskedWindows:
    """The windows of a split. Raises UserError where it has too little text."""
    least, room, arrange = 2, seq_len - 3, apart  # [CLS] A [SEP] B [SEP]
    if not masking.next_sentence:  # [CLS], and behind each text [SEP]
        least, room = 1, seq_len - 2
        arrange = lambda lengths: pack(lengths + 1, seq_len - 1)  # noqa: E731
    fields = cut_windows(config, source, tokenizer, seq_len, least, room, arrange, report)
    return MaskedWindows(**fields, masking=masking)
