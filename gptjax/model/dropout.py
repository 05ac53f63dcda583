"""Dropout whose mask is a function of the step, the token's place and the place in the model, and of nothing else.

A mask drawn for a whole array follows the order in which the array is stored, and a key split over the layers follows
how they are run. Here every token has a key of its own, which goes wherever the token goes: split, reordered, scanned
or piped through stages, a run drops the same numbers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def token_keys(key: Array, batch: int, positions: Array) -> Array:
    """keys [B, T] from that of the micro-batch, each token's row in it and its position in the sequence."""
    rows = _fold_in(key, jnp.arange(batch))
    return jax.vmap(partial(_fold_in, numbers=positions))(rows)


def dropout(x: Array, rate: float, keys: Array | None, site: int | Array) -> Array:
    """x [B, T, D] with a share `rate` of its channels at zero and the rest scaled up to the same mean.

    keys [B, T], or None to leave x as it is; site: a number of its own for each call in the model.
    """
    if keys is None:
        return x

    def kept(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape[-1:])

    return jnp.where(jax.vmap(jax.vmap(kept))(keys), x / (1 - rate), 0)


def _fold_in(key: Array, numbers: Array) -> Array:
    return jax.vmap(partial(jax.random.fold_in, key))(numbers)
