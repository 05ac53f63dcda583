"""What must end a run and what must not: the spike test's statistics, streaks of bad steps, figures that are not
finite, and output that the terminal cannot show."""

import functools
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import NAN_GRADIENT, NAN_LOSS, SPIKE, Toy, fit, records, steps_of, toy_config

from gptjax.config import Config, OptimizerConfig
from gptjax.errors import UserError
from gptjax.files import json_text
from gptjax.train.checkpoint import FOLDER
from gptjax.train.metrics import Reporter
from gptjax.train.step import TrainState, guard

# The statistics


@functools.partial(jax.jit, static_argnums=1)
def walk(losses: jax.Array, sigma: float) -> tuple[jax.Array, ...]:
    """(left out, mean, deviation, bad streak) after each step of a run with these losses."""
    none = jnp.zeros((), jnp.int32)
    counters = {"accepted": none, "skipped": none, "bad_streak": none}
    start = TrainState(params=none, opt_state=none, loss_mean=jnp.zeros(()), loss_variance=jnp.zeros(()), **counters)
    config = OptimizerConfig(skip_spike_sigma=sigma)

    def one(old: TrainState, loss: jax.Array) -> tuple[TrainState, tuple[jax.Array, ...]]:
        new = guard(config, old, old, loss, jnp.float32(1))
        return new, (new.skipped - old.skipped, new.loss_mean, jnp.sqrt(new.loss_variance), new.bad_streak)

    return jax.lax.scan(one, start, losses.astype(jnp.float32))[1]


def left_out(losses: np.ndarray, sigma: float) -> list[int]:
    return np.flatnonzero(walk(losses, sigma)[0]).tolist()


def noise(steps: int, seed: int = 0) -> np.ndarray:
    return 0.002 * np.random.default_rng(seed).normal(size=steps)


def float64(losses: np.ndarray, sigma: float) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Left out, mean and deviation by the plain moments: in float64 their difference has digits to spare."""
    mean = square = 0.0
    out, means, deviations = [], [], []
    for i, x in enumerate(losses):
        if i >= 100 and x > mean + sigma * math.sqrt(max(square - mean**2, 0)):
            out.append(i)
            x = mean + sigma * math.sqrt(square - mean**2)
        keep = min(0.99, i / (i + 1))
        mean, square = keep * mean + (1 - keep) * x, keep * square + (1 - keep) * x**2
        means.append(mean)
        deviations.append(math.sqrt(max(square - mean**2, 0)))
    return out, np.array(means), np.array(deviations)


@pytest.mark.parametrize("seed", range(3))
def test_normal_steps_are_judged_as_in_float64(seed: int) -> None:
    """20,000 steps at 3 +- 0.002: none is left out at 4 deviations, but the one or three that lie there."""
    losses = np.float32(3 + noise(20_000, seed)).astype(float)
    want, means, deviations = float64(losses, 4.0)
    _, mean, deviation, _ = walk(losses, 4.0)
    assert left_out(losses, 4.0) == want
    assert len(want) == (0, 3, 1)[seed]
    np.testing.assert_allclose(mean[100:], means[100:], atol=2e-5)
    np.testing.assert_allclose(deviation[100:], deviations[100:], rtol=0.02)


@settings(max_examples=40)
@given(
    st.sampled_from([2.0, 4.0, 6.0, 10.0]),
    st.floats(0.5, 20),
    st.floats(0.01, 300),
    st.sampled_from([0.0, 1e-4, 1.0, 50.0]),
    st.integers(0, 9),
)
def test_a_lasting_rise_becomes_the_new_level(
    sigma: float, level: float, rise: float, spread: float, seed: int
) -> None:
    """Well before the limit on bad steps, from any level, to any other, even where the loss stood still."""
    losses = level + spread * noise(600, seed)
    losses[300:] += rise
    _, _, _, streak = walk(losses, sigma)
    assert max(streak) < 45 < OptimizerConfig().max_bad_steps
    assert sum(walk(losses, sigma)[0][450:]) <= (20 if sigma == 2 else 1)  # 2 deviations are met by chance
    assert streak[-1] <= 2


def test_a_rise_from_3_to_6_is_rejected_and_then_accepted() -> None:
    losses = 3 + noise(2000)
    losses[1000:] += 3
    out = left_out(losses, 4.0)
    assert out == list(range(1000, 1000 + len(out)))
    assert 5 < len(out) < 20


@pytest.mark.parametrize(("begin", "end"), [(3, 6), (6, 3)])
def test_a_slow_drift_is_followed(begin: float, end: float) -> None:
    assert left_out(np.linspace(begin, end, 20_000) + noise(20_000), 4.0) == []


@pytest.mark.parametrize("sigma", [4.0, 6.0])
def test_a_spike_of_100_times_is_left_out_and_hardly_seen(sigma: float) -> None:
    """Every 100 steps for 2000 steps; beside it a loss near 0, which is taken, moves no more."""
    plain = 3 + noise(3000)
    spiked = plain.copy()
    spiked[1000::100] *= 100
    spiked[1050::100] = 0.01
    out, mean, deviation, _ = walk(spiked, sigma)
    assert np.flatnonzero(out).tolist() == list(range(1000, 3000, 100))
    assert np.abs(mean - 3).max(where=np.arange(3000) > 500, initial=0) < 0.002
    assert np.max(deviation[1000:]) < 1.5 * 0.002
    before, after = deviation[999:-1:100], deviation[1000::100]
    assert np.max(np.asarray(after) / np.asarray(before)) < 1.08


def test_a_loss_that_is_not_finite_leaves_the_statistics() -> None:
    losses = 3 + noise(500)
    losses[200:240] = np.nan
    losses[300] = np.inf
    out, mean, deviation, streak = walk(losses, 6.0)
    assert np.flatnonzero(out).tolist() == [*range(200, 240), 300]
    assert streak[239] == 40
    assert streak[240] == 0
    assert mean[199] == mean[239]
    assert np.isfinite(mean).all()
    assert np.isfinite(deviation).all()


# Runs that go bad


def strict(run: Path) -> list[dict[str, Any]]:
    """The log as a reader takes it that knows JSON and no more."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return [json.loads(line, parse_constant=refuse) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("what", [NAN_LOSS, NAN_GRADIENT])
def test_a_run_that_left_out_every_step_is_not_done(what: int, tiny: Config, tmp_path: Path) -> None:
    config = toy_config(tiny, 30)
    with pytest.raises(UserError, match=r"step 30: 30 bad steps in a row, all that the run has; .*--init_from"):
        fit(config, Toy(dict.fromkeys(range(1, 31), what)), tmp_path)
    (last,) = [r for r in strict(tmp_path) if r["kind"] == "train"]
    assert (last["step"], last["skipped"]) == (30, 30)
    assert last["grad_norm"] is None
    assert (last["loss"] is None) == (what == NAN_LOSS)


@pytest.mark.parametrize("log_interval", [1, 5, 1000])
def test_a_streak_ends_the_run_at_one_step_whatever_is_logged(log_interval: int, tiny: Config, tmp_path: Path) -> None:
    """NaN batches one by one are survived, and a streak one short of the limit; the next streak is not. What is saved
    before its end goes on to the same end."""
    bad = [2, 4, 5, 6, 12, 13, 14, 15, 16, 17]
    config = toy_config(tiny, 20, log_interval=log_interval, save_interval=14)
    config = replace(config, optimizer=replace(config.optimizer, max_bad_steps=4))
    for resume in (False, True):
        with pytest.raises(UserError, match=r"step 15: 4 bad steps in a row, optimizer.max_bad_steps = 4; the last"):
            fit(config, Toy(dict.fromkeys(bad, NAN_LOSS)), tmp_path, resume)
        assert [p.name for p in (tmp_path / FOLDER).iterdir()] == ["14"]
        assert steps_of(tmp_path, "train")[-1] == 15
        strict(tmp_path)
    assert fit(replace(config, optimizer=replace(config.optimizer, max_bad_steps=0)), Toy(), tmp_path, True) == 0
    assert records(tmp_path, "train")[-1]["skipped"] == 7


def test_spikes_count_as_bad_steps(tiny: Config, tmp_path: Path) -> None:
    """Two after 110 steps, rejected where that is asked; a third bad step in a row is the limit."""
    config = toy_config(tiny, 120, log_interval=1)
    spikes = {112: SPIKE, 113: SPIKE}
    assert fit(config, Toy(spikes), tmp_path / "off") == 0
    assert records(tmp_path / "off", "train")[-1]["skipped"] == 0
    config = replace(config, optimizer=replace(config.optimizer, skip_spike_sigma=6.0, max_bad_steps=3))
    assert fit(config, Toy(spikes), tmp_path / "two") == 0
    assert records(tmp_path / "two", "train")[-1]["skipped"] == 2
    with pytest.raises(UserError, match="step 114: 3 bad steps in a row"):
        fit(config, Toy(spikes | {114: NAN_LOSS}), tmp_path / "three")


@pytest.mark.parametrize("step", [6, 7])
def test_values_that_are_let_in_end_the_run_before_a_save(step: int, tiny: Config, tmp_path: Path) -> None:
    """With skip_nonfinite off, also where the bad step is the one that would be saved."""
    config = toy_config(tiny, 12, save_interval=3, rollbacks=0)
    config = replace(config, optimizer=replace(config.optimizer, skip_nonfinite=False))
    with pytest.raises(UserError, match=f"step {step}: .*optimizer.skip_nonfinite = False"):
        fit(config, Toy({step: NAN_GRADIENT}), tmp_path)
    newest = max((tmp_path / FOLDER).iterdir(), key=lambda p: int(p.name))
    assert int(newest.name) == (3 if step == 6 else 6)
    with ocp.StandardCheckpointer() as reader:
        assert np.isfinite(reader.restore(newest.absolute() / "state")["params"]["w"]).all()


def test_an_evaluation_that_is_not_finite_ends_the_run_every_time(tiny: Config, tmp_path: Path) -> None:
    """The record is written first; a resume meets the same, and never says done."""
    config = toy_config(tiny, 6, eval_batches=1)
    diverged = Toy(figures=lambda _: {"loss": math.nan, "bits_per_byte": math.inf})
    for resume in (False, True):
        with pytest.raises(UserError, match="step 6: eval gives loss = nan; start a new run with a lower"):
            fit(config, diverged, tmp_path, resume)
    assert [r["loss"] for r in strict(tmp_path) if r["kind"] == "eval"] == [None, None]
    assert fit(config, Toy(), tmp_path, True) == 0


# What is written and shown

numbers = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@settings(max_examples=40)
@given(st.recursive(numbers, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_holds_what_json_knows(value: Any) -> None:
    def want(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: want(child) for key, child in node.items()}
        if isinstance(node, list):
            return [want(child) for child in node]
        return None if isinstance(node, float) and (math.isnan(node) or math.isinf(node)) else node

    assert json.loads(json_text(value), parse_constant=pytest.fail) == want(value)


def test_output_that_is_ascii_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The banner's O(T·W), and a sample of any character."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    reporter = Reporter(tmp_path / "log.jsonl", 1, active=True)
    reporter.say("O(T\N{MIDDLE DOT}W)")
    reporter.done("sample", 1, 1, 1.0, 0.5, {"text": "\N{SNOWMAN} and \ud800"})
    reporter.close()
    assert stream.buffer.getvalue().decode("ascii").splitlines() == ["O(T?W)", "step 1  sample", "? and ?"]
    assert json.loads((tmp_path / "log.jsonl").read_text())["text"] == "\N{SNOWMAN} and \ud800"
