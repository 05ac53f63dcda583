"""Which tokens of a row are its response, and sums and statistics over them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Extent(NamedTuple):
    """Where responses lie in rows [..., T]."""

    mask: Array
    """bool [..., T]: the response's tokens, its end token among them: what is never trained is never learned."""
    last: Array
    """int32 [...]: index of the last of them, where its score is read; -1 where there is none."""
    ended: Array
    """bool [...]: whether that is an end token. A response without one was cut off at its limit: penalise it with
    `returns.penalised`, or leave it out by `mask & ended[..., None]`."""


def extent(*, tokens: Array, drawn: Array, ends: Sequence[int]) -> Extent:
    """The response in each row, cut after its first end token.

    tokens: int [..., T]; drawn: bool [..., T], where the sampler wrote, such as `arange(T) < lengths[:, None]`; ends:
    ids that end a response. What is real is told by `drawn` alone, since the id that pads may be one that ends, and a
    prompt may hold ends of its own.
    """
    is_end = drawn & jnp.isin(tokens, jnp.asarray(ends, tokens.dtype))
    ends_before = jnp.cumsum(is_end, axis=-1) - is_end
    mask = drawn & (ends_before == 0)
    return Extent(mask, last_index(mask), jnp.any(is_end, axis=-1))


def last_index(mask: Array) -> Array:
    """int32 [...]: that of the last True along the last axis; -1 where there is none."""
    return jnp.max(jnp.where(mask, jnp.arange(mask.shape[-1], dtype=jnp.int32), -1), axis=-1)


def inside(x: Array, *, mask: Array) -> Array:
    """x in float32, 0 outside the mask.

    It comes before any arithmetic: where() after exp() would leave the padding's inf in the gradient, as 0 * inf.
    """
    return jnp.where(mask, x.astype(jnp.float32), 0)


def row_sums(x: Array, *, mask: Array) -> Array:
    """[..., T] -> [...]: log-probability of each response, or its KL, in nats."""
    return jnp.sum(inside(x, mask=mask), axis=-1)


def masked_mean(x: Array, *, mask: Array) -> Array:
    """Over all tokens of all responses, a scalar; not a number where there are none."""
    return jnp.sum(inside(x, mask=mask)) / jnp.sum(mask)


def masked_variance(x: Array, *, mask: Array) -> Array:
    """Over all tokens of all responses, around their mean, divided by their number."""
    return masked_mean((inside(x, mask=mask) - masked_mean(x, mask=mask)) ** 2, mask=mask)


def whiten(x: Array, *, mask: Array, shift_mean: bool) -> Array:
    """x [..., T] with variance 1 over all tokens of all responses, and mean 0 or, without `shift_mean`, its own.

    The rows are those of a whole iteration: a minibatch or a device has another mean. Rewards keep their mean, which
    says whether a response is worth its length; advantages do not (Ziegler et al., arXiv 1909.08593, and its code).
    """
    mean = masked_mean(x, mask=mask)
    white = (inside(x, mask=mask) - mean) * jax.lax.rsqrt(masked_variance(x, mask=mask) + 1e-8)
    return inside(white if shift_mean else white + mean, mask=mask)
