"""What standard output can show, and how long work shows how far it is."""

import io
import math
import sys
import time
from typing import Any

SIZES = ("B", "kB", "MB", "GB", "TB")
SHOW_AFTER = 1.0  # seconds
SAY_EVERY = 30.0  # seconds


def show_anything() -> None:
    """A character that standard output cannot encode, of a sample or of ours, becomes a question mark and ends
    nothing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def size_words(size: float) -> str:
    """1.2 GB"""
    power = min(int(math.log(max(size, 1), 1000)), len(SIZES) - 1)
    return f"{size / 1000**power:.{1 if power else 0}f} {SIZES[power]}"


class Progress:
    """How far a long piece of work is, on standard error: a bar where that is a terminal, else a line now and then.

    Work that takes no second shows nothing. Use it in a `with`, and call it from any thread.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._began = self._said = time.monotonic()
        self._first: int | None = None
        self._what, self._done = "", 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` bytes."""
        now = time.monotonic()
        if self._first is None:
            self._began, self._first = now, done
        self._what, self._done = what, done
        if now - self._began < SHOW_AFTER:
            return
        if not sys.stderr.isatty():
            if now - self._said > SAY_EVERY:
                self._said = now
                far = f": {self._rate(done)}, {done / total:.0%}" if done else ""
                print(f"{what}{far}", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            self._start()
        self._bar.update(self._task, description=what, completed=done, total=total)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as SpeedColumn

        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task("")

    def _rate(self, done: int) -> str:
        size, seconds = done - (self._first or 0), max(time.monotonic() - self._began, 1e-9)
        return f"{size / 1e6:,.0f} MB in {seconds:,.0f} s, {size / 1e6 / seconds:,.0f} MB/s"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self._done and time.monotonic() - self._began > SHOW_AFTER:
            print(f"{self._what}: {self._rate(self._done)}", file=sys.stderr, flush=True)
