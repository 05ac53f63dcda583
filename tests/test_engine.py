"""The engine against a plain loop of full forward passes: what a request gives is the same, whatever runs beside it."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import Config, DataConfig, LayoutConfig, ModelConfig
from gptjax.errors import UserError
from gptjax.infer.engine import Engine, common
from gptjax.infer.prepare import apart, prepared
from gptjax.infer.programs import key_of
from gptjax.infer.request import Reply, Request
from gptjax.infer.sampling import Knobs, Sampling, draw
from gptjax.model.accounting import cache_bytes
from gptjax.model.gpt import GPT, forward
from gptjax.model.loss import logits
from gptjax.parallel.network import Network
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, rule_table

T, V = 48, 61
PLAIN = ModelConfig(num_layers=2, num_heads=4, embed_dim=32, seq_len=T, vocab_size=V, scan_layers=False)
MODELS = {
    "dense": replace(PLAIN, attention_pattern=("dense",)),
    "banded": replace(PLAIN, attention_pattern=("banded",), window=5),
    "both": replace(PLAIN, attention_pattern=("dense", "banded"), window=7),
    "scanned": replace(PLAIN, num_layers=4, attention_pattern=("banded", "dense"), window=3, scan_layers=True),
    "llama": replace(
        PLAIN,
        attention_pattern=("dense", "banded"),
        window=7,
        num_kv_heads=2,
        head_size=6,
        mlp_size=40,
        norm="rms",
        positions="rotary",
        activation="swiglu",
        qkv_bias=False,
        biases=False,
        tied_head=False,
    ),
}
GREEDY, WARM = Sampling(0.0), Sampling(1.3, top_k=20, top_p=0.9, repetition_penalty=1.2)


@cache
def model(name: str) -> tuple[GPT, dict]:
    """Weights so large that each token is far likelier than the next."""
    gpt = GPT(MODELS[name], jnp.dtype("float32"))
    params = nn.unbox(gpt.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"])
    return gpt, jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)


@cache
def engine(name: str) -> Engine:
    """Few rows, short chunks: every border is met; in one of them several prompts share a call."""
    return Engine(*model(name), slots=3, steps=2, chunk=64 if name == "scanned" else 16)


@cache
def scores(name: str):
    gpt, params = model(name)
    return jax.jit(lambda ids: logits(*forward(gpt, params, ids)[:2], V)[0])


@cache
def passed(name: str):
    """The token that is drawn after so many, from a whole forward pass, and its log-probability: one call a token."""
    gpt, params = model(name)
    bias = np.where(np.arange(128) < V, 0, -np.inf).astype(np.float32)[None]

    @jax.jit
    def draw_one(ids, length, words, number, knobs, counts, seen):
        row = logits(*forward(gpt, params, ids)[:2], V)[0][None, length - 1]
        key = jax.random.fold_in(jax.random.wrap_key_data(words), number)
        token = draw(row, knobs, bias, counts, seen, key[None])[0]
        return token, jax.nn.log_softmax(row[0])[token]

    return draw_one


def by_full_passes(name: str, request: Request, count: int) -> tuple[list[int], list[float]]:
    """(tokens, log-probabilities) from whole forward passes over a padded context."""
    ids, values = list(request.prompt), []
    knobs = jax.tree.map(lambda x: np.array([x]), Knobs.of(request.sampling))
    words = key_of(request.seed, request.sample)
    for number in range(count):
        padded = np.zeros((1, T), np.int32)
        padded[0, : len(ids)] = ids
        counts, seen = np.zeros((1, 128), np.int32), np.zeros((1, 128), bool)
        np.add.at(counts[0], ids[len(request.prompt) :], 1)
        seen[0, request.prompt] = True
        token, value = passed(name)(padded, len(ids), words, number, knobs, counts, seen)
        ids.append(int(token))
        values.append(float(value))
    return ids[len(request.prompt) :], values


def assert_equal(name: str, reply: Reply) -> None:
    tokens, values = by_full_passes(name, reply.request, len(reply.tokens))
    assert reply.tokens == tokens, (len(reply.request.prompt), reply.request)
    np.testing.assert_allclose(reply.logprobs, values, atol=1e-4)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, V, length).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_length_of_prompt(name: str) -> None:
    """One token to a full context, over every border of the calls that fill it, and three times round each ring."""
    requests = [Request(prompt(n, n), T, GREEDY) for n in (1, 2, 15, 16, 17, 18, 32, 33, 34, T - 1, T)]
    for reply in engine(name).run(requests):
        assert reply.reason == "length"
        assert len(reply.request.prompt) + len(reply.tokens) == T + 1  # the last token needs no place
        assert_equal(name, reply)


def test_the_programs_of_accelerators() -> None:
    """They read so many slots, and scatter; here on a CPU, not on one of them."""
    runner = Engine(*model("both"), slots=3, steps=2, chunk=16)
    runner._on_cpu = False
    for reply in runner.run([Request(prompt(n, n), 6, how, seed=n) for n in (1, 17, 30, T) for how in (GREEDY, WARM)]):
        assert_equal("both", reply)


asked = st.tuples(
    st.integers(1, T), st.integers(1, 20), st.integers(0, 12), st.sampled_from((GREEDY, WARM)), st.integers(0, 3)
)


@pytest.mark.parametrize("name", ["both", pytest.param("banded", marks=pytest.mark.whole)])
@settings(max_examples=8, deadline=None)
@given(every=st.lists(asked, min_size=1, max_size=7))
def test_whatever_arrives_when(name: str, every: list[tuple]) -> None:
    """Lengths, limits, rounds of arrival and ways of drawing at random; prompts that share beginnings."""
    runner, replies = engine(name), []
    for now in range(13):
        for length, limit, at, how, seed in every:
            if at == now:
                replies.append(runner.submit(Request(prompt(T, seed)[:length], limit, how, seed=seed)))
        runner.step()
    while runner.busy:
        runner.step()
    for reply in replies:
        assert_equal(name, reply)


def test_prompts_that_begin_otherwise_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of those that wait with each row, in each round: two thirds of the time of 128 short replies."""
    compared: list[int] = []
    monkeypatch.setattr("gptjax.infer.engine.common", lambda a, b: compared.append(len(a)) or common(a, b))
    engine("dense").run([Request([number, *range(20)], 2) for number in range(12)])
    assert not compared


@pytest.mark.parametrize("name", ["dense", "both"])
def test_prefixes_are_computed_once_and_change_nothing(name: str) -> None:
    runner, shared = engine(name), prompt(30, 9)
    requests = [Request([*shared, *prompt(4, i)], 6, GREEDY) for i in range(6)]
    requests += [Request(shared, 6, WARM, seed=3, sample=i) for i in range(5)]
    runner.clear()
    filled = []
    fill = runner.programs.fill
    counting = lambda params, slots, tokens, numbers, count, *rest: (  # noqa: E731
        filled.append(int(count.sum())),
        fill(params, slots, tokens, numbers, count, *rest),
    )[1]
    runner.programs.__dict__["fill"] = counting
    try:
        replies = runner.run(requests)
        reused, filled[:] = sum(filled), []
        runner.reuse = False
        plain = runner.run(requests)
        alone = sum(filled)
    finally:
        runner.reuse, runner.programs.__dict__["fill"] = True, fill
    assert alone == sum(len(request.prompt) - 1 for request in requests)
    assert reused < alone / 3
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in plain]
    assert len({tuple(reply.tokens) for reply in replies[6:]}) == 5
    for reply in replies:
        assert_equal(name, reply)


def test_prompts_are_scored() -> None:
    ids = prompt(40, 4)
    (reply,) = engine("both").run([Request(ids, 0, tops=3, prompt_logprobs=True)])
    padded = np.zeros((1, T), np.int32)
    padded[0, :40] = ids
    whole = np.asarray(jax.nn.log_softmax(scores("both")(padded)))
    np.testing.assert_allclose(reply.prompt_logprobs, whole[np.arange(39), ids[1:]], atol=1e-4)
    for row, pairs in zip(whole, reply.prompt_tops, strict=False):
        assert [token for token, _ in pairs] == np.argsort(-row)[:3].tolist()
    assert (reply.reason, reply.tokens, len(reply.prompt_tops)) == ("length", [], 39)


@pytest.mark.parametrize("name", ["dense", "both"])
def test_prompts_that_are_scored_from_the_middle_share_what_stands_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As continuations of one context are, of which the longest is one token more than the context holds."""
    runner, found = engine(name), []
    best = runner._best
    monkeypatch.setattr(runner, "_best", lambda ids: found.append(best(ids)) or found[-1])
    context = prompt(30, 9)
    asked = [[*context, *prompt(n, n)] for n in (1, 2, 5, 17, T - 29)]
    replies = runner.run([Request(ids, 0, tops=1, prompt_logprobs=True, told_from=30) for ids in asked])
    for ids, reply in zip(asked, replies, strict=True):
        padded = np.zeros((1, T), np.int32)
        padded[0, : len(ids)] = ids[:T]
        whole = np.asarray(jax.nn.log_softmax(scores(name)(padded)))[29 : len(ids) - 1]
        np.testing.assert_allclose(reply.prompt_logprobs, whole[np.arange(len(whole)), ids[30:]], atol=1e-4)
        assert [pairs[0][0] for pairs in reply.prompt_tops] == whole.argmax(-1).tolist()
    assert sum(shared == 29 for _, shared in found) >= 4  # all but the first


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("both", LayoutConfig(data=2, fsdp=1, tensor=4)),
        ("both", LayoutConfig(data=2, fsdp=2, tensor=2)),
        ("llama", LayoutConfig(data=2, fsdp=2, tensor=2)),
    ],
)
def test_layouts_give_the_same_text(name: str, layout: LayoutConfig) -> None:
    config = Config(name="x", model=MODELS[name], data=DataConfig(), layout=layout)
    place = Layout(make_mesh(config), rule_table(layout))
    network = Network(config, "cpu", place)
    boxed = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.device_put(model(name)[1], place.shardings(boxed))
    runner = Engine(network.decoder, params, slots=3, steps=2, chunk=16, layout=place)
    for reply in runner.run([Request(prompt(n, n), 8, how, seed=n) for n in (1, 17, 30) for how in (GREEDY, WARM)]):
        assert_equal(name, reply)


def test_other_parameters_between_two_rounds() -> None:
    gpt, params = model("both")
    runner = Engine(gpt, jax.tree.map(jnp.zeros_like, params), slots=1, steps=2, chunk=16)
    request = Request(prompt(20, 2), 4, GREEDY)
    (zero,) = runner.run([request])
    assert zero.logprobs == pytest.approx([-np.log(V)] * 4)
    programs = runner.programs
    before = programs.fill._cache_size(), programs.decode._cache_size()
    runner.params = params
    (reply,) = runner.run([request])  # nothing of what the other parameters left
    assert_equal("both", reply)
    half = runner.submit(Request(prompt(20, 2), 20, GREEDY))
    runner.step()
    runner.step()
    runner.params = jax.tree.map(jnp.copy, params)
    (reply,) = runner.run([request])  # beside a row that was half done
    assert half.reason == "length"
    assert_equal("both", reply)
    assert (programs.fill._cache_size(), programs.decode._cache_size()) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("scanned", marks=pytest.mark.whole), "llama"])
def test_weights_in_8_and_16_bits_are_near(name: str) -> None:
    """Each in a type of its own, and stacked layers laid apart."""
    config = MODELS[name]
    gpt, params = model(name)
    flat = gpt.clone(config=replace(config, scan_layers=False))
    request = Request(prompt(20, 5), 1, GREEDY, tops=5)
    (want,) = engine(name).run([request])
    for kind, near in (("float32", 1e-5), ("bfloat16", 0.2), ("int8", 0.2)):
        held = prepared(apart(params, config), kind, jnp.dtype("float32"))
        (got,) = Engine(flat, held, slots=1, steps=2, chunk=16).run([request])
        assert got.tops[0][0][1] == pytest.approx(want.tops[0][0][1], abs=near), kind
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    assert size < 0.4 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_a_cache_is_as_large_as_said() -> None:
    for name, config in MODELS.items():
        runner = engine(name)
        runner.step()
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(runner._state.cache))
        assert held == cache_bytes(config, runner.programs.rows, T, 4), name
    dense, both = (cache_bytes(MODELS[name], 1, T, 4) for name in ("dense", "both"))
    assert both == dense / 2 * (1 + 7 / T)


def test_what_cannot_be_is_one_line() -> None:
    runner = engine("dense")
    for request, message in (
        (lambda: Request([]), "prompt: empty"),
        (lambda: Request([1], -1), "max_tokens = -1: must lie in 0"),
        (lambda: Request([1], seed=2**64), "seed = 18446744073709551616"),
        (lambda: Request([1], tops=21), "logprobs = 21: must lie in 0 to 20; nearest 20"),
        (lambda: Sampling(float("nan")), "temperature = nan"),
        (lambda: Sampling(float("inf")), "temperature = inf"),
        (lambda: Sampling(top_p=0.0), "top_p = 0.0"),
        (lambda: runner.submit(Request([0] * (T + 1))), "prompt: 49 tokens; the context holds 48"),
        (lambda: runner.submit(Request([V])), f"token {V}: outside the vocabulary, 0 to {V - 1}"),
        (lambda: runner.submit(Request([1], sampling=Sampling(logit_bias={-1: 1.0}))), "token -1: outside"),
    ):
        with pytest.raises(UserError, match=message):
            request()
    assert not runner.busy


def test_cancelled_anywhere_and_the_others_unharmed() -> None:
    runner = engine("both")
    others = [runner.submit(Request(prompt(20, i), 12, GREEDY)) for i in range(2)]
    long = runner.submit(Request(prompt(T, 7), 1, GREEDY))
    waiting = runner.submit(Request(prompt(5, 8), 4, GREEDY))
    runner.step()  # a chunk of each, none whole
    runner.cancel(long)
    runner.cancel(waiting)
    assert (long.reason, waiting.reason) == ("cancelled", "cancelled")
    runner.step()
    runner.cancel(others[0])
    assert len(runner._taken) == 1
    while runner.busy:
        runner.step()
    assert_equal("both", others[1])
    assert runner._free == [0, 1, 2]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_beginnings(a: list[int], b: list[int]) -> None:
    n = common(a, b)
    assert a[:n] == b[:n] and (a[n : n + 1] != b[n : n + 1] or n == min(len(a), len(b)))


@pytest.mark.parametrize("name", ["fill", "decode", "rest"])
def test_cut_off_in_a_call_that_has_taken_the_caches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C there: all that was asked ends, and the next request is answered as ever."""
    runner, doomed = engine("both"), [Request(prompt(20, 1), 9, GREEDY), Request(prompt(3, 2), 9, WARM)]
    runner.clear()
    replies = [runner.submit(request) for request in doomed]
    real = getattr(runner.programs, name)

    def interrupted(*arguments: object) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(vars(runner.programs), name, interrupted)  # where cached_property keeps it
        with pytest.raises(KeyboardInterrupt):
            while runner.busy:
                runner.step()
    assert {reply.reason for reply in replies} == {"cancelled"} and not runner.busy
    (reply,) = runner.run([Request(prompt(20, 1), 9, GREEDY)])
    assert_equal("both", reply)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_warm_engine_compiles_nothing(on_cpu: bool) -> None:
    """Prompts alone and together, short and in chunks, scored and not, and every number of rows."""
    runner = Engine(*model("both"), slots=3, steps=2, chunk=16)
    runner._on_cpu = on_cpu
    for _ in runner.warm():
        pass
    before = runner.programs.compiled
    for count in (1, 2, 3, 5):
        requests = [Request(prompt(4 + 10 * n, n), 4, how, seed=n) for n in range(count) for how in (GREEDY, WARM)]
        told = [replace(request, prompt_logprobs=True, tops=2) for request in requests[::2]]
        for reply in runner.run([*requests, *told]):
            assert_equal("both", reply)
    assert runner.programs.compiled == before
    assert runner.reused > 0
