"""A batch as named arrays, every one of them with the batch's axes first."""

from typing import Any, NamedTuple

import numpy as np

PADDING = -1  # neither an id nor a target
CUT = -2  # CUT - i is id i as an input, and no target


class Rows(NamedTuple):
    """What a decoder reads and is asked for: arrays [..., T] of numpy, of JAX, or of shapes."""

    tokens: Any
    """int32 ids."""
    targets: Any
    """int32 id after each token; PADDING where none counts."""
    segments: Any = None
    """int32 number of each token's document within its row, where documents are kept apart; else None."""
    positions: Any = None
    """int32 position of each token within its document, where each begins anew; else None."""
    types: Any = None
    """int32 part of its row that each token belongs to, where a model tells parts apart; else None."""


class PairRows(NamedTuple):
    """What an encoder of S places and a decoder of T read, and what the decoder is asked for: arrays of numpy, of JAX,
    or of shapes."""

    source: Any
    """int32 ids [..., S], from the left; behind them 0."""
    source_segments: Any
    """int32 [..., S]: 0 for ids, 1 behind them."""
    tokens: Any
    """int32 [..., T]: the id that starts a text, and the target without its last id; behind them 0."""
    targets: Any
    """int32 [..., T]: the ids of the target, the one that ends it the last; behind them PADDING."""
    segments: Any
    """int32 [..., T]: 0 for ids, which look at the source's, 1 behind them."""


def next_token(tokens: np.ndarray, eot: int | None = None) -> Rows:
    """Rows of T+1 tokens of a stream, int32 [..., T+1] with CUT and PADDING, as inputs and targets; `eot` keeps apart
    the documents that end in it, and belongs to the one that it ends."""
    inputs = np.maximum(np.maximum(tokens, CUT - tokens), 0)[..., :-1]
    segments = None
    if eot is not None:
        ends = inputs == eot
        segments = np.cumsum(ends, axis=-1, dtype=np.int32) - ends
    return Rows(inputs, np.maximum(tokens, PADDING)[..., 1:], segments)


def pair_row(source: np.ndarray, target: np.ndarray, start: int, source_len: int, target_len: int) -> PairRows:
    """One row of ids that fit; of none an empty one."""
    ids, source_segments = np.zeros(source_len, np.int32), np.ones(source_len, np.int32)
    tokens, segments = np.zeros(target_len, np.int32), np.ones(target_len, np.int32)
    targets = np.full(target_len, PADDING, np.int32)
    ids[: len(source)], source_segments[: len(source)] = source, 0
    if len(target):
        tokens[0], tokens[1 : len(target)] = start, target[:-1]
    targets[: len(target)], segments[: len(target)] = target, 0
    return PairRows(ids, source_segments, tokens, targets, segments)
