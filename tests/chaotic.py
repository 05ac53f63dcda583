"""The command `gptjax` of one process of a run that is disturbed (chaos.py): each step takes its time, limits of time
are short, and an order, a file that the driver leaves, is obeyed once, at the place that its name says."""

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from threading import Timer
from typing import Any

from gptjax import cli, supervisor

ORDERS = Path(os.environ["CHAOS_ORDERS"])
STEP_SECONDS = 0.1
FLOOR, HEARTBEAT = 10.0, 20
"""In the place of 30 and 100 seconds."""
STUCK = 600.0  # seconds: longer than anybody waits


def taken(order: str) -> str:
    """What an order says, which is then obeyed and gone; empty where there is none."""
    path = ORDERS / order
    try:
        text = path.read_text()
        path.unlink()
        return text
    except FileNotFoundError:
        return ""


def dies_in(place: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but for a SIGKILL or another signal that comes so many seconds after it has begun."""

    def run(*args: Any, **more: Any) -> Any:
        for number in (signal.SIGKILL, signal.SIGTERM):
            if seconds := taken(f"{number.name} in {place}"):
                Timer(float(seconds), os.kill, (os.getpid(), number)).start()
        return plain(*args, **more)

    return run


def shifted() -> float:
    """Seconds by which this host's clock is wrong."""
    try:
        return float((ORDERS / "clock").read_text() or 0)
    except (FileNotFoundError, ValueError):
        return 0.0


class Clock(datetime):
    """A `datetime` by that clock."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime.fromtimestamp(time.time(), tz)


def disturb_clock(*modules: Any) -> None:
    plain = time.time
    time.time = lambda: plain() + shifted()
    for module in modules:
        module.datetime = Clock


def watch() -> None:
    """A supervisor, whose trainer is this file, too."""
    disturb_clock(supervisor)
    supervisor.FLOOR, supervisor.DUMP = FLOOR, 1.0
    plain = supervisor.Supervisor.__init__

    def begin(self: Any, *args: Any) -> None:
        plain(self, *args)
        self._command[1:3] = [__file__]

    supervisor.Supervisor.__init__ = begin  # type: ignore[method-assign]


def train() -> None:
    """A trainer."""
    from functools import partial

    import jax

    if taken("late"):
        time.sleep(8)
    if taken("config"):
        sys.argv += ["--optimizer.b2", "0.9"]
    jax.distributed.initialize = partial(jax.distributed.initialize, heartbeat_timeout_seconds=HEARTBEAT)

    from gptjax.stages import launch
    from gptjax.train import goodput, join, loop, metrics, run
    from gptjax.train.checkpoint import Checkpoints

    disturb_clock(goodput, metrics, run)
    join.join = dies_in("join", join.join)
    loop._compile = dies_in("compile", loop._compile)
    Checkpoints.restore = dies_in("restore", Checkpoints.restore)  # type: ignore[method-assign]
    Checkpoints.save = dies_in("save", Checkpoints.save)  # type: ignore[method-assign]
    if taken("version"):
        launch.code_digest = lambda: "another version"

    def rate(*args: Any, plain: Callable[..., Any] = loop.learning_rate) -> Any:
        time.sleep(STEP_SECONDS)
        if taken("stuck"):
            time.sleep(STUCK)
        if taken("mistake"):
            raise RuntimeError("a mistake that is made once")
        return plain(*args)

    loop.learning_rate = rate


if __name__ == "__main__":
    watch() if sys.argv[1] == "run" else train()
    cli.main()
