"""A checksum of every array of a tree: the same on every layout, another if one bit, or two numbers' places, change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.sharding.rules import leaf_name

SEEDS = (0x9E3779B9, 0x85EBCA6B)  # two sums of 32 bits


def fingerprint(tree: Any) -> dict[str, str]:
    """Name -> 16 hexadecimal digits, for arrays of any type. Computed where the arrays lie, nothing is gathered."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([_sums(leaf) for _, leaf in leaves])
    return {leaf_name(path): "".join(f"{int(x):08x}" for x in two) for (path, _), two in zip(leaves, sums, strict=True)}


@jax.jit
def _sums(leaf: Array) -> Array:
    """uint32 [2]: the words of an array, each mixed with its place in the whole, summed modulo 2³²: a sum has no order,
    so it does not matter which device holds which part. A program for each shape and layout, compiled once."""
    words = _words(leaf)
    sums = []
    for seed in SEEDS:
        mixed = jnp.full(words.shape, np.uint32(seed))
        for axis in range(words.ndim):
            mixed = _mix(mixed ^ jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis))
        sums.append(jnp.sum(_mix(mixed ^ words), dtype=jnp.uint32))
    return jnp.stack(sums)


def _mix(x: Array) -> Array:
    """Every bit of a word onto every other: the last steps of MurmurHash3 (Appleby, public domain), a bijection."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(leaf: Array) -> Array:
    """The bits of an array as uint32; numbers of 64 bits get another axis of two."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _words(jax.random.key_data(leaf))
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return jnp.stack([_words(leaf.real), _words(leaf.imag)])
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    bits = jnp.iinfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.finfo(leaf.dtype).bits
    if bits >= 32:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
