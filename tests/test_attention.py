"""Every attention backend is one function: a table of all of them against a float64 reference.

Errors are the largest deviation, of the output and of the three gradients, in units of the largest value among the
four; TOLERANCE says what is allowed. The reference works row by row on picked keys and shares nothing with the code
under test. By default head size 64 in float32 meets every T and W (of the reference, which has no blocks, every other
T) and the other sizes and types meet SOME;
`pytest tests/test_attention.py --whole` takes all 1,440 cells (864 programs to compile).
"""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from jax.sharding import AxisType, Mesh

from gptjax.config import Config, LayoutConfig
from gptjax.data.rows import CUT, next_token
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.model.attention import Attend, Mask, Need, reference
from gptjax.model.kernels import blockwise, choose, cudnn, selftest, splash
from gptjax.parallel import context
from gptjax.sharding.mesh import MESH_AXES
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages.launch import train
from gptjax.stages.pretrain import Pretrain

LENGTHS = (1, 2, 63, 64, 65, 255, 256, 257, 1000, 2048)
WINDOWS = (None, 1, 2, 64, 256, 4096)  # 4096: at least T everywhere
SOME = ((1, 1), (65, 64), (257, None), (257, 64), (1000, 256), (2048, 2))
HEAD_DIMS = (64, 80, 96, 128)
TITLE = "attention against float64, over T and W: largest error of out, dq, dk, dv"
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
ATTEND: dict[str, Attend] = {
    "reference": reference,
    "blockwise": blockwise.attend,
    "splash": partial(splash.attend, interpret=True),
}


def oracle(qkv: list[np.ndarray], cotangent: np.ndarray, window: int | None, scale: float) -> list[np.ndarray]:
    """Output and gradients in float64, [T, K] each, query by query with its keys picked by index."""
    q, k, v = qkv
    out, dq, dk, dv = (np.zeros_like(q) for _ in range(4))
    for i in range(len(q)):
        seen = slice(0 if window is None else max(0, i - window + 1), i + 1)
        scores = k[seen] @ q[i] * scale
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[i] = weights @ v[seen]
        grad_weights = v[seen] @ cotangent[i]
        grad_scores = weights * (grad_weights - weights @ grad_weights) * scale
        dq[i] = grad_scores @ k[seen]
        dk[seen] += np.outer(grad_scores, q[i])
        dv[seen] += np.outer(weights, cotangent[i])
    return [out, dq, dk, dv]


@cache
def case(length: int, window: int | None, head_dim: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(q, k, v and a cotangent that bfloat16 holds exactly, the oracle's answers)."""
    rng = np.random.default_rng(length)
    inputs = [np.asarray(rng.normal(size=(length, head_dim)), jnp.bfloat16).astype(np.float64) for _ in range(4)]
    return inputs, oracle(inputs[:3], inputs[3], window, head_dim**-0.5)


def run(attend: Attend, mask: Mask, scale: float, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
    """inputs q, k, v, cotangent [B, T, H, K] -> output and gradients."""
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask, scale, None), *inputs[:3])
    return out, *pull(inputs[3])


def cells_of(head_dim: int, dtype: str) -> Any:
    """Other sizes in bfloat16 are shown by those in float32, and by bfloat16 in one."""
    mark = pytest.mark.whole if dtype == "bfloat16" and head_dim != 64 else pytest.mark.slow
    return pytest.param(head_dim, dtype, marks=mark)


@pytest.mark.parametrize(("head_dim", "dtype"), [cells_of(*each) for each in itertools.product(HEAD_DIMS, TOLERANCE)])
@pytest.mark.parametrize("backend", ATTEND)
def test_backend_equals_float64(
    backend: str, head_dim: int, dtype: str, table_row: Callable[[str, str], None], request: pytest.FixtureRequest
) -> None:
    """Prints one row of the table for dense and one for banded masks."""
    every = request.config.getoption("--whole") or (head_dim, dtype) == (64, "float32")
    lengths = LENGTHS if request.config.getoption("--whole") else LENGTHS[1::2]
    cells = list(itertools.product(lengths, WINDOWS)) if every else SOME
    errors: dict[tuple[int, Mask], list[float]] = {}
    worst: dict[str, list] = {"dense": [], "banded": []}
    for length, window in cells:
        same = length, Mask(window).within(length)
        if same not in errors:
            errors[same] = measure(backend, Mask(window), length, head_dim, dtype)
        assert max(errors[same]) <= TOLERANCE[dtype], (length, window, errors[same])
        worst["dense" if window is None else "banded"].append(errors[same])
    for kind, rows in worst.items():
        shown = " ".join(f"{error:9.1e}" for error in np.max(rows, axis=0))
        table_row(TITLE, f"{backend:10} {kind:7} {head_dim:>4} {dtype:9} {len(rows):>3} cells {shown}")


def measure(backend: str, mask: Mask, length: int, head_dim: int, dtype: str) -> list[float]:
    """Errors of the output and the gradients, in units of the largest value among the four."""
    inputs, want = case(length, mask.within(length).window, head_dim)
    arrays = tuple(jnp.asarray(x, dtype)[None, :, None] for x in inputs)
    compiled = jax.jit(partial(run, ATTEND[backend], mask, head_dim**-0.5))
    got = [np.asarray(x[0, :, 0], np.float64) for x in compiled(arrays)]
    assert_outside_has_no_influence(compiled, arrays, mask.window)
    largest = max(np.abs(x).max() for x in want)
    return [np.abs(a - b).max() / largest for a, b in zip(got, want, strict=True)]


def assert_outside_has_no_influence(compiled: "jax.stages.Wrapped", arrays: tuple, window: int | None) -> None:
    """For one query: other keys and values outside what it sees change no bit of its output or gradients."""
    length = arrays[0].shape[1]
    i = 2 * length // 3
    first = 0 if window is None else max(0, i - window + 1)
    outside = np.ones((1, length, 1, 1), bool)
    outside[:, first : i + 1] = False
    q, k, v, cotangent = arrays
    only = jnp.where(np.arange(length)[None, :, None, None] == i, cotangent, 0)
    before = compiled((q, k, v, only))
    after = compiled((q, jnp.where(outside, k + 9, k), jnp.where(outside, v - 9, v), only))
    assert jnp.array_equal(before[0][:, i], after[0][:, i])
    for a, b in zip(before[1:], after[1:], strict=True):
        assert jnp.array_equal(a, b)
    for gradient in before[2:]:
        assert not np.asarray(gradient, np.float32)[np.broadcast_to(outside, gradient.shape)].any()


@settings(max_examples=12)
@given(
    length=st.integers(1, 70),
    window=st.none() | st.integers(1, 80),
    causal=st.booleans(),
    documents=st.booleans(),
    scores=st.sampled_from([1, 4000]),
    segments=st.sampled_from([1, 8]),
)
def test_blockwise_equals_reference(
    length: int, window: int | None, causal: bool, documents: bool, scores: int, segments: int
) -> None:
    """Encoders' masks, documents kept apart, rows cut into pieces, scores far beyond exp's range."""
    rng = np.random.default_rng(length)
    q, k, v, cotangent = (rng.normal(size=(2, length, 3, 8)) for _ in range(4))
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (2, length)))) if documents else None
    mask = Mask(window if causal else None, causal)
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "SCORES", scores)
        patch.setattr(blockwise, "SEGMENTS", segments)
        patch.setattr(blockwise, "BLOCK", 8)
        inputs = tuple(jnp.asarray(x) for x in (q * 300, k, v, cotangent))
        got, want = (
            jax.jit(lambda inputs, f=f: run(lambda *qkv: f(*qkv[:5], ids), mask, 0.3, inputs))(inputs)
            for f in (blockwise.attend, reference)
        )
    for a, b in zip(got, want, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", [Mask(), Mask(50), Mask(causal=False)], ids=["dense", "banded", "encoder"])
@pytest.mark.parametrize("documents", [False, True])
def test_splash_pads_and_keeps_documents_apart(mask: Mask, documents: bool) -> None:
    rng = np.random.default_rng(1)
    inputs = tuple(jnp.asarray(rng.normal(size=(2, 130, 2, 64)), jnp.float32) for _ in range(4))
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (2, 130)))) if documents else None
    attend = partial(splash.attend, interpret=True)
    got, want = (
        jax.jit(lambda inputs, f=f: run(lambda *qkv: f(*qkv[:5], ids), mask, 0.125, inputs))(inputs)
        for f in (attend, reference)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_reference_equals_the_oracle_to_rounding() -> None:
    with jax.enable_x64(True):
        for window in (None, 7):
            inputs, want = case(40, window, 64)
            got = run(reference, Mask(window), 0.125, tuple(jnp.asarray(x)[None, :, None] for x in inputs))
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a[0, :, 0], b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("window", "causal"), [(0, True), (-1, True), (4, False)])
def test_a_band_is_causal_and_has_a_key(window: int, causal: bool) -> None:
    with pytest.raises(ValueError, match="a band is causal"):
        Mask(window, causal)


def test_blockwise_memory_is_linear_in_length() -> None:
    """Forward and backward; scores of one head alone would be 4 times as large at twice the length."""

    def scratch(length: int, window: int | None) -> int:
        x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
        compiled = jax.jit(partial(run, blockwise.attend, Mask(window), 0.125)).lower((x,) * 4).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert scratch(8192, 256) < 2.2 * scratch(4096, 256)
    assert scratch(32768, None) < 2.2 * scratch(16384, None) < 2**29


# --- The choice of a backend


NEED = Need("tpu", jnp.dtype("bfloat16"), 128, 2048, (Mask(), Mask(256)))
changed = partial(replace, NEED)


@pytest.mark.parametrize(
    ("name", "need", "chosen", "reason"),
    [
        ("auto", NEED, "splash", "the kernel for tpu"),
        ("auto", changed(platform="cpu"), "blockwise", "the fastest tested on cpu"),
        ("auto", changed(head_dim=48), "blockwise", "splash cannot serve: head size 48 is not one of 64, 80"),
        ("auto", changed(context=4), "blockwise", "cannot split the sequence"),
        ("blockwise", NEED, "blockwise", "named by the config"),
        ("reference", NEED, "reference", "named by the config"),
    ],
)
def test_choice_and_its_reason(name: str, need: Need, chosen: str, reason: str, tmp_path: Path) -> None:
    got = choose(name, need, tmp_path / "tests.json")
    assert got[0] == chosen
    assert reason in got[1]


@pytest.mark.parametrize(
    ("name", "need", "message"),
    [
        ("cudnn", NEED, "cudnn: it runs on NVIDIA GPUs and this is tpu; choose from auto, blockwise, splash"),
        ("cudnn", changed(platform="gpu"), "it runs on NVIDIA GPUs and this is cpu; choose from auto, blockwise"),
        ("splash", changed(platform="cpu"), "splash: it runs on TPU and this is cpu"),
        ("splash", changed(head_dim=72), "head size 72 is not one of 64, 80, 96, 128"),
        ("splash", changed(context=2), "it cannot split the sequence"),
        ("reference", changed(context=2), "it cannot split the sequence"),
    ],
)
def test_a_named_backend_that_cannot_serve_raises(name: str, need: Need, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        choose(name, need, tmp_path / "tests.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"dtype": jnp.dtype("float32")}, "it computes in bfloat16 and float16, not in float32"),
        ({"head_dim": 260}, "head size 260 is not a multiple of 8 up to 256"),
        ({"head_dim": 36}, "head size 36 is not a multiple of 8"),
        ({"length": 1000}, "model.seq_len = 1000 is not a multiple of 128"),
        ({"segments": True}, "it cannot keep documents apart"),
        ({"context": 2}, "it cannot split the sequence"),
        ({"deterministic": True}, "it does not run in a deterministic step"),
    ],
)
def test_limits_of_cudnn(change: dict, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    got = cudnn.refuse(changed(platform="gpu", **change))
    assert got is None if message is None else message in got


@pytest.mark.parametrize("mask", [Mask(), Mask(1), Mask(7), Mask(64), Mask(causal=False)])
def test_cudnn_is_asked_for_this_mask(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that would go to cuDNN, answered by JAX's own XLA implementation of the same interface."""
    real = jax.nn.dot_product_attention
    asked = []

    def answer(*qkv: Array, implementation: str, **settings: object) -> Array:
        asked.append(implementation)
        return real(*qkv, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    inputs = [jnp.asarray(x, jnp.float32)[None, :, None] for x in case(64, None, 64)[0][:3]]
    np.testing.assert_allclose(
        cudnn.attend(*inputs, mask, 0.3, None), reference(*inputs, mask, 0.3), rtol=1e-4, atol=1e-5
    )
    assert asked == ["cudnn"]


def no_band(q: Array, k: Array, v: Array, mask: Mask, scale: float, segments: Array | None) -> Array:
    return reference(q, k, v, Mask(causal=mask.causal), scale, segments)


@jax.custom_vjp
def _halved(x: Array) -> Array:
    return x


_halved.defvjp(lambda x: (x, None), lambda _, grad: (grad * 0.5,))


def wrong_backward(q: Array, k: Array, v: Array, mask: Mask, scale: float, segments: Array | None) -> Array:
    return reference(q, _halved(k), v, mask, scale, segments)


def broken(*_: object) -> Array:
    raise RuntimeError("no execution plans\nsecond line")


def wordless(*_: object) -> Array:
    raise MemoryError


@jax.custom_vjp
def _rounded(x: Array) -> Array:
    return x


_rounded.defvjp(lambda x: (x, None), lambda _, grad: (grad + jnp.asarray(1e-3, grad.dtype),))


def rounding(q: Array, k: Array, v: Array, mask: Mask, scale: float, segments: Array | None) -> Array:
    return reference(_rounded(q), k, v, mask, scale, segments)


def trial(dtype: str, *masks: Mask) -> Need:
    return Need("cpu", jnp.dtype(dtype), 64, 256, masks)


@pytest.mark.parametrize(
    ("attend", "answer"),
    [
        (blockwise.attend, None),
        (rounding, None),
        (no_band, "Mask(window=128, causal=True): output is off by"),
        (wrong_backward, "Mask(window=None, causal=True): gradient of k is off by"),
        (broken, "raised no execution plans"),
        (wordless, "raised MemoryError"),
    ],
)
def test_self_test_finds_what_is_wrong(attend: Attend, answer: str | None) -> None:
    got = selftest.self_test(attend, trial("bfloat16", Mask(), Mask(256), Mask(1)))
    assert got is None if answer is None else answer in got
    assert got is None or "second line" not in got


def test_only_a_passed_self_test_is_remembered(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "deep" / "attention.json"
    about = trial("float32", Mask(64))
    assert "no execution plans" in selftest.remembered(path, broken, about)
    assert not path.exists()
    assert selftest.remembered(path, blockwise.attend, about) is None  # what failed once is tried again
    assert selftest.remembered(path, broken, about) is None  # what passed is not
    assert "no execution plans" in selftest.remembered(path, broken, trial("float32", Mask(65)))
    whole = path.read_bytes()
    (key,) = json.loads(whole)
    assert jax.__version__ in key
    assert not capsys.readouterr().err
    for damaged in (whole[: len(whole) // 2], b"", b"\xff", b"{}", b'{"of an older version": "raised out of memory"}'):
        path.write_bytes(damaged)
        assert "no execution plans" in selftest.remembered(path, broken, about)
        said = capsys.readouterr().err
        assert str(path) in said
        assert said.count("\n") == 1
    assert selftest.remembered(path, blockwise.attend, about) is None
    assert path.read_bytes() == whole


def test_a_reference_out_of_memory_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "reference", broken)
    assert "no execution plans" in selftest.self_test(blockwise.attend, trial("float32", Mask()))


def test_a_refusal_leaves_no_run_folder(tiny: Config, tmp_path: Path) -> None:
    config = replace(tiny, model=replace(tiny.model, attention="splash"), run=str(tmp_path / "run"))
    with pytest.raises(UserError, match="splash: it runs on TPU and this is cpu; choose from auto"):
        train(config, None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ways", [1, 2])
def test_documents_of_a_row_are_apart_when_asked(ways: int, tiny: Config) -> None:
    """What follows a document's first token costs the same whatever text stands before it, in one part or two; a
    document that was cut there, to go on elsewhere, is as far away, and its cut is no target."""
    tokenizer = load_tokenizer("bytes")

    def differs(apart: bool) -> float:
        config = replace(tiny, model=replace(tiny.model, separate_documents=apart))
        task = Pretrain(config, "cpu", context_layout(ways), tokenizer)
        params = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
        loss = jax.jit(lambda rows: task.loss(params, rows, jnp.float32(1), None))

        def gap(before: str, end: int) -> float:
            rows = [[*tokenizer.encode(before), end, *b"x", *after] for after in (b"abcdefghi", b"qrstuvwyz")]
            one, two = (next_token(np.array([row], np.int32), tokenizer.eot if apart else None) for row in rows)
            assert task.counts(one) == 16 - (end < 0)
            return float(loss(one) - loss(two))

        ends = (tokenizer.eot, CUT - tokenizer.eot)
        gaps = [gap("one ab", end) - gap("TWO=#%", end) for end in ends]
        assert gaps[0] == pytest.approx(gaps[1], abs=3e-5)
        return abs(gaps[0])

    assert differs(apart=True) < 1e-5
    assert differs(apart=False) > 1e-4


# --- The sequence over several devices


def context_layout(ways: int) -> Layout:
    sizes = [ways if axis == context.AXIS else 1 for axis in MESH_AXES]
    devices = np.array(jax.devices()[:ways]).reshape(sizes)
    return Layout(Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 6), rule_table(LayoutConfig(context=ways)))


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_order_gives_every_device_the_same_work(ways: int) -> None:
    order = context.order(64, ways)
    assert sorted(order) == list(range(64))
    assert len({part.sum() for part in np.split(order, ways)}) == 1  # keys that a causal query sees: its position + 1


@pytest.mark.parametrize("ways", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 1, 12, 17])
def test_split_sequence_equals_single_device(ways: int, window: int | None) -> None:
    """Output and gradients of a dense and of banded layers, the widest band of 8 devices included, with documents."""
    rng = np.random.default_rng(ways)
    inputs = tuple(jnp.asarray(rng.normal(size=(2, 256, 2, 16)), jnp.float32) for _ in range(4))
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, 256))))
    mask, order = Mask(window), context.order(256, ways)
    split = context.on_mesh(blockwise.attend, context_layout(ways))
    for segments in (None, ids):

        def compute(attend: Attend, segments: Array | None, inputs: tuple) -> tuple:
            return jax.jit(lambda inputs: run(lambda *qkv: attend(*qkv[:5], segments), mask, 0.25, inputs))(inputs)

        want = compute(reference, segments, inputs)
        got = compute(split, None if segments is None else segments[:, order], tuple(x[:, order] for x in inputs))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b[:, order], rtol=1e-4, atol=5e-6)


def test_a_mask_of_an_encoder_is_not_split() -> None:
    x = jnp.zeros((1, 8, 1, 4))
    with pytest.raises(UserError, match=r"layout\.context = 2: only causal attention can be split; use 1"):
        context.on_mesh(blockwise.attend, context_layout(2))(x, x, x, Mask(causal=False), 1.0)


COLLECTIVE = re.compile(r"= (\S+) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def collectives(ways: int, window: int | None, batch: int, length: int, heads: int, head_dim: int) -> list[tuple]:
    """(operation, bytes of its result on one device) in the compiled forward and backward pass of one layer."""
    layout = context_layout(ways)
    attend = context.on_mesh(blockwise.attend, layout)
    x = jax.ShapeDtypeStruct(
        (batch, length, heads, head_dim), jnp.float32, sharding=layout.sharding(("batch", "length", "heads", None))
    )
    text = jax.jit(partial(run, attend, Mask(window), 0.25)).lower((x,) * 4).compile().as_text()
    found = []
    for shape, operation in COLLECTIVE.findall(text):
        sizes = re.findall(r"f32\[([\d,]*)\]", shape)
        assert sizes, shape
        found.append((operation, sum(4 * int(np.prod([int(n) for n in size.split(",")])) for size in sizes)))
    return found


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_a_banded_layer_sends_only_its_halo(ways: int) -> None:
    """Read from the compiled program: W-1 keys and values to each of two neighbours, and their gradients back."""
    batch, length, heads, head_dim, window = 2, 256, 2, 16, 13
    found = collectives(ways, window, batch, length, heads, head_dim)
    assert {operation for operation, _ in found} == {"collective-permute"}
    halo = 2 * batch * (window - 1) * heads * head_dim * 4  # keys and values
    assert sum(size for _, size in found) == 2 * 2 * halo  # two neighbours, forward and backward


def test_a_dense_layer_passes_keys_and_values_round_the_ring() -> None:
    """No all-gather either: one device's part at a time, k and v forward, and with them dk and dv backward and home."""
    found = collectives(4, None, 2, 256, 2, 16)
    part = 2 * (256 // 4) * 2 * 16 * 4
    assert {operation for operation, _ in found} == {"collective-permute"}
    assert sum(size for _, size in found) == (2 + 4 + 2) * part


# --- Compiled for a TPU that is not there


FOR_TPU = """
import sys
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.experimental import topologies
from gptjax.config import Config, LayoutConfig
from gptjax.data.tokenizers import load_tokenizer
from gptjax.model.attention import Mask, Need
from gptjax.model.kernels import BACKENDS, choose
from gptjax.parallel.context import on_mesh
from gptjax.sharding.mesh import MESH_AXES, AUTO
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages.launch import train
from gptjax.stages.pretrain import Pretrain

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = jax.sharding.Mesh(np.array(devices).reshape(1, 1, 1, 2, 1, 2), MESH_AXES, axis_types=AUTO)
layout = Layout(mesh, rule_table(LayoutConfig(fsdp=2, tensor=2)))
for head_dim, mask in ((64, Mask()), (64, Mask(256)), (80, Mask(256)), (96, Mask()), (128, Mask(256))):
    name, _ = choose("auto", Need("tpu", jnp.dtype("bfloat16"), head_dim, 2048, (mask,)))
    attend = on_mesh(BACKENDS[name].attend, layout)
    spec = layout.sharding(("batch", "length", "heads", None))
    x = jax.ShapeDtypeStruct((2, 2048, 4, head_dim), jnp.bfloat16, sharding=spec)
    loss = lambda q, k, v: attend(q, k, v, mask, head_dim**-0.5).astype(jnp.float32).sum()
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    print(name, head_dim, mask.window, text.count('custom_call_target="tpu_custom_call"'), memory.temp_size_in_bytes)
"""


@pytest.mark.slow
def test_splash_compiles_for_a_tpu() -> None:
    """Forward and backward under shard_map, each head size and each mask: the kernel's calls are there, a [T, T] buffer
    is not."""
    pytest.importorskip("libtpu", reason="needs the tpu extra")
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", FOR_TPU], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 5
    for name, _, _, calls, scratch in rows:
        assert name == "splash"
        assert int(calls) >= 3  # output, dq, dk and dv
        assert int(scratch) < 2048 * 2048 * 4
