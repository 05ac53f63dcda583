"""From the parts of a source to a data set: on all cores, whose number changes nothing but the time, and from where a
build that was stopped had come to."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import TypeAlias

from gptjax.data import cache
from gptjax.data.store import finish, is_written
from gptjax.data.worker import Part, Task
from gptjax.errors import UserError

PART_BYTES = 1 << 26
MOST_PARTS = 256  # about; of each a file is held open while it is read
ALONE_BYTES = 1 << 26  # below, another process would take longer to start
WAIT = 0.2  # seconds between two looks at another builder

Worker: TypeAlias = "subprocess.Popen[bytes]"
Report = Callable[[str, int, int], None]
"""Told what is done, the bytes that are, and all there are."""


def part_bytes(total: int) -> int:
    """The size of parts of a source of so many bytes."""
    return max(PART_BYTES, total // MOST_PARTS)


@dataclass(frozen=True)
class Plan:
    """What a data set is made from."""

    name: str
    key: str
    """Of the files, and of what else makes another data set of them."""
    about: str
    """The source in words."""
    parts: Callable[[], Sequence[Part]]
    """In order, and the same on every machine."""


def build(root: Path, plan: Plan, max_chars: int, report: Report, most: int) -> Path:
    """The folder of a data set, made now by at most so many processes; another one of this host that makes it is waited
    for.

    Stopped at any moment, it leaves its finished parts, with which the next build goes on. Raises UserError, and
    leaves nothing, for a text that cannot be read or is empty; OSError where the disk is full.
    """
    stem = f"{plan.name}-{plan.key}"
    while pid := cache.builder(root, stem):
        report(f"waiting for process {pid}, which builds it", 0, 1)
        time.sleep(WAIT)
        if found := cache.find(root, plan.key):
            return found
    parts = plan.parts()
    made = cache.workplace(root, stem)
    try:
        for rest in made.glob(".*"):  # of a write that was cut off
            rest.unlink()
        done = [is_written(made, number) for number in range(len(parts))]
        tasks = [Task(made, i, part, max_chars) for i, part in enumerate(parts) if not done[i]]
        left = sum(task.part.size for task in tasks)
        _write(tasks, _Progress(report, sum(part.size for part in parts), left), most)
        digest = finish(made, [part.split for part in parts])
        if not digest:
            raise UserError(f"data.source: no text in {plan.about}; give files with text")
        return cache.publish(made, f"{plan.name}-{digest[:16]}", plan.key)
    except Died:
        cache.abandon(made)
        raise
    except Exception:
        cache.remove(made)
        raise
    except BaseException:
        cache.abandon(made)
        raise


class Died(UserError):
    """A process that wrote parts is gone."""


class _Progress:
    """What is done, by any thread."""

    def __init__(self, report: Report, total: int, left: int):
        self._report, self._done, self._total, self._lock = report, total - left, total, Lock()

    def __call__(self, size: int) -> None:
        with self._lock:
            self._done = min(self._done + size, self._total)
            self._report("building", self._done, self._total)


def _write(tasks: Sequence[Task], heard: Callable[[int], None], most: int) -> None:
    """Raises what the first of the tasks in order raised that did."""
    count = min(most, len(tasks))
    if count < 2 or sum(task.part.size for task in tasks) < ALONE_BYTES:
        for task in tasks:
            task.run(heard)
        return
    with ThreadPoolExecutor(count) as pool, _workers(count) as workers:

        def run(task: Task) -> None:
            worker = workers.get()
            try:
                _ask(worker, task, heard)
            finally:
                workers.put(worker)

        futures = [pool.submit(run, task) for task in tasks]
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


def _ask(worker: Worker, task: Task, heard: Callable[[int], None]) -> None:
    assert worker.stdin and worker.stdout
    try:
        pickle.dump(task, worker.stdin)
        worker.stdin.flush()
        while (answer := pickle.load(worker.stdout)) is not None:
            if isinstance(answer, Exception):
                raise answer
            heard(answer)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        status = worker.wait()
        raise Died(
            f"data.source: the process that built part {task.number} of it ended with status {status}, as where memory "
            "runs out; start again, and it goes on from there"
        ) from None
