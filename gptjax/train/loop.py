"""The one train loop. A stage brings a `Task`; batches, steps, logs, checkpoints and signals are here."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from gptjax.config import Config
from gptjax.data.stream import Prefetcher, TokenStream, merge_positions
from gptjax.errors import UserError
from gptjax.hardware import peak_flops
from gptjax.model.accounting import num_params, train_flops_per_token
from gptjax.sharding.mesh import MESH_AXES
from gptjax.sharding.rows import rows_by_process
from gptjax.sharding.rules import Layout
from gptjax.train.checkpoint import Checkpoints, Position
from gptjax.train.metrics import Clock, Reporter
from gptjax.train.run import LOG
from gptjax.train.schedule import learning_rate, steps, total_steps
from gptjax.train.signals import StopFlag, signals
from gptjax.train.step import LossFn, Params, abstract_state, init_state, make_step, placed, start_state

PREFETCH = 2  # batches ready on the devices ahead of the step


class Task(Protocol):
    """What a stage supplies."""

    @property
    def loss(self) -> LossFn: ...
    def init(self, key: Array) -> Params: ...
    def stream(self, positions: Sequence[int] | None, rows: Sequence[int]) -> TokenStream: ...
    def evaluate(
        self, params: Params, place: Callable[[np.ndarray], Array], rows: Sequence[int]
    ) -> dict[str, float]: ...
    def sample(self, params: Params) -> str: ...


@dataclass(frozen=True)
class Batch:
    """One step's input on the devices, and where this process stands once it is consumed."""

    tokens: Array  # [M, b, T+1]
    num_micro: int
    start: Position
    after: Position


def fit(
    config: Config,
    task: Task,
    layout: Layout,
    run: Path,
    resume: bool,
    facts: dict[str, Any],
    load: Callable[[Params], Params] | None = None,
) -> int:
    """Train to the end, or to a signal. Returns the signal's number, 0 at the end.

    Without a checkpoint to resume, `load` gives the first parameters, laid out as the shapes it gets say; without
    `load` they are random.
    Raises UserError for anything the user can mend.
    """
    abstract = abstract_state(config, task.init)
    shardings = layout.shardings(abstract)
    checkpoints = Checkpoints(run, config)
    places = placed(abstract, shardings)
    state, position = (checkpoints.restore(places, _warn) if resume else None) or (None, Position())
    if state is None:
        if load is None:
            state = init_state(config, task.init, layout)
        else:
            state = start_state(config, load(places.params), shardings)
    first = jax.process_index() == 0
    reporter = Reporter(
        run / LOG, config.train.total_tokens, config.train.tensorboard, first, position.step if resume else None
    )
    try:
        with signals() as stop:
            _announce(config, layout, reporter, position, facts)
            return _loop(config, task, layout, shardings, state, position, checkpoints, reporter, run, stop)
    finally:
        reporter.close()
        checkpoints.close()


def _loop(
    config: Config,
    task: Task,
    layout: Layout,
    shardings: Any,
    state: Any,
    position: Position,
    checkpoints: Checkpoints,
    reporter: Reporter,
    run: Path,
    stop: StopFlag,
) -> int:
    """From `position` on; every periodic action is a function of the step."""
    train = config.train
    batch_sharding = layout.sharding((None, "batch", None))
    mine = rows_by_process(layout, config.micro_batch_size)[jax.process_index()]
    rows_sharding = layout.sharding(("batch", None))

    def place_rows(rows: np.ndarray) -> Array:
        shape = (config.micro_batch_size, rows.shape[-1])
        return jax.make_array_from_process_local_data(rows_sharding, rows, shape)

    def evaluate(step: int) -> None:
        with clock.pause():
            figures = task.evaluate(state.params, place_rows, mine)
            reporter.record("eval", step, **figures)
            reporter.say(f"step {step}  eval  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    clock = Clock()
    meter = Meter(config, reporter, clock, position)
    ended = position.tokens >= train.total_tokens
    made = batches(config, task, batch_sharding, mine, position)
    with Prefetcher(lambda: next(made), PREFETCH) as ahead:
        step_fn = None
        while not ended:
            batch = next(ahead)
            done = batch.after.step
            _profile(train.profile_steps, batch.start.step, run, state)
            lr = np.float32(learning_rate(config.optimizer, batch.start.tokens))
            arguments = (state, batch.tokens, lr, np.int32(batch.num_micro), np.int32(batch.start.step))
            if step_fn is None:
                with clock.pause():
                    step_fn = _compile(config, task, shardings, layout, arguments, reporter)
            state, metrics = step_fn(*arguments)
            ended = batch.after.tokens >= train.total_tokens
            meter.add(done, batch.after.tokens, float(lr), metrics)
            stopping = stop.agreed()
            if ended or stopping or (train.save_interval and done % train.save_interval == 0):
                meter.flush()
                jax.block_until_ready(state)  # the queued steps are training time, not pause
                with clock.pause():
                    if checkpoints.save(state, _whole(batch.after)):
                        reporter.record("save", done)
            if stopping:
                break
            if train.eval_batches and (ended or (train.eval_interval and done % train.eval_interval == 0)):
                meter.flush()
                jax.block_until_ready(state)
                evaluate(done)
            if train.sample_interval and (ended or done % train.sample_interval == 0):
                with clock.pause():
                    text = task.sample(state.params)
                    reporter.record("sample", done, text=text)
                    reporter.say(f"step {done}  sample\n{text}")
        meter.flush()
        checkpoints.wait()
    return stop.number


def _compile(config: Config, task: Task, shardings: Any, layout: Layout, arguments: Any, reporter: Reporter) -> Any:
    """The step, compiled ahead of its first run so that the time is known and not counted as training."""
    started = time.perf_counter()
    compiled = make_step(config, task.loss, shardings, layout).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    reporter.say(f"step compiled in {seconds:.1f} s")
    return compiled


def batches(
    config: Config, task: Task, sharding: NamedSharding, mine: Sequence[int], position: Position
) -> Iterator[Batch]:
    """Every step's batch, on the devices; runs in the prefetch thread. The rows `mine` of each micro-batch are this
    process's to read."""
    stream = task.stream(position.data, mine)
    micro, most = config.micro_batch_size, config.max_accumulation
    try:
        for step, tokens, size in steps(config, position.step, position.tokens):
            num_micro = size // micro
            rows = stream.batch(num_micro)
            # During the ramp the unused micro-batches are zeros: one compiled shape for the whole run.
            rows = np.pad(rows, ((0, most - num_micro), (0, 0), (0, 0)))
            shape = (most, micro, config.model.seq_len + 1)
            placed = jax.make_array_from_process_local_data(sharding, rows, shape)
            data = tuple(stream.positions)
            after = Position(step + 1, tokens + size * config.model.seq_len, data)
            yield Batch(placed, num_micro, Position(step, tokens), after)
    finally:
        stream.close()


def _whole(position: Position) -> Position:
    """The position with the lanes of all processes, which each knows only its own of.

    Processes talk to each other here, so it belongs to the main thread: talk from the prefetch thread would meet
    the other processes' steps in another order.
    """
    if jax.process_count() == 1 or position.data is None or len(position.data) == 1:
        return position
    halves = np.array(position.data, np.int64).view(np.int32)  # JAX moves 32-bit words unless x64 is on
    every = np.ascontiguousarray(multihost_utils.process_allgather(halves)).view(np.int64)
    return replace(position, data=tuple(merge_positions(every.tolist())))


class Meter:
    """Turns the steps' metrics into log records without making the step wait: a window is fetched only
    once the step after it is queued."""

    def __init__(self, config: Config, reporter: Reporter, clock: Clock, position: Position):
        self._config, self._reporter, self._clock = config, reporter, clock
        self._window: list[dict[str, Array]] = []
        self._due: tuple[int, int, float, list[dict[str, Array]]] | None = None
        self._tokens, self._seconds = position.tokens, 0.0
        self._skipped: int | None = None
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()

    def add(self, step: int, tokens: int, lr: float, metrics: dict[str, Array]) -> None:
        if self._due is not None:
            self._emit()
        self._window.append(metrics)
        if step % self._config.train.log_interval == 0:
            self._due, self._window = (step, tokens, lr, self._window), []

    def flush(self) -> None:
        """Emit what is due, as before a pause."""
        if self._due is not None:
            self._emit()

    def _emit(self) -> None:
        assert self._due is not None
        step, tokens, lr, window = self._due
        self._due = None
        fetched = jax.device_get(window)
        losses = np.array([m["loss"] for m in fetched], np.float64)
        finite = losses[np.isfinite(losses)]
        skipped = int(fetched[-1]["skipped"])
        if not finite.size:
            raise UserError(
                f"step {step}: the loss of every one of the last {len(losses)} steps was {losses[-1]}; resume from the "
                "last checkpoint with a lower optimizer.learning_rate, in a new run"
            )
        seconds = self._clock.seconds()
        rate = (tokens - self._tokens) / (seconds - self._seconds)
        self._tokens, self._seconds = tokens, seconds
        flops = train_flops_per_token(self._config.model) * rate
        self._reporter.train(
            step,
            tokens,
            max(0.0, self._config.train.total_tokens - tokens) / rate,
            loss=float(finite.mean()),
            grad_norm=float(fetched[-1]["grad_norm"]),
            lr=lr,
            tokens_per_s=rate,
            mfu=flops / self._peak if self._peak else None,
            skipped=skipped,
            seconds=seconds,
        )


def plain_facts(config: Config, layout: Layout, count: int, device_kind: str) -> dict[str, str]:
    """What a run is, in words, on so many devices of a kind."""
    params, step_tokens = num_params(config.model), config.train.batch_size * config.model.seq_len
    degrees = " x ".join(f"{axis} {layout.mesh.shape[axis]}" for axis in MESH_AXES if layout.mesh.shape[axis] > 1)
    pattern = ",".join(config.model.attention_pattern)
    lines = {
        "model": f"{params:,} parameters, {config.model.num_layers} layers of {pattern}, "
        f"{train_flops_per_token(config.model):.3e} FLOPs per token (causality and band counted exactly)",
        "devices": f"{count} x {device_kind}, layout {degrees or 'single device'}",
        "batch": f"{config.train.batch_size} x {config.model.seq_len} = {step_tokens:,} tokens in "
        f"{config.max_accumulation} micro-batch(es)"
        + (f", ramped from {config.train.ramp_start}" if config.train.ramp_start else ""),
        "length": f"{config.train.total_tokens:,} tokens, {total_steps(config):,} steps, "
        f"{config.train.total_tokens / params:.1f} tokens per parameter",
    }
    if peak_flops(device_kind) is None:
        lines["mfu"] = f"not shown: no peak is listed for {device_kind}"
    return lines


def _announce(config: Config, layout: Layout, reporter: Reporter, position: Position, facts: dict[str, Any]) -> None:
    """The plain facts before the first step."""
    lines = plain_facts(config, layout, jax.device_count(), jax.devices()[0].device_kind)
    for name, text in (lines | facts).items():
        reporter.say(f"{name:<10}{text}")
    reporter.record("start", position.step, **lines, **facts)
    if position.step:
        reporter.say(f"resumed at step {position.step}, {position.tokens:,} tokens")


def _profile(steps: tuple[int, ...], step: int, run: Path, state: Any) -> None:
    """Trace the steps from the first to the last of the pair, into RUN/profile."""
    if not steps:
        return
    if step == steps[0]:
        jax.profiler.start_trace(str(run / "profile"))
    if step == steps[1] + 1:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)
