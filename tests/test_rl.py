"""The arithmetic of PPO, GRPO and DPO against plain loops in float64, and against what others got wrong. Run:
pytest tests/test_rl.py

Outside the mask random arrays hold NaN: whatever reads it fails.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.rl import control, losses, responses, returns

ROWS, LENGTH = 4, 9
MASKS = npst.arrays(bool, (ROWS, LENGTH)).filter(np.any)  # with holes, padding on either side, rows without a token
SEEDS = st.integers(0, 2**31)
SHARES = st.floats(0, 1, width=32)
STATIC = ("shift_mean", "scale_by_std")
END, STOP, PAD = 5, 6, 0


@cache
def jitted(function: Callable) -> Callable:
    known = function.__code__.co_varnames[: function.__code__.co_kwonlyargcount + function.__code__.co_argcount]
    return jax.jit(function, static_argnames=[name for name in STATIC if name in known])


def normal(seed: int, mask: np.ndarray, count: int, scale: float = 1) -> list[np.ndarray]:
    """Random arrays of float32, NaN outside the mask."""
    drawn = np.random.default_rng(seed).normal(0, scale, (count, *mask.shape)).astype(np.float32)
    return list(np.where(mask, drawn, np.nan))


def close(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    """To `tolerance` of the greatest value, or of 1."""
    assert ours.dtype == np.float32
    theirs = np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max(initial=0)))


def tokens_of(mask: np.ndarray) -> list[tuple[int, int]]:
    return [(row, t) for row, t in np.ndindex(mask.shape) if mask[row, t]]


# Responses


def plain_extent(tokens: np.ndarray, drawn: np.ndarray, ends: tuple[int, ...]) -> list[tuple[list[bool], int, bool]]:
    found = []
    for row, real in zip(tokens.tolist(), drawn.tolist(), strict=True):
        mask, last, ended = [False] * len(row), -1, False
        for t, token in enumerate(row):
            if real[t] and not ended:
                mask[t], last, ended = True, t, token in ends
        found.append((mask, last, ended))
    return found


@given(npst.arrays(np.int32, (ROWS, LENGTH), elements=st.integers(0, 6)), npst.arrays(bool, (ROWS, LENGTH)))
def test_extent(tokens: np.ndarray, drawn: np.ndarray) -> None:
    found = jax.device_get(jitted(responses.extent)(tokens=tokens, drawn=drawn, ends=(5, 2)))
    assert found.last.dtype == np.int32
    for i, (mask, last, ended) in enumerate(plain_extent(tokens, drawn, (5, 2))):
        assert found.mask[i].tolist() == mask
        assert (found.last[i], found.ended[i]) == (last, ended)


def test_a_response_without_end_ids_is_all_that_was_drawn() -> None:
    tokens, drawn = np.zeros((1, 4), np.int32), np.array([[True, True, True, False]])
    found = responses.extent(tokens=jnp.array(tokens), drawn=jnp.array(drawn), ends=())
    assert found.mask.tolist() == drawn.tolist()
    assert (found.last.tolist(), found.ended.tolist()) == ([2], [False])


@given(SEEDS, MASKS)
def test_sums_and_statistics(seed: int, mask: np.ndarray) -> None:
    (x,) = normal(seed, mask, 1)
    values = [float(x[at]) for at in tokens_of(mask)]
    mean = sum(values) / len(values)
    close(jitted(responses.masked_mean)(x, mask=mask), mean)
    close(jitted(responses.masked_variance)(x, mask=mask), sum((v - mean) ** 2 for v in values) / len(values))
    close(jitted(responses.row_sums)(x, mask=mask), [math.fsum(x[i][mask[i]].tolist()) for i in range(ROWS)])


@given(SEEDS, MASKS, st.booleans())
def test_whiten(seed: int, mask: np.ndarray, shift_mean: bool) -> None:
    (x,) = normal(seed, mask, 1)
    values = [float(x[at]) for at in tokens_of(mask)]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    expected = np.zeros(x.shape)
    for (row, t), value in zip(tokens_of(mask), values, strict=True):
        expected[row, t] = (value - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean)
    condition = max(1, max(map(abs, values)) / math.sqrt(variance + 1e-8))  # what a difference of the values loses
    close(jitted(responses.whiten)(x, mask=mask, shift_mean=shift_mean), expected, 1e-6 * condition)


# Returns


def plain_rewards(
    logprobs: np.ndarray, ref_logprobs: np.ndarray, scores: np.ndarray, mask: np.ndarray, beta: float
) -> np.ndarray:
    rewards = np.zeros(mask.shape)
    for row in range(len(mask)):
        places = [t for t in range(mask.shape[1]) if mask[row, t]]
        for t in places:
            rewards[row, t] = -beta * (float(logprobs[row, t]) - float(ref_logprobs[row, t]))
        if places:
            rewards[row, places[-1]] += float(scores[row])
    return rewards


@given(SEEDS, MASKS, st.floats(0, 2, width=32))
def test_token_rewards(seed: int, mask: np.ndarray, beta: float) -> None:
    logprobs, ref_logprobs = normal(seed, mask, 2)
    scores = np.random.default_rng(seed).normal(0, 3, ROWS).astype(np.float32)
    expected = plain_rewards(logprobs, ref_logprobs, scores, mask, beta)
    close(
        jitted(returns.token_rewards)(
            logprobs=logprobs, ref_logprobs=ref_logprobs, scores=scores, mask=mask, beta=beta
        ),
        expected,
    )


def plain_gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """The sum that defines an advantage, of every token anew: equation 16 over the tokens that are there."""
    advantages, found = np.zeros(mask.shape), np.zeros(mask.shape)
    for row in range(len(mask)):
        places = [t for t in range(mask.shape[1]) if mask[row, t]]
        r, v = [float(rewards[row, t]) for t in places], [float(values[row, t]) for t in places] + [0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(places))]
        for i, t in enumerate(places):
            advantages[row, t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(places)))
            found[row, t] = advantages[row, t] + v[i]
    return advantages, found


@given(SEEDS, MASKS, SHARES, SHARES)
def test_gae(seed: int, mask: np.ndarray, gamma: float, lam: float) -> None:
    rewards, values = normal(seed, mask, 2)
    found = jitted(returns.gae)(rewards=rewards, values=values, mask=mask, gamma=gamma, lam=lam)
    for ours, theirs in zip(found, plain_gae(rewards, values, mask, gamma, lam), strict=True):
        close(ours, theirs)


@given(SEEDS, MASKS, SHARES)
def test_true_values_leave_no_advantage(seed: int, mask: np.ndarray, lam: float) -> None:
    (rewards,) = normal(seed, mask, 1)
    togo = np.cumsum(np.where(mask, rewards, 0)[:, ::-1], axis=1, dtype=np.float32)[:, ::-1]
    found = jitted(returns.gae)(rewards=rewards, values=togo, mask=mask, gamma=1.0, lam=lam)
    close(found.advantages, np.zeros(mask.shape), 3e-6)
    close(found.returns, np.where(mask, togo, 0), 3e-6)


@given(SEEDS, st.booleans())
def test_group_advantages(seed: int, scale_by_std: bool) -> None:
    scores = np.random.default_rng(seed).normal(0, 2, (3, 5)).astype(np.float32)
    expected = np.zeros(scores.shape)
    for i, group in enumerate(scores.astype(float).tolist()):
        mean = sum(group) / len(group)
        std = math.sqrt(sum((score - mean) ** 2 for score in group) / (len(group) - 1))
        expected[i] = [(score - mean) / (std + 1e-4 if scale_by_std else 1) for score in group]
    close(jitted(returns.group_advantages)(scores=scores, scale_by_std=scale_by_std), expected, 2e-6)


@given(st.floats(-100, 100, width=32), st.sampled_from([1, 3, 17]), st.booleans())
def test_equal_scores_have_no_advantage(score: float, group: int, scale_by_std: bool) -> None:
    scores = np.full((2, group), score, np.float32)
    assert not np.any(jitted(returns.group_advantages)(scores=scores, scale_by_std=scale_by_std))


# Losses: plain versions of what a step minimises


def plain_policy(
    logprobs: np.ndarray, old: np.ndarray, advantages: np.ndarray, mask: np.ndarray, clip: float
) -> tuple[float, int]:
    """The sum over tokens, and how many are clipped."""
    total, clipped = 0.0, 0
    for at in tokens_of(mask):
        ratio, advantage = math.exp(float(logprobs[at]) - float(old[at])), float(advantages[at])
        kept = min(max(ratio, 1 - clip), 1 + clip)
        total += max(-advantage * ratio, -advantage * kept)
        clipped += -advantage * kept > -advantage * ratio
    return total, clipped


def plain_value(values: np.ndarray, old: np.ndarray, found: np.ndarray, mask: np.ndarray, clip: float) -> float:
    total = 0.0
    for at in tokens_of(mask):
        value, before, target = float(values[at]), float(old[at]), float(found[at])
        near = before + min(max(value - before, -clip), clip)
        total += 0.5 * max((value - target) ** 2, (near - target) ** 2)
    return total


def plain_k3(logprobs: np.ndarray, ref: np.ndarray, mask: np.ndarray) -> float:
    total = 0.0
    for at in tokens_of(mask):
        log_ratio = float(ref[at]) - float(logprobs[at])
        total += math.exp(log_ratio) - log_ratio - 1
    return total


def slopes(function: Callable[[np.ndarray], float], x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Central differences in float64; 0 outside the mask."""
    step, found = 1e-6, np.zeros(x.shape)
    for at in tokens_of(mask):
        up, down = x.astype(float), x.astype(float)
        up[at] += step
        down[at] -= step
        found[at] = (function(up) - function(down)) / (2 * step)
    return found


def counted(mask: np.ndarray) -> float:
    """Twice the tokens that are here: the others of the step are in another micro-batch."""
    return 2.0 * mask.sum()


CLIPS = st.sampled_from([0.05, 0.2, 0.5])
FEW = settings(max_examples=25)


@FEW
@given(SEEDS, MASKS, CLIPS)
def test_policy_loss(seed: int, mask: np.ndarray, clip: float) -> None:
    (logprobs, old, advantages), count = normal(seed, mask, 3, 0.5), counted(mask)
    given = {"old_logprobs": old, "advantages": advantages, "mask": mask, "clip": clip, "count": count}
    loss, slope = jitted(gradient_of(losses.policy_loss, "logprobs"))(logprobs, given)
    total, clipped = plain_policy(logprobs, old, advantages, mask, clip)
    close(loss, total / count)
    close(jitted(losses.clip_fraction)(logprobs=logprobs, **given), clipped / count)
    close(slope, slopes(lambda x: plain_policy(x, old, advantages, mask, clip)[0] / count, logprobs, mask))


@FEW
@given(SEEDS, MASKS, st.sampled_from([0.05, 0.2, math.inf]))
def test_value_loss(seed: int, mask: np.ndarray, clip: float) -> None:
    (values, old, found), count = normal(seed, mask, 3), counted(mask)
    given = {"old_values": old, "returns": found, "mask": mask, "clip": clip, "count": count}
    loss, slope = jitted(gradient_of(losses.value_loss, "values"))(values, given)
    close(loss, plain_value(values, old, found, mask, clip) / count)
    close(slope, slopes(lambda x: plain_value(x, old, found, mask, clip) / count, values, mask))


@FEW
@given(SEEDS, MASKS, CLIPS)
def test_grpo_loss(seed: int, mask: np.ndarray, clip: float) -> None:
    (logprobs, old, ref), count = normal(seed, mask, 3, 0.5), counted(mask)
    advantages = np.random.default_rng(seed).normal(size=ROWS).astype(np.float32)
    given = {"old_logprobs": old, "response_advantages": advantages, "mask": mask, "clip": clip, "count": count}
    given |= {"ref_logprobs": ref, "beta": 0.04}

    def plain(x: np.ndarray) -> float:
        spread = np.repeat(advantages[:, None], LENGTH, axis=1)
        return (plain_policy(x, old, spread, mask, clip)[0] + 0.04 * plain_k3(x, ref, mask)) / count

    loss, slope = jitted(gradient_of(losses.grpo_loss, "logprobs"))(logprobs, given)
    close(loss, plain(logprobs))
    close(slope, slopes(plain, logprobs, mask))


@cache
def gradient_of(function: Callable, name: str) -> Callable:
    return lambda x, rest: jax.value_and_grad(lambda x: function(**{name: x}, **rest))(x)


@given(SEEDS, MASKS)
def test_explained_variance(seed: int, mask: np.ndarray) -> None:
    found, noise = normal(seed, mask, 2)
    explained = partial(jitted(losses.explained_variance), mask=mask)
    inside = [found[at] for at in tokens_of(mask)]
    if np.std(inside) < 0.1:  # a quotient of what rounding left
        return
    values = (found + 0.1 * noise).astype(np.float32)
    rest = np.var([float(found[at]) - float(values[at]) for at in tokens_of(mask)])
    close(explained(values=values, returns=found), 1 - rest / np.var(inside, dtype=np.float64), 1e-5)
    assert explained(values=found, returns=found) == 1
    assert explained(values=np.zeros_like(found), returns=found) == pytest.approx(0, abs=1e-6)
    assert np.isnan(explained(values=found, returns=np.ones_like(found)))


def test_three_estimates_of_one_kl() -> None:
    """In the mean over what pi draws, k1 and k3 are the KL; k2 is close for policies that are."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20, 50))
    near = scores + rng.normal(0, 0.05, scores.shape)
    pi, ref = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (scores, near))
    share, kl = np.exp(pi), np.sum(np.exp(pi) * (pi - ref), -1)
    k1, k2, k3 = (
        np.asarray(k(logprobs=jnp.float32(pi), ref_logprobs=jnp.float32(ref)))
        for k in (losses.kl_k1, losses.kl_k2, losses.kl_k3)
    )
    assert np.sum(share * k1, -1) == pytest.approx(kl, abs=1e-6)
    assert np.sum(share * k3, -1) == pytest.approx(kl, abs=1e-6)
    assert np.sum(share * k2, -1) == pytest.approx(kl, rel=0.1)
    assert k1.min() < 0 <= k2.min() and k3.min() > -1e-7
    close(k1, pi - ref)
    close(k2, (pi - ref) ** 2 / 2)
    close(k3, np.exp(ref - pi) - 1 - (ref - pi))


# DPO against PyTorch


@pytest.mark.skipif(not find_spec("torch"), reason="needs the peers extra")
@pytest.mark.usefixtures("one_torch_thread")
@FEW
@given(SEEDS, npst.arrays(bool, (2, 3, LENGTH)), st.sampled_from([0.0, 0.1]))
def test_dpo_is_that_of_pytorch(seed: int, mask: np.ndarray, smoothing: float) -> None:
    """From logits, of whose tokens those in the mask are responses, to loss and gradient."""
    import torch

    rng = np.random.default_rng(seed)
    logits, ref = rng.normal(size=(2, *mask.shape, 7)).astype(np.float32)
    tokens = rng.integers(0, 7, mask.shape)
    found, slope = dpo_step()(logits, ref, tokens, mask, smoothing)

    def spoken(logits: Any) -> Any:
        logprobs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens)[..., None])[..., 0]
        return (logprobs * torch.tensor(mask)).sum(-1)

    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    chosen, rejected = 0.3 * (spoken(theirs) - spoken(torch.tensor(ref, dtype=torch.float64)))
    right, wrong = (torch.nn.functional.logsigmoid(sign * (chosen - rejected)) for sign in (1, -1))
    loss = -((1 - smoothing) * right + smoothing * wrong).mean()
    loss.backward()
    close(found[0], loss.item(), 1e-5)
    close(found[1], (chosen - rejected).mean().item(), 1e-5)
    close(slope, theirs.grad.numpy(), 1e-5)


def our_dpo(logits: jax.Array, ref: jax.Array, tokens: jax.Array, mask: jax.Array, smoothing: float) -> Any:
    """Loss and mean margin of chosen and rejected [2, pairs, T]."""
    ours, theirs = (
        responses.row_sums(jnp.take_along_axis(jax.nn.log_softmax(x), tokens[..., None], axis=-1)[..., 0], mask=mask)
        for x in (logits, ref)
    )
    chosen, rejected = losses.implicit_rewards(logprobs=ours, ref_logprobs=theirs, beta=0.3)
    pairs = jnp.ones(len(chosen), bool)
    given = {"chosen_rewards": chosen, "rejected_rewards": rejected, "mask": pairs, "count": len(chosen)}
    return losses.dpo_loss(**given, label_smoothing=smoothing), losses.dpo_margin(**given)


@cache
def dpo_step() -> Callable:
    return jax.jit(jax.value_and_grad(our_dpo, has_aux=True))


def test_dpo_begins_at_log_2_and_its_margin_grows() -> None:
    rng = np.random.default_rng(0)
    ref, tokens = rng.normal(size=(2, 3, LENGTH, 7)).astype(np.float32), rng.integers(0, 7, (2, 3, LENGTH))
    mask = np.arange(LENGTH) >= 4  # a prompt of four
    mask, logits, margins = np.broadcast_to(mask, tokens.shape), jnp.array(ref), []
    for _ in range(10):
        found, slope = dpo_step()(logits, ref, tokens, mask, 0.0)
        logits -= slope
        margins.append(float(found[1]))
        assert not np.any(slope[:, :, :4])
        if len(margins) == 1:
            assert found[0] == pytest.approx(math.log(2), abs=1e-7)
    assert margins[0] == 0 and all(a < b for a, b in pairwise(margins))


def test_figures_of_dpo_leave_out_padded_pairs() -> None:
    given = {
        "chosen_rewards": jnp.array([1.0, 0.0, 0.5, np.nan]),
        "rejected_rewards": jnp.array([0.5, 0.25, 0.5, 0.0]),
        "mask": jnp.array([True, True, True, False]),
        "count": 3,
    }
    assert losses.dpo_accuracy(**given) == pytest.approx(1 / 3)  # a tie is not right
    assert losses.dpo_margin(**given) == pytest.approx(0.25 / 3)
    expected = sum(math.log1p(math.exp(-margin)) for margin in (0.5, -0.25, 0)) / 3
    assert losses.dpo_loss(**given, label_smoothing=0.0) == pytest.approx(expected, rel=1e-6)


# Parts of a step, and where rows lie


@FEW
@given(SEEDS, MASKS)
def test_micro_batches_add_up(seed: int, mask: np.ndarray) -> None:
    a, b, c = normal(seed, mask, 3, 0.5)
    count = float(mask.sum())
    policy = {"logprobs": a, "old_logprobs": b, "advantages": c, "mask": mask}
    value = {"values": a, "old_values": b, "returns": c, "mask": mask}
    grpo = {"logprobs": a, "old_logprobs": b, "ref_logprobs": c, "mask": mask, "response_advantages": np.ones(ROWS)}
    pairs = {"chosen_rewards": a[:, 0], "rejected_rewards": b[:, 0], "mask": mask[:, 0]}
    for function, rows, rest in (
        (losses.policy_loss, policy, {"clip": 0.2}),
        (losses.clip_fraction, policy, {"clip": 0.2}),
        (losses.value_loss, value, {"clip": 0.2}),
        (losses.grpo_loss, grpo, {"clip": 0.2, "beta": 0.04}),
        (losses.dpo_loss, pairs, {"label_smoothing": 0.1}),
        (losses.dpo_accuracy, pairs, {}),
    ):
        whole = jitted(function)(**rows, **rest, count=count)
        parts = [jitted(function)(**{k: v[i : i + 1] for k, v in rows.items()}, **rest, count=count) for i in range(4)]
        close(sum(parts[1:], parts[0]), float(whole))


def test_a_step_in_which_nothing_counts_has_no_loss() -> None:
    """It is not a number, so that the step is left out (Objective in gptjax/train/step.py), and not 0."""
    zeros, nothing = jnp.zeros((2, 3)), {"mask": jnp.zeros((2, 3), bool), "clip": 0.2, "count": jnp.float32(0)}
    assert jnp.isnan(losses.policy_loss(**dict.fromkeys(("logprobs", "old_logprobs", "advantages"), zeros), **nothing))
    assert jnp.isnan(losses.value_loss(**dict.fromkeys(("values", "old_values", "returns"), zeros), **nothing))


def test_statistics_do_not_depend_on_where_rows_lie() -> None:
    """Arrays are cut over eight devices; of a prompt's replies and an iteration's tokens there is one mean."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(16, 5)).astype(np.float32), rng.random((16, 5)) < 0.7
    by_row, by_column = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), (None, "data")))
    white = jitted(responses.whiten)(jax.device_put(x, by_row), mask=jax.device_put(mask, by_row), shift_mean=True)
    close(np.asarray(white), responses.whiten(jnp.array(x), mask=jnp.array(mask), shift_mean=True))
    scores = x[:10].reshape(5, 2, 5)[:, :, :4].reshape(5, 8)  # every reply of a prompt on a device of its own
    found = jitted(returns.group_advantages)(scores=jax.device_put(scores, by_column), scale_by_std=True)
    close(np.asarray(found), returns.group_advantages(scores=jnp.array(scores), scale_by_std=True))


# Learning


def test_equal_scores_give_no_gradient() -> None:
    logits = jnp.array(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    slope = jax.jit(jax.grad(one_token_loss))(logits, jnp.array([[0, 1, 2, 0]] * 4), jnp.full((4, 4), 0.1))
    assert not np.any(slope)


def one_token_loss(logits: jax.Array, drawn: jax.Array, scores: jax.Array) -> jax.Array:
    """GRPO of replies of one token: logits [prompts, V], drawn and scores [prompts, G]."""
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn, axis=-1).reshape(-1, 1)
    return losses.grpo_loss(
        logprobs=logprobs,
        old_logprobs=jax.lax.stop_gradient(logprobs),
        ref_logprobs=None,
        response_advantages=returns.group_advantages(scores=scores, scale_by_std=True).reshape(-1),
        mask=jnp.ones_like(logprobs, bool),
        clip=0.2,
        beta=0.0,
        count=drawn.size,
    )


def test_a_response_that_was_cut_off_can_be_left_out() -> None:
    tokens = jnp.array([[1, 2, END], [1, 2, 3]])
    found = responses.extent(tokens=tokens, drawn=jnp.ones_like(tokens, bool), ends=(END,))
    mask = found.mask & found.ended[:, None]
    given = {"old_logprobs": jnp.zeros((2, 3)), "ref_logprobs": jnp.ones((2, 3)), "response_advantages": jnp.ones(2)}
    slope = jax.grad(lambda x: losses.grpo_loss(logprobs=x, **given, mask=mask, clip=0.2, beta=0.04, count=3))
    assert np.any(slope(jnp.zeros((2, 3))), axis=-1).tolist() == [True, False]


def test_grpo_finds_each_prompts_best_token() -> None:
    worth = jnp.array(np.random.default_rng(0).permuted(np.tile(np.arange(5.0), (4, 1)), axis=1))

    @jax.jit
    def step(logits: jax.Array, key: jax.Array) -> jax.Array:
        drawn = jax.random.categorical(key, logits[:, None], shape=(4, 16))
        return logits - 4 * jax.grad(one_token_loss)(logits, drawn, jnp.take_along_axis(worth, drawn, axis=-1))

    logits = jnp.zeros((4, 5))
    for i in range(100):
        logits = step(logits, jax.random.key(i))
    assert (jnp.argmax(logits, -1) == jnp.argmax(worth, -1)).all()
    assert jax.nn.softmax(logits).max(-1).min() > 0.9


# Between iterations


@given(st.floats(0.01, 1), st.floats(-5, 50), st.floats(0.1, 10), st.integers(1, 512), st.floats(200, 1e5))
def test_beta(beta: float, kl: float, target: float, episodes: int, horizon: float) -> None:
    found = control.next_beta(beta=beta, kl=kl, episodes=episodes, target=target, horizon=horizon)
    error = float(np.clip(np.float64(kl) / target - 1, -0.2, 0.2))
    assert found == pytest.approx(beta + beta * error * episodes / horizon, rel=1e-12)
    assert found > 0
    assert control.next_beta(beta=beta, kl=kl, episodes=episodes, target=None, horizon=horizon) == beta


def test_beta_moves_by_no_more_than_its_horizon_allows() -> None:
    move = partial(control.next_beta, beta=0.2, episodes=256, target=6.0)
    assert move(kl=6.0, horizon=10_000) == 0.2
    assert move(kl=math.inf, horizon=10_000) == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000))  # 0.5%
    assert move(kl=0.0, horizon=1000) == pytest.approx(0.2 * (1 - 0.2 * 256 / 1000))
    with pytest.raises(ValueError, match=r"horizon = 50: .* more than 51\.2"):
        move(kl=6.0, horizon=50)
    with pytest.raises(ValueError, match="kl is not a number"):
        move(kl=math.nan, horizon=10_000)


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 9), st.integers(1, 8), st.integers(1, 8))
def test_minibatches_have_every_episode_once(seed: int, iteration: int, epoch: int, count: int, size: int) -> None:
    order = partial(control.minibatches, seed=seed, iteration=iteration, epoch=epoch, size=size)
    found = order(episodes=count * size)
    assert found.shape == (count, size)
    assert sorted(found.ravel().tolist()) == list(range(count * size))
    assert (order(episodes=count * size) == found).all()
    if size > 1:
        with pytest.raises(ValueError):
            order(episodes=count * size + 1)


def test_minibatches_of_a_run_that_goes_on_are_those_of_before() -> None:
    order = partial(control.minibatches, seed=0, episodes=8, size=4)
    assert order(iteration=0, epoch=0).tolist() == [[7, 4, 2, 6], [5, 0, 1, 3]]
    assert order(iteration=1, epoch=0).tolist() == [[0, 1, 5, 4], [6, 2, 3, 7]]
    assert order(iteration=0, epoch=1).tolist() == [[7, 6, 0, 4], [1, 3, 5, 2]]


def test_ema() -> None:
    rng = np.random.default_rng(0)
    params = [{"w": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=2)} for _ in range(5)]
    average: Any = jax.tree.map(jnp.float32, params[0])
    expected = {name: value.astype(float) for name, value in params[0].items()}
    for each in params:
        average = control.ema(average=average, params=jax.tree.map(jnp.float32, each), decay=0.992)
        for name, value in each.items():
            expected[name] = 0.992 * expected[name] + 0.008 * np.float32(value).astype(float)
    for name, value in expected.items():
        close(average[name], value)
    ones, two = jnp.ones(3, jnp.bfloat16), jnp.full(3, 1.25, jnp.bfloat16)
    close(control.ema(average=ones, params=two, decay=0.992), np.full(3, 1.002))  # in bfloat16 it would stay 1


# What others got wrong: each check passes on ours and fails with the mistake put back

LOGPROBS = np.array([[-1.0, -2.0, -0.5, np.nan], [-1.5, -0.25, np.nan, np.nan]], np.float32)
REF_LOGPROBS = np.array([[-1.5, -1.0, -0.75, np.nan], [-1.0, -0.5, np.nan, np.nan]], np.float32)
MASK = ~np.isnan(LOGPROBS)
REWARDED = {"logprobs": LOGPROBS, "ref_logprobs": REF_LOGPROBS, "mask": MASK}


def check_fractions_of_scores_survive(token_rewards: Callable) -> None:
    for dtype, scores in ((jnp.float32, [0.73, -1.9]), (jnp.bfloat16, [0.75, -1.875]), (jnp.int32, [2, -1])):
        found = token_rewards(**REWARDED, scores=jnp.array(scores, dtype), beta=0.0)
        assert found.dtype == jnp.float32
        assert np.sum(found, -1).tolist() == pytest.approx(scores)
        halves = {name: jnp.array(REWARDED[name], jnp.bfloat16) for name in ("logprobs", "ref_logprobs")}
        mixed = token_rewards(**halves, mask=MASK, scores=jnp.array(scores, dtype), beta=0.02)
        assert mixed.dtype == jnp.float32
        assert mixed[0, 2] == pytest.approx(scores[0] - 0.02 * 0.25)  # 0.725 is no bfloat16


def rewards_of_the_dtype_of_tokens(*, scores: Any, **rest: Any) -> jax.Array:
    return returns.token_rewards(scores=scores.astype(jnp.int32), **rest)


def rewards_of_the_dtype_of_logprobs(*, logprobs: Any, **rest: Any) -> jax.Array:
    return returns.token_rewards(logprobs=logprobs, **rest).astype(logprobs.dtype)


def check_the_penalty_is_the_log_ratio(token_rewards: Callable) -> None:
    found = token_rewards(**REWARDED, scores=jnp.zeros(2), beta=0.04)
    close(found, -0.04 * np.where(MASK, LOGPROBS - REF_LOGPROBS, 0))
    assert found.min() < 0 < found.max()


def rewards_with_k3(*, logprobs: Any, ref_logprobs: Any, scores: Any, mask: Any, beta: float) -> jax.Array:
    kl = losses.kl_k3(logprobs=jnp.array(logprobs), ref_logprobs=jnp.array(ref_logprobs))
    rest = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "scores": scores, "mask": mask}
    return returns.token_rewards(**rest, beta=0.0) - beta * jnp.where(mask, kl, 0)


def check_the_score_is_at_the_last_real_token(token_rewards: Callable) -> None:
    """The end first, in the middle, last, absent; and a response without a token."""
    for length in range(5):
        mask = np.arange(4)[None] < length
        zeros = np.where(mask, np.zeros((1, 4), np.float32), np.nan)
        found = token_rewards(logprobs=zeros, ref_logprobs=zeros, scores=jnp.array([0.5]), mask=mask, beta=1.0)
        assert found.tolist() == [[0.5 * (t == length - 1) for t in range(4)]]


def rewards_at_an_index(*, scores: Any, mask: Any, past: int = 0, **rest: Any) -> jax.Array:
    """Without a token it is -1: the end of the row."""
    found = returns.token_rewards(scores=jnp.zeros_like(scores), mask=mask, **rest)
    return found.at[jnp.arange(len(scores)), responses.last_index(mask) + past].add(scores, mode="drop")


def check_padding_may_be_an_end(extent: Callable) -> None:
    """Four lengths of which two hold no end; one that is padded in front, after a prompt with an end in it."""
    tokens = [[END, END, END, END], [1, END, END, END], [1, 2, END, END], [1, 2, 3, 4], [END, 1, 2, END]]
    lengths = [1, 2, 2, 4]
    drawn = np.concatenate([np.arange(4) < np.array(lengths)[:, None], [[False, True, True, True]]])
    found = extent(tokens=jnp.array(tokens), drawn=jnp.array(drawn), ends=(END,))
    assert found.mask.tolist() == drawn.tolist()
    assert found.last.tolist() == [0, 1, 1, 3, 3]
    assert found.ended.tolist() == [True, True, False, False, True]


def extent_from_padding(*, tokens: Any, ends: Any, **_: Any) -> responses.Extent:
    return responses.extent(tokens=tokens, drawn=tokens != END, ends=ends)


def extent_of_all_tokens(*, tokens: Any, drawn: Any, ends: Any) -> responses.Extent:
    return responses.extent(tokens=tokens, drawn=jnp.ones_like(drawn), ends=ends)


def extent_without_the_end(**given: Any) -> responses.Extent:
    found = responses.extent(**given)
    return found._replace(mask=found.mask & ~jnp.isin(given["tokens"], jnp.array(given["ends"])))


def check_any_stop_token_ends(extent: Callable) -> None:
    tokens = jnp.array([[1, STOP, 2, END], [1, END, 2, 2], [1, 2, 3, 4]])
    found = extent(tokens=tokens, drawn=jnp.ones_like(tokens, bool), ends=(END, STOP))
    assert jnp.sum(found.mask, -1).tolist() == [2, 2, 4]
    scores = returns.penalised(scores=jnp.array([3, 4, 5]), ended=found.ended, penalty=-1.5)
    assert scores.dtype == jnp.float32 and scores.tolist() == [3, 4, -1.5]


def extent_of_the_end_of_text(*, ends: Any, **rest: Any) -> responses.Extent:
    return responses.extent(ends=ends[:1], **rest)


def check_the_end_is_trained(extent: Callable) -> None:
    tokens = jnp.array([[1, 2, END, PAD]])
    mask = extent(tokens=tokens, drawn=tokens != PAD, ends=(END,)).mask
    given = {"old_logprobs": LOGPROBS[:1], "advantages": np.ones((1, 4)), "mask": mask, "clip": 0.2, "count": 3}
    slope = jax.grad(lambda x: losses.policy_loss(logprobs=x, **given))(jnp.array(LOGPROBS[:1]))
    assert slope[0].tolist() == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 0])


def check_padding_is_no_part_of_whitening(whiten: Callable) -> None:
    rng = np.random.default_rng(0)
    x, mask = rng.normal(2, 1, (3, 4)).astype(np.float32), np.arange(4) < np.array([[4], [2], [1]])
    short = whiten(jnp.where(mask, x, 0), mask=jnp.array(mask), shift_mean=True)
    assert np.mean(short[mask]) == pytest.approx(0, abs=1e-6)
    assert np.std(short[mask]) == pytest.approx(1, abs=1e-5)
    assert not np.any(short[~mask])
    wider = [(0, 0), (0, 9)]
    longer = whiten(jnp.pad(jnp.where(mask, x, 0), wider), mask=jnp.pad(mask, wider), shift_mean=True)
    close(longer[:, :4], short)


def whiten_everything(x: jax.Array, *, mask: jax.Array, shift_mean: bool) -> jax.Array:
    return responses.whiten(x, mask=jnp.ones_like(mask), shift_mean=shift_mean) * mask


def whiten_each_row(x: jax.Array, *, mask: jax.Array, shift_mean: bool) -> jax.Array:
    return jax.vmap(partial(responses.whiten, shift_mean=shift_mean))(x, mask=mask)


def check_a_hard_prompt_is_judged_alone(group_advantages: Callable) -> None:
    """The best reply to a hard prompt is better than the worst one to an easy prompt, whatever their scores."""
    found = group_advantages(scores=jnp.array([[9.0, 9, 10, 10], [0, 0, 0, 1]]), scale_by_std=True)
    assert np.sum(found, -1) == pytest.approx([0, 0], abs=1e-5)
    assert found[1, 3] > 0 > found[0, 0]


def advantages_of_a_device(*, scores: jax.Array, scale_by_std: bool, devices: int = 1) -> jax.Array:
    parts = scores.reshape(devices, -1)
    return returns.group_advantages(scores=parts, scale_by_std=scale_by_std).reshape(scores.shape)


def check_every_epoch_has_an_order_of_its_own(minibatches: Callable) -> None:
    places = [(seed, i, epoch) for seed in (0, 1) for i in range(4) for epoch in range(4)]
    orders = [minibatches(seed=s, iteration=i, epoch=e, episodes=64, size=16) for s, i, e in places]
    assert {order.shape for order in orders} == {(4, 16)}  # updates = epochs x minibatches
    assert len({order.tobytes() for order in orders}) == len(places)


def check_what_was_sampled_is_what_is_scored(scored: Callable) -> None:
    """The ratio is exactly 1 where nothing was learned yet, whatever the temperature of the samples."""
    logits = jnp.array(np.random.default_rng(0).normal(size=(2, 4, 7)).astype(np.float32))
    for temperature in (1.0, 0.7):
        sampled, now = jax.nn.log_softmax(logits / temperature)[..., 0], scored(logits, temperature)[..., 0]
        given = {"logprobs": now, "old_logprobs": sampled, "mask": jnp.array(MASK)}
        assert losses.ratio_error(**given) == 0
        advantages = np.random.default_rng(1).normal(size=MASK.shape).astype(np.float32)
        loss = losses.policy_loss(**given, advantages=advantages, clip=0.2, count=MASK.sum())
        assert loss == pytest.approx(-float(advantages[MASK].mean()), abs=1e-6)


def scored_at_its_temperature(logits: jax.Array, temperature: float) -> jax.Array:
    return jax.nn.log_softmax(logits / temperature)


def scored_at_temperature_1(logits: jax.Array, _: float) -> jax.Array:
    return jax.nn.log_softmax(logits)


token_rewards, extent, whiten, group_advantages = (
    jitted(function)
    for function in (returns.token_rewards, responses.extent, responses.whiten, returns.group_advantages)
)
MISTAKES: dict[str, tuple[Callable, Callable, Callable]] = {
    "scores cut to integers": (check_fractions_of_scores_survive, token_rewards, rewards_of_the_dtype_of_tokens),
    "rewards in bfloat16": (check_fractions_of_scores_survive, token_rewards, rewards_of_the_dtype_of_logprobs),
    "k3 in the reward": (check_the_penalty_is_the_log_ratio, token_rewards, rewards_with_k3),
    "score one past the end": (
        check_the_score_is_at_the_last_real_token,
        token_rewards,
        partial(rewards_at_an_index, past=1),
    ),
    "score at index -1": (check_the_score_is_at_the_last_real_token, token_rewards, rewards_at_an_index),
    "mask from the pad id": (check_padding_may_be_an_end, extent, extent_from_padding),
    "ends in padding and prompt": (check_padding_may_be_an_end, extent, extent_of_all_tokens),
    "penalty that knows one end": (check_any_stop_token_ends, extent, extent_of_the_end_of_text),
    "end token dropped": (check_the_end_is_trained, extent, extent_without_the_end),
    "whitening over padding": (check_padding_is_no_part_of_whitening, whiten, whiten_everything),
    "whitening each row": (check_padding_is_no_part_of_whitening, whiten, whiten_each_row),
    "group of all prompts": (check_a_hard_prompt_is_judged_alone, group_advantages, advantages_of_a_device),
    "group of a device": (
        check_a_hard_prompt_is_judged_alone,
        group_advantages,
        partial(advantages_of_a_device, devices=4),
    ),
    "one order for all iterations": (
        check_every_epoch_has_an_order_of_its_own,
        control.minibatches,
        lambda **place: control.minibatches(**place | {"iteration": 0}),
    ),
    "one order for all epochs": (
        check_every_epoch_has_an_order_of_its_own,
        control.minibatches,
        lambda **place: control.minibatches(**place | {"epoch": 0}),
    ),
    "one minibatch": (
        check_every_epoch_has_an_order_of_its_own,
        control.minibatches,
        lambda **place: control.minibatches(**place).reshape(1, -1),
    ),
    "scored at another temperature": (
        check_what_was_sampled_is_what_is_scored,
        scored_at_its_temperature,
        scored_at_temperature_1,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_others_got_wrong(mistake: str) -> None:
    check, ours, theirs = MISTAKES[mistake]
    check(ours)
    with pytest.raises(AssertionError):
        check(theirs)
