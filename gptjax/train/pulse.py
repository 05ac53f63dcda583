"""What a run says of itself while it goes, to whoever watches over it (gptjax/supervisor.py)."""

import faulthandler
import json
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from gptjax.children import end_with_parent

VARIABLE = "GPTJAX_PULSE"
"""Names the file that a watched run writes."""
WATCH = "GPTJAX_WATCH"
"""The number of the process that watches it."""
STEP = "step"
OFTEN = 1.0  # seconds between two beats of steps: a beat is a small file
WINDOW = 64  # steps whose middle is how long one takes


@dataclass(frozen=True)
class Beat:
    """One word of a run."""

    phase: str
    """start, step, or what it does between steps."""
    began: int
    """The step at which this start began."""
    step: int
    """Steps that are done."""
    step_seconds: float
    """The middle of the last ones; 0 while there is none."""


class Pulse:
    """Writes beats, where somebody watches; else nothing."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        name = environment.get(VARIABLE)
        self._path = Path(name) if name else None
        self._began = self._step = 0
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._last = self._told = 0.0
        if self._path:
            faulthandler.register(signal.SIGUSR1, all_threads=True)
            self._write("start")

    def begin(self, step: int) -> None:
        """The loop is about to go on from a step."""
        self._began = self._step = step
        self._write("start")

    def step(self, step: int) -> None:
        """A step is done, or as good as: not more of them are under way than the loop allows."""
        now = time.monotonic()
        if self._last:
            self._seconds.append(now - self._last)
        self._step, self._last = step, now
        if self._path and now - self._told >= OFTEN:
            self._write(STEP)

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Something between steps, which may take as long as it needs."""
        self._write(phase)
        yield
        self._last = 0.0
        self._write(STEP)

    def _write(self, phase: str) -> None:
        if self._path is None:
            return
        beat = Beat(phase, self._began, self._step, median(self._seconds) if self._seconds else 0.0)
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(beat)))
        os.replace(temporary, self._path)
        self._told = time.monotonic()


def read(path: Path) -> tuple[Beat | None, int]:
    """(the last beat, what tells it from the one before); (None, 0) before the first."""
    try:
        return Beat(**json.loads(path.read_text())), path.stat().st_mtime_ns
    except FileNotFoundError:
        return None, 0


def end_unwatched(environment: Mapping[str, str]) -> None:
    """First of all in a run: where somebody watches, it ends with them. One that nobody watches any more would keep its
    folder, and its place among other processes, from the next."""
    if watch := environment.get(WATCH):
        end_with_parent(int(watch))
