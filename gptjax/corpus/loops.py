"""Loops over bytes, words and hashes, compiled by numba: each looks at its input once, where numpy would write 8 bytes
for every letter at each of its steps. What is compiled stays on the disk, beside this file or in the user's cache.

Letters: D documents, N bytes, W spans, G sequences of them, K hash functions.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from gptjax.data.order import mix
from gptjax.errors import UserError

try:
    from numba import njit
except ImportError:
    raise UserError("data build: to clean texts needs the extra clean: pip install 'gptjax[clean]'") from None

BASE, STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)  # odd: no factor of 2^64 is lost

Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(loop: Loop) -> Loop:
    """In a second at its first call of a process, and but once where a folder can be written."""
    try:
        return cast(Loop, njit(cache=True)(loop))
    except RuntimeError:  # neither beside this file nor in the user's cache
        return cast(Loop, njit(loop))


_mixed: Any = compiled(mix)


@compiled
def spans(inside: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [W] first bytes, bytes behind, and documents, of the runs of bytes of which inside [N] is true; ends:
    int64 [D], where each document ends, which is never inside."""
    count, before = 0, False
    for here in inside:
        count += here and not before
        before = here
    found = np.empty((3, count), np.int64)
    start, span = 0, 0
    for document, end in enumerate(ends):
        before = False
        for i in range(start, end + 1):
            if inside[i] and not before:
                found[0, span], found[2, span] = i, document
            elif before and not inside[i]:
                found[1, span] = i
                span += 1
            before = inside[i]
        start = end + 1
    return found[0], found[1], found[2]


@compiled
def count(of: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """int64 [W]: of how many bytes of each span `of` [N] is true."""
    found = np.zeros(len(starts), np.int64)
    for span in range(len(starts)):
        for i in range(starts[span], ends[span]):
            found[span] += of[i]
    return found


@compiled
def hashes(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint64 [W]: equal for equal bytes, and for others in one of 2^64 pairs."""
    found = np.empty(len(starts), np.uint64)
    for span in range(len(starts)):
        total, power = np.uint64(0), np.uint64(1)
        for i in range(starts[span], ends[span]):
            total += (np.uint64(data[i]) + np.uint64(1)) * power
            power *= BASE
        found[span] = _mixed(total)
    return found


@compiled
def ngrams(hashes: np.ndarray, owner: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each n spans in a row of one document, the hash, uint64 [G], and the number of the first, int64 [G]."""
    most = max(len(hashes) - n + 1, 0)
    grams, first, size = np.empty(most, np.uint64), np.empty(most, np.int64), 0
    for start in range(most):
        if owner[start] == owner[start + n - 1]:
            total = np.uint64(0)
            for k in range(n):
                total = total * STEP + hashes[start + k]
            grams[size], first[size] = _mixed(total), start
            size += 1
    return grams[:size], first[:size]


@compiled
def least(grams: np.ndarray, owner: np.ndarray, factors: np.ndarray, summands: np.ndarray, found: np.ndarray) -> None:
    """Write into found, uint32 [D, K], the least value of each hash function, uint64 [K] factors and summands, over
    the grams, uint64 [G], of each document, int64 [G], which stand together."""
    start = 0
    while start < len(grams):
        document, end = owner[start], start
        while end < len(grams) and owner[end] == document:
            end += 1
        for j in range(len(factors)):
            lowest = np.uint64(0xFFFFFFFFFFFFFFFF)
            for i in range(start, end):
                lowest = min(lowest, grams[i] * factors[j] + summands[j])
            found[document, j] = np.uint32(lowest >> np.uint64(32))
        start = end


@compiled
def first_equal(values: np.ndarray) -> np.ndarray:
    """int64 [W]: for each of uint64 [W] the number of the first that is equal."""
    size = 16
    while size < 2 * len(values):
        size *= 2
    table, found = np.full(size, -1, np.int64), np.empty(len(values), np.int64)
    for i in range(len(values)):
        slot = np.int64(_mixed(values[i]) & np.uint64(size - 1))
        while table[slot] >= 0 and values[table[slot]] != values[i]:
            slot = (slot + 1) & (size - 1)
        if table[slot] < 0:
            table[slot] = i
        found[i] = table[slot]
    return found


@compiled
def again(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """bool [W]: whether the same value was there before in the same document; bounds: int64 [D + 1]."""
    found = np.empty(len(values), np.bool_)
    for document in range(len(bounds) - 1):
        start, end = bounds[document], bounds[document + 1]
        first = first_equal(values[start:end])
        for i in range(end - start):
            found[start + i] = first[i] != i
    return found


@compiled
def repeats(values: np.ndarray, lengths: np.ndarray, bounds: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each document and length of sequences, float64 [D, most + 1] twice: the characters of the sequence that makes
    up most of the document, times how often it is there, if twice; and of the words that stand in a sequence which was
    there before. values: uint64 [W] hashes of words; lengths: float64 [W]; bounds: int64 [D + 1].

    A sequence can be there twice only if both of its shorter ones are, so that fewer are looked at as n grows.
    """
    top, inside = np.zeros((len(bounds) - 1, most + 1)), np.zeros((len(bounds) - 1, most + 1))
    for document in range(len(bounds) - 1):
        words, size = values[bounds[document] : bounds[document + 1]], lengths[bounds[document] : bounds[document + 1]]
        place, grams = np.arange(len(words)), words.copy()  # sequences of n - 1 that are there twice
        twice = np.ones(len(words) + 1, np.bool_)
        for n in range(2, most + 1):
            held = 0
            for k in range(len(place)):
                start = place[k]
                if start + n <= len(words) and twice[start + 1]:
                    place[held], grams[held] = start, grams[k] * STEP + words[start + n - 1]
                    held += 1
            first = first_equal(grams[:held])
            times = np.zeros(held, np.int64)
            for k in range(held):
                times[first[k]] += 1
            twice[:] = False
            left, covered = 0, 0
            for k in range(held):
                if times[first[k]] == 1:
                    continue
                start = place[k]
                twice[start] = True
                if first[k] == k:
                    top[document, n] = max(top[document, n], times[k] * size[start : start + n].sum())
                else:
                    for i in range(max(start, covered), start + n):
                        inside[document, n] += size[i]
                    covered = start + n
                place[left], grams[left] = start, grams[k]
                left += 1
            if left == 0:
                break
            place, grams = place[:left], grams[:left]
    return top, inside
