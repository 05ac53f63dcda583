"""A config fails early, in one line that names the field, the value and the nearest right one."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import config as c
from gptjax.config import load as loading
from gptjax.errors import UserError
from gptjax.sharding.mesh import check, degrees

BASE = c.Config("x", c.ModelConfig(4, 4, 128, seq_len=64, attention_pattern=("dense", "banded"), window=16))
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.num_layer", "4"], "--model.num_layer: no such field; did you mean --model.num_layers?"),
        (["--num_heads", "4"], "--num_heads: no such field; did you mean --model.num_heads?"),
        (["--train.seed", "one"], "--train.seed one: expected a whole number, such as 1000 or 1e9"),
        (["--model.dropout", "much"], "--model.dropout much: expected a number, such as 3e-4"),
        (["--model.scan_layers", "maybe"], "--model.scan_layers maybe: expected true or false"),
        (["--model.dtype", "float16"], "nearest bfloat16"),
        (["--model.attention_pattern", "dense,bandit"], "nearest banded"),
        (["--layout", "fsd"], "choose from dp, fsdp, tp, tp_seq"),
        (["--layout.tensor"], "--layout.tensor: a value is missing"),
        (["--model", "big"], "--model: a section"),
        (["model.dropout", "0"], "model.dropout: expected --section.field value"),
        (["--model.num_heads", "5"], "model.num_heads = 5: does not divide model.embed_dim = 128; nearest 4"),
        (["--model.num_layers", "3"], "model.num_layers = 3: not a multiple of the pattern dense,banded (2); nearest"),
        (["--model.window", "65"], "model.window = 65: must lie in 1..model.seq_len = 64; nearest 64"),
        (["--train.micro_batch_size", "7"], "train.micro_batch_size = 7: does not divide train.batch_size = 256"),
        (["--data.lanes", "3"], "data.lanes = 3: does not divide the micro-batch of 256 sequences; nearest"),
        (["--train.batch_size", "0"], "train.batch_size = 0: must be positive; nearest 1"),
        (["--train.ramp_start", "7", "--train.micro_batch_size", "4"], "train.ramp_start = 7"),
        (["--data.seed", "-1"], "data.seed = -1"),
        (["--model.dropout", "1"], "model.dropout = 1.0: must lie in [0, 1)"),
    ],
)
def test_bad_override_is_one_line(args: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        c.validate(loading.override(BASE, args))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_reach_every_depth() -> None:
    args = [
        "--model.seq_len=1e2",
        "--train.profile-steps",
        "3,5",
        "--layout",
        "tp_seq",
        "--layout.data",
        "2",
        "--run",
        "r",
    ]
    got = loading.override(BASE, args)
    assert (got.model.seq_len, got.train.profile_steps, got.run) == (100, (3, 5), "r")
    assert got.layout == c.LayoutConfig(data=2, fsdp=1, tensor=-1, sequence_sharding=True)


def test_every_field_has_a_docstring_and_help_shows_it() -> None:
    command = [sys.executable, "-m", "gptjax", "train", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = list(loading.walk(c.Config))
    assert len(rows) > 50
    for name, _, _, doc in rows:
        assert doc, name
        assert f"--{name} " in text
        assert doc in text


def test_json_round_trip() -> None:
    assert c.from_json(c.to_json(BASE)) == BASE
    with pytest.raises(UserError, match=r"unknown field model.colour"):
        c.from_json(c.to_json(BASE).replace('"dropout"', '"colour"'))


def test_differences_name_only_what_a_run_may_not_change() -> None:
    free = replace(BASE, layout=c.LayoutConfig(tensor=2), train=replace(BASE.train, save_interval=7), run="elsewhere")
    assert loading.differences(BASE, free) == []
    other = loading.override(free, ["--model.num_layers", "6", "--optimizer.b2", "0.9"])
    lines = loading.differences(BASE, other)
    assert lines == ["model.num_layers: the run has 4, given 6", "optimizer.b2: the run has 0.95, given 0.9"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; did you mean quickstart.py?"),
        ("x = 1", "must define config()"),
        ("def config(): return 3", "must define config()"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
    ],
)
def test_bad_config_file(text: str | None, message: str, tmp_path: Path) -> None:
    file = QUICKSTART.with_name("quickstrat.py") if text is None else tmp_path / "bad.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        loading.load_config(str(file), [])


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8), st.sampled_from(["data", "fsdp", "tensor"]))
def test_free_degree_takes_the_rest_or_says_why(devices: int, a: int, b: int, free: str) -> None:
    fixed = dict(zip([n for n in ("data", "fsdp", "tensor") if n != free], (a, b), strict=True))
    layout = c.LayoutConfig(**{free: -1, **fixed})
    if devices % (a * b):
        with pytest.raises(UserError, match=r"does not match .* nearest \d"):
            degrees(layout, devices)
    else:
        sizes = degrees(layout, devices)
        assert sizes[0] * sizes[1] * sizes[2] * sizes[3] * sizes[4] * sizes[5] == devices


@pytest.mark.parametrize(
    ("layout", "devices", "message"),
    [
        (c.LayoutConfig(fsdp=3), 8, "layout.fsdp = 3"),
        (c.LayoutConfig(data=-1, fsdp=-1), 8, "layout.fsdp = -1: layout.data is -1 already"),
        (c.LayoutConfig(data=0), 8, "layout.data = 0: must be positive"),
        (c.LayoutConfig(fsdp=1, tensor=8), 8, "layout.tensor = 8: does not divide model.num_heads = 4; nearest 4"),
        (c.LayoutConfig(fsdp=96), 96, "not divisible by replica x data x fsdp = 96 of the mesh; nearest 288"),
        (c.LayoutConfig(fsdp=256), 256, "layout.fsdp = 256: does not divide model.embed_dim = 128; nearest 128"),
        (c.LayoutConfig(fsdp=1, context=3), 3, "layout.context = 3: twice that does not divide model.seq_len = 64"),
        (
            c.LayoutConfig(fsdp=1, context=4),
            4,
            "chunks of 8 positions are shorter than model.window - 1 = 15; nearest 2",
        ),
        (
            c.LayoutConfig(fsdp=1, context=2, tensor=3, sequence_sharding=True),
            6,
            "layout.tensor = 3: does not divide model.num_heads = 4",
        ),
    ],
)
def test_layout_that_does_not_fit(layout: c.LayoutConfig, devices: int, message: str) -> None:
    config = replace(BASE, layout=layout)
    with pytest.raises(UserError) as error:
        check(config, degrees(layout, devices))
    assert message in str(error.value)
