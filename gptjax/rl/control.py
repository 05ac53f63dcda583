"""What changes between iterations: the weight of the KL, the order of minibatches, the average of the weights.

They are functions of their arguments alone: a run that goes on needs the last beta and average and its iteration's
number, and no object with a state of its own.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def next_beta(
    *, beta: float, kl: float, episodes: int, target: float | None, horizon: float, clip: float = 0.2
) -> float:
    """The KL coefficient of the next iteration (Ziegler et al., arXiv 1909.08593, section 2.2); the same one where
    `target` is None.

    kl, target: nats per response, kl the mean over the iteration's `episodes`; horizon: episodes. A KL that is off by a
    share e, at most `clip`, moves beta by e * episodes / horizon: at 256 and 10,000 by 0.5% an iteration, so scale the
    horizon to the run. Raises ValueError where one iteration could leave beta at 0 or below, or the KL is not a number.
    """
    if target is None:
        return beta
    if math.isnan(kl):
        raise ValueError("kl is not a number: neither beta nor what was learned since the last iteration would be one")
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
    """The tree of decay * average + (1 - decay) * params, in float32 whatever they are.

    InstructGPT's decay is 0.992: in bfloat16, of 8 bits, steps of 0.8% would be lost, and the average stand still.
    """

    def mean(old: Array, new: Array) -> Array:
        old, new = old.astype(jnp.float32), new.astype(jnp.float32)
        return old + (1 - decay) * (new - old)

    return jax.tree.map(mean, average, params)
