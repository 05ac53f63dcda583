"""Where a token stands, other than by a learned table: waves that are added to the embeddings, queries and keys that
are turned, and numbers for distances that are added to the scores."""

import jax.numpy as jnp
import numpy as np
from jax import Array

BASE = 10_000.0  # of the waves


def rotated(x: Array, places: Array, base: float) -> Array:
    """x [B, T, H, K] at places int32 [B, T]: pair i of a head's numbers, i and i + K/2, turned by place / base^(2i/K)
    (RoFormer, arXiv 2104.09864), so that products of queries and keys depend on how far apart they are.

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


def waves(length: int, dim: int) -> np.ndarray:
    """float32 [T, D]: channel 2i is sin(place / 10000^(2i/D)), channel 2i + 1 its cosine (arXiv 1706.03762, section
    3.5)."""
    rates = BASE ** (-np.arange(0, dim, 2) / dim)
    angles = np.arange(length)[:, None] * rates
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, -1)[:, :dim].astype(np.float32)


def biases(table: Array, ahead: Array, reach: int, causal: bool) -> Array:
    """table [buckets, H], ahead int32 [..., Tq, Tk], how far each key stands behind its query's place (negative before
    it) -> float32 [..., H, Tq, Tk], to be added to the scores (T5, arXiv 1910.10683, section 2.1)."""
    kinds = jnp.asarray(_kinds(table.shape[0], reach, causal))  # [2 reach + 1]
    found = table.astype(jnp.float32)[kinds[jnp.clip(ahead, -reach, reach) + reach]]
    return jnp.moveaxis(found, -1, -3)


def _kinds(buckets: int, reach: int, causal: bool) -> np.ndarray:
    """int32 [2 reach + 1]: the bucket of a key so far ahead, from -reach to reach.

    Half of the buckets are for keys ahead, unless none of these is seen; of n for a direction the first n/2 hold one
    distance each, the others as much as the one before on a logarithmic scale, up to `reach`.
    """
    ahead = np.arange(-reach, reach + 1)
    size = buckets if causal else buckets // 2
    distance = np.maximum(-ahead, 0) if causal else np.abs(ahead)
    exact = size // 2
    # In float32, as every published model was trained: a boundary such as distance 16 falls where rounding puts it.
    scaled = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (scaled / np.float32(np.log(reach / exact)) * np.float32(size - exact)).astype(np.int32)
    found = np.where(distance < exact, distance, np.minimum(far, size - 1))
    return (found + np.where(ahead > 0, 0 if causal else size, 0)).astype(np.int32)
