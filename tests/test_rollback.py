"""A run that goes back: to which checkpoint, over which rows, whatever ends it on the way; and where its time went."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from toy import NAN_GRADIENT, NAN_LOSS, STEP_TOKENS, Toy, crash_at, fit, records, steps_of, toy_config

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.train import goodput
from gptjax.train.checkpoint import FOLDER, position_of, read_meta
from gptjax.train.metrics import read_log

BAD = {8: NAN_LOSS, 9: NAN_GRADIENT, 10: NAN_LOSS}
"""Rows by their place in the data: a streak of three that begins between the checkpoints at 6 and 9."""


@pytest.fixture
def config(tiny: Config) -> Config:
    """20 steps, of which every third is saved and every fourth evaluated."""
    config = toy_config(tiny, 20, save_interval=3, log_interval=5, keep_last=9, eval_batches=1, eval_interval=4)
    return replace(config, optimizer=replace(config.optimizer, max_bad_steps=3))


def ended(run: Path) -> tuple[Any, np.ndarray]:
    """The position and the parameters of the last checkpoint."""
    folder = run.absolute() / FOLDER
    newest = folder / str(max(int(path.name) for path in folder.iterdir() if path.name.isdigit()))
    with ocp.StandardCheckpointer() as reader:
        return position_of(read_meta(newest)), np.asarray(reader.restore(newest / "state")["params"]["w"])


def test_a_streak_goes_back_and_its_rows_are_passed_over(config: Config, tmp_path: Path) -> None:
    """To 6, not to 9, which was saved among the bad steps; then 14 steps on the rows from 11 on. Fine steps are all
    alike, so the parameters are those of a run that never met a bad one."""
    assert fit(config, Toy(BAD), tmp_path / "run") == 0
    position, w = ended(tmp_path / "run")
    assert (position.step, position.tokens) == (20, 20 * STEP_TOKENS)
    assert (position.data, position.passed) == ((24,), ((6, 10),))
    assert fit(config, Toy(), tmp_path / "plain") == 0
    np.testing.assert_array_equal(w, ended(tmp_path / "plain")[1])
    for run in ("run", "plain"):
        assert steps_of(tmp_path / run, "save") == [3, 6, 9, 12, 15, 18, 20]
        assert steps_of(tmp_path / run, "eval") == [4, 8, 12, 16, 20]
    (told,) = records(tmp_path / "run", "rollback")
    assert (told["step"], told["end"], told["cost"]["lost_steps"]) == (6, 10, 4)
    assert told["reason"].startswith("step 10: 3 bad steps in a row, optimizer.max_bad_steps = 3")
    assert records(tmp_path / "run", "train")[-1]["skipped"] == 0
    (start,) = records(tmp_path / "run", "start")
    size = 4 * (3 * 4 + 6)  # four numbers with Adam's two of each, and six counters and statistics
    assert start["saves"].startswith(f"{size} B each, up to {size} B of host memory meanwhile; ")
    assert read_meta((tmp_path / "run" / FOLDER / "9").absolute())["position"]["data"] == [13]  # saved anew


@pytest.mark.parametrize("call", [9, 12, 15, 22])
def test_a_crash_before_or_after_it_changes_nothing(
    call: int, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the bad steps, right after the way back, before and after the next checkpoint."""
    assert fit(config, Toy(BAD), tmp_path / "whole") == 0
    crash_at(call, monkeypatch)
    with pytest.raises(RuntimeError, match="gone"):
        fit(config, Toy(BAD), tmp_path / "run")
    assert fit(config, Toy(BAD), tmp_path / "run", resume=True) == 0
    (position, w), (want, expected) = ended(tmp_path / "run"), ended(tmp_path / "whole")
    assert position == want
    np.testing.assert_array_equal(w, expected)
    for kind in ("train", "save", "eval"):
        assert steps_of(tmp_path / "run", kind) == sorted(set(steps_of(tmp_path / "run", kind)))


def test_what_is_let_in_goes_back_too(config: Config, tmp_path: Path) -> None:
    """With skip_nonfinite off the parameters are lost at the first one, and are those of the checkpoint again."""
    config = replace(config, optimizer=replace(config.optimizer, skip_nonfinite=False))
    assert fit(config, Toy({8: NAN_GRADIENT}), tmp_path) == 0
    position, w = ended(tmp_path)
    assert (position.data, position.passed) == ((22,), ((6, 8),)) and np.isfinite(w).all()


def test_after_so_many_times_the_run_ends_with_one_line(config: Config, tmp_path: Path) -> None:
    """Also where it is started again: how often it went back is in the checkpoint."""
    config = replace(config, train=replace(config.train, rollbacks=1))
    again = Toy(BAD | dict.fromkeys((18, 19, 20), NAN_LOSS))
    for resume in (False, True):
        with pytest.raises(UserError, match=r"step 16: 3 bad .*, after going back 1 time\(s\) \(train.rollbacks"):
            fit(config, again, tmp_path, resume)
    assert ended(tmp_path)[0].passed == ((6, 10),)
    assert fit(replace(config, train=replace(config.train, rollbacks=2)), again, tmp_path, resume=True) == 0
    assert ended(tmp_path)[0].passed == ((6, 10), (12, 16))


def test_the_time_of_a_run_is_counted_once(config: Config, tmp_path: Path) -> None:
    """Shares of what the log has, over a stop, a rollback and a resume; lost steps are in no other part."""
    toy = Toy(BAD, batch_seconds=0.05)
    assert fit(replace(config, train=replace(config.train, total_tokens=16 * STEP_TOKENS)), toy, tmp_path) == 0
    assert fit(config, toy, tmp_path, resume=True) == 0
    log = read_log(tmp_path / "log.jsonl")
    parts = goodput.seconds_by_part(log)
    assert parts["data"] + parts["steps"] == pytest.approx([r for r in log if r["kind"] == "train"][-1]["seconds"])
    assert parts["data"] > 0.2
    assert parts["lost"] >= 0.1  # four steps that waited so long
    assert parts["compile"] == pytest.approx(sum(r["took"] for r in log if r["kind"] == "compile"))
    assert [r["step"] for r in log if r["kind"] == "compile"] == [0, 6, 16]
    assert min(parts[part] for part in ("save", "evaluate", "start")) > 0
    words = goodput.in_words(log)
    assert "waiting for data" in words and "lost" in words


def test_parts_of_a_log() -> None:
    log = [
        {"kind": "start", "step": 0, "cost": {"start": 4.0, "down": 0.0, "lost": 0.0, "lost_steps": 0}},
        {"kind": "compile", "step": 0, "took": 6.0},
        {"kind": "train", "step": 5, "seconds": 50.0, "data_wait": 0.2},
        {"kind": "save", "step": 5, "seconds": 50.5, "took": 1.0},
        {"kind": "eval", "step": 5, "seconds": 50.5, "took": 2.0},
        {"kind": "start", "step": 5, "cost": {"start": 5.0, "down": 10.0, "lost": 7.0, "lost_steps": 3}},
        {"kind": "train", "step": 8, "seconds": 60.0, "data_wait": 1.2},
        {"kind": "train", "step": 9, "seconds": 80.0, "data_wait": None},
        {"kind": "end", "step": 9, "took": 1.0},
    ]
    parts = goodput.seconds_by_part(log)
    want = {"steps": 60, "data": 20, "compile": 6, "save": 2, "evaluate": 2, "start": 9, "down": 10, "lost": 7}
    assert parts == pytest.approx(want)
    assert goodput.in_words(log).startswith("1m 56s: steps 51.7%, waiting for data 17.2%, compiling 5.2%")
    assert goodput.cost_in_words(log[5]) == "down 0m 10s, starting 0m 05s, lost 3 steps, 0m 07s"
    assert goodput.in_words([{"kind": "start", "step": 0}]) == "none"
