"""Products in float8 with one scale a tensor, taken from the tensor itself (arXiv 2209.05433)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# The two formats of the paper (section 3): gradients need range more than precision.
FORWARD, BACKWARD = jnp.dtype("float8_e4m3fn"), jnp.dtype("float8_e5m2")

Dims = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


class Scaled(NamedTuple):
    """An array as values times a scale [], without one the values themselves."""

    values: Array
    scale: Array | None = None

    def reshape(self, *shape: int) -> "Scaled":
        return Scaled(self.values.reshape(shape), self.scale)


def quantise(x: Array, dtype: jnp.dtype) -> Scaled:
    """x in float8. The scale is the power of two above the one that would put x's largest number at the end of the
    format: a product rounded to bfloat16 before it is scaled then equals one that is scaled first.

    Numbers that are not finite stay so.
    """
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    # Zeros alone would have no scale; from 2^-40 on, the product of two scales is no less than 2^-126.
    _, exponent = jnp.frexp(jnp.maximum(largest, 2.0**-40) / float(jnp.finfo(dtype).max))
    scale = jnp.ldexp(jnp.float32(1), exponent)
    return Scaled((x / scale.astype(x.dtype)).astype(dtype), scale)


def dot_general(a: Scaled, b: Scaled, dims: Dims, dtype: jnp.dtype) -> Array:
    """`jax.lax.dot_general` given in `dtype`. The GPU compiler makes product and scales one call of cuBLAS."""
    if a.scale is None or b.scale is None:
        return jax.lax.dot_general(a.values, b.values, dims)
    # By default XLA lets an H100 sum in about 14 bits (arXiv 2412.19437, section 3.3.2): too few for gradients.
    precision = jax.lax.Precision.HIGHEST if BACKWARD in (a.values.dtype, b.values.dtype) else None
    out = jax.lax.dot_general(a.values, b.values, dims, precision, preferred_element_type=dtype)
    return out * (a.scale * b.scale).astype(dtype)
