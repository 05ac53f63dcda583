"""The model against independent truth: float64 references, closed forms, PyTorch's GPT-2."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import Config, LoRAConfig, ModelConfig
from gptjax.data.store import Record
from gptjax.data.stream import eval_batches
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.hardware import require_float8
from gptjax.model import accounting, block, gpt
from gptjax.model.attention import reference
from gptjax.model.block import ACTIVATIONS, Parallelism
from gptjax.model.cache import At, Cache, empty_cache
from gptjax.model.dropout import dropout, token_keys
from gptjax.model.fp8 import BACKWARD, FORWARD, quantise
from gptjax.model.gpt import GPT, forward, look_up
from gptjax.model.lora import is_adapter
from gptjax.model.loss import IGNORED, Head, cross_entropy, log_probs, logits
from gptjax.model.positions import rotated
from gptjax.model.products import multiply
from gptjax.parallel.network import Network
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, leaf_name, rule_table
from gptjax.stages.pretrain import Pretrain

CONFIG = ModelConfig(
    4, 4, 32, seq_len=24, vocab_size=200, attention_pattern=("dense", "banded"), window=5, loss_chunk=7
)


@settings(max_examples=15)
@given(length=st.integers(1, 20), chunk=st.integers(1, 25), ignored=st.integers(0, 5), biased=st.booleans())
def test_cross_entropy_and_gradient_equal_float64(length: int, chunk: int, ignored: int, biased: bool) -> None:
    rng = np.random.default_rng(length)
    hidden, head = rng.normal(size=(2, length, 8)), Head(rng.normal(size=(128, 8)), rng.normal(size=128))
    head = head if biased else Head(head.table)
    targets = rng.integers(0, 100, (2, length))
    targets[0, :ignored] = IGNORED

    def plain(hidden: jax.Array, head: Head) -> jax.Array:  # the whole logits, vocabulary cut to 100
        scores = hidden @ head.table[:100].T + (0 if head.bias is None else head.bias[:100])
        scores = jax.nn.log_softmax(scores)
        picked = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return -3 * jnp.sum(picked * (targets != IGNORED))  # 3: a cotangent that is not 1

    def chunked(hidden: jax.Array, head: Head) -> jax.Array:
        return 3 * cross_entropy(hidden, head, jnp.asarray(targets), 100, chunk)

    with jax.enable_x64(True):
        value, grads = jax.value_and_grad(plain, (0, 1))(hidden, head)
    arguments = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (hidden, head))
    got, got_grads = jax.value_and_grad(chunked, (0, 1))(*arguments)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(chunked(*arguments), value, rtol=1e-5)  # the path without a gradient
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_head_is_exact_far_from_zero() -> None:
    """Scores near -100, as GPT-2's: rounded to bfloat16 as they are, the loss would be 0.01 nats too high."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=64)
    hidden = jnp.asarray(rng.normal(size=(4, 256, 64)) - 1.5 * shared, jnp.bfloat16)
    embedding = jnp.asarray(0.25 * rng.normal(size=(512, 64)) + shared, jnp.bfloat16)
    targets = rng.integers(0, 500, (4, 256))
    with jax.enable_x64(True):
        wide = np.asarray(hidden, np.float64), np.asarray(embedding, np.float64)
        scores = (wide[0] @ wide[1].T)[..., :500]
        assert scores.mean() < -80
        want = -jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], -1).mean()
    got = cross_entropy(hidden, Head(embedding), jnp.asarray(targets), 500, 64) / targets.size
    assert float(got) == pytest.approx(float(want), abs=2e-3)  # the table is rounded once more
    rounded = jnp.asarray(jnp.asarray(scores, jnp.bfloat16), jnp.float32)
    plain = -jnp.take_along_axis(jax.nn.log_softmax(rounded), targets[..., None], -1).mean()
    assert float(plain) - float(want) > 1e-2


@settings(max_examples=10)
@given(length=st.integers(1, 20), chunk=st.integers(1, 25), ignored=st.integers(0, 5), split=st.booleans())
def test_log_probs_equal_the_samplers_and_float64(length: int, chunk: int, ignored: int, split: bool) -> None:
    """In bfloat16, too: its products are exact in float32, so that only sums round."""
    rng = np.random.default_rng(length)
    lead = (2, 2) if split else (2,)  # with the axis of a sequence over two devices, or without
    hidden, embedding = rng.normal(size=(*lead, length, 8)), rng.normal(size=(128, 8))
    targets = rng.integers(0, 100, (*lead, length))
    targets[0, ..., :ignored] = IGNORED
    for dtype in (jnp.float32, jnp.bfloat16):
        x, table = jnp.asarray(hidden, dtype), jnp.asarray(embedding, dtype)
        got = log_probs(x, Head(table), jnp.asarray(targets), 100, chunk)
        assert got.dtype == jnp.float32
        drawn_from = np.asarray(jax.nn.log_softmax(logits(x, Head(table), 100)))
        scores = np.float64(x) @ np.float64(table)[:100].T
        exact = scores - np.logaddexp.reduce(scores, -1, keepdims=True)
        for want in (drawn_from, exact):
            picked = np.take_along_axis(want, np.maximum(targets, 0)[..., None], -1)[..., 0]
            np.testing.assert_allclose(got, np.where(targets == IGNORED, 0, picked), atol=1e-5)


def test_training_loss_in_bfloat16_is_log_probs_up_to_its_rounding() -> None:
    """Scores of deviation 5, rounded to 8 bits: one token is off by up to 0.1 nats, the mean of 512 by 0.001."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(512, 64)), jnp.bfloat16)
    head = Head(jnp.asarray(0.6 * rng.normal(size=(512, 64)), jnp.bfloat16))
    targets = jnp.asarray(rng.integers(0, 500, 512))
    one = jax.vmap(lambda x, y: cross_entropy(x[None], head, y[None], 500, 1))
    gap = np.asarray(one(hidden, targets) + log_probs(hidden, head, targets, 500, 64))
    assert 0.01 < np.abs(gap).max() < 0.2  # scores up to 25 are rounded by up to 0.06: the target's, and the largest
    assert abs(gap.mean()) < 5e-3


@pytest.mark.parametrize(("ways", "dtype"), [(1, "bfloat16"), (2, "float32")])
def test_evaluation_sums_log_probs(ways: int, dtype: str, tiny: Config) -> None:
    """Over the whole split: in bfloat16, where the training loss is not it, and with the sequence over two devices."""
    config = replace(tiny, model=replace(tiny.model, dtype=dtype), layout=replace(tiny.layout, context=ways))
    layout = Layout(make_mesh(config, jax.devices()[:ways]), rule_table(config.layout))
    bytes_, text = load_tokenizer("bytes"), [Record("one text of some length", True), Record("and another", True)]
    task = Pretrain(config, "cpu", layout, bytes_, SimpleNamespace(split=lambda *_: text))
    params = jax.tree.map(lambda p: 5 * p, nn.unbox(jax.jit(task.init)(jax.random.key(0))))
    got = task.evaluate(params, partial(jax.tree.map, jnp.asarray), range(config.micro_batch_size))
    plain = Network(config, "cpu").plain_model
    ((inputs, targets, *_),) = eval_batches(text, bytes_, config.model.seq_len, config.micro_batch_size)
    hidden, embedding, _ = jax.jit(partial(forward, plain))(params, inputs)
    each = np.asarray(jax.nn.log_softmax(logits(hidden, embedding, config.model.vocab_size)), np.float64)
    picked = np.take_along_axis(each, np.maximum(targets, 0)[..., None], -1)[..., 0][targets != IGNORED]
    assert got["loss"] == pytest.approx(-picked.mean(), rel=2e-6)
    trained = cross_entropy(hidden, embedding, targets, config.model.vocab_size, 7) / picked.size
    assert (abs(float(trained) + picked.mean()) > 1e-4) == (dtype == "bfloat16")


def test_gradient_of_a_frequent_token_is_summed_whole() -> None:
    """4,096 places of one token, each with a gradient of 1: bfloat16 would stop at 256."""
    table, tokens = jnp.ones((4, 2), jnp.bfloat16), jnp.full((2, 2048), 3)
    gradient = jax.grad(lambda t: look_up(t, tokens).astype(jnp.float32).sum())(table)
    np.testing.assert_array_equal(gradient, [[0, 0]] * 3 + [[4096, 4096]])


def test_no_full_logits_in_memory() -> None:
    """Forward and backward of 8 x 1024 positions over 8,192 words keep far less than their 268 MB of logits."""
    hidden = jax.ShapeDtypeStruct((8, 1024, 16), jnp.float32)
    head = Head(jax.ShapeDtypeStruct((8192, 16), jnp.float32))
    targets = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
    loss = jax.jit(jax.grad(cross_entropy, (0, 1)), static_argnums=(3, 4))
    probs = jax.jit(jax.grad(lambda *inputs: log_probs(*inputs).sum(), (0, 1)), static_argnums=(3, 4))
    for function in (loss, probs):
        memory = function.lower(hidden, head, targets, 8192, 32).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 8 * 1024 * 8192 * 4 / 4


def build(config: ModelConfig, seed: int = 0) -> tuple[GPT, dict]:
    model = GPT(config, jnp.dtype("float32"))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"])
    rng = np.random.default_rng(seed)  # biases and norms away from 0 and 1
    return model, jax.tree.map(lambda p: p + rng.normal(0, 0.02, p.shape).astype(np.float32), params)


def tokens_of(config: ModelConfig) -> jax.Array:
    return jax.random.randint(jax.random.key(5), (2, config.seq_len), 0, config.vocab_size)


def unstack(params: dict, config: ModelConfig) -> dict:
    """Scanned parameters as the unrolled model names them."""
    rest = {name: value for name, value in params.items() if name != "units"}
    units = config.num_layers // len(config.attention_pattern)
    return rest | {f"unit_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["units"]) for i in range(units)}


@pytest.mark.slow
def test_scan_unroll_and_remat_are_one_function() -> None:
    model, params = build(CONFIG)
    tokens = tokens_of(CONFIG)

    def run(config: ModelConfig, params: dict) -> tuple[jax.Array, dict]:
        def loss(params: dict) -> jax.Array:
            hidden, _, _ = forward(model.clone(config=config), params, tokens, dropout_key=jax.random.key(3))
            return jnp.sum(hidden**2)

        return jax.jit(jax.value_and_grad(loss))(params)

    config = replace(CONFIG, dropout=0.1)
    value, grads = run(config, params)
    for remat in ("dots", "full"):
        again, same = run(replace(config, remat=remat), params)
        np.testing.assert_allclose(again, value, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), same, grads)
    unrolled, unrolled_grads = run(replace(config, scan_layers=False), unstack(params, CONFIG))
    np.testing.assert_allclose(unrolled, value, rtol=1e-6)
    grads = unstack(grads, CONFIG)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), unrolled_grads, grads)


def rounded(x: np.ndarray, dtype: type) -> np.ndarray:
    """x as float8 times a power of two has it, in float64."""
    scale = 2.0 ** np.frexp(np.abs(x).max() / float(ml_dtypes.finfo(dtype).max))[1]
    return (x / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


@pytest.mark.parametrize("merge_rows", [True, False])
@pytest.mark.parametrize(("ins", "outs"), [((24,), (4, 6)), ((4, 6), (24,)), ((24,), (96,))])
def test_float8_products_equal_float64_of_rounded_operands(ins: tuple, outs: tuple, merge_rows: bool) -> None:
    rng = np.random.default_rng(0)
    x, kernel, grad = rng.normal(0, 3, (2, 5, *ins)), rng.normal(0, 0.02, (*ins, *outs)), rng.normal(size=(2, 5, *outs))
    x, kernel, grad = (y.astype(np.float32) for y in (x, kernel, grad * 1e-6))

    @jax.jit
    def products(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple:
        out, pull = jax.vjp(lambda x, kernel: multiply(x, kernel, len(ins), merge_rows, True), x, kernel)
        return out, *pull(grad)

    a, b = (rounded(y, ml_dtypes.float8_e4m3fn) for y in (x, kernel))
    g = rounded(grad, ml_dtypes.float8_e5m2)
    inner, outer = len(ins), len(outs)
    want = (
        np.tensordot(a, b, inner),
        np.tensordot(g, b, [range(2, 2 + outer), range(inner, inner + outer)]),
        np.tensordot(a, g, [(0, 1), (0, 1)]),
    )
    for got, exact in zip(products(x, kernel, grad), want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    plain = np.tensordot(np.float64(x), np.float64(kernel), inner)
    assert 1e-3 < np.linalg.norm(want[0] - plain) / np.linalg.norm(plain) < 0.05  # float8, and no worse
    zeros = (jnp.zeros_like(y) for y in (x, kernel, grad))
    for y in products(*zeros):
        np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_float8_scale_fits_the_largest_number(dtype: jnp.dtype) -> None:
    for power in range(-40, 60):
        x = jnp.array([2.0**power, -1.7 * 2.0**power], jnp.bfloat16)
        values, scale = quantise(x, dtype)
        largest = np.abs(np.float64(values)).max()
        assert 0.45 * float(jnp.finfo(dtype).max) < largest <= float(jnp.finfo(dtype).max)
        np.testing.assert_allclose(np.float64(values) * float(scale), np.float64(x), rtol=2**-3)
    for wrong in (jnp.nan, jnp.inf):  # for the step's guard to see
        assert not np.isfinite(np.float32(quantise(jnp.array([1.0, wrong]), dtype).values)).all()


@pytest.mark.slow
def test_float8_model_scanned_unrolled_and_close_to_float32() -> None:
    small = replace(CONFIG, num_layers=2, attention_pattern=("dense",))
    model, params = build(small)
    tokens, config = tokens_of(small), replace(small, fp8=True)

    def run(config: ModelConfig, params: dict) -> tuple[jax.Array, dict]:
        def loss(params: dict) -> jax.Array:
            hidden, embedding, _ = forward(model.clone(config=config), params, tokens[:, :-1])
            return cross_entropy(hidden, embedding, tokens[:, 1:], 200, 7) / tokens[:, 1:].size

        return jax.jit(jax.value_and_grad(loss))(params)

    def apart(one: dict, two: dict) -> float:
        return float(optax.tree.norm(optax.tree.sub(one, two)) / optax.tree.norm(two))

    value, grads = run(config, params)
    unrolled, unrolled_grads = run(replace(config, scan_layers=False), unstack(params, small))
    np.testing.assert_allclose(unrolled, value, rtol=1e-5)
    plain, plain_grads = run(small, params)
    np.testing.assert_allclose(value, plain, rtol=1e-2)
    assert apart(unrolled_grads, unstack(grads, small)) < 1e-2  # a number at the border of two float8 may fall apart
    assert 1e-3 < apart(grads, plain_grads) < 0.1


def test_gpus_without_float8_are_refused() -> None:
    require_float8(jax.devices()[0])
    require_float8(SimpleNamespace(device_kind="NVIDIA L4", compute_capability="8.9"))
    with pytest.raises(UserError, match=r"model.fp8 = true: NVIDIA A100 \(compute capability 8.0\) has no float8"):
        require_float8(SimpleNamespace(device_kind="NVIDIA A100", compute_capability="8.0"))


@pytest.mark.parametrize("scan", [True, False])
def test_cache_equals_full_forward(scan: bool) -> None:
    config = replace(CONFIG, scan_layers=scan)
    model, params = build(config)
    tokens = tokens_of(config)
    whole, _, _ = forward(model, params, tokens)
    cache = empty_cache(config, 2, config.seq_len, model.dtype)

    @jax.jit
    def run(part: jax.Array, cache: Cache, start: int) -> tuple:
        at = At(jnp.full(2, start), jnp.full(2, part.shape[1]))
        return forward(model, params, part, cache=cache, at=at)[::2]

    first, cache = run(tokens[:, :9], cache, 0)
    parts = [first]
    for i in range(9, config.seq_len):
        one, cache = run(tokens[:, i : i + 1], cache, i)
        parts.append(one)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_dropout_is_keyed_and_off_by_default() -> None:
    config = replace(CONFIG, dropout=0.5)
    model, params = build(config)
    tokens = tokens_of(config)

    run = jax.jit(lambda p, key: forward(model, p, tokens, dropout_key=key)[0])
    off, one, again, other = (run(params, key) for key in (None, *map(jax.random.key, (1, 1, 2))))
    assert jnp.array_equal(one, again)
    assert not jnp.array_equal(one, other)
    plain = jax.jit(lambda p: forward(model.clone(config=CONFIG), p, tokens, dropout_key=jax.random.key(1))[0])(params)
    assert jnp.array_equal(off, plain)


@partial(jax.jit, static_argnums=2)
def masks(rate: float, key: jax.Array, batch: int, positions: jax.Array) -> jax.Array:
    """bool [4 micro-batches, 5 sites, B, T, 32 channels]: what is kept."""

    def one(micro_batch: jax.Array, site: jax.Array) -> jax.Array:
        keys = token_keys(jax.random.fold_in(key, micro_batch), batch, positions)
        return dropout(jnp.ones((*keys.shape, 32)), rate, keys, site) != 0

    return jax.vmap(lambda i: jax.vmap(partial(one, i))(jnp.arange(5)))(jnp.arange(4))


@settings(max_examples=15)
@given(rate=st.sampled_from([0.02, 0.1, 0.5, 0.9]), seed=st.integers(0, 2**31 - 1))
def test_every_place_has_a_mask_of_its_own_at_the_right_rate(rate: float, seed: int) -> None:
    """Micro-batch, site, row, position, channel: the share that is kept, and how often two places apart by any shift
    of one of them agree, are those of independent draws within 6 deviations."""
    kept = np.array(masks(rate, jax.random.key(seed), 3, jnp.arange(16)))

    def assert_share(events: np.ndarray, share: float, draws: int) -> None:
        assert abs(events.mean() - share) < 6 * np.sqrt(share * (1 - share) / draws)

    assert_share(kept, 1 - rate, kept.size)
    for axis, size in enumerate(kept.shape):
        for part in np.moveaxis(kept, axis, 0):
            assert_share(part, 1 - rate, part.size)
        for shift in range(1, size):
            # Pairs share their draws, hence half the count.
            assert_share(kept == np.roll(kept, shift, axis), rate**2 + (1 - rate) ** 2, kept.size // 2)


@settings(max_examples=15)
@given(order=st.permutations(range(16)), rows=st.sampled_from([1, 3]), seed=st.integers(0, 2**31 - 1))
def test_masks_follow_the_tokens(order: list[int], rows: int, seed: int) -> None:
    """However the sequence is stored, and whatever rows come after."""
    key = jax.random.key(seed)
    whole = np.array(masks(0.5, key, 3, jnp.arange(16)))
    np.testing.assert_array_equal(masks(0.5, key, rows, jnp.array(order)), whole[:, :, :rows, order])


def test_dropout_scales_what_it_keeps() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 32)), jnp.bfloat16)
    keys = token_keys(jax.random.key(0), 2, jnp.arange(7))
    out, pull = jax.vjp(jax.jit(lambda x: dropout(x, 0.2, keys, 3)), x)
    assert out.dtype == x.dtype
    want = np.where(out == 0, 0, np.float32(x) / 0.8)
    np.testing.assert_allclose(np.float32(out), want, rtol=2**-7)
    np.testing.assert_allclose(np.float32(pull(jnp.ones_like(x))[0]), np.where(out == 0, 0, 1 / 0.8), rtol=2**-7)


@pytest.mark.parametrize("cross", [False, True])
def test_no_two_places_in_the_model_share_a_site(monkeypatch: pytest.MonkeyPatch, cross: bool) -> None:
    """The embedding, and after attention, after the MLP and after cross-attention of each layer."""
    config, tokens, sites = (
        replace(CONFIG, dropout=0.5, scan_layers=False, cross_attention=cross),
        tokens_of(CONFIG),
        [],
    )
    model, memory = GPT(config, jnp.dtype("float32")), jnp.zeros((len(tokens), 3, config.embed_dim)) if cross else None
    params = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), tokens, memory=memory)["params"]))
    for room in (gpt, block):
        monkeypatch.setattr(room, "dropout", lambda x, rate, keys, site: sites.append((rate, keys.shape, site)) or x)
    jax.eval_shape(lambda p: forward(model, p, tokens, memory=memory, dropout_key=jax.random.key(0))[0], params)
    number = (3 if cross else 2) * config.num_layers + 1
    assert sorted(sites) == [(0.5, tokens.shape, i) for i in range(number)]


def pytorch_gpt2(config: ModelConfig, params: dict) -> Any:
    """The same weights in the peer's model, in float32."""
    torch = pytest.importorskip("torch", reason="needs the peers extra")
    transformers = pytest.importorskip("transformers", reason="needs the peers extra")
    sizes = {"n_positions": config.seq_len, "n_embd": config.embed_dim, "n_layer": config.num_layers}
    sizes |= {"vocab_size": config.vocab_size, "n_head": config.num_heads}
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ).eval()

    def tensor(x: jax.Array, *shape: int) -> "torch.Tensor":
        return torch.nn.Parameter(torch.tensor(np.array(x)).reshape(shape or x.shape))

    peer.transformer.wte.weight = peer.lm_head.weight = tensor(params["embedding"][: config.vocab_size])
    peer.transformer.wpe.weight = tensor(params["positions"])
    for name, norm in [("norm_final", peer.transformer.ln_f)]:
        norm.weight, norm.bias = tensor(params[name]["scale"]), tensor(params[name]["bias"])
    for i, theirs in enumerate(peer.transformer.h):
        ours = jax.tree.map(lambda leaf, i=i: leaf[i], params["units"]["block_0"])
        for name, norm in [("norm_attention", theirs.ln_1), ("norm_mlp", theirs.ln_2)]:
            norm.weight, norm.bias = tensor(ours[name]["scale"]), tensor(ours[name]["bias"])
        linears = {"qkv": theirs.attn.c_attn, "projection": theirs.attn.c_proj}
        linears |= {"mlp_up": theirs.mlp.c_fc, "mlp_down": theirs.mlp.c_proj}
        for name, linear in linears.items():
            linear.weight = tensor(ours[name]["kernel"], *linear.weight.shape)
            linear.bias = tensor(ours[name]["bias"], *linear.bias.shape)
    return peer


def test_logits_and_gradient_equal_pytorch_gpt2() -> None:
    torch = pytest.importorskip("torch", reason="needs the peers extra")
    config = ModelConfig(3, 4, 48, seq_len=20, vocab_size=131)
    model, params = build(config)
    tokens = np.array(tokens_of(config))
    peer = pytorch_gpt2(config, params)
    ids = torch.tensor(tokens, dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(peer(ids).logits[:, :-1].reshape(-1, 131), ids[:, 1:].reshape(-1))
    loss.backward()

    def ours_loss(params: dict) -> jax.Array:
        hidden, embedding, _ = forward(model, params, tokens[:, :-1])
        return cross_entropy(hidden, embedding, tokens[:, 1:], 131, 256) / (2 * 19)

    got = jax.jit(lambda p: logits(*forward(model, p, jnp.asarray(tokens))[:2], 131))(params)[..., :131]
    np.testing.assert_allclose(got, peer(ids).logits.detach().numpy(), atol=1e-4)
    value, grads = jax.jit(jax.value_and_grad(ours_loss))(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(grads["embedding"][:131], peer.transformer.wte.weight.grad, atol=1e-5)
    qkv = grads["units"]["block_0"]["qkv"]["kernel"][1].reshape(48, 144)
    np.testing.assert_allclose(qkv, peer.transformer.h[1].attn.c_attn.weight.grad, atol=1e-5)


def test_layer_norm_far_from_zero_is_as_exact_as_pytorchs() -> None:
    """A constant c in all channels of the residual stream changes no logit: how far it does in float32, against
    float64 of the same weights. The mean of squares less the square of the mean would be 0.1 off at c = 100."""
    torch = pytest.importorskip("torch", reason="needs the peers extra")
    config = ModelConfig(2, 4, 32, seq_len=16, vocab_size=128)
    model, params = build(config)
    tokens = tokens_of(config)
    ours = jax.jit(lambda p: logits(*forward(model, p, tokens)[:2], 128)[..., :128])
    ids = torch.tensor(np.array(tokens), dtype=torch.long)
    for c in (0, 1, 10, 100, 1000):
        shifted = params | {"positions": params["positions"] + np.float32(c)}
        peer = pytorch_gpt2(config, shifted)
        with torch.no_grad():
            theirs, exact = peer(ids).logits.numpy(), peer.double()(ids).logits.numpy()
        error, bar = (np.abs(scores - exact).max() for scores in (np.array(ours(shifted)), theirs))
        assert error <= 4 * bar, (c, error, bar)


def test_parameter_and_flop_counts() -> None:
    gpt3 = ModelConfig(96, 96, 12288, attention_pattern=("dense", "banded"))
    assert accounting.num_params(gpt3) == 174_604_259_328
    small = replace(gpt3, num_layers=12, num_heads=12, embed_dim=768)
    assert accounting.num_params(small) == 125_226_240
    assert accounting.train_flops_per_token(small) == pytest.approx(8.111e8, rel=1e-3)
    assert accounting.train_flops_per_token(gpt3) == pytest.approx(1.056e12, rel=1e-3)
    assert accounting.train_flops_per_token_palm(small) == pytest.approx(9.677e8, rel=1e-3)


@st.composite
def blocks(draw: st.DrawFn) -> ModelConfig:
    """Any combination of what the block can be."""
    flags = {name: draw(st.booleans()) for name in ("qkv_bias", "biases", "tied_head", "scan_layers")}
    heads = draw(st.integers(1, 4))
    return ModelConfig(
        num_layers=2,
        num_heads=heads,
        embed_dim=heads * 2 * draw(st.integers(1, 3)),
        seq_len=8,
        vocab_size=128,
        num_kv_heads=draw(st.sampled_from([0, *(n for n in range(1, heads + 1) if heads % n == 0)])),
        head_size=draw(st.sampled_from([0, 2, 6])),
        mlp_size=draw(st.integers(0, 9)),
        norm=draw(st.sampled_from(["layer", "rms"])),
        positions=draw(st.sampled_from(["learned", "rotary"])),
        activation=draw(st.sampled_from([*ACTIVATIONS])),
        parallel_mlp=draw(st.sampled_from(["no", "one_norm", "two_norms"])),
        **flags,
    )


@settings(max_examples=25)
@given(blocks())
def test_every_block_has_the_parameters_and_adapters_that_are_counted(config: ModelConfig) -> None:
    lora = LoRAConfig(rank=3)
    gpt = GPT(config, jnp.dtype("float32"), lora=lora)
    boxed = jax.eval_shape(lambda key: gpt.init(key, jnp.zeros((1, 1), jnp.int32))["params"], jax.random.key(0))
    sizes = {leaf_name(p): x.size for p, x in jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))}
    adapters = {name: size for name, size in sizes.items() if is_adapter(name)}
    assert sum(sizes.values()) - sum(adapters.values()) == accounting.num_params(config)
    assert sum(adapters.values()) == sum(accounting.adapter_params(config, lora).values())
    held = jax.tree.leaves(jax.eval_shape(lambda: empty_cache(config, 3, 5, jnp.dtype("float32"))))
    assert sum(x.size for x in held) * 4 == accounting.cache_bytes(config, 3, 5, 4)


@given(st.integers(0, 2**20), st.integers(0, 2**20), st.integers(0, 500))
def test_rotary_scores_depend_on_the_distance_alone(place: int, other: int, distance: int) -> None:
    """And equal float64's, where angles in float32 are off by 2^-24 of themselves."""
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 1, 1, 8)).astype(np.float32) for _ in range(2))

    def score(at: int) -> float:
        turned = [rotated(jnp.asarray(x), jnp.full((1, 1), p), 10_000.0) for x, p in ((q, at + distance), (k, at))]
        return float(jnp.sum(turned[0] * turned[1]))

    angles = distance * 10_000.0 ** (-np.arange(4) / 4)
    pairs = [(x[..., :4] + 1j * x[..., 4:]).ravel().astype(np.complex128) for x in (q, k)]
    exact = np.sum(pairs[0] * np.exp(1j * angles) * pairs[1].conj()).real
    for at in (place, other):
        assert score(at) == pytest.approx(exact, abs=1e-5 + 1e-6 * (at + distance))


@given(st.integers(1, 200), st.integers(1, 250))
def test_mean_keys_counts_keys(length: int, window: int) -> None:
    positions = np.arange(length)
    counted = np.minimum(positions + 1, window).mean()
    assert accounting.mean_keys("banded", length, window) == pytest.approx(counted)


LATER = ModelConfig(2, 4, 128, seq_len=64, vocab_size=128, scan_layers=False, num_kv_heads=2, head_size=48)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(2, 2, 128, seq_len=64, vocab_size=128, scan_layers=False),
        replace(LATER, mlp_size=320, norm="rms", positions="rotary", activation="swiglu", tied_head=False),
    ],
    ids=["gpt", "llama"],
)
def test_flops_equal_the_compilers_count(config: ModelConfig) -> None:
    """Unrolled, dense, no remat, and reference attention that computes all T keys: the PaLM count within 10%."""
    model = GPT(config, jnp.dtype("float32"), Parallelism(reference))
    params = jax.eval_shape(
        lambda key: nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]), jax.random.key(0)
    )

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        hidden, embedding, _ = forward(model, params, tokens)
        return cross_entropy(hidden, embedding, tokens, 128, 64)

    compiled = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((4, 64), jnp.int32)).compile()
    counted = compiled.cost_analysis()["flops"] / (4 * 64)
    assert counted == pytest.approx(accounting.train_flops_per_token_palm(config), rel=0.1)
