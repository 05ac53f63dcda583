"""What a window of steps is said to have taken."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from toy import toy_config

from gptjax.config import Config
from gptjax.train.checkpoint import Position
from gptjax.train.meter import Clock, Meter, _longest
from gptjax.train.metrics import Reporter

STEP = 0.2
NAMES = ("loss", "grad_norm", "skipped", "bad_streak")


class Later:
    """A number on a device that has it at `at`."""

    def __init__(self, at: float):
        self.at = at

    def is_ready(self) -> bool:
        return time.perf_counter() >= self.at

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        time.sleep(max(0.0, self.at - time.perf_counter()))
        return np.zeros((), np.float32)


def test_a_step_that_takes_as_long_to_queue_as_to_run_is_not_the_next_ones_time(
    tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read when the next is queued, the first would have taken two steps and the last none: 28 million tokens a second
    were said of a GPU. The MFU is of what a stage needs for each of these tokens."""
    monkeypatch.setattr("gptjax.train.meter.peak_flops", lambda kind: 1e6)
    config = toy_config(tiny, 3)
    reporter = Reporter(tmp_path / "log.jsonl", 1, active=True)
    start, clock = time.perf_counter(), Clock()
    meter = Meter(config, tmp_path, reporter, clock, Position(), 7.0)
    for step in (1, 2, 3):
        metrics: Any = dict.fromkeys(NAMES, Later(start + step * STEP))
        meter.add(Position(step=step, tokens=100 * step), 0.1, metrics)
        now: Any = SimpleNamespace(position=Position(step=step))
        meter.end_window(now)
        time.sleep(max(0.0, start + (step + 0.9) * STEP - time.perf_counter()))  # the next one is queued
    meter.flush()
    reporter.close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["seconds"] for row in rows] == pytest.approx([STEP, 2 * STEP, 3 * STEP], abs=0.4 * STEP)
    assert [row["mfu"] for row in rows] == pytest.approx([7 * row["tokens_per_s"] / 8e6 for row in rows])


def test_waiting_for_a_batch_counts_for_its_own_step(tmp_path: Path, tiny: Config) -> None:
    """A batch that is drawn between two steps takes most of the time, and never more than there is."""
    reporter = Reporter(tmp_path / "log.jsonl", 1, active=True)
    meter = Meter(toy_config(tiny, 3), tmp_path, reporter, Clock(), Position(), 7.0)
    for step in (1, 2, 3):
        with meter.waiting():
            time.sleep(0.9 * STEP)
        metrics: Any = dict.fromkeys(NAMES, Later(time.perf_counter() + 0.1 * STEP))
        meter.add(Position(step=step, tokens=100 * step), 0.1, metrics)
        now: Any = SimpleNamespace(position=Position(step=step))
        meter.end_window(now)
    meter.flush()
    reporter.close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["data_wait"] for row in rows] == pytest.approx([0.9, 1, 1], abs=0.08)


@pytest.mark.parametrize(("shares", "want"), [([0.1, 0.7, 0.2], (0.7, "process 1")), ([0.0, 0.004], (0.004, ""))])
def test_the_process_that_waits_for_data_is_named(
    shares: list[float], want: tuple[float, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for it in their sums, and have waited for no data."""
    assert _longest(0.25) == (0.25, "")
    monkeypatch.setattr(jax, "process_count", lambda: len(shares))
    monkeypatch.setattr("gptjax.train.meter.multihost_utils.process_allgather", lambda mine: np.array(shares))
    assert _longest(shares[0]) == want
