"""Benchmarks: what is counted and what is written. The figures themselves are not tested."""

import json
from pathlib import Path

import pytest
from devices import environment

from gptjax import cli
from gptjax.bench import data as bench_data
from gptjax.bench.attention import exponent
from gptjax.data.pool import cores
from gptjax.errors import UserError
from gptjax.hardware import peak_flops
from gptjax.planner.chips import CHIPS

TINY = ["--lengths", "8,32", "--window", "4", "--head-dim", "8"]


def test_attention_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["bench", "attention", *TINY, "--heads", "2", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "new" / "attention.json").read_text())
    assert (tmp_path / "new" / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert [(r["kind"], r["length"]) for r in result["rows"]] == [
        ("dense", 8), ("banded", 8), ("dense", 32), ("banded", 32)
    ]  # fmt: skip
    assert printed.count("blockwise") == 4
    assert result["device"] in printed
    pairs = {("dense", 8): 36, ("banded", 8): 1 + 2 + 3 + 5 * 4, ("dense", 32): 528, ("banded", 32): 6 + 29 * 4}
    for row in result["rows"]:  # two heads of 8: 4 operations a pair and channel forward, 12 with backward
        work = 2 * 8 * pairs[row["kind"], row["length"]]
        assert row["forward_flops"] * row["forward_s"] == pytest.approx(4 * work)
        assert row["both_flops"] * row["both_s"] == pytest.approx(12 * work)
        assert row["both_bytes"] * row["both_s"] == pytest.approx(12 * 2 * 8 * 4 * row["length"])


def test_exponent_of_a_power_law() -> None:
    lengths = (64, 128, 256, 512)
    rows = [{"kind": "dense", "length": n, "both_s": 3e-6 * n**2} for n in lengths]
    result = {"settings": {"window": 16}, "rows": rows}
    assert exponent(result, "dense", "both_s") == pytest.approx(2)
    assert exponent(result | {"settings": {"window": 64}}, "dense", "both_s") is None  # one length is not a line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "8,x"], "--lengths x: expected a whole number"),
        (["--lengths", "0"], "must be positive; nearest 1"),
        (["--attention", "flash"], "--attention flash: choose from auto, blockwise"),
        (["--attention", "splash"], "splash: it runs on TPU and this is cpu; choose from auto, blockwise"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        cli.run(["bench", "attention", *TINY, *arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device_kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100", None),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100X", None),
        ("TPU7x", 1150),
        ("TPU v6 lite", 918),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v4", 275),
        ("TPU v4 lite", 137),
        ("TPU v3", 70),  # per core, which is what jax counts
        ("TPU v2", 23),
        ("TPU v99", None),
        ("cpu", None),
    ],
)
def test_peak_is_that_of_the_very_card(device_kind: str, tera: float | None) -> None:
    assert peak_flops(device_kind) == (None if tera is None else pytest.approx(tera * 1e12))


def test_planned_chips_are_the_cards_of_the_big_nodes() -> None:
    tera = {"v4": 275, "v5e": 197, "v5p": 459, "v6e": 918, "tpu7x": 1150, "a100": 312, "h100": 989, "h200": 989}
    tera |= {"b200": 2250, "gb200": 2500}
    assert {family: chip.flops / 1e12 for family, chip in CHIPS.items()} == pytest.approx(tera)


def test_data_has_both_sides_and_the_building(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench_data, "SECONDS", 0.05)
    out = str(tmp_path / "out")
    words = ["--tokenizers", "bytes,sentencepiece:300", "--rounds", "2", "--out", out]
    assert cli.run(["bench", "data", file, *words]) == 0
    result = json.loads((tmp_path / "out" / "data.json").read_text())
    assert [row["tokenizer"] for row in result["stream"]] == ["bytes", "sentencepiece:300"]
    for row in result["stream"]:
        low, high = row["ratio_span"]
        assert 0 < low <= row["ratio"] <= high and row["encode_bytes_s"] > 0 and row["stream_bytes_s"] > 0
    assert [row["processes"] for row in result["build"]] == sorted({1, cores()})
    assert "| bytes |" in capsys.readouterr().out


@pytest.mark.slow
def test_save_has_both_sides_and_the_memory(file: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every turn saves, and no checkpoint stays."""
    words = ["--layout", "dp", "--interval", "2", "--rounds", "2", "--out", str(tmp_path / "out")]
    assert cli.run(["bench", "save", file, *words]) == 0
    result = json.loads((tmp_path / "out" / "save.json").read_text())
    assert len(result["plain_s"]) == len(result["rows"]) == 2
    for row in result["rows"]:
        assert 0 < row["blocked_s"] < row["seconds"] and row["waited_s"] >= 0
    assert result["local_bytes"] == result["state_bytes"] > 0
    assert "a save every 2 steps costs" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["save.json"]


@pytest.mark.slow
def test_serve_has_both_sides_and_what_a_storm_left(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("uvicorn", reason="needs the serve extra")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    how = {"slots": 4, "prompt": 20, "tokens": 12, "out": tmp_path}
    words = ["bench", "serve", str(small_run), *(word for name, v in how.items() for word in (f"--{name}", str(v)))]
    assert cli.run([*words, "--streams", "3", "--rounds", "2"]) == 0
    result = json.loads((tmp_path / "serve.json").read_text())
    assert len(result["ratios"]) == 2 and "server / engine" in capsys.readouterr().out
    for side in ("server", "engine"):  # two turns of three streams that ask four times
        row = result[side]
        assert row["tokens"] == 2 * 3 * 4 * 12 and 0 < row["first_s_p50"] <= row["first_s_p99"]
    assert cli.run([*words, "--streams", "12", "--load", "4"]) == 0
    storm = json.loads((tmp_path / "serve-load.json").read_text())
    assert storm["wrong"] == [] and not any(storm["left_behind"].values()), capsys.readouterr().out
    assert storm["counts"]["whole: right"] > 5 and storm["counts"]["probe afterwards: right"] == 8
    assert storm["memory"]["samples"] and set(storm["left_behind"]) >= {"gptjax_slots_used", "gptjax_queue_length"}
    with pytest.raises(UserError, match="the context holds 192 together"):
        cli.run([*words, "--prompt", "190"])
