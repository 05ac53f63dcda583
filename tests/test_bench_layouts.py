"""`gptjax bench layouts`: what is run, what becomes of a setting that does not end well, and what is said of it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptjax import cli
from gptjax.bench import layouts, trial
from gptjax.bench.compare import changes
from gptjax.bench.constants import constants
from gptjax.bench.layouts import Options, Setting, attached, calibrate, planned, select, settings
from gptjax.bench.layouts_report import summary
from gptjax.bench.measure import figures
from gptjax.config import Config, LayoutConfig, LoRAConfig, SFTConfig, to_json
from gptjax.config.load import load_config
from gptjax.errors import UserError
from gptjax.model.accounting import train_flops_per_token
from gptjax.planner.chips import topology, wiring, with_constants
from gptjax.planner.cost import Estimate, Place, estimate
from gptjax.planner.place import place
from gptjax.planner.search import name as plan_name
from gptjax.planner.search import search

FACTS = {
    "device": "cpu",
    "platform": "cpu",
    "count": 8,
    "local_count": 8,
    "first": True,
    "dtype": "float32",
    "versions": {"jax": "0.10.2"},
    "date": "2026-01-01",
    "limits": {"flops": 8e9, "bytes": 4e9, "gather": 1e8},
    "memory_bytes": 16e9,
    "attention": ["blockwise", "reference"],
    "attention_refused": {"splash": "it runs on TPU and this is cpu"},
}


def guess(place: Place) -> Estimate:
    """A predictor that any reader can check: 1 ms, and as much again for every way of the tensor axis."""
    config = place.config
    return Estimate({"parameters": 5e6}, {"products": 1e-3, "exposed": 1e-3 * max(config.layout.tensor, 1)}, ())


def answer(seconds: float) -> dict[str, Any]:
    times = [seconds, 0.9 * seconds, 1.2 * seconds]
    return {
        "status": "ok", "times_s": times, "compile_s": 2.0, "loss": 5.0, "memory_bytes": 7e6,
        "memory_source": "compiled program",
    }  # fmt: skip


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Without any child: the answer of each layout by its name, 40 ms where the test gives none."""
    answers: dict[str, dict[str, Any]] = {}

    def measure(config: Config, steps: int, timeout: float, distributed: bool) -> dict[str, Any]:
        given = answers.get(layouts._layout(config, config.layout, 8).name, answer(0.04))
        if given["status"] == "stopped":
            raise KeyboardInterrupt
        return given

    monkeypatch.setattr(layouts, "estimate", guess)
    monkeypatch.setattr(trial, "facts_of_devices", lambda config, timeout, distributed: FACTS)
    monkeypatch.setattr(trial, "measure", measure)
    return answers


def test_layouts_of_eight_devices(tiny: Config) -> None:
    made = {setting.name: setting for setting in settings(replace(tiny, layout=LayoutConfig(data=2)), FACTS)}
    assert " ".join(made) == (
        "dp2_fsdp4 dp8 fsdp8 fsdp4_tp2 fsdp4_tp2_seq fsdp2_tp4 fsdp2_tp4_seq tp8 tp8_seq pp2_fsdp4 pp4_fsdp2 pp8 "
        "fsdp4_cp2 fsdp2_cp4 cp8 replica2_fsdp4"
    )
    assert [name for name, s in made.items() if s.refused] == ["pp4_fsdp2", "pp8", "fsdp2_cp4", "cp8"]
    assert "does not divide the 2 repeats of the pattern; nearest 2" in made["pp8"].refused
    assert made["fsdp2_tp4_seq"].config.layout == LayoutConfig(fsdp=2, tensor=4, sequence_sharding=True)


def test_layouts_of_fine_tuning_are_as_many_and_predicted(tiny: Config, adapted: SFTConfig) -> None:
    """Its data have no lanes. Adapters leave out what no frozen matrix needs."""
    topology = attached(FACTS)
    names = {setting.name for setting in settings(tiny, FACTS)}
    tuned = replace(adapted, lora=LoRAConfig())
    for config in (adapted, tuned):
        assert {setting.name for setting in settings(config, FACTS)} == names
    small, whole = (layouts._predict(layouts.Setting("own", config), topology) for config in (adapted, tuned))
    assert small["predicted_bytes"] < whole["predicted_bytes"]
    assert small["uncalibrated_s"] < whole["uncalibrated_s"]


def test_own_layout_that_does_not_fit_is_a_row(tiny: Config) -> None:
    first = next(settings(replace(tiny, layout=LayoutConfig(fsdp=3)), FACTS))
    assert first.name == "own"
    assert "layout.fsdp = 3: fsdp 3 does not match 8 device(s)" in first.refused


def test_sweep_of_one_device(tiny: Config) -> None:
    made = {setting.name: setting for setting in settings(tiny, FACTS | {"count": 1})}
    remats = ["", "+remat=dots", "+remat=full"]
    assert list(made) == [
        "own", "unroll", "remat=dots", "remat=dots+unroll", "remat=full", "remat=full+unroll",
        *(f"micro={n}{remat}" for n in (4, 16) for remat in remats), "attention=reference", "attention=splash",
    ]  # fmt: skip
    assert [name for name, setting in made.items() if setting.refused] == ["attention=splash"]
    config = made["micro=16+remat=full"].config
    assert (config.train.batch_size, config.micro_batch_size, config.model.remat) == (16, 16, "full")
    whole = replace(tiny, train=replace(tiny.train, micro_batch_size=0))
    double = next(s for s in settings(whole, FACTS | {"count": 1}) if s.name == "batch=32")
    assert (double.config.train.batch_size, double.config.micro_batch_size) == (32, 32)  # 32 does not divide 16


def test_names_select_with_and_without_numbers(tiny: Config) -> None:
    every = list(settings(tiny, FACTS))

    def plans(name: str) -> Setting:
        return planned(tiny, FACTS, name)

    assert [s.name for s in select(every, "tp8,fsdp_tp,fsdp4_tp2", plans)] == ["tp8", "fsdp4_tp2", "fsdp2_tp4"]
    with pytest.raises(UserError, match=r"--layouts tq: no such setting here; choose from all, fsdp8.*nearest tp8"):
        select(every, "dp,tq", plans)
    with pytest.raises(UserError, match=r"--layouts fsdp8/much: no such setting here"):
        select(every, "fsdp8/much", plans)


def test_names_of_a_plan_are_taken(tiny: Config) -> None:
    """Every one that the search finds for these devices, with its remat and micro-batch."""
    every, where = list(settings(tiny, FACTS)), topology("v5e-8")
    printed = [candidate.name for candidate in search(tiny, where).fitting]
    assert len(printed) > 50
    chosen = select(every, ",".join(printed), lambda name: planned(tiny, FACTS, name))
    assert [setting.name for setting in chosen] == printed
    assert all(not setting.refused and plan_name(setting.config, 8) == setting.name for setting in chosen)
    (refused,) = select(every, "fsdp3_tp2", lambda name: planned(tiny, FACTS, name))
    assert "does not match 8 device(s)" in refused.refused


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("import time; time.sleep(60)", "timeout", "not done within 1 s"),
        ("import sys; sys.exit('RESOURCE_EXHAUSTED: wants 9 GB\\nlast words')", "out of memory", "wants 9 GB"),
        ("import os; os.kill(os.getpid(), 9)", "out of memory", "killed by SIGKILL"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "killed by SIGSEGV"),
        ("import sys; sys.exit('no such\\nlast words')", "failed", "exit status 1: last words"),
        ("pass", "failed", "exit status 0: no message"),
        ('print("noise"); print(\'{"status": "ok", "loss": 1}\')', "ok", None),
    ],
)
def test_a_child_that_ends_in_any_way_is_an_answer(
    program: str, status: str, reason: str | None, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "COMMAND", (sys.executable, "-S", "-c", program))
    found = trial.measure(tiny, 1, 1)
    assert found["status"] == status
    assert reason is None or reason in found["reason"]


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background does not have
from gptjax.bench import trial
from gptjax.config import from_json
trial.COMMAND = (sys.executable, "-S", "-c", sys.argv[1])
trial.measure(from_json(sys.stdin.read()), 1, 60)
"""


def test_an_interrupt_ends_the_child(tiny: Config, tmp_path: Path) -> None:
    """In a parent of its own, once the child says that it is there."""
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED, child], **pipes) as parent:
        assert parent.stdin and parent.stderr
        parent.stdin.write(to_json(tiny))
        parent.stdin.close()
        deadline = time.monotonic() + 60
        while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        parent.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in parent.stderr.read()
    assert ended(int(note.read_text()))


def ended(pid: int) -> bool:
    """Whether no such process goes on: it is gone, or only its status is left."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


SLEEPER = """
import os, sys, time
from gptjax.children import end_with_parent
end_with_parent()
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""
WAITER = """
import sys
from concurrent.futures import ThreadPoolExecutor
from gptjax.children import Children
with ThreadPoolExecutor(1) as pool, Children() as children:
    jobs = [pool.submit(children.run, [sys.executable, "-c", *sys.argv[1:]], "", 60) for _ in range(3)]
    jobs[0].result()
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_children_end_with_their_parent_by_any_signal(stop: signal.Signals, tmp_path: Path) -> None:
    note, begun = tmp_path / "pid", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    words = [sys.executable, "-c", f"{begun}{WAITER}", SLEEPER, str(note)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as parent:
        deadline = time.monotonic() + 60
        while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        parent.send_signal(stop)
        assert parent.wait(20)  # the two that wait do not start
    while not ended(int(note.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ended(int(note.read_text()))


def test_a_finished_row_is_written_at_once(file: str, stand_in: dict, tmp_path: Path) -> None:
    """What a stop leaves is a result of those rows, which a later run compares itself with."""
    words = ["bench", "layouts", file, "--layouts", "dp,fsdp,tp", "--out", str(tmp_path)]
    stand_in["tp8"] = {"status": "stopped"}
    with pytest.raises(KeyboardInterrupt):
        cli.run(words)
    left = json.loads((tmp_path / "layouts.json").read_text())
    assert ({row["name"] for row in left["rows"]}, left["settings_left"]) == ({"dp8", "fsdp8"}, 1)
    del stand_in["tp8"]
    assert cli.run([*words, "--compare", str(tmp_path / "layouts.json")]) == 0
    assert json.loads((tmp_path / "layouts.json").read_text())["settings_left"] == 0


def test_rows_table_and_plot(file: str, stand_in: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stand_in["fsdp8"] = answer(0.03)
    stand_in["tp8"] = answer(0.02)
    stand_in["fsdp4_tp2"] = {"status": "out of memory", "reason": "wants 9 GB"}
    stand_in["replica2_fsdp4"] = {"status": "timeout", "reason": "not done within 600 s"}
    names = "dp,fsdp,tp,fsdp4_tp2,replica_fsdp,pp8"
    out = tmp_path / "out"
    assert cli.run(["bench", "layouts", file, "--model.dropout", "0.1", "--layouts", names, "--out", str(out)]) == 0
    result = json.loads((out / "layouts.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["tp8", "fsdp8", "dp8", "fsdp4_tp2", "pp8", "replica2_fsdp4"]
    assert [row["status"] for row in rows.values()] == ["ok"] * 3 + ["out of memory", "skipped", "timeout"]
    assert result["config"]["model"]["dropout"] == 0.1
    # dp8 was named first, so it fixes the factor: 40 ms against the 2 of the predictor, who says 9 of tp8.
    assert result["calibration"]["reference"] == "dp8"
    assert result["calibration"]["factor"] == pytest.approx(20)
    assert rows["tp8"]["predicted_s"] == pytest.approx(0.18)
    assert rows["tp8"]["error"] == pytest.approx(8)
    assert rows["fsdp8"]["error"] == pytest.approx(1 / 3)
    assert rows["tp8"]["tokens_per_s"] == pytest.approx(16 * 16 / 0.02)
    printed = capsys.readouterr().out
    assert "pp8: skipped: layout.pipeline = 8: does not divide" in printed
    assert "fsdp4_tp2: out of memory: wants 9 GB" in printed
    last = printed.splitlines()[-1]
    assert last.startswith(f"{out / 'layouts.json'}, {out / 'layouts.png'}; median error of 2 predictions 417%")
    assert last.endswith("predicted best fsdp8, dp8 alike, measured best tp8 (2.00x as fast as the slowest of these)")
    assert (out / "layouts.png").read_bytes().startswith(b"\x89PNG")


CHIPS = [("NVIDIA H100 80GB HBM3", "gpu", "h100", 8), ("TPU v5", "tpu", "v5p", 64), ("TPU v6 lite", "tpu", "v6e", 1)]


@pytest.mark.parametrize(("kind", "platform", "family", "count"), CHIPS)
def test_constants_of_a_chip_are_what_a_plan_needs_to_be_right(
    kind: str, platform: str, family: str, count: int, tiny: Config, tmp_path: Path
) -> None:
    """A plan of such a slice or node with this file predicts the step that was measured, and another network."""
    config = replace(load_config("configs/gpt3_1_3b.py", []), layout=LayoutConfig(fsdp=count))
    config = replace(config, train=replace(config.train, micro_batch_size=128, batch_size=512))
    limits = {"flops": 5e14, "bytes": 2e12} | ({"gather": 4e11} if count > 1 else {})
    facts = FACTS | {"device": kind, "platform": platform, "count": count, "local_count": count, "limits": limits}
    facts["memory_bytes"] = 7e10
    here = topology(f"{family}-{count}x1" if platform == "gpu" else {"v5p": "v5p-128", "v6e": "v6e-1"}[family])
    usual = estimate(place(config, here)).update_seconds
    file = tmp_path / "chip.json"
    file.write_text(json.dumps(constants(config, 1.5 * usual, facts)))
    told = with_constants(here, file, 0)
    assert estimate(place(config, told)).update_seconds == pytest.approx(1.5 * usual, rel=1e-4)
    assert (told.chip.hbm, told.chip.hbm_rate) == (7e10, 2e12)
    rate = wiring(told, {"all": count})["all"][0]
    assert rate == (pytest.approx(4e11) if count > 1 else here.chip.link)
    assert constants(config, 1e-9, facts)[family]["matmul"] == 1  # it cannot be faster than the peak


def test_no_constants_of_what_no_plan_knows(tiny: Config) -> None:
    assert constants(tiny, 1.0, FACTS) == {}
    several = FACTS | {"device": "NVIDIA H200", "platform": "gpu", "count": 16}  # 8 of them here: two nodes
    assert constants(tiny, 1.0, several) == {}


def test_the_best_is_judged_by_tokens() -> None:
    def row(name: str, measured: float, predicted: float, tokens: int) -> dict[str, Any]:
        figures = {"median_s": measured, "predicted_s": predicted, "tokens_per_s": tokens / measured}
        return {"name": name, "error": predicted / measured - 1} | figures

    rows = [row("own", 1.0, 1.0, 100), row("twice", 1.6, 1.8, 200)]
    text = summary({"rows": rows, "calibration": {"reference": "own"}})
    assert text == "median error of 1 predictions 12%; predicted best twice, measured best twice: the same"
    assert "not judged" in summary({"rows": rows[:1], "calibration": {"reference": "own"}})


def test_figures_and_limits(tiny: Config) -> None:
    facts = FACTS | {"device": "NVIDIA H100 80GB HBM3", "platform": "gpu", "count": 2}
    found = figures(tiny, [0.1, 0.3, 0.2], facts)
    assert (found["median_s"], found["p10_s"], found["p90_s"]) == pytest.approx((0.2, 0.12, 0.28))
    assert found["mfu"] == pytest.approx(16 * 16 / 0.2 * train_flops_per_token(tiny.model) / (2 * 9.89e14))
    assert figures(tiny, [0.1], FACTS)["mfu"] is None
    gpu = attached(facts)
    assert (gpu.num_devices, gpu.chip.flops, gpu.chip.platform) == (2, 9.89e14, "gpu")
    assert (gpu.chip.flops * gpu.chip.matmul, gpu.chip.hbm_rate, gpu.chip.link) == pytest.approx((8e9, 4e9, 1e8))
    cpu = attached(FACTS).chip  # eight virtual devices share the machine; the gather was measured on all at once
    assert (cpu.flops * cpu.matmul, cpu.hbm_rate, cpu.hbm, cpu.link) == pytest.approx((1e9, 5e8, 2e9, 1e8))


def test_float8_that_a_gpu_does_not_have(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is measured, in the trainer's words."""
    gpu = SimpleNamespace(device_kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr(trial.jax, "devices", lambda: [gpu])
    with pytest.raises(UserError, match=r"model.fp8 = true: NVIDIA A100 .* has no float8 products"):
        trial._facts(replace(tiny, model=replace(tiny.model, fp8=True)))


def test_nothing_measured_is_still_a_result() -> None:
    rows = [{"name": "own", "status": "failed", "reason": "no", "uncalibrated_s": 0.5, "predicted_bytes": 1.0}]
    calibration = calibrate(rows, FACTS, attached(FACTS))
    assert (calibration["reference"], calibration["factor"], rows[0]["predicted_s"]) == (None, 1.0, 0.5)


def ok(name: str, median_s: float, p90_s: float) -> dict[str, Any]:
    return {"name": name, "status": "ok", "median_s": median_s, "p90_s": p90_s}


def result(rows: list[dict[str, Any]], flops: float = 1.0, copies: float = 1.0) -> dict[str, Any]:
    return {"rows": rows, "calibration": {"measured_limits": {"flops": flops, "bytes": copies}}}


def test_regressions() -> None:
    old = [ok("a", 1.0, 1.2), ok("b", 1.0, 1.02), ok("c", 1.0, 1.02), ok("d", 1.0, 1.0), ok("e", 1.0, 1.0)]
    new = [
        ok("a", 1.15, 2),  # slower, but the earlier run was so, too, at times
        ok("b", 1.04, 2),  # beyond the earlier spread, by too little
        ok("c", 1.06, 2),
        {"name": "d", "status": "out of memory", "reason": ""},
        ok("f", 9.0, 9.0),
    ]
    found = {change.name: change for change in changes(result(old), result(new))}
    assert {name: change.worse for name, change in found.items()} == {
        "a": False, "b": False, "c": True, "d": True, "e": False, "f": False
    }  # fmt: skip
    assert found["c"].text.startswith("1.06x the time (1000 -> 1060 ms)")
    assert found["d"].text == "was measured, now out of memory"
    assert found["e"].text == "not measured this time"


def test_a_busier_machine_is_no_regression() -> None:
    """Its products at two thirds and its copies at half of their rate before: sqrt(3) times the time is its own."""
    old, busy = result([ok("a", 1.0, 1.0)]), result([ok("a", 1.75, 1.8)], 2 / 3, 0.5)
    (change,) = changes(old, busy)
    assert change.text.startswith("1.01x the time (1000 -> 1750 ms)") and not change.worse
    (change,) = changes(busy, result([ok("a", 1.2, 1.2)]))  # as fast as before, and it should have been 1.01
    assert change.worse
    (change,) = changes(old, result([ok("a", 1.9, 1.9)], 2 / 3, 0.5))
    assert change.worse


def test_compare_ends_with_status_one(file: str, stand_in: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["bench", "layouts", file, "--layouts", "dp,fsdp", "--out", str(tmp_path)]
    assert cli.run(arguments) == 0
    again = [*arguments, "--compare", str(tmp_path / "layouts.json")]
    assert cli.run(again) == 0
    assert (
        "0 regression(s); the devices' measured limits now: matrix product 1.00x, copy 1.00x, gather 1.00x"
        in capsys.readouterr().out
    )
    stand_in["dp8"] = answer(0.06)
    assert cli.run(again) == 1  # it compares with the file that it then replaces
    assert "1.50x the time (40 -> 60 ms)  REGRESSION" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "TPU v4"}, "its device is TPU v4, here it is cpu"),
        ({"count": 4}, "its count is 4, here it is 8"),
        ({"benchmark": "attention"}, "not a result of gptjax bench layouts"),
        ({"config": "deeper"}, r"its model.num_layers is 8, here it is 1; compare runs of the same devices and config"),
    ],
)
def test_another_result_is_refused(
    change: dict, message: str, file: str, plain: Config, stand_in: dict, tmp_path: Path
) -> None:
    if "config" in change:
        change = {"config": asdict(replace(plain, model=replace(plain.model, num_layers=8)))}
    about = {name: FACTS[name] for name in ("device", "platform", "count", "dtype")}
    earlier = {"benchmark": "layouts", "config": asdict(plain), "rows": []} | about | change
    (tmp_path / "old.json").write_text(json.dumps(earlier))
    with pytest.raises(UserError, match=message):
        cli.run(["bench", "layouts", file, "--compare", str(tmp_path / "old.json"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.num_layer", "4"], "no such field; did you mean --model.num_layers?"),
        (["--lengths", "8"], "--lengths: gptjax bench layouts has no such argument"),
        (["--steps", "0"], "--steps 0: must be positive; nearest 1"),
        (["--layouts", "xx"], "--layouts xx: no such setting here"),
        (["--compare", "nowhere.json"], "--compare nowhere.json: No such file"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, file: str, stand_in: dict) -> None:
    with pytest.raises(UserError, match=message):
        cli.run(["bench", "layouts", file, *arguments])


def test_attention_takes_no_fields() -> None:
    with pytest.raises(UserError, match=r"--model\.window: gptjax bench attention has no such argument"):
        cli.run(["bench", "attention", "--model.window", "4"])


def test_only_the_first_host_reports(
    file: str, stand_in: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []

    def measure(config: Config, steps: int, timeout: float, distributed: bool) -> dict[str, Any]:
        asked.append(distributed)
        return answer(0.04)

    monkeypatch.setattr(trial, "facts_of_devices", lambda config, timeout, distributed: FACTS | {"first": False})
    monkeypatch.setattr(trial, "measure", measure)
    out = tmp_path / "out"
    assert cli.run(["bench", "layouts", file, "--layouts", "dp,fsdp", "--distributed", "--out", str(out)]) == 0
    assert (asked, capsys.readouterr().out, out.exists()) == ([True, True], "", False)


PARENT = """
import runpy, sys
from gptjax import cli
from gptjax.bench import trial
tests = runpy.run_path(sys.argv[1])
trial.facts_of_devices = lambda config, timeout, distributed: tests["FACTS"]
trial.measure = lambda config, steps, timeout, distributed: tests["answer"](0.04)
sys.exit(cli.run(["bench", "layouts", *sys.argv[2:]]))
"""


def test_the_parent_leaves_the_devices_alone(file: str, tmp_path: Path) -> None:
    """It would fail if it asked for the only platform there is said to be."""
    command = [sys.executable, "-c", PARENT, __file__, file, "--layouts", "dp,fsdp_tp", "--out", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "tpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, (tmp_path / "layouts.png").exists()) == (0, True), done.stderr


@pytest.mark.slow
def test_eight_virtual_devices(file: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert cli.run(["bench", "layouts", file, "--layouts", "dp,fsdp4_tp2", "--steps", "3", *out]) == 0
    result = json.loads((tmp_path / "out" / "layouts.json").read_text())
    assert (result["count"], result["platform"]) == (8, "cpu")
    rows = {row["name"]: row for row in result["rows"]}
    assert [row["status"] for row in rows.values()] == ["ok", "ok"]
    assert all(len(row["times_s"]) == 3 and row["compile_s"] > 0 and 4 < row["loss"] < 7 for row in rows.values())
    assert rows["dp8"]["memory_bytes"] > 1.5 * rows["fsdp4_tp2"]["memory_bytes"]  # it holds the whole state
    assert result["calibration"]["measured_limits"]["gather"] > 0
    assert rows["dp8"]["predicted_bytes"] > 1.5 * rows["fsdp4_tp2"]["predicted_bytes"]


@pytest.mark.slow
def test_a_model_beyond_any_memory_is_a_row(tiny: Config) -> None:
    huge = replace(tiny, model=replace(tiny.model, embed_dim=2**20, num_layers=2))  # 26 million million parameters
    found = trial.measure(huge, 1, Options().timeout)
    assert found["status"] == "out of memory"
    assert "\n" not in found["reason"]
