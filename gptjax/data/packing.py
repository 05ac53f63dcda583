"""Which examples share a row: best fit, longest first (Johnson 1973), and another draw of it in every epoch.

An epoch takes every example once. How many rows of which lengths there are follows from the lengths alone, so all
epochs have as many; which of the examples of a length takes which place, and the order of the rows, is drawn anew.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Packing:
    """Places for examples in rows. Make one with `pack`, or with `apart` for one example a row."""

    lengths: np.ndarray
    """int [examples]: tokens that each takes of a row."""
    row_of: np.ndarray
    """int [examples]: the row of each place; places go from the longest to the shortest."""
    num_rows: int

    def epoch(self, seed: int, number: int) -> "Epoch":
        """The draw of an epoch."""
        first = _draw(seed, 2 * number, len(self.lengths))
        examples = first[np.argsort(-self.lengths[first], kind="stable")]
        by_row = np.argsort(self.row_of, kind="stable")
        starts = np.searchsorted(self.row_of[by_row], np.arange(self.num_rows + 1))
        return Epoch(examples[by_row], starts, _draw(seed, 2 * number + 1, self.num_rows))

    def efficiency(self, seq_len: int) -> float:
        """Share of the rows' tokens that belong to an example."""
        return float(self.lengths.sum()) / max(self.num_rows * seq_len, 1)


@dataclass(frozen=True, eq=False)
class Epoch:
    """The rows of one epoch."""

    examples: np.ndarray
    """int [examples], row after row."""
    starts: np.ndarray
    """int [rows + 1]: where each row begins in it."""
    order: np.ndarray
    """int [rows]: which row comes when."""

    def row(self, place: int) -> list[int]:
        """The examples of the row at a place of the epoch."""
        number = self.order[place]
        found: list[int] = self.examples[self.starts[number] : self.starts[number + 1]].tolist()
        return found


def pack(lengths: np.ndarray, capacity: int) -> Packing:
    """Best fit: each example goes where it leaves the least room, from the longest to the shortest.

    Raises ValueError for an example that is empty or does not fit in a row.
    """
    longest_first = np.sort(lengths)[::-1].tolist()
    if len(longest_first) and not 0 < longest_first[-1] <= longest_first[0] <= capacity:
        raise ValueError(f"examples of {longest_first[-1]} to {longest_first[0]} tokens for rows of {capacity}")
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left in them
    rooms: list[int] = []  # those that some row has, ascending
    row_of, count = np.empty(len(longest_first), np.int64), 0
    for place, length in enumerate(longest_first):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room, count = count, capacity, count + 1
        else:
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[at]
        row_of[place], room = row, room - length
        if room:
            if not rows_with[room]:
                insort(rooms, room)
            rows_with[room].append(row)
    return Packing(lengths, row_of, count)


def apart(lengths: np.ndarray) -> Packing:
    """Each example in a row of its own."""
    return Packing(lengths, np.arange(len(lengths)), len(lengths))


def _draw(seed: int, number: int, count: int) -> np.ndarray:
    """A permutation, the same with any version of NumPy: of a bit generator, not of what is made of its bits."""
    return np.argsort(np.random.Philox(key=[seed, number]).random_raw(count), kind="stable")
