"""The steps' metrics on their way from the devices to the log, and what ends a run that has gone bad."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.hardware import peak_flops
from gptjax.train.checkpoint import Position
from gptjax.train.metrics import SHOWN_WAIT, Reporter
from gptjax.train.periodic import Moment
from gptjax.train.schedule import total_steps
from gptjax.train.step import Metrics

OWN = {"loss", "grad_norm", "skipped", "bad_streak"}  # of every step; what else there is a stage has said
Read = tuple[float, dict[str, float]]
"""What a step's metrics are, and the seconds of the clock when they were there."""
BEHIND = 1  # steps between the one that is queued and the one whose metrics are read


class GoneBad(UserError):
    """A run that has to go back, or else to end: `position` is after the last of `streak` bad steps in a row."""

    def __init__(self, text: str, position: Position, streak: int):
        super().__init__(text)
        self.position, self.streak = position, streak


class Queued(NamedTuple):
    """A step that is on the devices, or was when it was queued."""

    position: Position
    lr: float
    waited: float
    """Seconds for data until then, of all steps."""
    metrics: Metrics
    read: Future[Read]


class Clock:
    """Seconds spent training, over all starts, without the pauses (evaluation, samples, compilation)."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.perf_counter() - before
        self._paused = 0.0

    @contextmanager
    def pause(self) -> Iterator[Callable[[], float]]:
        """Gives how long it has been, once it is over."""
        before, length = time.perf_counter(), 0.0
        try:
            yield lambda: length
        finally:
            length = time.perf_counter() - before
            self._paused += length

    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._paused


class Meter:
    """Reads every step's metrics once the step after it is queued, so that no step waits for the host.

    A thread sees when a step ends: to queue the next one can itself take as long as a step, on a GPU whose kernels are
    launched one by one.

    A window of them becomes a log record, and a bad streak ends the run, after the same step on every process and
    whatever is logged.
    """

    def __init__(
        self, config: Config, run: Path, reporter: Reporter, clock: Clock, position: Position, flops_per_token: float
    ):
        self._config, self._run, self._reporter, self._clock = config, run, reporter, clock
        self._queue: deque[Queued] = deque()
        self._reader = ThreadPoolExecutor(1, "metrics")
        self._window: list[dict[str, float]] = []
        self._due: set[int] = set()
        self._total_steps = total_steps(config)
        self._tokens, self._seconds = position.tokens, clock.seconds()
        self._waited = self._told = 0.0  # seconds for data in all, and those of the windows that are out
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()
        self._flops = flops_per_token

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For data. It counts where the devices have no step left to do: a batch that comes before has cost nothing."""
        before = time.perf_counter()
        yield
        last: Any = self._queue[-1].metrics["loss"] if self._queue else None
        if last is None or last.is_ready():
            self._waited += time.perf_counter() - before

    def add(self, position: Position, lr: float, metrics: Metrics) -> None:
        """The metrics of the step that led to `position`. Raises GoneBad where an earlier one ends the run."""
        self._queue.append(Queued(position, lr, self._waited, metrics, self._reader.submit(self._fetch, metrics)))
        if len(self._queue) > BEHIND:
            self._read()

    def end_window(self, now: Moment) -> None:
        """The record goes out once this moment's step is read."""
        self._due.add(now.position.step)

    def flush(self) -> None:
        """Read all that is queued, as before a pause. Raises GoneBad as `add` does."""
        while self._queue:
            self._read()

    def _read(self) -> None:
        step = self._queue.popleft()
        seconds, values = step.read.result()
        self._window.append(values)
        reason = gone_bad(self._config, self._window[-1], step.position.step, self._total_steps)
        if reason or step.position.step in self._due:
            self._due.discard(step.position.step)
            self._emit(step.position, step.lr, step.waited, seconds)
        if reason:
            count = len(step.position.passed)
            tried = f", after going back {count} time(s) (train.rollbacks)" if count else ""
            raise GoneBad(
                f"{reason}{tried}; start a new run with a lower optimizer.learning_rate, from the last checkpoint of "
                f"this one if it has any: gptjax train CONFIG --init_from {self._run}",
                step.position,
                int(values["bad_streak"]),
            )

    def _fetch(self, metrics: Metrics) -> Read:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        return self._clock.seconds(), values

    def _emit(self, position: Position, lr: float, waited: float, seconds: float) -> None:
        losses = np.array([m["loss"] for m in self._window])
        finite = losses[np.isfinite(losses)]
        more = {name: fmean(m[name] for m in self._window) for name in self._window[-1] if name not in OWN}
        last, self._window = self._window[-1], []
        rate = (position.tokens - self._tokens) / (seconds - self._seconds)
        data_wait, waiting = _longest((waited - self._told) / (seconds - self._seconds))
        self._tokens, self._seconds, self._told = position.tokens, seconds, waited
        self._reporter.train(
            position.step,
            position.tokens,
            seconds,
            max(0.0, self._config.train.total_tokens - position.tokens) / rate,
            loss=float(finite.mean()) if finite.size else math.nan,
            grad_norm=last["grad_norm"],
            lr=lr,
            tokens_per_s=rate,
            data_wait=data_wait,
            mfu=self._flops * rate / self._peak if self._peak else None,
            skipped=int(last["skipped"]),
            **({"waiting": waiting} if waiting else {}),
            **more,
        )


def _longest(share: float) -> tuple[float, str]:
    """The share of its time in which the process that waits most for data does so, and, of several, which it is: the
    others wait for it in their sums, and do not know."""
    if jax.process_count() == 1:
        return share, ""
    every = np.asarray(multihost_utils.process_allgather(np.float32(share)))
    return float(every.max()), f"process {every.argmax()}" if every.max() >= SHOWN_WAIT else ""


def gone_bad(config: Config, metrics: dict[str, float], step: int, total_steps: int) -> str | None:
    """Why a run ends after this step; None where it goes on.

    The limit is never longer than the run: one that left out every step is not done.
    """
    optimizer, streak = config.optimizer, int(metrics["bad_streak"])
    if not optimizer.max_bad_steps or not streak:
        return None
    last = f"loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}"
    if not optimizer.skip_nonfinite and not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        return f"step {step}: {last}, and optimizer.skip_nonfinite = False lets that into the weights"
    if streak >= min(optimizer.max_bad_steps, total_steps):
        limit = "all that the run has" if streak == total_steps else f"optimizer.max_bad_steps = {streak}"
        return f"step {step}: {streak} bad steps in a row, {limit}; the last: {last}"
    return None


def require_finite(name: str, step: int, values: dict[str, Any]) -> None:
    """Raises UserError where a figure of an evaluation is not finite: more steps would not mend the weights."""
    for figure, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"step {step}: {name} gives {figure} = {value}; start a new run with a lower optimizer.learning_rate"
            )
