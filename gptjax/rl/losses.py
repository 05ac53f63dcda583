"""What a step minimises, and the figures that say how it fares.

Every loss and share is a sum over its rows divided by a `count` of the whole step, response tokens or pairs, so that
the parts of micro-batches add up to the step's mean (see Objective in gptjax/train/step.py).
"""

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.rl.responses import inside, masked_variance

# The policy and the value function


def policy_loss(
    *, logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: float, count: float | Array
) -> Array:
    """PPO's clipped objective with its sign turned, a scalar (Schulman et al., arXiv 1707.06347, equation 7).

    logprobs, old_logprobs: [..., T] in nats, now and when the tokens were drawn; advantages: [..., T]; clip: how far
    from 1 the ratio of the two probabilities still counts; count: response tokens of the step.
    """
    plain, clipped = _policy_terms(logprobs, old_logprobs, advantages, mask, clip)
    return jnp.sum(jnp.maximum(plain, clipped)) / count


def clip_fraction(
    *, logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: float, count: float | Array
) -> Array:
    """The share of tokens that `policy_loss` clips: they have no gradient."""
    plain, clipped = _policy_terms(logprobs, old_logprobs, advantages, mask, clip)
    return jnp.sum(clipped > plain) / count


def _policy_terms(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: float
) -> tuple[Array, Array]:
    """Minus advantage times ratio, and times the clipped ratio, [..., T]; 0 outside the mask."""
    ratio = jnp.exp(_log_ratio(logprobs, old_logprobs, mask))
    advantages = inside(advantages, mask=mask)
    return -advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)


def _log_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
    return inside(logprobs, mask=mask) - inside(old_logprobs, mask=mask)


def ratio_error(*, logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
    """The largest |ratio - 1|: 0 to rounding (1.2e-7) in the first minibatch after a rollout. Where it is more, the
    policy that is scored is not the one that was sampled from: temperature, top-k, dropout, dtype or old weights."""
    return jnp.max(jnp.abs(jnp.expm1(_log_ratio(logprobs, old_logprobs, mask))))


def value_loss(
    *, values: Array, old_values: Array, returns: Array, mask: Array, clip: float, count: float | Array
) -> Array:
    """Half the squared error, or that of the value kept within `clip` of the old one where it is the greater; a scalar.

    values, old_values: [..., T], now and when advantages were made; returns: [..., T]; clip: in units of the score, inf
    for none; count: response tokens of the step (Ziegler et al., arXiv 1909.08593, and its code).
    """
    values, old_values, returns = (inside(x, mask=mask) for x in (values, old_values, returns))
    near = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.sum(jnp.maximum((values - returns) ** 2, (near - returns) ** 2)) / count


def explained_variance(*, values: Array, returns: Array, mask: Array) -> Array:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than a constant; not a number where returns
    do not vary."""
    variance = masked_variance(returns, mask=mask)
    left = masked_variance(inside(returns, mask=mask) - inside(values, mask=mask), mask=mask)
    return jnp.where(variance > 0, 1 - left / variance, jnp.nan)


# KL(pi || ref) per token in nats, [...], from tokens that pi drew: logprobs are pi's, ref_logprobs the other's
# (Schulman, "Approximating KL divergence", 2020).


def kl_k1(*, logprobs: Array, ref_logprobs: Array) -> Array:
    """The log ratio: unbiased, of either sign. What rewards are charged and a KL controller reads."""
    return logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)


def kl_k2(*, logprobs: Array, ref_logprobs: Array) -> Array:
    """Half the square of the log ratio: biased, never negative."""
    return 0.5 * kl_k1(logprobs=logprobs, ref_logprobs=ref_logprobs) ** 2


def kl_k3(*, logprobs: Array, ref_logprobs: Array) -> Array:
    """Ratio of the other to pi, less 1, less its logarithm: unbiased, never negative. For a loss, not for a reward."""
    log_ratio = kl_k1(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return jnp.expm1(-log_ratio) + log_ratio


# GRPO


def grpo_loss(
    *,
    logprobs: Array,
    old_logprobs: Array,
    ref_logprobs: Array | None,
    response_advantages: Array,
    mask: Array,
    clip: float,
    beta: float,
    count: float | Array,
) -> Array:
    """`policy_loss` with one advantage a response, and beta times k3 to the reference; a scalar.

    logprobs, old_logprobs, ref_logprobs: [..., T] in nats; response_advantages: [...], from `returns.group_advantages`;
    count: response tokens of the step, so that each of them weighs the same (DeepSeekMath, arXiv 2402.03300, equations
    3 and 4; the mean over tokens is that of DAPO, arXiv 2503.14476, section 3.3). Without a reference there is no KL.
    """
    loss = policy_loss(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=response_advantages[..., None],
        mask=mask,
        clip=clip,
        count=count,
    )
    if ref_logprobs is None:
        return loss
    kl = kl_k3(logprobs=inside(logprobs, mask=mask), ref_logprobs=inside(ref_logprobs, mask=mask))
    return loss + beta * jnp.sum(kl) / count


# DPO


def implicit_rewards(*, logprobs: Array, ref_logprobs: Array, beta: float) -> Array:
    """[...]: beta (log pi - log pi_ref) of whole responses (Rafailov et al., arXiv 2305.18290, equation 5 up to a term
    of the prompt). Both are sums over response tokens, `responses.row_sums`: a prompt has no part in them, and those of
    the reference can be made once and kept."""
    return beta * (logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32))


def dpo_loss(
    *, chosen_rewards: Array, rejected_rewards: Array, label_smoothing: float, mask: Array, count: float | Array
) -> Array:
    """-log sigmoid of the margin, a scalar; log 2 where policy and reference are equal (equation 7).

    chosen_rewards, rejected_rewards: [pairs], `implicit_rewards`; label_smoothing: the share of labels taken to be the
    wrong way round (Mitchell, "A note on DPO with noisy preferences", 2023); mask: bool [pairs], False for padding;
    count: pairs of the step.
    """
    margins = _margins(chosen_rewards, rejected_rewards, mask)
    right, wrong = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    return jnp.sum(inside(losses, mask=mask)) / count


def dpo_margin(*, chosen_rewards: Array, rejected_rewards: Array, mask: Array, count: float | Array) -> Array:
    """The mean of chosen less rejected."""
    return jnp.sum(_margins(chosen_rewards, rejected_rewards, mask)) / count


def dpo_accuracy(*, chosen_rewards: Array, rejected_rewards: Array, mask: Array, count: float | Array) -> Array:
    """The share of pairs whose chosen one is the greater: 0 at the start, where all are ties."""
    return jnp.sum(_margins(chosen_rewards, rejected_rewards, mask) > 0) / count


def _margins(chosen: Array, rejected: Array, mask: Array) -> Array:
    return inside(chosen, mask=mask) - inside(rejected, mask=mask)
