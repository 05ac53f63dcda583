"""Tokens of records in an order, made in groups: as many as the next batch takes, and no more.

A group is read, then tokenised, then packed: what goes through one step after another finds its code in the cache.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

HANDOVER = 1e-3  # seconds of work that are worth another thread: two threads take up to 0.1 ms to hand something over
MOST = 64  # records of a group

Made = tuple[list[np.ndarray], float]


class Reader(Iterator[np.ndarray]):
    """The tokens of records `start`, `start + 1`, ..., up to `stop` if there is one; int32 [N] each.

    What `make` raises for a group reaches the reader in the place of the group. Held are at most the tokens that
    `ahead` asked for, and a few records.
    """

    def __init__(
        self,
        make: Callable[[range], list[np.ndarray]],
        start: int,
        stop: int | None,
        pool: ThreadPoolExecutor | None,
        groups: int = 1,
    ):
        """`pool` None has records made by whoever takes them; else at least so many `groups` are under way."""
        self._make, self._next, self._stop = make, start, stop
        self._pool, self._groups_wanted = pool, groups
        self._ready: deque[np.ndarray] = deque()
        self._groups: deque[tuple[float, Future[Made]]] = deque()
        self._wanted, self._under_way = 1, 0.0  # tokens; the latter as expected
        self._length, self._seconds = float("inf"), float("inf")  # tokens of a record, and its time, as seen lately

    def ahead(self, tokens: int) -> None:
        """Have about so many tokens under way, unless they take less time than to hand them over."""
        self._wanted = tokens
        if self._pool is None or tokens / self._length * self._seconds < HANDOVER:  # at first inf / inf: not known
            return
        share = tokens / self._groups_wanted
        while self._under_way < tokens or len(self._groups) < self._groups_wanted:
            records = self._take(min(HANDOVER / self._seconds, share / self._length))
            if not records:
                return
            expected = min(len(records) * self._length, share + 1)
            self._groups.append((expected, self._pool.submit(self._timed, records)))
            self._under_way += expected

    def _take(self, count: float) -> range:
        end = self._next + min(max(int(count), 1), MOST)
        taken = range(self._next, end if self._stop is None else min(end, self._stop))
        self._next = taken.stop
        return taken

    def _timed(self, records: range) -> Made:
        began = time.thread_time()
        return self._make(records), time.thread_time() - began

    def __next__(self) -> np.ndarray:
        if not self._ready:
            made, seconds = self._group()
            length, each = sum(map(len, made)) / len(made), seconds / len(made)
            known = self._length < float("inf")  # half of what is known comes from the last group
            self._length = (self._length + length) / 2 if known else length
            self._seconds = (self._seconds + each) / 2 if known else each
            self._ready.extend(made)
        return self._ready.popleft()

    def _group(self) -> Made:
        if self._groups:
            expected, group = self._groups.popleft()
            self._under_way -= expected
            return group.result()
        records = self._take(self._wanted / self._length)
        if not records:
            raise StopIteration
        return self._timed(records)
