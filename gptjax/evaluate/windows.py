"""Texts of any length as windows of a model's context, and windows as batches of one shape."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.data.rows import PADDING, Rows


class Window(NamedTuple):
    """Up to T tokens, int32 [n], and what follows each of them."""

    owner: int
    """Number of the text that it is from."""
    tokens: np.ndarray
    targets: np.ndarray
    """PADDING where another window counts the target."""


def windows(owner: int, ids: np.ndarray, before: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    """The windows of a text, in which every id is a target exactly once.

    The first begins with `before`, after which a text begins. Each further one counts `stride` targets more, after more
    than T - stride tokens, and the last is as full as any: at stride T these are the windows of lm-evaluation-harness.
    """
    every = np.concatenate([np.asarray(before, np.int32), np.asarray(ids, np.int32)])
    total, done = len(every) - 1, len(before) - 1  # targets, those that need not count among them
    end = min(length, total)
    while done < total:
        start = max(end - length, 0)
        targets = every[start + 1 : end + 1].copy()
        targets[: done - start] = PADDING
        yield Window(owner, every[start:end], targets)
        done, end = end, min(end + stride, total)


def packed(found: Iterable[Window], rows: int, length: int) -> Iterator[tuple[Rows, np.ndarray]]:
    """Batches [rows, T] with each window in the first row that has room, apart from the others there; and the owner of
    each target, int64 [rows, T]."""
    batch, filled = _empty(rows, length), [0] * rows
    counts = [0] * rows
    for window in found:
        size = len(window.tokens)
        row = next((row for row in range(rows) if filled[row] + size <= length), None)
        if row is None:
            yield batch
            batch, filled, counts, row = _empty(rows, length), [0] * rows, [0] * rows, 0
        values, owners = batch
        here = np.s_[row, filled[row] : filled[row] + size]
        values.tokens[here], values.targets[here], values.positions[here] = *window[1:], np.arange(size)
        values.segments[here], owners[here] = counts[row], window.owner
        values.segments[row, filled[row] + size :] = counts[row] + 1  # what is left is nobody's
        filled[row], counts[row] = filled[row] + size, counts[row] + 1
    if any(filled):
        yield batch


def _empty(rows: int, length: int) -> tuple[Rows, np.ndarray]:
    zeros = np.zeros((rows, length), np.int32)
    return Rows(zeros, np.full_like(zeros, PADDING), zeros.copy(), zeros.copy()), np.zeros((rows, length), np.int64)
