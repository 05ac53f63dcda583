"""A config's train step on the devices of this process, to be timed, traced and weighed."""

import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from gptjax.bench.parts import seconds_by_part
from gptjax.config import Config
from gptjax.data.rows import Rows
from gptjax.data.stream import Prefetcher
from gptjax.hardware import compiler_options
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rows import rows_by_process
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import AnyStage, stage_class
from gptjax.stages.launch import with_text
from gptjax.train.checkpoint import Position
from gptjax.train.loop import PREFETCH, batches
from gptjax.train.schedule import learning_rate
from gptjax.train.step import MICRO_BATCHES, TrainState, abstract_state, make_step

WARMUP = 2  # steps that are not measured: the first also places what the allocator will keep
TRACED = 2  # steps in a profiler's trace


@dataclass(frozen=True)
class Work:
    """A config's train step on some devices, and what it is fed."""

    config: Config
    layout: Layout
    stage: AnyStage
    abstract: Any
    shardings: Any

    @classmethod
    def prepare(cls, config: Config, devices: list[jax.Device]) -> "Work":
        layout = Layout(make_mesh(config, devices), rule_table(config.layout))
        stage = stage_class(config)(config, jax.default_backend(), layout)
        abstract = abstract_state(config, stage)
        return cls(config, layout, stage, abstract, layout.shardings(abstract))

    @property
    def _sharding(self) -> NamedSharding:
        return self.layout.sharding(MICRO_BATCHES)

    @cached_property
    def random_rows(self) -> Rows:
        """[M, b, T] of the stage's own kind."""
        c = self.config
        rows = self.stage.random_rows(c.train.seed, (c.updates * c.max_accumulation, c.micro_batch_size))

        def put(leaf: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(leaf.shape, self._sharding, lambda part: leaf[part])

        return jax.tree.map(put, rows)

    def compile(self, state: TrainState, more: dict[str, str]) -> Any:
        """With more compiler options than the devices' own. Not from the persistent cache: the time to compile is a
        figure."""
        options = compiler_options(self.layout.mesh.devices.flat[0], self.config.train.deterministic) | more
        step = make_step(self.config, self.stage, self.shardings, self.layout, options)
        return step.lower(state, self.random_rows, *self._scalars(0)).compile()

    def timed(self, step: Any, state: TrainState, batches: Iterable[Rows]) -> tuple[TrainState, list[float], float]:
        """(state, seconds of each step after the warm-up, last loss)."""
        seconds = []
        started = time.perf_counter()
        for i, rows in enumerate(batches):
            state, metrics = jax.block_until_ready(step(state, rows, *self._scalars(i)))
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
        return state, seconds[WARMUP:], float(metrics["loss"])

    def _scalars(self, i: int) -> tuple[Any, ...]:
        c = self.config
        lr = learning_rate(c.optimizer, i * c.step_tokens)
        return np.float32(lr), np.int32(c.max_accumulation), np.int32(i)

    @contextmanager
    def stream(self, count: int) -> Iterator[Iterator[Rows]]:
        """The first batches of the config's own text, prefetched as in training."""
        stage = with_text(self.stage)
        rows = rows_by_process(self.layout, self.config.micro_batch_size)[jax.process_index()]
        made = batches(self.config, stage, self._sharding, rows, Position(), dict)
        with Prefetcher(lambda: next(made), PREFETCH) as ahead:
            yield (next(ahead).rows for _ in range(count))

    def parts(self, state: TrainState, more: dict[str, str]) -> dict[str, float]:
        """Seconds of one step in each part and idle, from a trace of TRACED steps: their sum is the traced step."""
        # Kernels that are launched as a graph are not traced by their instruction's name.
        alone = {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else {}
        step = self.compile(state, more | alone)
        state, _, _ = self.timed(step, state, [self.random_rows] * WARMUP)
        text = step.as_text()
        module = re.match(r"HloModule ([\w.\-]+)", text)
        assert module
        quiet = jax.profiler.ProfileOptions()
        quiet.python_tracer_level = 0  # its own calls are no part of the step, and cost
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=quiet):
                started = time.perf_counter()
                self.timed(step, state, [self.random_rows] * TRACED)
                whole = time.perf_counter() - started
            seconds = seconds_by_part(Path(folder), text, module[1], _threads())
        seconds["idle"] = whole - sum(seconds.values())
        return {part: spent / TRACED for part, spent in seconds.items()}


def _threads() -> int:
    """Threads that compute at once on this machine's CPU."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def peak(step: Any) -> dict[str, Any]:
    """Peak bytes of the fullest device, and who says so: the allocator, or where it keeps no count the program."""
    m = step.memory_analysis()
    # Not its own peak, which on CPU leaves out the temporaries (jaxlib 0.10.2).
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    counts = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [count for count in counts if count]
    source = "allocator" if known else "compiled program"
    return {"memory_bytes": max(known, default=held), "memory_source": source, "program_bytes": held}
