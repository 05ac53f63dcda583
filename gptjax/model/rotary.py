"""Rotary positions (RoFormer, arXiv 2104.09864): queries and keys are turned by where they stand, so that their
products depend on how far apart they are."""

import jax.numpy as jnp
from jax import Array


def rotated(x: Array, places: Array, base: float) -> Array:
    """x [B, T, H, K] at places int32 [B, T]: pair i of a head's numbers, i and i + K/2, turned by place / base^(2i/K).

    The pairs are halves apart, as `transformers` has them; neighbours, as in the paper, are the same model with the
    rows of its matrices in another order. Angles are float32: at place 10^6 they are right to 0.06.
    """
    half = x.shape[-1] // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rates = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = places[..., None, None].astype(jnp.float32) * rates  # [B, T, 1, K/2]
    cos, sin = jnp.cos(angles).astype(wide), jnp.sin(angles).astype(wide)
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
