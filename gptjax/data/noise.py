"""What becomes of a text that an encoder-decoder is to restore: spans that give way to sentinels (T5, arXiv
1910.10683), a mixture of such denoisers (UL2, arXiv 2205.05131), one mask for each span and sentences in another order
(BART, arXiv 1910.13461)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import numpy as np

from gptjax.config import NoiseConfig

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Marks:
    """Ids that mean something to a denoiser."""

    eos: int
    """Ends inputs and targets."""
    sentinels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """int32 [S], the first of them used first; of spans and ul2."""
    modes: tuple[int, int, int] | None = None
    """[R], [S] and [X], of which one begins an input of ul2."""
    mask: int | None = None
    """Stands for a span of infill."""


class Noise(Protocol):
    """A way to damage texts."""

    def __call__(self, ids: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> Pair:
        """Inputs and targets, int32, both with `eos` and the targets without a decoder's start, of the ids of a text,
        int32 [N], whose sentences end where `ends`, bool [N], is True. Raises ValueError for less than two tokens."""

    def fits(self, length: int, input_length: int, target_length: int) -> bool:
        """Whether whatever is made of a text of this many tokens does."""


def denoiser(config: NoiseConfig, marks: Marks) -> Noise:
    """What a config asks for. Raises ValueError for marks that its kind has and that are None."""
    if config.kind == "infill":
        if marks.mask is None:
            raise ValueError("infill: no mask")
        return Infill(config.rate, config.mean_span, marks.mask, marks.eos)
    short = Spans(config.rate, config.mean_span, marks)
    return short if config.kind == "spans" else ul2(short)


def room(noise: Noise, input_length: int, target_length: int) -> int:
    """The largest number of tokens, of which a text always fits both lengths, as do all shorter ones; below 2 where
    none does."""
    return next(length for length in count(2) if not noise.fits(length, input_length, target_length)) - 1


# Sentinels


@dataclass(frozen=True)
class Spans:
    """As many tokens as the rate says, in as many spans as their mean length makes of them; how both these and the
    others are divided is drawn, and a text begins with one that stays and ends with one that does not."""

    rate: float
    mean_span: float
    marks: Marks

    def __call__(self, ids: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> Pair:
        noised, spans = self._counts(_long_enough(ids))
        lengths = _segments(len(ids) - noised, spans, rng), _segments(noised, spans, rng)
        return corrupted(ids, np.repeat(np.tile([False, True], spans), np.stack(lengths, 1).ravel()), self.marks)

    def fits(self, length: int, input_length: int, target_length: int) -> bool:
        noised, spans = self._counts(length)
        sides = length - noised + spans < input_length and noised + spans < target_length
        return sides and spans <= len(self.marks.sentinels)

    def _counts(self, length: int) -> tuple[int, int]:
        """How many tokens give way, in how many spans."""
        noised = min(max(round(length * self.rate), 1), length - 1)
        return noised, min(max(round(noised / self.mean_span), 1), noised, length - noised)


@dataclass(frozen=True)
class Suffix:
    """The end of a text, a quarter in the mean: 1 to N // 2 - 1 tokens, all as likely."""

    marks: Marks

    def __call__(self, ids: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> Pair:
        length = _long_enough(ids)
        return corrupted(ids, np.arange(length) >= length - rng.integers(1, self._most(length) + 1), self.marks)

    def fits(self, length: int, input_length: int, target_length: int) -> bool:
        return length < input_length and self._most(length) + 1 < target_length and len(self.marks.sentinels) > 0

    def _most(self, length: int) -> int:
        return max(length // 2 - 1, 1)


@dataclass(frozen=True)
class Mixture:
    """One of several denoisers for each text, all as likely, whose mode the input begins with."""

    denoisers: Sequence[tuple[int, Noise]]
    """The id of its mode, and each."""

    def __call__(self, ids: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> Pair:
        mode, drawn = self.denoisers[int(rng.integers(len(self.denoisers)))]
        inputs, targets = drawn(ids, ends, rng)
        return np.append(np.int32(mode), inputs), targets

    def fits(self, length: int, input_length: int, target_length: int) -> bool:
        return all(each.fits(length, input_length - 1, target_length) for _, each in self.denoisers)


def ul2(short: Spans) -> Mixture:
    """The seven denoisers of table 1, of which `short` is the first. Raises ValueError for marks without modes."""
    marks = short.marks
    if marks.modes is None:
        raise ValueError("ul2: no modes")
    regular, sequential, extreme = marks.modes
    return Mixture(
        [
            (regular, short),
            (regular, Spans(0.15, 8, marks)),
            (sequential, Suffix(marks)),
            (extreme, Spans(0.5, 3, marks)),
            (extreme, Spans(0.5, 8, marks)),
            (extreme, Spans(0.15, 64, marks)),
            (extreme, Spans(0.5, 64, marks)),
        ]
    )


def corrupted(ids: np.ndarray, noised: np.ndarray, marks: Marks) -> Pair:
    """Inputs with a sentinel for each span of `noised`, bool [N], and targets with each span behind its sentinel, and
    one more where the text goes on behind the last. Raises ValueError where that takes more sentinels than there are.
    """
    begins = noised & ~np.append(False, noised[:-1])
    spans = np.count_nonzero(begins)
    used = marks.sentinels[: spans + (not noised[-1])]
    if len(used) < spans + (not noised[-1]):
        raise ValueError(f"{len(used)} sentinels for {spans} spans; fewer or longer spans take fewer")
    inputs = ids.copy()
    inputs[begins] = used[:spans]
    targets = np.insert(ids[noised], np.flatnonzero(begins[noised]), used[:spans])
    return _ended(inputs[~noised | begins], marks.eos), _ended(np.append(targets, used[spans:]), marks.eos)


# One mask


@dataclass(frozen=True)
class Infill:
    """Sentences in another order, and then as many tokens as the rate says, in spans of Poisson lengths, each of which
    becomes one mask; one of no tokens inserts one, unless the input were then longer than the text."""

    rate: float
    mean_span: float
    mask: int
    eos: int

    def __call__(self, ids: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> Pair:
        noised = max(round(_long_enough(ids) * self.rate), 1)
        spans = self._spans(noised, rng)
        masks = np.zeros(len(ids) - noised + len(spans), bool)
        masks[rng.choice(len(masks), len(spans), replace=False)] = True
        widths = np.ones(len(masks), int)
        widths[masks] = spans
        places = np.minimum(np.cumsum(widths) - widths, len(ids) - 1)  # a mask may be inserted behind the last token
        inputs = np.where(masks, self.mask, _shuffled(ids, ends, rng)[places])
        return _ended(inputs, self.eos), _ended(ids, self.eos)

    def fits(self, length: int, input_length: int, target_length: int) -> bool:
        return length < min(input_length, target_length)

    def _spans(self, noised: int, rng: np.random.Generator) -> np.ndarray:
        """Lengths whose sum is `noised`, int [spans]."""
        lengths = rng.poisson(self.mean_span, noised)
        while lengths.sum() < noised:
            lengths = np.append(lengths, rng.poisson(self.mean_span, noised))
        total = np.cumsum(lengths)
        last = np.searchsorted(total, noised)
        lengths = lengths[: last + 1]
        lengths[-1] -= total[last] - noised
        empty = np.flatnonzero(lengths == 0)
        return np.delete(lengths, empty[noised - np.count_nonzero(lengths) :])


def _shuffled(ids: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sentences in another order."""
    sentence = np.cumsum(ends) - ends
    return ids[np.argsort(rng.permutation(sentence[-1] + 1)[sentence], kind="stable")]


def _segments(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of at least one whose sum is `total`, int [parts], all divisions as likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def _long_enough(ids: np.ndarray) -> int:
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens, of which none can be restored from the others; the least is 2")
    return len(ids)


def _ended(ids: np.ndarray, eos: int) -> np.ndarray:
    return np.append(ids, eos).astype(np.int32)
