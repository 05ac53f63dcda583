"""A trainer that is started again when it falls: who watches, what counts as stuck, and when it is no use any more.

The trainer is a process of its own, `gptjax train ... --resume auto`: whatever happens to it, who watches is a small
program that has neither a device nor its memory. Each host has one; those of a run need not know of each other, since a
trainer whose peers are gone ends by itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Thread
from typing import IO, Any

from gptjax.bucket import is_remote
from gptjax.train.falls import EVENTS, why
from gptjax.train.pulse import STEP, VARIABLE, WATCH, Beat, read

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Statuses of a run that was told to stop, and saved."""
LONGEST = 600.0  # seconds between two starts at most
FLOOR = 30.0  # seconds that a step may take whatever the others took
LOOKS = 0.5  # seconds between two looks
DUMP = 3.0  # seconds for the stacks of all threads to be written
LOST = "JAX distributed service detected fatal errors"
LOST_WORDS = "another process is gone, and JAX ends those that are left"
OUTSIDE = (
    "No space left",
    "Address already in use",
    "Disk quota",
    "Input/output error",
    "Stale file handle",
    "Connection re",
    "Connection closed",
    "timed out",
    "Timeout",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "heartbeat",
    "cannot be reached",
)
"""Words of what the program cannot help: disks, ports, networks, other hosts."""


@dataclass(frozen=True)
class Care:
    """How a trainer is watched; what is usual stands on the arguments of `gptjax run`."""

    tries: int
    """Falls in a row without a step beyond the last checkpoint's, after which it is given up."""
    patience: float
    """A step may take so many times the middle of the others, and half a minute."""
    grace: float
    """Seconds for anything else: reading a checkpoint, compiling, a save, an evaluation. What comes before, such as
    building a text, takes as long as it takes."""
    backoff: float
    """Seconds before the first start anew; doubled at each fall that follows without progress."""


@dataclass(frozen=True)
class Fall:
    """An end that was none."""

    status: int
    """As the shell has it: 128 + the signal that killed it."""
    began: int
    step: int
    words: str
    """The last that it said."""
    stuck: str = ""
    """Why it was killed; empty where it fell by itself."""


def given_up(falls: Sequence[Fall], tries: int) -> str:
    """Why another start is of no use; empty where it may be.

    The same words at the same step, twice in a row, are the program's or its config's. A signal, a lost peer or a full
    disk is worth another try, as long as the run gets further now and then.
    """
    last, before = falls[-1], falls[-2] if len(falls) > 1 else None
    own = last.status < 128 and last.words and not last.stuck and not any(word in last.words for word in OUTSIDE)
    if before and own and (last.status, last.step, last.words) == (before.status, before.step, before.words):
        return f"it fell twice at step {last.step} with the same words: {last.words}"
    if len(falls) >= tries and no_progress(falls) >= tries:
        return f"it fell {tries} times in a row without getting beyond step {last.began}"
    return ""


def no_progress(falls: Sequence[Fall]) -> int:
    """The last falls whose starts began at no later step than one before them. A start that fell before it began
    counts from 0, so the one before the last is not enough."""
    count = furthest = 0
    for fall in falls:
        count = 1 if not count or fall.began > furthest else count + 1
        furthest = max(furthest, fall.began)
    return count


def pause(falls: Sequence[Fall], backoff: float) -> float:
    """Seconds before the next start."""
    return min(backoff * 2.0 ** (no_progress(falls) - 1), LONGEST)


def stuck(beat: Beat | None, silent: float, care: Care) -> str:
    """Why a trainer that was last heard so many seconds ago is to be killed; empty where it is not."""
    if beat is None:
        return ""
    if beat.phase == STEP and beat.step_seconds:
        most = max(care.patience * beat.step_seconds, FLOOR)
        return f"no step for {silent:.0f} s, where one takes {beat.step_seconds:.3g} s" if silent > most else ""
    return f"{beat.phase}: not done within {care.grace:g} s" if silent > care.grace else ""


class Supervisor:
    """Keeps one trainer going until it is done."""

    def __init__(self, words: Sequence[str], run: Any, care: Care) -> None:
        """words: what `gptjax` is given; run: the folder in which events are noted once it is there, or its place."""
        self._command = [sys.executable, "-m", "gptjax", *words]
        self._run, self._care = run, care
        index = os.environ.get("JAX_PROCESS_ID")
        self._place = {"host": socket.gethostname()} | ({"process": index} if index else {})
        """Which of several watches notes something."""
        self._told = 0
        """The signal by which this process was told to stop."""
        self._unsent: deque[int] = deque()
        """Signals that the trainer has not been given yet."""
        self._child: subprocess.Popen[str] | None = None
        self._unwritten: list[str] = []

    def keep(self) -> int:
        """Until it is done, told to stop, or given up; returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)
        falls: list[Fall] = []
        down = time.monotonic()
        while True:
            fall, down = self._once(partial(self._on, down, bool(falls))), time.monotonic()
            if fall.status == 0 or fall.status in STOPPED or self._told:
                self._note("end", status=fall.status, step=fall.step)
                return fall.status
            falls.append(fall)
            if reason := given_up(falls, self._care.tries):
                self._note("given up", **asdict(fall), why=reason)
                print(f"error: {reason}", file=sys.stderr, flush=True)
                return fall.status
            seconds = pause(falls, self._care.backoff)
            self._note("fall", **asdict(fall), pause=seconds)
            told = why(fall.status, fall.words, fall.stuck)
            print(f"the run fell at step {fall.step} ({told}); again in {seconds:.0f} s", file=sys.stderr, flush=True)
            self._sleep(seconds)
            if self._told:
                return 128 + self._told

    def _on(self, down: float, again: bool, beat: Beat) -> None:
        """It makes steps: since it is down, or since this watch began."""
        self._note("on", step=beat.began, seconds=round(time.monotonic() - down, 1), again=again)

    def _once(self, on: Callable[[Beat], None]) -> Fall:
        """One trainer, to its end; `on` is called at the first beat of its steps."""
        with tempfile.TemporaryDirectory(prefix="gptjax-") as folder:
            pulse = Path(folder) / "pulse"
            self._note("start")
            # A group of its own: a Ctrl-C comes to this process alone, which passes it on as it does SIGTERM.
            environment = os.environ | {VARIABLE: str(pulse), WATCH: str(os.getpid())}
            self._child = subprocess.Popen(
                self._command, env=environment, stderr=subprocess.PIPE, errors="replace", process_group=0
            )
            self._forward()  # what came while it was being started
            said: deque[str] = deque(maxlen=1)
            assert self._child.stderr
            reader = Thread(target=_pass_on, args=(self._child.stderr, said), daemon=True)
            reader.start()
            reason = self._watch(self._child, pulse, on)
            reader.join(LOOKS)
            beat, _ = read(pulse)
        status = self._child.returncode
        words = said[0] if said else ""
        began, step = (beat.began, beat.step) if beat else (0, 0)
        return Fall(status if status >= 0 else 128 - status, began, step, words, reason)

    def _watch(self, child: "subprocess.Popen[str]", pulse: Path, on: Callable[[Beat], None]) -> str:
        """Until it ends; says why where it was killed for being stuck."""
        going = False
        last, since = 0, time.monotonic()  # no clock that is set right meanwhile, and none of a file system
        while True:
            try:
                child.wait(LOOKS)
                return ""
            except subprocess.TimeoutExpired:
                pass
            beat, mark = read(pulse)
            if mark != last:
                last, since = mark, time.monotonic()
            if beat and beat.phase == STEP and not going:
                on(beat)
                going = True
            if reason := stuck(beat, time.monotonic() - since, self._care):
                child.send_signal(signal.SIGUSR1)  # all its stacks, to standard error
                time.sleep(DUMP)
                child.kill()
                child.wait()
                return reason

    def _hear(self, number: int, frame: object) -> None:
        self._told = number
        self._unsent.append(number)
        self._forward()

    def _forward(self) -> None:
        while self._unsent and self._child and self._child.poll() is None:
            self._child.send_signal(self._unsent.popleft())

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._told and time.monotonic() < end:
            time.sleep(min(LOOKS, max(0.0, end - time.monotonic())))

    def _note(self, event: str, **more: object) -> None:
        """A line in the run folder, once there is one that can be written: a full disk ends no watch. None in a bucket,
        which each host would write anew."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._unwritten.append(json.dumps({"event": event, "time": now, **self._place, **more}) + "\n")
        if is_remote(self._run) or not self._run.is_dir():
            return
        try:
            with (self._run / EVENTS).open("a") as file:
                file.writelines(self._unwritten)
            self._unwritten = []
        except OSError:
            self._unwritten.insert(0, "\n")  # of which it may have written half a line


def _pass_on(source: IO[str], said: deque[str]) -> None:
    """Standard error as it comes; the last line that says something is kept, of JAX's way to end a process whose peers
    are gone its reason."""
    for line in source:
        sys.stderr.write(line)
        sys.stderr.flush()
        if LOST in line:
            said.append(LOST_WORDS)
        elif line.strip() and not line.startswith((" ", "\t")) and LOST_WORDS not in said:
            said.append(line.strip())
