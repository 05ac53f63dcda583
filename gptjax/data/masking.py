"""Which tokens of a text are hidden from an encoder, and what stands in their place (BERT, arXiv 1810.04805)."""

from typing import Literal

import numpy as np

from gptjax.data.rows import PADDING

Unit = Literal["tokens", "words", "spans"]

SPAN_LENGTHS = np.arange(1, 11)  # words, geometric with p = 0.2 (SpanBERT, arXiv 1907.10529, section 3.1)
SPAN_SHARES = 0.8**SPAN_LENGTHS / np.sum(0.8**SPAN_LENGTHS)


def hidden(choosable: np.ndarray, starts: np.ndarray, unit: Unit, rate: float, rng: np.random.Generator) -> np.ndarray:
    """The places whose tokens are asked for, bool [N], of which there are round(rate * choosable) and at least one.

    choosable: bool [N], False at special tokens and padding, which no word and no span goes across. starts: bool [N],
    True where a token begins a word. Words stay whole, so they may make a few tokens fewer, or one word where each has
    more tokens than may be hidden.
    """
    chosen = np.zeros(len(choosable), bool)
    places = np.flatnonzero(choosable)
    if not len(places):
        return chosen
    budget = max(round(rate * len(places)), 1)
    if unit == "tokens":
        chosen[rng.choice(places, budget, replace=False)] = True
        return chosen
    apart = np.diff(places, prepend=-2) > 1
    words = np.flatnonzero(starts[places] | apart)
    order = rng.permutation(len(words))
    lengths = np.ones(len(words), int) if unit == "words" else rng.choice(SPAN_LENGTHS, len(words), p=SPAN_SHARES)
    taken = _taken(np.append(words, len(places)).tolist(), apart[words].tolist(), order, lengths, budget)
    chosen[places] = taken[np.cumsum(starts[places] | apart) - 1]
    return chosen


def masked(
    ids: np.ndarray, chosen: np.ndarray, mask: int, drawn_from: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int32 [N], of a text's ids, int32 [N]: of the chosen places 80% hold `mask`, 10% an id of
    `drawn_from`, int32 [M], and 10% their own; the targets are their ids, PADDING elsewhere."""
    inputs = ids.astype(np.int32)
    places = np.flatnonzero(chosen)
    lot = rng.random(len(places))
    inputs[places[lot < 0.8]] = mask
    other = places[(lot >= 0.8) & (lot < 0.9)]
    inputs[other] = rng.choice(drawn_from, len(other))
    return inputs, np.where(chosen, ids, PADDING).astype(np.int32)


def _taken(bounds: list[int], apart: list[bool], order: np.ndarray, lengths: np.ndarray, budget: int) -> np.ndarray:
    """Of words that lie between bounds, in tokens, those to be hidden, bool [words]: from each of the order on, as many
    as its length, fewer where the next one is apart from it, is taken, or has more tokens than are left."""
    taken = [False] * len(apart)
    for first, length in zip(order.tolist(), lengths.tolist(), strict=True):
        for word in range(first, min(first + length, len(apart))):
            size = bounds[word + 1] - bounds[word]
            if taken[word] or size > budget or (word > first and apart[word]):
                break
            taken[word] = True
            budget -= size
        if not budget:
            break
    if not any(taken):
        taken[order[0]] = True
    return np.array(taken)
