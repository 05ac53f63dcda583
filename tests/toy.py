"""A stage of four weights, compiled in a moment, whose batches say what goes wrong: for tests of the loop."""

import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gptjax.config import Config
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.train import loop
from gptjax.train.metrics import read_log
from gptjax.train.step import ByGradient

ROWS, LENGTH = 2, 16
STEP_TOKENS = ROWS * LENGTH
FINE, NAN_LOSS, NAN_GRADIENT, SPIKE = range(4)


@dataclass
class Stream:
    """Rows that hold nothing but what happens in their step."""

    happens: dict[int, int]
    positions: list[int]
    seconds: float = 0.0

    def batch(self, num_micro: int, *_: Any) -> dict[str, np.ndarray]:
        time.sleep(self.seconds)
        self.positions = [self.positions[0] + 1]
        return {"what": np.full((num_micro, ROWS), self.happens.get(self.positions[0], FINE), np.int32)}

    def close(self) -> None:
        pass


@dataclass
class Toy(ByGradient):
    """What happens by step, counted from 1; `figures` gives an evaluation's from how many there were before."""

    happens: dict[int, int] = field(default_factory=dict)
    figures: Callable[[int], dict[str, float]] = lambda count: {"loss": 2.0 + count, "bits_per_byte": 3.0}
    evaluated: list[float] = field(default_factory=list)
    batch_seconds: float = 0.0

    on_policy = False
    flops_per_token = 1.0
    num_params = 4

    def is_frozen(self, name: str) -> bool:
        return False

    def init(self, key: jax.Array) -> Any:
        return {"w": nn.LogicallyPartitioned(jax.random.normal(key, (4,)), (None,))}

    @property
    def row(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"what": jax.ShapeDtypeStruct((), np.int32)}

    def counts(self, rows: dict[str, jax.Array]) -> jax.Array:
        return jnp.float32(ROWS * LENGTH)

    def loss(self, params: Any, rows: dict[str, jax.Array], counts: jax.Array, key: Any) -> jax.Array:
        what, count = rows["what"][0], ROWS * LENGTH
        loss = 3 + jnp.sum(params["w"] ** 2)
        loss *= jnp.where(what == SPIKE, 100.0, 1.0) * jnp.where(what == NAN_LOSS, jnp.nan, 1.0)
        zero = jnp.where(what == NAN_GRADIENT, 0.0, 1.0) * jnp.sum(params["w"] ** 2)
        return count * (loss + jnp.where(what == NAN_GRADIENT, jnp.sqrt(zero), 0)) / counts

    def feed(self, positions: Iterable[int] | None, *_: Any) -> Stream:
        return Stream(self.happens, list(positions or [0]), self.batch_seconds)

    def evaluate(self, params: Any, *_: Any) -> dict[str, float]:
        self.evaluated.append(float(jnp.sum(params["w"])))
        return self.figures(len(self.evaluated) - 1)

    def keep(self, run: Path, step: int, figures: dict[str, float]) -> None:
        pass

    def sample(self, params: Any) -> str:
        return f"w is {float(params['w'][0]):.3f} \N{SNOWMAN}"


def toy_config(tiny: Config, steps: int, **train: Any) -> Config:
    """`steps` steps; without evaluations, samples and saves on the way unless `train` says so."""
    plain = {"ramp_start": 0, "ramp_tokens": 0, "eval_batches": 0, "save_interval": 0, "log_interval": 1000}
    plain |= {"batch_size": ROWS, "micro_batch_size": ROWS, "total_tokens": steps * STEP_TOKENS}
    model = replace(tiny.model, seq_len=LENGTH)
    return replace(tiny, model=model, data=replace(tiny.data, lanes=1), train=replace(tiny.train, **(plain | train)))


def fit(config: Config, toy: Toy, run: Path, resume: bool = False, **more: Any) -> int:
    run.mkdir(parents=True, exist_ok=True)
    layout = Layout(make_mesh(config, jax.devices()[:1]), rule_table(config.layout))
    return loop.fit(config, toy, layout, run, resume, {}, **more)


def crash_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule, which each step calls once, raises at this call from now on, counted over all starts; once."""
    plain, calls = loop.learning_rate, [0]

    def rate(*args: Any) -> float:
        calls[0] += 1
        if calls[0] == call:
            raise RuntimeError("gone")
        return plain(*args)

    monkeypatch.setattr(loop, "learning_rate", rate)


def signal_in(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM reaches the process in this step (counted from 1), once."""
    plain, left = loop.learning_rate, [True]

    def rate(config: Any, tokens: int) -> float:
        if tokens == (step - 1) * STEP_TOKENS and left:
            left.clear()
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)  # a thread hears it, and these steps take microseconds
        return plain(config, tokens)

    monkeypatch.setattr(loop, "learning_rate", rate)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_log(run / "log.jsonl") if r["kind"] == kind]


def steps_of(run: Path, kind: str) -> list[int]:
    return [r["step"] for r in records(run, kind)]
