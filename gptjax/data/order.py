"""Which record comes next, as a function of its number alone: nothing is kept, and the 10^12th is as near as the
first."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

BLOCK = 64
"""Records of a mixture within which sources have no order: else every so-manieth record, and so a lane of several,
would be of one source."""
UNITS = 1 << 32  # that all weights are in together: a share is off by 1e-10
HELD = 16  # blocks that are remembered: lanes that go side by side ask for the same

Order = Callable[[int], int]
"""From a number of 0 on, without end, to a record."""


def shuffled(size: int, seed: int | None) -> Order:
    """Permutations of `size` records, each epoch another; seed None keeps them in order."""
    if seed is None:
        return lambda number: number % size
    import grain

    every = grain.MapDataset.range(size).seed(seed).shuffle().repeat()  # an index permutation: no memory
    return lambda number: int(every[number])


def derived(seed: int, *about: str) -> int:
    """A seed of 32 bits for what `about` says: Grain's second epoch of a seed is the first one of the next seed, so
    that neighbours will not do."""
    return int.from_bytes(hashlib.sha256("\0".join([str(seed), *about]).encode()).digest()[:4], "big")


@dataclass(frozen=True)
class Period:
    """From record number `start` on, records of each source are drawn by these weights."""

    start: int
    units: tuple[int, ...]
    """Weights of the sources, whole numbers."""


def units(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole numbers; none but 0 becomes 0."""
    total = sum(weights)
    return tuple(max(round(weight / total * UNITS), 1) if weight else 0 for weight in weights)


def counts(number: int, weights: Sequence[int]) -> list[int]:
    """How many of the first `number` records are of each source: its share rounded down, then so the next one's of what
    is left. It never falls from one number to the next, and is never off by more than one for each source before."""
    found, left, total = [], number, sum(weights)
    for weight in weights:
        found.append(left * weight // total if total else 0)
        left, total = left - found[-1], total - weight
    return found


class Interleaved:
    """Records of several sources that lie end to end, drawn by weights: without replacement in each, until its epoch
    ends, and in a permutation of its own."""

    def __init__(self, sizes: Sequence[int], seeds: Sequence[int], periods: Sequence[Period], seed: int):
        """sizes: records of each source; periods: in order, from 0 on. Raises ValueError where they are not."""
        starts = [period.start for period in periods]
        if starts[:1] != [0] or starts != sorted({*starts}):
            raise ValueError(f"periods from {starts}: take 0 first, then each above the last")
        self._sizes, self._periods, self._seed = list(sizes), list(periods), seed
        self._offsets = [0, *accumulate(sizes)]
        self._orders = [shuffled(size, own) for size, own in zip(sizes, seeds, strict=True)]
        self._block = lru_cache(HELD)(self._made)

    def __call__(self, number: int) -> int:
        sources, ranks = self._block(number // BLOCK)
        source = int(sources[number % BLOCK])
        return self._offsets[source] + self._orders[source](int(ranks[number % BLOCK]))

    def drawn(self, number: int) -> list[int]:
        """How many of the first `number` records are of each source; within a block, before it is mixed."""
        total = [0] * len(self._sizes)
        for period, following in zip(self._periods, [*self._periods[1:], None], strict=True):
            end = number if following is None else min(number, following.start)
            if end <= period.start:
                break
            total = [a + b for a, b in zip(total, counts(end - period.start, period.units), strict=True)]
        return total

    def _made(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each record of a block, and its number among all those of that source."""
        before, after = self.drawn(block * BLOCK), self.drawn((block + 1) * BLOCK)
        each = [end - start for start, end in zip(before, after, strict=True)]
        sources = np.repeat(np.arange(len(each)), each)[np.argsort(_mixed(self._seed, block), kind="stable")]
        ranks = np.empty(BLOCK, np.int64)
        for source, first in enumerate(before):
            there = np.flatnonzero(sources == source)
            ranks[there] = first + np.arange(len(there))
        return sources, ranks


def mix(x: np.ndarray) -> np.ndarray:
    """Every bit of each uint64 depends on all of its bits (SplitMix64's finaliser; Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mixed(seed: int, block: int) -> np.ndarray:
    """uint64 [BLOCK], by SplitMix64: the same whatever version of a library there is."""
    places = np.arange(1, BLOCK + 1, dtype=np.uint64) + np.uint64((block * BLOCK + (seed << 32)) % 2**64)
    return mix(places * np.uint64(0x9E3779B97F4A7C15))
