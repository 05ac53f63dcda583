"""What attention is: the mask, and the plain reference that every backend is tested against.

Backends live in `kernels/`, one file each; all are an `Attend`: q, k, v [B, T, H, K] to [B, T, H, K].
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

KEPT = "attention"
"""Name under which rematerialisation may keep what a backend's backward pass needs beside q, k and v."""


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees.

    `window` W: position i sees keys max(0, i-W+1) .. i, that is W keys, itself included; None is dense.
    `causal` False is the dense mask of an encoder. Raises ValueError for a window below 1 or without causality:
    a one-sided band that sees the future is never meant.
    """

    window: int | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(f"{self}: a band is causal and at least one key wide")

    def within(self, length: int) -> "Mask":
        """The same mask on so many positions: a window that reaches all of them is no window."""
        return Mask(causal=self.causal) if self.window is not None and self.window >= length else self


Attend = Callable[[Array, Array, Array, Mask, float, Array | None], Array]
"""(q, k, v [B, T, H, K], mask, scale of the scores, segments [B, T] or None) -> [B, T, H, K].

A query sees only keys of its own segment, so that packed documents can be kept apart.
"""


@dataclass(frozen=True)
class Need:
    """What a model asks of a backend, so that one that cannot honour it says so before anything is compiled."""

    platform: str
    """cpu, gpu or tpu."""
    dtype: jnp.dtype
    head_dim: int
    length: int
    masks: tuple[Mask, ...]
    segments: bool = False
    bias: bool = False
    """Whether numbers are added to the scores, as relative positions are."""
    context: int = 1
    """Ways that the sequence is split over devices."""
    deterministic: bool = False
    """Only kernels that always give the same bits (GPUs)."""


def refuse_beyond(need: Need) -> str | None:
    """The limits of every backend that the ring, the halo and biases are not built on, or None."""
    if need.bias:
        return "it cannot add to the scores what relative positions do (model.positions)"
    return "it cannot split the sequence (layout.context)" if need.context > 1 else None


def visible(mask: Mask, query_positions: Array, key_positions: Array) -> Array:
    """Boolean [Tq, Tk]: may this query see this key? Negative key positions are padding."""
    distance = query_positions[:, None] - key_positions[None, :]
    seen = jnp.broadcast_to(key_positions[None, :] >= 0, distance.shape)
    if mask.causal:
        seen &= distance >= 0
    return seen if mask.window is None else seen & (distance < mask.window)


def reference(q: Array, k: Array, v: Array, mask: Mask, scale: float, segments: Array | None = None) -> Array:
    """Plain masked softmax attention, O(T²) in time and memory; any dtype, softmax in at least float32."""
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    seen = visible(mask, jnp.arange(q.shape[1]), jnp.arange(k.shape[1]))
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = jnp.einsum("bthk,bshk->bhts", q * scale, k, preferred_element_type=accumulate)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", weights.astype(q.dtype), v)
