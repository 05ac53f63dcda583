"""A config fails early, in one line that names the field, the value and the nearest right one."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import cli
from gptjax import config as c
from gptjax.commands import arguments
from gptjax.commands.sample import Command as Sample
from gptjax.commands.train import Command as Train
from gptjax.config import load as loading
from gptjax.config.fields import ROUNDING, Leaf, walk
from gptjax.config.saved import changes, get
from gptjax.errors import UserError
from gptjax.sharding.mesh import check, degrees

BASE = c.Config("x", c.ModelConfig(4, 4, 128, seq_len=64, attention_pattern=("dense", "banded"), window=16))
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layout.data", "0"], "layout.data = 0: must be positive, or -1 for the rest; nearest 1"),
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
        (["--run", "s3://bucket/a"], "run = s3://bucket/a: neither a path nor gs://BUCKET/FOLDER"),
        (["--run", "gs://bucket"], "run = gs://bucket: neither a path nor gs://BUCKET/FOLDER"),
        (
            ["--data.cache_dir", "s3://bucket"],
            "data.cache_dir = s3://bucket: an address, and no path; name a folder",
        ),
        (["--init_from", "gs:/bucket/a"], "init_from = gs:/bucket/a: neither a path nor gs://BUCKET/FOLDER"),
        (["--train.batch_size", "0"], "train.batch_size = 0: must be positive; nearest 1"),
        (["--train.ramp_start", "7", "--train.micro_batch_size", "4"], "train.ramp_start = 7"),
        (["--data.seed", "-1"], "data.seed = -1"),
        (["--model.dropout", "1"], "model.dropout = 1.0: must lie in [0, 1)"),
        (["--optimizer.learning_rate", "nan"], "--optimizer.learning_rate nan: expected a number, such as 3e-4"),
        (["--optimizer.learning_rate", "0"], "optimizer.learning_rate = 0.0: must be positive"),
        (["--optimizer.clip_norm", "inf"], "--optimizer.clip_norm inf: expected a number"),
        (["--optimizer.final_ratio", "-5"], "optimizer.final_ratio = -5.0: must lie in [0, 1]; nearest 0"),
        (["--optimizer.b1", "-0.1"], "optimizer.b1 = -0.1: must lie in [0, 1); nearest 0"),
        (["--optimizer.b2", "1"], "optimizer.b2 = 1.0: must lie in [0, 1)"),
        (["--optimizer.eps", "-1"], "optimizer.eps = -1.0: must be positive"),
        (
            ["--optimizer.warmup_tokens", "2", "--optimizer.decay_tokens", "1"],
            "optimizer.warmup_tokens = 2: longer than",
        ),
        (["--train.profile_steps", "6,3"], "train.profile_steps = (6, 3): give first and last step, such as 10,13"),
        (["--train.profile_steps", "-1,3"], "train.profile_steps = -1: must not be negative; nearest 0"),
        (["--train.sample_prompt", ""], "train.sample_prompt = '': must not be empty"),
        (["--train.eval_batches", "-2"], "train.eval_batches = -2: must be at least -1; nearest -1"),
        (["--model.attention_pattern", ""], "model.attention_pattern = (): must not be empty"),
        (["--data.tokenizer", ""], "data.tokenizer = '': must not be empty"),
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
    assert text == subprocess.run([*command[:-1], "-h"], capture_output=True, text=True, check=True).stdout
    rows = list(walk(c.Config))
    assert len(rows) > 50
    for leaf in rows:
        assert leaf.doc, leaf.name
        assert f"--{leaf.name} " in text
        assert leaf.doc in text
    assert "--model.dropout  float  (in [0, 1); default 0.0)" in text  # the bound that is checked, where it stands


def test_json_round_trip() -> None:
    assert c.from_json(c.to_json(BASE)) == BASE
    text = c.to_json(BASE)
    for wrong, message in {
        text.replace('"dropout"', '"dropuot"'): "model.dropuot = 0.0: no such field; did you mean model.dropout?",
        text[: len(text) // 2]: "not whole JSON",
        text.replace('"adamw"', '"adam"'): "optimizer.kind = adam: choose from adamw, muon",
        text.replace("0.95", "NaN"): "optimizer.b2 = nan: must be a finite number",
        text.replace("50257", "50257.0"): "model.vocab_size = 50257.0: expected a whole number",
        "[]": "expected Config",
        "": "not whole JSON",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)) as error:
            c.from_json(wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("attention_pattern=('dense', 'local')", "model.attention_pattern = local: choose from dense, banded; nearest"),
        ("remat='ful'", "model.remat = ful: choose from none, dots, full; nearest full"),
        ("seq_len=8.0", "model.seq_len = 8.0: expected a whole number, such as 1000 or 1e9, not float; nearest 8"),
        ("dropout=float('nan')", "model.dropout = nan: must be a finite number"),
        ("scan_layers=1", "model.scan_layers = 1: expected true or false, not int"),
        ("num_laiers=3", "model.num_laiers = 3: no such field; did you mean model.num_layers?"),
        ("window=1 / 0", "ZeroDivisionError: division by zero"),
        ("window=500", "model.window = 500: must lie in 1..model.seq_len = 64"),
    ],
)
def test_a_value_in_a_file_is_checked_like_one_of_the_command_line(written: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    given = {
        "num_layers": "4",
        "num_heads": "4",
        "embed_dim": "128",
        "seq_len": "64",
        "attention_pattern": '("banded",)',
    }
    name, value = written.split("=", 1)
    body = ", ".join(f"{n}={v}" for n, v in (given | {"window": "16"} | {name: value}).items())
    file.write_text(f"from gptjax.config import *\n\n\ndef config():\n    return Config('x', ModelConfig({body}))\n")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        loading.load_config(str(file), [])
    assert "\n" not in str(error.value)
    assert "line 5" in str(error.value) or "must lie in" in str(error.value)


@given(st.sampled_from([leaf for leaf in walk(c.Config) if leaf.hint in (int, float)]), st.floats(), st.booleans())
def test_a_number_is_taken_within_its_bounds_and_else_refused_in_one_line(leaf: Leaf, number: float, cut: bool) -> None:
    """Whatever is typed, a config that is made is finite and of the right type, and what is refused is explained."""
    text = repr(int(number)) if cut and math.isfinite(number) else repr(number)
    try:
        got = get(loading.override(BASE, [f"--{leaf.name}", text]), leaf.name)
    except UserError as error:
        assert "\n" not in str(error) and leaf.name in str(error)
        if found := re.search(r"nearest (-?[\d.e+]+)$", str(error)):
            loading.override(BASE, [f"--{leaf.name}", found[1]])
    else:
        assert type(got) is leaf.hint and math.isfinite(got)
        assert got == float(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "x", "--samples", "0"], "--samples 0: must be positive; nearest 1"),
        (["sample", "x", "--temperature", "nan"], "--temperature nan: expected a number"),
        (["sample", "x", "--top-p", "0"], "--top-p 0.0: must lie in (0, 1]"),
        (["sample", "x", "--seed", str(2**64)], "must lie in 0..18446744073709551615"),
        (["sample", "x", "--smaples", "3"], "--smaples: gptjax sample has no such argument; did you mean --samples?"),
        (["sample", "x", "--prompt"], "--prompt: a value is missing"),
        (["sample", "x", "--prompt", "--seed", "1"], "--prompt: a value is missing, before --seed"),
        (["sample"], "gptjax sample: PATH is missing"),
        (["sample", "x", "y"], "y: gptjax sample takes no such word"),
        (["train"], "gptjax train: name a config"),
        (["train", "c.py", "--run", "--dry-run"], "--run: a value is missing, before --dry-run"),
        (["train", "c.py", "--data.source", "--run", "runs/a"], "--data.source: a value is missing, before --run"),
        (["train", "c.py", "-v"], "-v: gptjax train has no such argument"),
        (["train", "c.py", "--slices", "2"], "--topology and --slices"),
        (["plan", "c.py"], "--topology: a value is missing"),
        (["plan", "c.py", "--topology", "v5e-4", "--diff", "tp"], "--diff ('tp',): name two layouts with a comma"),
        (["plan", str(QUICKSTART), "--topology", "v5e-4", "--diff", "fsdp0/full/4,tp/full/4"], "layout.fsdp = 0"),
        (["trian", "c.py"], "gptjax trian: choose from train, run, sample"),
        (["bench", "all"], "gptjax bench all: choose from bench attention"),
    ],
)
def test_words_that_are_no_command(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        cli.run(words)
    assert "\n" not in str(error.value)


def test_a_value_may_look_like_a_flag() -> None:
    made = arguments.read("sample", Sample, ["x", "--prompt", "--a.b", "--seed=7"])
    assert (made.prompt, made.seed) == (("--a.b",), 7)
    train = arguments.read("train", Train, ["c.py", "--data.source", "--odd", "--train.seed=3", "--distributed"])
    assert (train.config, train.distributed) == ("c.py", True)
    assert train.overrides == ("--data.source", "--odd", "--train.seed=3")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_argument_of_every_verb_has_a_docstring_that_help_shows(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*verb.split(), "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for leaf in walk(cli._command(verb)):
        if leaf.name != "overrides":
            assert leaf.doc and leaf.doc in text, leaf.name


def refused(saved: c.Config, given: c.Config) -> list[str]:
    return [str(change) for change in changes(saved, given) if change.allowed is None]


def test_differences_name_only_what_a_run_may_not_change() -> None:
    free = replace(BASE, layout=c.LayoutConfig(tensor=2), train=replace(BASE.train, save_interval=7), run="elsewhere")
    assert refused(BASE, free) == []
    other = loading.override(free, ["--model.num_layers", "6", "--optimizer.b2", "0.9"])
    lines = refused(BASE, other)
    assert lines == ["model.num_layers: the run has 4, given 6", "optimizer.b2: the run has 0.95, given 0.9"]
    rounding = loading.override(BASE, ["--model.remat", "full", "--model.attention", "reference"])
    rounding = loading.override(rounding, ["--model.loss_chunk", "7", "--train.micro_batch_size", "64"])
    assert refused(BASE, rounding) == []
    assert {change.allowed for change in changes(BASE, rounding)} == {ROUNDING}
    dropped = [loading.override(config, ["--model.dropout", "0.1"]) for config in (BASE, rounding)]
    assert refused(*dropped) == ["train.micro_batch_size: the run has 0, given 64"]  # its masks count rows


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


@pytest.mark.parametrize(
    ("train", "lanes", "ways", "message"),
    [
        (
            {"batch_size": 16, "micro_batch_size": 8},
            2,
            16,
            "train.micro_batch_size = 8: .* = 16 of .*; nearest 16",
        ),
        ({"batch_size": 48, "micro_batch_size": 16}, 4, 6, "train.micro_batch_size = 16: .* nearest 12"),
        ({"batch_size": 16, "micro_batch_size": 8}, 2, 12, "train.batch_size = 16: .* nearest 12, or a product of 8,"),
        (
            {"batch_size": 16, "micro_batch_size": 8, "ramp_start": 8, "ramp_multiple": 8},
            2,
            16,
            "train.batch_size = 16: .* or a product of 8,",
        ),
    ],
)
def test_rows_that_other_devices_cannot_share(train: dict, lanes: int, ways: int, message: str) -> None:
    """What is told to be nearest is what the rest of the config allows."""
    config = c.validate(replace(BASE, data=replace(BASE.data, lanes=lanes), train=c.TrainConfig(**train)))
    with pytest.raises(UserError, match=message) as error:
        check(config, (1, 1, 1, ways, 1, 1))
    if "micro_batch_size" in message:
        near = int(str(error.value).rpartition(" ")[2])
        c.validate(replace(config, train=c.TrainConfig(**train | {"micro_batch_size": near})))
