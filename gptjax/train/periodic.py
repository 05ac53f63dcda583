"""What a run does between steps: a list of actions, each a function of the step, owed until done."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.train.checkpoint import Position
from gptjax.train.processes import is_first, warn

REQUEST = "profile.request"
"""A file in the run folder: trace so many of the next steps."""
USUAL = 5  # where it is empty
When = Callable[[int, bool], bool]
"""(steps done, whether the run ends there) -> due."""


@dataclass(frozen=True)
class Moment:
    """A run between two steps."""

    position: Position
    state: Any
    ended: bool


@dataclass(frozen=True)
class Action:
    """Something that a run does at the steps that `when` names.

    The values that `what` returns become a record of the log, of the kind `name`: the proof that it was done. An action
    that a step owes and that has none, because a signal or a kill came between, is done on resume before the next step.
    """

    name: str
    when: When
    what: Callable[[Moment], dict[str, Any] | None]
    at_stop: bool = False
    """Done also where a signal stops the run; the others stay owed."""
    waits: bool = True
    """The device is idle and the training clock stopped meanwhile."""


def every(interval: int) -> When:
    """Each `interval` steps (0 is never), and at the end."""
    return lambda step, ended: ended or bool(interval and step and step % interval == 0)


def due(actions: Iterable[Action], moment: Moment, stopping: bool) -> list[Action]:
    """What is to be done now, in the order of the list."""
    if stopping:
        return [action for action in actions if action.at_stop]
    return [action for action in actions if action.when(moment.position.step, moment.ended)]


def owed(actions: Sequence[Action], moment: Moment, log: Iterable[dict[str, Any]]) -> list[Action]:
    """What is due at a start's first moment and was not done before it. A record with a null in it is of a failure and
    proves nothing. The first process has the log, the others are told."""
    done = {r["kind"] for r in log if r["step"] == moment.position.step and None not in r.values()}
    undone = np.array([action.name not in done for action in actions], np.int32)
    if jax.process_count() > 1:
        undone = multihost_utils.broadcast_one_to_all(undone)
    return due((action for action, left in zip(actions, undone, strict=True) if left), moment, stopping=False)


class Trace:
    """The profiler's trace of the steps numbered first to last, into a folder of the run; and of those that somebody
    asks for by the file REQUEST in it, which holds how many, or nothing.

    A start within these steps traces the rest of them, and an end or a stop writes what there is: close it.
    """

    def __init__(self, steps: tuple[int, ...], start: int, run: Path, looks: When):
        """`steps` is empty or (first, last); the run is about to take step number `start`. `looks`: when the file is
        looked for."""
        self._folder, self._request, self._running = run / "profile", run / REQUEST, False
        self._windows = [(max(steps[0], start), steps[1])] if steps else []
        begins: When = lambda step, ended: not ended and any(a == step <= b for a, b in self._windows)  # noqa: E731
        ends: When = lambda step, _: any(step == b + 1 for _, b in self._windows)  # noqa: E731
        self.begin = Action("profile", begins, self._begin)
        self.end = Action("profile", ends, self._end)
        self.ask = Action("profile request", looks, self._ask, waits=False)

    def _ask(self, now: Moment) -> None:
        """The same on every process: the first one looks."""
        count = np.int32(self._asked() if is_first() and not self._running else 0)
        if jax.process_count() > 1:
            count = multihost_utils.broadcast_one_to_all(count)
        if count:
            step = now.position.step
            self._windows.append((step + 1, step + int(count)))

    def _asked(self) -> int:
        try:
            text = self._request.read_text().strip()
            self._request.unlink()
        except OSError:
            return 0
        if text and not re.fullmatch("[1-9][0-9]{0,5}", text):
            warn(f"{self._request}: {text[:20]}: must be a number of steps, or nothing for {USUAL}")
            return 0
        return int(text or USUAL)

    def _begin(self, _: Moment) -> None:
        if not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def _end(self, _: Moment) -> None:
        self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
