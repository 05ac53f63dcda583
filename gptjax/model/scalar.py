"""A scalar head: one number for a text, read at one of its tokens.

Its parameters, score/kernel [D] and score/bias [], stand beside the decoder's, whose forward pass does not know them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

NAME = "score"


def init_head(key: Array, dim: int) -> dict[str, Any]:
    """Parameters boxed with their logical axes; a standard deviation of 1/sqrt(D + 1), as in "Fine-Tuning Language
    Models from Human Preferences" (arXiv 1909.08593), gives scores of about 1 after a LayerNorm."""
    normal, zeros = nn.initializers.normal((dim + 1) ** -0.5), nn.initializers.zeros
    return {
        "kernel": nn.with_logical_partitioning(normal, ("embed",))(key, (dim,), jnp.float32),
        "bias": nn.with_logical_partitioning(zeros, ())(key, (), jnp.float32),
    }


def is_head(name: str) -> bool:
    """Whether a parameter, such as score/kernel, is the head's."""
    return name.split("/")[0] == NAME


def read(head: Any, hidden: Array, here: Array) -> Array:
    """hidden [B, ..., D], here [B, ...] with one True for each text -> float32 [B], whatever dtype it is computed in.

    The sum over places has one term that is not zero, so it is exact, and a device adds up its own part of a sequence
    that is split: a gather would have the whole of it sent.
    """
    places = tuple(range(1, hidden.ndim - 1))
    chosen = jnp.sum(jnp.where(here[..., None], hidden, 0), axis=places, dtype=jnp.float32)
    # No product: those of accelerators round float32 unless they are told not to.
    return jnp.sum(chosen * head["kernel"].astype(jnp.float32), axis=-1) + head["bias"].astype(jnp.float32)


def read_each(head: Any, hidden: Array) -> Array:
    """hidden [..., D] -> float32 [...]: the number at every place, as `read` gives that of one."""
    wide = hidden.astype(jnp.float32)
    return jnp.sum(wide * head["kernel"].astype(jnp.float32), axis=-1) + head["bias"].astype(jnp.float32)


def ranking_nats(scores: Array, ranks: Array) -> Array:
    """InstructGPT's loss of each prompt (arXiv 2203.02155, equation 1), float32 [...]: the mean over pairs of replies
    whose ranks differ of -log sigmoid(score of the better - score of the worse); 0 where there is no pair.

    scores and ranks [..., K]; rank 1 is best, 0 is no reply.
    """
    better = is_better(ranks)
    gaps = scores[..., :, None] - scores[..., None, :]
    nats = jnp.sum(jnp.where(better, jax.nn.softplus(-gaps), 0), axis=(-1, -2))
    return nats / jnp.maximum(jnp.sum(better, axis=(-1, -2)), 1)


def is_better(ranks: Any) -> Any:
    """[..., K] of numpy or JAX -> bool [..., K, K]: whether the first reply is ranked before the second. Neither is of
    a tie."""
    first, second = ranks[..., :, None], ranks[..., None, :]
    return (first > 0) & (first < second)
