"""The one train loop. A `Stage` brings what is its own; batches, steps, logs, checkpoints and signals are here."""

import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from gptjax import bucket
from gptjax.config import Config
from gptjax.data.stream import Prefetcher, merge_positions
from gptjax.hardware import peak_flops
from gptjax.model.accounting import adapter_params
from gptjax.sharding.mesh import MESH_AXES
from gptjax.sharding.rows import rows_by_process
from gptjax.sharding.rules import Layout
from gptjax.terminal import size_words
from gptjax.train import goodput
from gptjax.train.checkpoint import Checkpoints, Position, sizes
from gptjax.train.copies import in_words
from gptjax.train.feed import Feed, Telling
from gptjax.train.local import Local
from gptjax.train.meter import Clock, GoneBad, Meter, require_finite
from gptjax.train.metrics import LOG, Reporter
from gptjax.train.parting import parting
from gptjax.train.parts import Params
from gptjax.train.periodic import Action, Moment, Trace, due, every, owed
from gptjax.train.processes import first, is_first, warn
from gptjax.train.pulse import Pulse
from gptjax.train.run import run_id
from gptjax.train.schedule import learning_rate, steps, total_steps
from gptjax.train.signals import StopFlag, signals
from gptjax.train.sinks import sinks
from gptjax.train.step import (
    MICRO_BATCHES,
    Objective,
    Parametrised,
    Rows,
    TrainState,
    abstract_rows,
    abstract_state,
    init_state,
    make_step,
    placed,
    start_state,
)

PREFETCH = 2  # batches ready on the devices ahead of the step


class Stage(Objective, Parametrised, Protocol):
    """What a stage supplies."""

    @property
    def row(self) -> Rows:
        """The shapes of one row."""
        ...

    @property
    def num_params(self) -> int:
        """Numbers of the model, without padding."""
        ...

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of a step, for each token that it learns from."""
        ...

    @property
    def on_policy(self) -> bool:
        """Whether rows depend on the current parameters. Else they depend on the position alone, and are made ahead."""
        ...

    def feed(self, positions: Sequence[int] | None, rows: Sequence[int]) -> Feed:
        """The training rows from a position on, None for the start: of every micro-batch those of this process."""
        ...

    def evaluate(self, params: Params, place: Callable[[Rows], Rows], rows: Sequence[int]) -> dict[str, Any]:
        """Figures of the evaluation split, its `loss` among them; `rows` of every batch are this process's to read and
        `place`. A list of them is logged and not shown."""
        ...

    def keep(self, run: Path, step: int, figures: dict[str, Any]) -> None:
        """What others will want to know of an evaluation, as a file in the run folder; on the first process alone."""
        ...

    def sample(self, params: Params) -> str:
        """A text that shows what the model can do."""
        ...


@dataclass(frozen=True)
class Batch:
    """One step's input on the devices, and where this process stands once it is consumed."""

    rows: Rows  # [M, b, ...]
    num_micro: int
    start: Position
    after: Position
    figures: Mapping[str, Any]
    """What its feed says of it."""


def fit(
    config: Config,
    stage: Stage,
    layout: Layout,
    run: Path,
    resume: bool,
    facts: dict[str, Any],
    load: Callable[[Params], Params] | None = None,
    more: Sequence[Action] = (),
    began: float | None = None,
) -> int:
    """Train to the end, or to a signal. Returns the signal's number, 0 at the end.

    `load` gives parameters, laid out as the shapes it gets say: all of them where there is no checkpoint to resume,
    else those that are frozen; without `load` they are random. `more` is what a stage does between steps beside saving,
    evaluating and sampling. `began`, of `time.monotonic`, is when this start began, where that was before.
    Raises UserError for anything the user can mend, and where the run has gone bad once more than it may go back.
    """
    pulse, began = Pulse(os.environ), began or time.monotonic()
    with (
        signals() as stop,
        closing(Checkpoints(run, config)) as checkpoints,
        closing(_local(config, run)) as local,
        parting(),
    ):
        abstract = abstract_state(config, stage)
        shardings = layout.shardings(abstract)
        places = placed(abstract, shardings)
        newer = partial(local.restore, places.kept, warn)
        kept, position = (checkpoints.restore(places.kept, warn, newer=newer) if resume else None) or (None, Position())
        local.forget(position.step)
        if kept is not None:
            state = _whole_state(kept, places, load)
        elif load is None:
            state = init_state(config, stage, shardings)
        else:
            state = start_state(config, stage, load(places.every_param), shardings)
        show, openers = (config.train.total_tokens, is_first()), sinks(config, run, partial(run_id, run))
        rest = run, stop, pulse, more, local
        with closing(Reporter(run / LOG, *show, position.step if resume else None, openers)) as reporter:
            known = facts | {"saves": _saves(places.kept, run)} | local.facts(places.kept, config.train.local_interval)
            known |= {"reads": told} if (told := in_words(places.kept)) else {}
            _announce(config, stage, layout, reporter, position, known, goodput.of_start(reporter, began))
            ended = _loop(config, stage, layout, shardings, state, position, checkpoints, reporter, *rest)
        while isinstance(ended, GoneBad):
            del state
            fell = time.perf_counter()
            with pulse.doing("rollback"):
                kept, position = _gone_back(config, checkpoints, places.kept, ended)
                local.forget(position.step)
                state = _whole_state(kept, places, load)
            with closing(Reporter(run / LOG, *show, position.step, openers)) as reporter:
                _tell(reporter, position, ended, time.perf_counter() - fell)
                ended = _loop(config, stage, layout, shardings, state, position, checkpoints, reporter, *rest)
        return ended


def _local(config: Config, run: Path) -> Local:
    folder = config.train.local_dir
    return Local(folder, first(lambda: run_id(run)) if folder else "")


def _whole_state(kept: dict[str, Any], places: Any, load: Callable[[Params], Params] | None) -> TrainState:
    return TrainState(**kept, frozen=load(places.frozen) if load and places.frozen else {})


def _gone_back(config: Config, checkpoints: Checkpoints, places: Any, bad: GoneBad) -> tuple[Any, Position]:
    """What the last checkpoint before the bad steps holds, and the position there, but with the rows behind them.

    Both follow from config and rows alone: a run that is killed before it has saved again comes here again. Raises
    `bad` where the run went back as often as it may, or has no such checkpoint.
    """
    passed = bad.position.passed
    if len(passed) >= config.train.rollbacks:
        raise bad
    checkpoints.wait()
    found = checkpoints.restore(places, warn, bad.position.step - bad.streak)
    if found is None:
        raise bad
    kept, there = found
    checkpoints.forget(there.step)
    return kept, replace(there, data=_whole(bad.position).data, passed=(*passed, (there.step, bad.position.step)))


def _saves(places: Any, run: Path) -> str:
    """What a checkpoint takes, in words."""
    size, held = sizes(places)
    free = bucket.free_bytes(bucket.home(run))
    there = f"; {size_words(free)} free there" if free < math.inf else ""
    return f"{size_words(size)} each, up to {size_words(held)} of host memory meanwhile{there}"


def _tell(reporter: Reporter, position: Position, bad: GoneBad, took: float) -> None:
    """That the run goes back, from where, and why."""
    reason, end = str(bad).partition(";")[0], bad.position.step
    reporter.record("rollback", position.step, end=end, reason=reason, cost=goodput.of_rollback(reporter, took))
    reporter.say(f"{reason}: going back to step {position.step}, and passing over the rows from there")


def _loop(
    config: Config,
    stage: Stage,
    layout: Layout,
    shardings: Any,
    state: Any,
    position: Position,
    checkpoints: Checkpoints,
    reporter: Reporter,
    run: Path,
    stop: StopFlag,
    pulse: Pulse,
    more: Sequence[Action],
    local: Local,
) -> int | GoneBad:
    """From `position` on: a step, then what it owes. Returns the number of the signal that stopped it, 0 at the end,
    or why it has to go back: as an exception it would keep the state in memory."""
    pulse.begin(position.step)
    train = config.train
    batch_sharding = layout.sharding(MICRO_BATCHES)
    mine = rows_by_process(layout, config.micro_batch_size)[jax.process_index()]
    rows_sharding = layout.sharding(("batch",))

    def place_rows(rows: Rows) -> Rows:
        return _on_devices(rows, rows_sharding, (config.micro_batch_size,))

    def save(now: Moment) -> dict[str, Any] | None:
        return {} if checkpoints.save(now.state.kept, _whole(now.position)) else None

    def save_local(now: Moment) -> dict[str, Any] | None:
        return {} if local.save(now.state.kept, _whole(now.position)) else None

    def evaluate(now: Moment) -> dict[str, Any]:
        figures = stage.evaluate(now.state.every_param, place_rows, mine)
        checkpoints.note(now.position.step, figures["loss"])
        if is_first():
            stage.keep(run, now.position.step, figures)
        return figures

    clock = Clock(reporter.seconds)
    meter = Meter(config, run, reporter, clock, position, stage.flops_per_token)
    trace = Trace(train.profile_steps, position.step, run, every(train.log_interval))
    todo = _todo(config, stage, meter, trace, save, save_local, evaluate, more)

    def do(actions: list[Action], now: Moment) -> None:
        for action in actions:
            if not action.waits:
                action.what(now)
                continue
            meter.flush()
            jax.block_until_ready(now.state)  # the queued steps are training time, not pause
            seconds = clock.seconds()
            with clock.pause() as took, pulse.doing(action.name):
                values = action.what(now)
            if values is not None:
                reporter.done(action.name, now.position.step, now.position.tokens, seconds, took(), values)
                require_finite(action.name, now.position.step, values)

    now = Moment(position, state, position.tokens >= train.total_tokens)
    made = batches(config, stage, batch_sharding, mine, position, lambda: now.state.every_param)
    source = closing(made) if stage.on_policy else Prefetcher(lambda: next(made), PREFETCH)
    try:
        with source as ahead, closing(trace):
            step_fn: Any = None
            if not now.ended:
                with clock.pause() as took:
                    step_fn = _compile(config, stage, shardings, layout, state)
                reporter.say(f"step compiled in {took():.1f} s")
                reporter.record("compile", position.step, took=took())
            do(owed(todo, now, reporter.earlier), now)
            while not now.ended:
                if stage.on_policy:  # it draws with the new weights: to wait for them is no waiting for data
                    jax.block_until_ready(now.state)
                with meter.waiting():
                    batch = next(ahead)
                lr = np.float32(learning_rate(config.optimizer, batch.start.tokens))
                state, metrics = step_fn(
                    now.state, batch.rows, lr, np.int32(batch.num_micro), np.int32(batch.start.step)
                )
                now = Moment(batch.after, state, batch.after.tokens >= train.total_tokens)
                meter.add(now.position, float(lr), {**metrics, **batch.figures})
                pulse.step(now.position.step)
                stopping = stop.agreed()
                do(due(todo, now, stopping), now)
                if stopping:
                    break
            with pulse.doing("save"), clock.pause() as took:
                checkpoints.wait()
                if now.ended:
                    local.forget(0)  # what it held is safe
            reporter.record("end", now.position.step, took=took())
    except GoneBad as bad:
        return bad.with_traceback(None)
    return stop.number


def _todo(
    config: Config,
    stage: Stage,
    meter: Meter,
    trace: Trace,
    save: Callable[[Moment], dict[str, Any] | None],
    save_local: Callable[[Moment], dict[str, Any] | None],
    evaluate: Callable[[Moment], dict[str, Any]],
    more: Sequence[Action],
) -> list[Action]:
    """What happens between steps, in this order."""
    train = config.train
    logs, saves, again = (every(n) for n in (train.log_interval, train.save_interval, train.eval_interval))

    def evaluates(step: int, ended: bool) -> bool:
        """What a run starts from, too, for what it learns is seen from there."""
        return again(step, ended) or bool(step == 0 and config.init_from and train.eval_interval)

    def is_saved(step: int, ended: bool) -> bool:
        """With every evaluation, too, where the best is kept."""
        return saves(step, ended) or bool(train.keep_best and train.eval_batches and evaluates(step, ended))

    def is_saved_locally(step: int, ended: bool) -> bool:
        return bool(train.local_interval) and every(train.local_interval)(step, ended) and not is_saved(step, ended)

    def ends_window(step: int, ended: bool) -> bool:
        """With every save, too, so that after a resume each step is in one record."""
        return logs(step, ended) or is_saved(step, ended) or is_saved_locally(step, ended)

    begin = [Action("train", ends_window, meter.end_window, at_stop=True, waits=False), trace.end]
    saving = [Action("save", is_saved, save, at_stop=True)]
    evaluating = [Action("eval", evaluates, evaluate)] if train.eval_batches else []
    # The best is known before the others go; else what was computed is safe before anything that can fail.
    todo = [*begin, *(evaluating + saving if train.keep_best else saving + evaluating)]
    todo.append(Action("local save", is_saved_locally, save_local))
    if train.sample_interval:
        todo.append(
            Action("sample", every(train.sample_interval), lambda now: {"text": stage.sample(now.state.params)})
        )
    return [*todo, *more, trace.ask, trace.begin]


def _compile(config: Config, stage: Stage, shardings: Any, layout: Layout, state: Any) -> Any:
    """The step, compiled ahead of its first run so that the time is known and not counted as training."""
    rows = abstract_rows(config, stage.row, layout)
    step = make_step(config, stage, shardings, layout)
    return step.lower(state, rows, np.float32(0), np.int32(0), np.int32(0)).compile()


def batches(
    config: Config,
    stage: Stage,
    sharding: NamedSharding,
    mine: Sequence[int],
    position: Position,
    params: Callable[[], Params],
) -> Generator[Batch]:
    """Every step's batch, on the devices; made in the prefetch thread, unless the stage is on-policy and wants the
    current `params`. The rows `mine` of each micro-batch are this process's to read.

    The feed is opened in the caller's thread: to import Grain changes for a moment what `import` does in every thread,
    and JAX imports while it compiles.
    """
    return _batches(config, stage, stage.feed(position.data, mine), sharding, position, params)


def _batches(
    config: Config,
    stage: Stage,
    feed: Feed,
    sharding: NamedSharding,
    position: Position,
    params: Callable[[], Params],
) -> Generator[Batch]:
    micro, most = config.micro_batch_size, config.updates * config.max_accumulation
    try:
        for step, tokens, size in steps(config, position.step, position.tokens):
            num_micro = size // micro
            # During the ramp the unused micro-batches are zeros: one compiled shape for the whole run.
            made = feed.batch(num_micro * config.updates, params() if stage.on_policy else None)
            rows = jax.tree.map(lambda leaf: _padded(leaf, most), made)
            placed = _on_devices(rows, sharding, (most, micro))
            data, end = tuple(feed.positions), tokens + size * config.updates * config.row_tokens
            if config.train.epochs:  # what fills up the last batch is no part of the epochs
                end = min(end, config.train.total_tokens)
            after = Position(step + 1, end, data, position.passed)
            yield Batch(
                placed, num_micro, Position(step, tokens), after, feed.figures if isinstance(feed, Telling) else {}
            )
    finally:
        feed.close()


def _padded(leaf: np.ndarray, length: int) -> np.ndarray:
    return np.pad(leaf, ((0, length - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)))


def _on_devices(rows: Rows, sharding: NamedSharding, lead: tuple[int, ...]) -> Rows:
    """This process's part of a batch, put together with those of the others; `lead` is the shape of the whole before a
    row's own."""

    def put(leaf: np.ndarray) -> Array:
        return jax.make_array_from_process_local_data(sharding, leaf, (*lead, *leaf.shape[len(lead) :]))

    return jax.tree.map(put, rows)


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


def plain_facts(
    config: Config, stage: Stage, layout: Layout, count: int, device_kind: str, num_processes: int
) -> dict[str, str]:
    """What a run is, in words, on so many devices of a kind."""
    adapters, params = sum(adapter_params(config.model, config.adapter).values()), stage.num_params
    step_tokens = config.step_tokens
    each = f"{config.row_sequences} x " if config.row_sequences > 1 else ""
    lengths = [str(model.seq_len) for model in config.models.values()]
    length = lengths[0] if len(lengths) == 1 else f"({' + '.join(lengths)})"
    layers = ", ".join(
        f"{model.num_layers} layers of {','.join(model.attention_pattern)}" + f" ({name})" * (len(config.models) > 1)
        for name, model in config.models.items()
    )
    trained = f", of which {adapters:,} are trained" if adapters else ""
    trained += " beside a frozen reference of as many" if config.has_reference else ""
    degrees = " x ".join(f"{axis} {layout.mesh.shape[axis]}" for axis in MESH_AXES if layout.mesh.shape[axis] > 1)
    lines = {
        "model": f"{params:,} parameters{trained}, {layers}, {stage.flops_per_token:.3e} FLOPs per token "
        "(causality and band counted exactly)",
        "devices": f"{count} x {device_kind}, layout {degrees or 'single device'}"
        + (f", {num_processes} processes" if num_processes > 1 else ""),
        "batch": f"{config.train.batch_size} x {each}{length} = {step_tokens:,} tokens in "
        f"{config.max_accumulation} micro-batch(es)"
        + (f", ramped from {config.train.ramp_start}" if config.train.ramp_start else ""),
        "length": f"{config.train.total_tokens:,} tokens, {total_steps(config):,} steps, "
        f"{config.train.total_tokens / params:.1f} tokens per parameter",
    }
    if peak_flops(device_kind) is None:
        lines["mfu"] = f"not shown: no peak is listed for {device_kind}"
    return lines


def _announce(
    config: Config,
    stage: Stage,
    layout: Layout,
    reporter: Reporter,
    position: Position,
    facts: dict[str, Any],
    cost: dict[str, float],
) -> None:
    """The plain facts before the first step."""
    devices = jax.devices()
    there = len(devices), devices[0].device_kind, jax.process_count()
    lines = plain_facts(config, stage, layout, *there)
    for name, text in (lines | facts).items():
        reporter.say(f"{name:<10}{text}")
    started = {
        "command": shlex.join(["gptjax", *sys.argv[1:]]),
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
    }
    reporter.record("start", position.step, **started, **lines, **facts, cost=cost)
    if position.step:
        reporter.say(f"resumed at step {position.step}, {position.tokens:,} tokens")
