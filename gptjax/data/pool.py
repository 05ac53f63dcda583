"""Pieces of work on all cores, whose number changes nothing but the time."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Protocol, TypeAlias

from gptjax.data.formats import Heard
from gptjax.errors import UserError

ALONE_BYTES = 1 << 26  # below, another process would take longer to start

Worker: TypeAlias = "subprocess.Popen[bytes]"
Report = Callable[[str, int, int], None]
"""Told what is done, the bytes that are, and all there are."""


class Work(Protocol):
    """What a process can be given, as a pickle."""

    @property
    def number(self) -> int: ...
    @property
    def size(self) -> int:
        """Bytes to be read, about."""
        ...

    def run(self, heard: Heard, /) -> None:
        """Do it; `heard` is told of bytes that are done. Raises UserError or OSError, which its parent raises."""
        ...


class Died(UserError):
    """A process that worked is gone."""


class Progress:
    """What is done, by any thread."""

    def __init__(self, report: Report, what: str, total: int, left: Sequence[Work]):
        """total: bytes of all pieces, of which those that are `left` are still to be done."""
        self._report, self._what, self._total, self._lock = report, what, total, Lock()
        self._done = total - sum(piece.size for piece in left)

    def __call__(self, size: int) -> None:
        with self._lock:
            self._done = min(self._done + size, self._total)
            self._report(self._what, self._done, self._total)


def work(pieces: Sequence[Work], heard: Callable[[int], None], most: int) -> None:
    """Do all of them, by at most so many processes. Raises what the first in order raised that did."""
    count = min(most, len(pieces))
    if count < 2 or sum(piece.size for piece in pieces) < ALONE_BYTES:
        for piece in pieces:
            piece.run(heard)
        return
    with ThreadPoolExecutor(count) as pool, _workers(count) as workers:

        def run(piece: Work) -> None:
            worker = workers.get()
            try:
                _ask(worker, piece, heard)
            finally:
                workers.put(worker)

        futures = [pool.submit(run, piece) for piece in pieces]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _workers(count: int) -> Iterator["SimpleQueue[Worker]"]:
    """Processes that live no longer than this lasts."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, environment = [sys.executable, "-m", "gptjax.data.worker"], os.environ | {"PYTHONPATH": path}
    pipe = subprocess.PIPE
    every = [subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe) for _ in range(count)]
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in every:
        idle.put(worker)
    try:
        yield idle
    finally:
        for worker in every:
            worker.kill()
        for worker in every:
            worker.wait()


def _ask(worker: Worker, piece: Work, heard: Callable[[int], None]) -> None:
    assert worker.stdin and worker.stdout
    try:
        pickle.dump(piece, worker.stdin)
        worker.stdin.flush()
        while (answer := pickle.load(worker.stdout)) is not None:
            if isinstance(answer, Exception):
                raise answer
            heard(answer)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        status = worker.wait()
        raise Died(
            f"data.source: the process that built part {piece.number} of it ended with status {status}, as where "
            "memory runs out; start again, and it goes on from there"
        ) from None
