"""What a run owes between steps, through stops and kills, and what its log and report say of it."""

import itertools
import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from tensorboardX.proto import event_pb2
from toy import STEP_TOKENS, Toy, fit, records, signal_in, steps_of, toy_config

from gptjax.config import Config, to_json
from gptjax.errors import UserError
from gptjax.train.checkpoint import Position
from gptjax.train.metrics import read_log
from gptjax.train.periodic import Action, Moment, due, every, owed
from gptjax.train.report import report


def test_every_is_a_function_of_the_step() -> None:
    assert [step for step in range(10) if every(3)(step, step == 7)] == [3, 6, 7, 9]
    assert [step for step in range(10) if every(0)(step, step == 7)] == [7]


def test_due_and_owed() -> None:
    a, b = Action("a", every(2), lambda _: {}), Action("b", every(3), lambda _: {}, at_stop=True)
    sixth = Moment(Position(6), None, False)
    assert due([a, b], sixth, stopping=False) == [a, b]
    assert due([a, b], sixth, stopping=True) == [b]
    log = [{"kind": "a", "step": 6, "x": 1.0}, {"kind": "b", "step": 3}]
    assert owed([a, b], sixth, log) == [b]
    assert owed([a, b], sixth, [*log, {"kind": "b", "step": 6}]) == []
    assert owed([a], sixth, [{"kind": "a", "step": 6, "x": None}]) == [a]


# Stops


def whole_and_parts(config: Config, tmp_path: Path, stops: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The same run twice: uninterrupted, and with a SIGTERM in each of these steps."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(config, Toy(), whole) == 0
    for count, stop in enumerate(stops):
        with monkeypatch.context() as patch:
            signal_in(stop, patch)
            assert fit(config, Toy(), parts, resume=count > 0) == 15
        assert steps_of(parts, "train")[-1] == stop
        assert steps_of(parts, "save")[-1] == stop
        assert stop not in steps_of(parts, "eval") + steps_of(parts, "sample")
    assert fit(config, Toy(), parts, resume=True) == 0
    return [whole, parts]


@pytest.fixture
def busy(tiny: Config) -> Config:
    """12 steps with something to do in most of them."""
    return toy_config(tiny, 12, eval_batches=1, eval_interval=4, sample_interval=6, save_interval=5, log_interval=5)


@pytest.mark.parametrize("stops", [[4], [12], [6, 8]])
def test_what_a_stop_leaves_is_done_on_resume(
    stops: list[int], busy: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation or sample due in the step that a signal stops, the last one too: done once, on its weights."""
    whole, parts = whole_and_parts(busy, tmp_path, stops, monkeypatch)
    for run in (whole, parts):
        assert steps_of(run, "eval") == [4, 8, 12]
        assert steps_of(run, "sample") == [6, 12]
    assert [r["text"] for r in records(whole, "sample")] == [r["text"] for r in records(parts, "sample")]
    assert [r["tokens"] for r in records(parts, "eval")] == [step * STEP_TOKENS for step in (4, 8, 12)]
    log = [(r["kind"], r["step"]) for r in read_log(parts / "log.jsonl")]
    late = [at for at, (kind, step) in enumerate(log) if kind in ("eval", "sample") and step in stops]
    assert late
    assert all(step <= log[at][1] for at in late for kind, step in log[:at])  # before the next step
    assert fit(busy, Toy(), parts, resume=True) == 0  # and nothing is owed any more
    assert steps_of(parts, "eval") == [4, 8, 12]


def test_every_step_is_in_one_record(busy: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last steps and those before a stop or a save, too: a window is the steps since the record before it."""
    whole, parts = whole_and_parts(busy, tmp_path, [7], monkeypatch)
    assert steps_of(whole, "train") == [5, 10, 12]
    assert steps_of(parts, "train") == [5, 7, 10, 12]
    for run in (whole, parts):
        seconds = [r["seconds"] for r in read_log(run / "log.jsonl") if "seconds" in r]
        assert seconds == sorted(seconds)  # of training, over all starts
        for before, after in itertools.pairwise(records(run, "train")):
            rate = (after["tokens"] - before["tokens"]) / (after["seconds"] - before["seconds"])
            if run == whole:
                assert after["tokens_per_s"] == pytest.approx(rate)


def test_the_share_of_time_that_waits_for_data_is_in_the_log(tiny: Config, tmp_path: Path) -> None:
    """Steps of a few milliseconds with batches of 50 wait for nearly all of the time."""
    config = toy_config(tiny, 12, log_interval=12)
    assert fit(config, Toy(batch_seconds=0.05), tmp_path) == 0
    (record,) = records(tmp_path, "train")
    assert 0.5 < record["data_wait"] <= 1


def test_a_stage_adds_what_it_does_between_steps(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a change to the loop: its record is the proof, a stop leaves it owed, a figure of it can end the run."""
    seen: list[int] = []

    def look(now: Moment) -> dict[str, Any]:
        seen.append(now.position.step)
        return {"norm": float(jax.numpy.linalg.norm(now.state.params["w"]))}

    config, more = toy_config(tiny, 6), [Action("look", every(2), look)]
    signal_in(4, monkeypatch)
    assert fit(config, Toy(), tmp_path, more=more) == 15
    assert seen == [2]
    assert fit(config, Toy(), tmp_path, resume=True, more=more) == 0
    assert seen == steps_of(tmp_path, "look") == [2, 4, 6]
    broken = [Action("look", every(8), lambda _: {"norm": float("inf")})]
    with pytest.raises(UserError, match="step 8: look gives norm = inf"):
        fit(toy_config(tiny, 8), Toy(), tmp_path, resume=True, more=broken)


# The profiler


@pytest.fixture
def running() -> list[list[int]]:
    """The trace that is being taken, if there is one."""
    return []


@pytest.fixture
def traces(running: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The steps (numbered from 0) of each trace that is written, by a profiler that only counts."""
    written: list[list[int]] = []

    def start(_: str) -> None:
        assert not running
        running.append([])

    def stop() -> None:
        written.append(running.pop())

    from gptjax.train import loop

    plain = loop.learning_rate

    def rate(config: Any, tokens: int) -> float:
        for trace in running:
            trace.append(tokens // STEP_TOKENS)
        return plain(config, tokens)

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    monkeypatch.setattr(loop, "learning_rate", rate)
    return written


@pytest.mark.parametrize(
    ("window", "stop", "want"),
    [
        ((2, 4), None, [[2, 3, 4]]),
        ((0, 0), None, [[0]]),
        ((5, 50), None, [[5, 6, 7]]),  # past the end
        ((7, 7), None, [[7]]),
        ((8, 9), None, []),
        ((2, 4), 2, [[2, 3, 4]]),  # a stop right before, within, at the end of and after the window
        ((2, 4), 4, [[2, 3], [4]]),
        ((2, 4), 5, [[2, 3, 4]]),
        ((2, 4), 6, [[2, 3, 4]]),
    ],
)
def test_the_trace_is_of_its_steps(
    window: tuple, stop: int | None, want: list, traces: list, running: list, tiny: Config, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = toy_config(tiny, 8, profile_steps=window)
    if stop:
        signal_in(stop, monkeypatch)
        assert fit(config, Toy(), tmp_path) == 15
        assert not running  # it would be lost
    assert fit(config, Toy(), tmp_path, resume=bool(stop)) == 0
    assert not running
    assert traces == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("2", [[2, 3], [5, 6]]),
        ("", [[2, 3], [5, 6, 7, 8, 9]]),
        ("99", [[2, 3], [5, 6, 7, 8, 9, 10, 11]]),
        ("0", [[2, 3]]),
    ],
)
def test_a_file_asks_for_a_trace_once(
    text: str, want: list, traces: list, running: list, tiny: Config, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """From the step after the one in whose record it is seen, beside the trace that the config has; not while one is
    being taken."""

    def ask(now: Moment) -> None:
        if now.position.step == 3:
            (tmp_path / "profile.request").write_text(text)

    config = toy_config(tiny, 12, profile_steps=(2, 3), log_interval=2)
    assert fit(config, Toy(), tmp_path, more=[Action("ask", every(1), ask)]) == 0
    assert traces == want and not running
    assert not (tmp_path / "profile.request").exists()
    assert ("profile.request: 0: must be a number of steps" in capsys.readouterr().err) == (text == "0")


def test_a_window_past_the_end_is_written(tiny: Config, tmp_path: Path) -> None:
    assert fit(toy_config(tiny, 3, profile_steps=(1, 9)), Toy(), tmp_path) == 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


# TensorBoard and the report


def scalars(run: Path) -> list[tuple[str, int]]:
    """(tag, step) of every scalar of every event file, read without a TensorBoard: length, its CRC, bytes, theirs."""
    found = []
    for file in (run / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack_from("<Q", data)
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            found += [(value.tag, event.step) for value in event.summary.value]
            data = data[16 + size :]
    return found


@pytest.fixture
def crashed(busy: Config, tmp_path: Path) -> tuple[Config, Path]:
    """A run that was saved at 5, logged at 6, gone in the evaluation of 8, and then resumed."""
    config = replace(busy, train=replace(busy.train, tensorboard=True, log_interval=3))

    def crash(count: int) -> dict[str, float]:
        if count == 1:
            raise RuntimeError("the machine is gone")
        return {"loss": 2.0, "bits_per_byte": 3.0}

    with pytest.raises(RuntimeError, match="gone"):
        fit(config, Toy(figures=crash), tmp_path)
    assert steps_of(tmp_path, "train") == [3, 5, 6]
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "st')
    assert fit(config, Toy(), tmp_path, resume=True) == 0
    return config, tmp_path


def test_tensorboard_shows_the_log_and_nothing_twice(crashed: tuple[Config, Path]) -> None:
    _, run = crashed
    found = scalars(run)
    assert len(found) == len(set(found))
    for kind, name in (("train", "loss"), ("eval", "bits_per_byte")):
        assert [step for tag, step in found if tag == f"{kind}/{name}"] == steps_of(run, kind)


def test_report_shows_every_start_and_every_evaluation(crashed: tuple[Config, Path]) -> None:
    config, run = crashed
    (run / "config.json").write_text(to_json(config))
    (run / "meta.json").write_text(json.dumps({"commit": "abc", "modified": True, "versions": {"jax": "0"}}))
    with (run / "log.jsonl").open("a") as log:
        log.write('{"kind": "eval", "step": 12, "tokens": 384, "seconds": 1e3, "loss": null, "perplexity": 2.5}\n')
        log.write('{"kind": "train", "step": 14, "tokens": 448, "loss": null, "grad_norm": null, "lr": 0.1, ')
        log.write('"tokens_per_s": 1.0, "mfu": null, "skipped": 2, "seconds": 1234.0}\n{"kind": "ev')
    report(str(run))
    page = (run / "report.html").read_text(encoding="utf-8")
    starts = re.findall(r"<tr><td>(20\d\d-[^<]*)</td><td>(\d+)</td><td>(gptjax[^<]*)</td><td>1? ?", page)
    assert [step for _, step, _ in starts] == ["0", "5"]
    assert "not finite nats, 2.5000 perplexity" in page
    assert "<th>training loss</th><td>not finite</td>" in page
    assert "1,234 s in 2 starts" in page
    assert "<th>time, over all starts</th>" in page and "lost 1 steps, " in page
    assert "\N{SNOWMAN}" in page
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_between_the_logged_steps_are_drawn(
    crashed: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the tokens of their own records: 4, 8 and 12, where the log has 3, 5, 6, 9, 10 and 12."""
    from matplotlib.axes import Axes

    _, run = crashed
    drawn: dict[str, list[float]] = {}
    plain = Axes.plot

    def plot(self: Axes, x: list, y: list, *args: Any, label: str = "", **more: Any) -> Any:
        drawn[label.split(":")[0]] = list(x)
        return plain(self, x, y, *args, label=label, **more)

    monkeypatch.setattr(Axes, "plot", plot)
    (run / "config.json").write_text("{}")
    (run / "meta.json").write_text('{"commit": "abc", "modified": true, "versions": {}}')
    report(str(run))
    assert drawn["evaluation loss"] == [step * STEP_TOKENS for step in (4, 8, 12)]


@pytest.mark.parametrize(
    ("log", "meta", "message"),
    [
        ('{"kind": "start", "step": 0}\n{"kind": "tr', "{}", "no training record yet"),
        ('{"kind": "train", "step": 5, "tokens": 5, "loss": 1.0, "tokens_per_s": 1.0, "mfu": null, "skipped": 0, '
         '"seconds": 1.0}', '{"commit": "a', "meta.json: missing or cut short"),
    ],
)  # fmt: skip
def test_report_of_half_a_run_is_one_line(log: str, meta: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(log)
    (tmp_path / "meta.json").write_text(meta)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        report(str(tmp_path))
