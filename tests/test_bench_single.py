"""`gptjax bench single`: what is measured, what is chosen, and that the peer does the same work."""

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from gptjax import cli
from gptjax.bench import trial
from gptjax.bench.parts import PARTS, UNKNOWN, Span, divided, floors, instructions, part_of, seconds_by_part
from gptjax.bench.single import OPTIONS, Options, alone, climb, search
from gptjax.bench.single_report import doubts, markdown
from gptjax.bench.work import Work
from gptjax.config import Config, LoRAConfig, ModelConfig, SFTConfig
from gptjax.data.rows import PADDING, next_token
from gptjax.errors import UserError
from gptjax.hardware import COMPILER_OPTIONS, compiler_options
from gptjax.model.accounting import train_flops_per_token
from gptjax.planner.chips import topology
from gptjax.planner.compile import devices_of
from gptjax.stages import SFT
from gptjax.stages.pretrain import Pretrain

ROOT = Path(__file__).parents[1]
FACTS = {
    "device": "NVIDIA H100 80GB HBM3",
    "platform": "gpu",
    "dtype": "bfloat16",
    "versions": {"jax": "0.11.2"},
    "date": "2026-01-01",
    "limits": {"flops": 8e14, "bytes": 3e12},
}


def answer(config: Config, rate: float) -> dict[str, Any]:
    """Of a process that trained at so many tokens per second."""
    seconds = config.train.batch_size * config.model.seq_len / rate
    parts = {part: seconds / 10 for part in PARTS} | {"unknown": 0.0, "idle": 0.4 * seconds}
    return {
        "status": "ok", "times_s": [seconds] * 3, "compile_s": 2.0, "loss": 5.0, "memory_bytes": 7e6,
        "memory_source": "allocator", "compute_width": 2, "state_bytes": {"params": 100, "opt_state": 200},
        "parts_s": parts, "stream_s": [1.25 * seconds] * 3, "again_s": [seconds] * 3,
    }  # fmt: skip


OUT_OF_MEMORY = {"status": "out of memory", "reason": "RESOURCE_EXHAUSTED: 81 GB"}


def test_operations_belong_to_parts() -> None:
    names = {
        "jit(step)/while/body/jvp(GPT)/unit_3/block_0/attention/dot_general": "attention",
        "jit(step)/while/body/jvp(GPT)/unit_3/block_0/norm_attention/sub": "rest",
        "jit(step)/transpose(jvp(GPT))/unit_3/block_0/qkv/dot_general": "projections",
        "jit(step)/transpose(jvp(GPT))/unit_3/block_0/projection/reduce_sum": "projections",
        "jit(step)/jvp(GPT)/unit_0/block_1/mlp/checkpoint/tanh": "MLP",
        "jit(step)/jvp(loss)/while/body/closed_call/exp": "head and loss",
        "jit(step)/optimizer/mul": "optimizer",
        "jit(step)/while/body/add": "rest",
        "": "rest",
    }
    assert {name: part_of(name) for name in names} == names


@pytest.mark.slow
def test_every_part_of_a_real_step_has_instructions(tiny: Config) -> None:
    """The scopes that PARTS names are those that the model and the step open."""
    work = trial.Work.prepare(alone(tiny), jax.devices()[:1])
    state = trial.init_state(work.config, work.stage, work.shardings)
    found = instructions(work.compile(state, {}).as_text())
    assert set(found.values()) == set(PARTS)


def test_a_trace_is_summed_by_part(tmp_path: Path) -> None:
    """Products of 400 x 400 in one scope cost far more than a sum in another, and loops are not counted twice."""

    def heavy(x: jax.Array) -> jax.Array:
        def turn(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            with jax.named_scope("mlp"):
                return jnp.tanh(x @ x), None

        x, _ = jax.lax.scan(turn, x, None, length=20)
        with jax.named_scope("optimizer"):
            return x.sum()

    x = jnp.ones((400, 400))
    step = jax.jit(heavy).lower(x).compile()
    step(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        step(x).block_until_ready()
    seconds = seconds_by_part(tmp_path, step.as_text(), "jit_heavy", 2)
    assert seconds["MLP"] > 5 * (sum(seconds.values()) - seconds["MLP"]) > 0
    assert seconds[UNKNOWN] == 0
    assert set(seconds_by_part(tmp_path, step.as_text(), "jit_other", 2).values()) == {0.0}


def test_work_that_outlasts_its_call_is_counted(tmp_path: Path) -> None:
    """A CPU's product returns when its work is dealt to threads: at most 57% of these 30 products was in their calls.
    The best of three runs, since others use the machine, too."""

    def products(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        with jax.named_scope("mlp"):
            for w in weights:
                x = x @ w
        return x

    x, weights = jnp.ones((512, 768)), [jnp.full((768, 768), 1e-3)] * 30
    options = compiler_options(jax.devices()[0])
    step = jax.jit(products, compiler_options=options).lower(x, weights).compile()
    step(x, weights).block_until_ready()
    shares = []
    for i in range(3):
        with jax.profiler.trace(str(tmp_path / str(i))):
            started = time.perf_counter()
            step(x, weights).block_until_ready()
            whole = time.perf_counter() - started
        seconds = seconds_by_part(tmp_path / str(i), step.as_text(), "jit_products", 2)
        assert seconds[UNKNOWN] == 0
        assert sum(seconds.values()) <= whole
        shares.append(seconds["MLP"] / whole)
    assert max(shares) > 0.8


def test_the_clock_is_divided_among_what_is_in_progress() -> None:
    """Two threads, nanoseconds: a runs alone, leaves work that fills the other thread while b runs, then both."""
    spans = [Span("a", 0, 10, 30), Span("b", 10, 20, 20), Span("c", 40, 50, 50), Span("c", 40, 50, 50)]
    seconds = {name: 1e9 * spent for name, spent in divided(spans, 2).items()}
    assert seconds == pytest.approx({"a": 10 + 10 / 2 + 10, "b": 10 / 2, "c": 10})  # 30 to 40 is idle
    seconds = {name: 1e9 * spent for name, spent in divided(spans, 1).items()}
    assert seconds == pytest.approx({"a": 10 + 10, "b": 10, "c": 10})  # one thread: while b runs, a waits


@given(
    st.lists(st.tuples(st.sampled_from("abc"), *[st.integers(0, 20)] * 3), max_size=12),
    st.integers(1, 4),
)
def test_the_parts_sum_to_the_time_in_which_anything_ran(made: list[tuple[str, int, int, int]], workers: int) -> None:
    spans = [Span(name, start, start + runs, start + runs + more) for name, start, runs, more in made]
    covered = {moment for s in spans for moment in range(int(s.start), int(s.done))}
    assert sum(divided(spans, workers).values()) == pytest.approx(1e-9 * len(covered), abs=1e-15)


def test_a_trace_that_cannot_be_right_says_so(tiny: Config) -> None:
    spent = {"MLP": 0.06, "rest": 0.46, UNKNOWN: 0.0, "idle": 0.48}
    parts = {part: {"share": s, "floor": 0.52 if part == "MLP" else 0.0} for part, s in spent.items()}
    row = {"name": "c", "median_s": 1.0, "parts": parts, "parts_s": spent}
    assert doubts(row) == ["not to be trusted: MLP has 6% of the step, below its floor of 52%"]
    assert "traced step took +100%" in doubts(row | {"median_s": 0.5})[1]
    parts["MLP"]["share"], parts["idle"]["share"], parts[UNKNOWN]["share"] = 0.6, 0.6, 0.02
    assert [doubt.split(" of ")[0] for doubt in doubts(row)] == ["not to be trusted: 2%", "not to be trusted: 60%"]
    parts["idle"]["share"], parts[UNKNOWN]["share"] = 0.1, 0.0
    assert not doubts(row)


def test_floors_are_the_products_and_the_bytes() -> None:
    model = ModelConfig(2, 4, 64, seq_len=128, vocab_size=1000, attention_pattern=("dense", "banded"), window=16)
    config = Config("c", model, train=replace(Config("c", model).train, batch_size=3))
    flops = {"flops": 1e6, "bytes": 1e30}
    least = floors(config, flops, 2, {"params": 10, "opt_state": 20})
    whole = train_flops_per_token(model) * 3 * 128 / 1e6
    assert sum(least.values()) == pytest.approx(whole)
    moved = floors(config, {"flops": 1e30, "bytes": 1.0}, 2, {"params": 10, "opt_state": 20})
    tokens = 3 * 128
    assert moved["optimizer"] == 2 * 30 + 10
    assert moved["attention"] == 2 * tokens * 64 * (4 + 8) * 2
    assert moved["rest"] == tokens * 64 * 5 * 6 * 2
    assert max(moved["MLP"], moved["projections"], moved["head and loss"]) < 1e-20


def test_floors_of_adapters_have_no_gradients_of_matrices(adapted: SFTConfig) -> None:
    least = floors(adapted, {"flops": 1.0, "bytes": 1e30}, 2, {"params": 10, "opt_state": 20})
    whole = train_flops_per_token(adapted.model, adapted.lora) * 16 * 16
    assert sum(least.values()) == pytest.approx(whole)
    assert whole < train_flops_per_token(adapted.model) * 16 * 16


def test_random_conversations_are_as_those_of_a_text(tuned: SFTConfig) -> None:
    """Positions begin anew with each conversation, and there are several; some ids are asked for, some are not."""
    rows = SFT(tuned, "cpu").random_rows(0, (2, 8))
    assert rows.types is None and {np.shape(leaf) for leaf in rows[:4]} == {(2, 8, 16)}
    assert {leaf.dtype for leaf in rows[:4]} == {np.dtype(np.int32)}
    begins = np.diff(rows.segments, axis=-1) > 0
    assert (rows.positions[..., 1:] == np.where(begins, 0, rows.positions[..., :-1] + 1)).all()
    assert (rows.positions[..., 0] == rows.segments[..., 0]).all()
    assert 1 < 1 + rows.segments.max(axis=-1).mean() < 8
    assert 0.3 < (rows.targets == PADDING).mean() < 0.7
    apart = replace(tuned, data=replace(tuned.data, packing=False))
    assert SFT(apart, "cpu").random_rows(0, (1, 8)).segments.max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.whole)])
def test_work_of_fine_tuning_is_fed_its_own_text(rank: int, tuned: SFTConfig) -> None:
    """A step on random conversations and on those of the text, by one compiled program; alone, it ends nowhere."""
    work = Work.prepare(alone(replace(tuned, init_from="base", lora=LoRAConfig(rank=rank))), jax.devices()[:1])
    state = trial.init_state(work.config, work.stage, work.shardings)
    step = work.compile(state, {})
    state, _, loss = work.timed(step, state, [work.random_rows])
    with work.stream(8) as batches:  # more than two epochs
        state, _, other = work.timed(step, state, batches)
    assert np.isfinite([loss, other]).all()


@pytest.mark.parametrize(
    ("rates", "best", "full"),
    [
        ({8: 1.0, 16: 1.5, 32: 1.6, 64: 1.6}, 32, False),  # 64 fits and gives nothing
        ({8: 1.0, 16: 1.5}, 16, True),  # 32 does not fit
        ({2: 0.5}, 2, True),  # 8 and 4 do not fit
        ({}, 1, True),  # nothing does
        ({8: 1.0, 16: 1.1, 32: 1.3, 64: 1.7, 128: 9.9}, 64, False),  # 128 does not divide the batch of 64
    ],
)
def test_micro_batch_climbs_while_it_pays(tiny: Config, rates: dict[int, float], best: int, full: bool) -> None:
    config = alone(replace(tiny, train=replace(tiny.train, batch_size=64, micro_batch_size=8)))
    tried = []

    def rate(candidate: Config) -> float:
        tried.append(candidate.micro_batch_size)
        return rates.get(candidate.micro_batch_size, 0.0)

    found, found_rate, was_full = climb(config, rate)
    assert (found.micro_batch_size, found_rate, was_full) == (best, rates.get(best, 0.0), full)
    assert len(set(tried)) == len(tried)


def test_search_takes_remat_only_for_memory(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without remat 8 sequences fit, with dots 32, with full all; unrolled layers are faster."""
    most = {"none": 8, "dots": 32, "full": 64}
    speed = {"none": 1.0, "dots": 0.9, "full": 0.7}

    def measured(config: Config, steps: int, timeout: float, **extras: Any) -> dict[str, Any]:
        micro, model = config.micro_batch_size, config.model
        assert config.train.batch_size in (micro, 2 * micro)
        if micro > most[model.remat]:
            return OUT_OF_MEMORY
        gain = micro / (micro + 4) * (1.0 if model.scan_layers else 1.1)
        return answer(config, 1e6 * speed[model.remat] * gain)

    monkeypatch.setattr(trial, "measure_single", measured)
    config = alone(replace(tiny, train=replace(tiny.train, batch_size=64, micro_batch_size=8)))
    best, rows = search(config, FACTS, Options())
    assert (best.micro_batch_size, best.model.remat, best.model.scan_layers) == (32, "dots", False)
    assert best.train.batch_size == 64
    assert {row["remat"] for row in rows} == {"none", "dots", "full"}
    assert [row["status"] for row in rows if row["micro_batch_size"] == 64] == ["out of memory", "ok"]

    most["none"] = 64  # now memory stops nothing, and remat is not even tried
    best, rows = search(config, FACTS, Options())
    assert (best.micro_batch_size, {row["remat"] for row in rows}) == (64, {"none"})


def test_table_and_file_say_what_was_measured(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def measured(config: Config, steps: int, timeout: float, **extras: Any) -> dict[str, Any]:
        option = (extras.get("options") or {}).get("xla_gpu_enable_triton_gemm")
        return answer(config, 5e5 * (1.1 if option else 1.0))

    def by_peer(script: Path, config: Config, steps: int, timeout: float) -> dict[str, Any]:
        return answer(config, 4e5) | {"how": "PyTorch 9"}

    monkeypatch.setattr(trial, "facts_of_devices", lambda config, timeout: FACTS)
    monkeypatch.setattr(trial, "measure_single", measured)
    monkeypatch.setattr(trial, "measure_peer", by_peer)
    out = tmp_path / "out"
    flags = ["--peer", file, "--rounds", "2", "--stream", "--options", "--out", str(out)]
    assert cli.run(["bench", "single", file, *flags, "--model.window", "8"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "single.json").read_text())
    (row,) = result["rows"]
    assert row["config"]["model"]["window"] == 8
    assert row["ratios"] == pytest.approx([1.25, 1.25])
    model = ModelConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in row["config"]["model"].items()})
    assert row["mfu"] == pytest.approx(5e5 * train_flops_per_token(model) / 9.89e14)
    assert row["parts"]["MLP"]["share"] == pytest.approx(0.1)
    assert row["parts"]["idle"]["share"] == pytest.approx(0.4)
    assert row["stream_ratio"] == pytest.approx(1.25)
    gains = {tried["option"]: tried.get("gain") for tried in row["options"]}
    assert gains["xla_gpu_enable_triton_gemm=False"] == pytest.approx(0.1)
    for shown in (
        "500,000",
        "400,000",
        "1.25 (1.25-1.25)",
        "1.250",
        "+10.0%",
        "NVIDIA H100",
        "0.11.2",
        "2026-01-01",
        "PyTorch 9",
    ):
        assert shown in printed
    assert (out / "single.md").read_text().strip() in printed


def test_what_does_not_run_is_a_row(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(trial, "facts_of_devices", lambda config, timeout: FACTS)
    monkeypatch.setattr(trial, "measure_single", lambda *_, **__: OUT_OF_MEMORY)
    assert cli.run(["bench", "single", file, "--out", str(tmp_path / "out")]) == 0
    assert "out of memory: RESOURCE_EXHAUSTED: 81 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "none.py"], r"--peer none.py: no such file; name a script such as tests/peers/gpt2_torch.py"),
        (["--steps", "0"], "--steps 0: must be positive; nearest 1"),
        (["--timeout", "nan"], "--timeout nan: expected a number"),
        (["--model.windo", "3"], "model.windo"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, file: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        cli.run(["bench", "single", file, *arguments, "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_options_of_the_step() -> None:
    """Determinism is the compiler's to promise on a GPU alone, and asked for in the config."""
    pytest.importorskip("jax_cuda13_plugin", reason="the extra `cuda-aot` is not installed")
    cpu, gpu = jax.devices()[0], devices_of(topology("h100-1x1"))[0]
    assert "xla_gpu_deterministic_ops" not in compiler_options(gpu)
    assert compiler_options(gpu, True) == compiler_options(gpu) | {"xla_gpu_deterministic_ops": "True"}
    assert compiler_options(cpu, True) == compiler_options(cpu)


def test_options_are_those_of_the_chip_and_its_compiler_takes_them() -> None:
    """All of v5p's, on the CPU on which a plan is made; a stand-in: no TPU is here."""
    pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")
    assert compiler_options(devices_of(topology("v5p-8"))[0]) == COMPILER_OPTIONS["TPU v5"]
    assert compiler_options(jax.devices()[0]).keys() == COMPILER_OPTIONS["cpu"].keys()


def test_the_cuda_compiler_takes_every_option() -> None:
    """The step's own and those that --options tries, on a program of one product for an H100 that is not there."""
    pytest.importorskip("jax_cuda13_plugin", reason="the extra `cuda-aot` is not installed")
    (gpu,) = devices_of(topology("h100-1x1"))
    device = SingleDeviceSharding(gpu)
    product = jax.jit(lambda x: x @ x, in_shardings=device, out_shardings=device)
    lowered = product.lower(jax.ShapeDtypeStruct((256, 256), jnp.bfloat16))
    for name, value in (OPTIONS["gpu"] | compiler_options(gpu, True)).items():
        lowered.compile(compiler_options={name: value})
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={"xla_gpu_no_such_option": "True"})


@pytest.mark.slow
def test_a_real_device_with_its_stream(file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.run(["bench", "single", file, "--steps", "2", "--stream", "--out", str(out)]) == 0
    (row,) = json.loads((out / "single.json").read_text())["rows"]
    assert (row["status"], len(row["times_s"]), len(row["stream_s"])) == ("ok", 2, 2)
    assert all(row["parts"][part]["share"] > 0 for part in PARTS)
    assert row["parts"][UNKNOWN]["share"] == 0 <= row["parts"]["idle"]["share"]
    assert sum(part["share"] for part in row["parts"].values()) == pytest.approx(1)
    assert row["memory_bytes"] > sum(row["state_bytes"].values())


def peer_module() -> Any:
    path = ROOT / "tests" / "peers" / "gpt2_torch.py"
    spec = importlib.util.spec_from_file_location("gpt2_torch", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_peer_is_the_same_model(tiny: Config) -> None:
    """With our weights it has our loss, and one job gives an answer of the right form."""
    torch = pytest.importorskip("torch", reason="the extra `peers` is not installed")
    model = replace(tiny.model, attention_pattern=("dense",), scan_layers=False, vocab_size=256)
    config = alone(replace(tiny, model=model))
    task = Pretrain(config, "cpu")
    params = nn.unbox(task.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: np.asarray(p + rng.normal(0, 0.05, p.shape), np.float32), params)
    net = peer_module().GPT2(4, 8, 32, 16, 256)
    ours = {"embedding.weight": params["embedding"], "positions.weight": params["positions"]}
    ours |= {f"norm_final.{to}": params["norm_final"][name] for to, name in (("weight", "scale"), ("bias", "bias"))}
    for i in range(4):
        block = params[f"unit_{i}"]["block_0"]
        for norm in ("norm_attention", "norm_mlp"):
            ours[f"blocks.{i}.{norm}.weight"] = block[norm]["scale"]
            ours[f"blocks.{i}.{norm}.bias"] = block[norm]["bias"]
        for name, outs in (("qkv", 96), ("projection", 32), ("mlp_up", 128), ("mlp_down", 32)):
            ours[f"blocks.{i}.{name}.weight"] = block[name]["kernel"].reshape(-1, outs).T
            ours[f"blocks.{i}.{name}.bias"] = block[name]["bias"].reshape(-1)
    net.load_state_dict({name: torch.tensor(np.ascontiguousarray(value)) for name, value in ours.items()})
    tokens = rng.integers(0, 256, (3, 17))
    rows = next_token(tokens)
    loss = jax.jit(lambda p: task.loss(p, rows, task.counts(rows), None))(params)
    assert net(torch.tensor(tokens)).item() == pytest.approx(float(loss), rel=1e-5)

    found = trial.measure_peer(ROOT / "tests" / "peers" / "gpt2_torch.py", config, 2, 300)
    assert (found["status"], len(found["times_s"])) == ("ok", 2)
    banded = replace(config, model=replace(model, attention_pattern=("dense", "banded")))
    assert "no banded layers" in trial.measure_peer(ROOT / "tests/peers/gpt2_torch.py", banded, 2, 300)["reason"]


@pytest.mark.parametrize("path", sorted((ROOT / "gptjax" / "bench" / "results").glob("single-*.json")), ids=str)
def test_the_readme_shows_what_was_measured(path: Path) -> None:
    assert markdown(json.loads(path.read_text())) in (ROOT / "README.md").read_text()


def test_a_child_that_fails_says_why() -> None:
    """The line of the error, and not what JAX puts behind it."""
    note = "--------------------\nFor simplicity, JAX has removed its internal frames from the traceback.\n"
    answer = trial._died(1, f"Traceback\n  File\nValueError: too wide\n{note}")
    assert answer == {"status": "failed", "reason": "exit status 1: ValueError: too wide"}
