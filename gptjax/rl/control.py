"""What changes between iterations, as functions of their arguments alone: the weight of the KL, the order of minibatches
and the average of the weights. A run that goes on needs a float and the number of its iteration, no hidden state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def next_beta(
    *, beta: float, kl: float, episodes: int, target: float | None, horizon: float, clip: float = 0.2
) -> float:
    """The KL coefficient of the next iteration (Ziegler et al., arXiv 1909.08593, section 2.2); the same one where
    `target` is None.

    kl, target: nats per response, kl the mean over the iteration's `episodes`; horizon: episodes. A KL that is off by a
    share e, at most `clip`, moves beta by e * episodes / horizon: at 256 and 10,000 by 0.5% an iteration, so scale the
    horizon to the run. Raises ValueError where one iteration could leave beta at 0 or below.
    """
    if target is None:
        return beta
    if clip * episodes >= horizon:
        raise ValueError(f"horizon = {horizon}: a low KL would turn the sign of beta; more than {clip * episodes:g}")
    error = min(max(kl / target - 1, -clip), clip)
    return beta * (1 + error * episodes / horizon)


def minibatches(*, seed: int, iteration: int, epoch: int, episodes: int, size: int) -> np.ndarray:
    """int64 [episodes / size, size]: each episode once, in an order of its own for every iteration and epoch.

    Drawn as in data/packing.py from the bits of Philox, which are the same in any version of NumPy; the counter's last
    word keeps it apart from that order. Raises ValueError where `size` does not divide `episodes`.
    """
    bits = np.random.Philox(key=[seed, iteration], counter=[0, 0, epoch, 1])
    return np.argsort(bits.random_raw(episodes), kind="stable").reshape(-1, size)


def ema(*, average: Any, params: Any, decay: float) -> Any:
    """The tree of decay * average + (1 - decay) * params in float32: bfloat16 would lose the steps of 0.992."""
    return jax.tree.map(lambda a, p: _towards(a.astype(jnp.float32), p.astype(jnp.float32), 1 - decay), average, params)


def _towards(a: jax.Array, b: jax.Array, share: float) -> jax.Array:
    return a + share * (b - a)
