"""What each token of a response earned: from scores and log-probabilities to advantages and returns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.rl.responses import inside, last_index


def penalised(*, scores: Array, ended: Array, penalty: float | None) -> Array:
    """float32 [...]: the scores, and `penalty` in place of that of a response which has no end token.

    scores: of any dtype; ended: bool, from `responses.extent`; penalty: -1 in arXiv 2403.17031 (the EOS trick), None
    for none: what was cut off is worth what it scores.
    """
    scores = scores.astype(jnp.float32)
    return scores if penalty is None else jnp.where(ended, scores, penalty)


def token_rewards(*, logprobs: Array, ref_logprobs: Array, scores: Array, mask: Array, beta: float | Array) -> Array:
    """float32 [..., T]: -beta (log pi - log pi_ref) at every response token, and the score at the last one.

    logprobs, ref_logprobs: [..., T] in nats, of the policy that drew the tokens and of the reference; scores: [...] of
    any dtype, one a response; beta: score per nat (InstructGPT, arXiv 2203.02155, equation 2). The penalty is the log
    ratio itself, of either sign: k3 is never negative, and as a reward its gradient is not that of the KL.
    """
    penalty = beta * (inside(logprobs, mask=mask) - inside(ref_logprobs, mask=mask))
    is_last = jnp.arange(mask.shape[-1]) == last_index(mask)[..., None]  # nowhere, where a response has no token
    return jnp.where(is_last, scores.astype(jnp.float32)[..., None], 0) - penalty


class Estimates(NamedTuple):
    """Of every response token, float32 [..., T]; 0 elsewhere."""

    advantages: Array
    returns: Array
    """What a value should have been."""


def gae(*, rewards: Array, values: Array, mask: Array, gamma: float | Array, lam: float | Array) -> Estimates:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, equation 16).

    rewards: [..., T]; values: [..., T], of the state before each token; gamma, lam: in [0, 1]. A token outside the mask
    is as if it were not there, and nothing comes after the last one: an episode ends with its response, also where it
    was cut off.
    """
    rewards, values = inside(rewards, mask=mask), inside(values, mask=mask)

    def step(after: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (advantage_after, value_after), (reward, value, counts) = after, token
        delta = reward + gamma * value_after - value
        advantage = jnp.where(counts, delta + gamma * lam * advantage_after, advantage_after)
        return (advantage, jnp.where(counts, value, value_after)), advantage

    nothing = jnp.zeros(mask.shape[:-1])
    by_token = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, values, mask))
    _, found = jax.lax.scan(step, (nothing, nothing), by_token, reverse=True)
    advantages = inside(jnp.moveaxis(found, 0, -1), mask=mask)
    return Estimates(advantages, advantages + values)


def group_advantages(*, scores: Array, scale_by_std: bool, eps: float = 1e-4) -> Array:
    """float32 [prompts, G]: (score - mean) / (std + eps) within each prompt's G replies; exactly 0 where all are equal.

    scores: [prompts, G], a row a prompt, so that no statistic is one of several prompts or of one device's share.
    DeepSeekMath (arXiv 2402.03300, section 4.1.2), with the sample's std, of squares over G - 1, as TRL has it. Without
    `scale_by_std` a prompt whose replies hardly differ does not count as one whose replies do (arXiv 2503.20783).
    """
    scores = scores.astype(jnp.float32)
    above = scores - scores[:, :1]  # 0 where all are equal: three times 0.1 over 3 need not be 0.1
    centred = above - jnp.mean(above, axis=-1, keepdims=True)
    if not scale_by_std:
        return centred
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / max(scores.shape[-1] - 1, 1)
    return centred / (jnp.sqrt(variance) + eps)
