"""Tokens of records in an order, made ahead by threads: as many as the next batch takes, and no more."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

GROUP = 1 << 16  # tokens that a thread makes at a time: handing a task over takes 30 microseconds
LEAST_GROUPS = 2  # that are under way for each thread, also where a batch is small


class Reader(Iterator[np.ndarray]):
    """The tokens of records `start`, `start + 1`, ..., up to `stop` if there is one; int32 [N] each.

    What `tokens_of` raises reaches the reader in the place of the record. At most what `ahead` asks for is held, and
    a few groups, each of GROUP tokens or one record.
    """

    def __init__(
        self,
        tokens_of: Callable[[int], np.ndarray],
        start: int,
        stop: int | None,
        pool: ThreadPoolExecutor,
        threads: int,
    ):
        self._tokens_of, self._next, self._stop = tokens_of, start, stop
        self._pool, self._threads = pool, threads
        self._ready: deque[np.ndarray] = deque()
        self._groups: deque[tuple[float, Future[list[np.ndarray]]]] = deque()
        self._under_way = 0.0  # tokens, as expected
        self._mean = float(GROUP)  # tokens of a record, of those seen lately

    def ahead(self, tokens: int) -> None:
        """Have about so many tokens under way."""
        size = min(GROUP, max(tokens // (LEAST_GROUPS * self._threads), 1))
        while self._under_way < tokens or len(self._groups) < LEAST_GROUPS * self._threads:
            count = max(int(size / self._mean), 1)
            if self._stop is not None:
                count = min(count, self._stop - self._next)
            if count <= 0:
                return
            records = range(self._next, self._next + count)
            expected = count * self._mean
            self._groups.append((expected, self._pool.submit(self._make, records)))
            self._next += count
            self._under_way += expected

    def _make(self, records: range) -> list[np.ndarray]:
        return [self._tokens_of(number) for number in records]

    def __next__(self) -> np.ndarray:
        if not self._ready:
            if not self._groups:
                self.ahead(1)
            if not self._groups:
                raise StopIteration
            expected, group = self._groups.popleft()
            self._under_way -= expected
            self._ready.extend(group.result())
            self._mean += (sum(map(len, self._ready)) / len(self._ready) - self._mean) / 2
        return self._ready.popleft()
