"""Causal self-attention with an optional band, as interchangeable backends.

A window W means that position i sees keys max(0, i-W+1) .. i: W keys, itself included; None is dense.
Every backend maps q, k, v [B, T, H, K] to [B, T, H, K] and is tested against `reference`.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.errors import UserError

# Block edge of `blockwise`: 64-128 measured best on CPU for W = 256.
BLOCK = 128


class Attention(Protocol):
    def __call__(self, q: Array, k: Array, v: Array, window: int | None) -> Array: ...


def reference(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Plain masked softmax attention, O(T²) in time and memory; any dtype, softmax in at least float32."""
    length = q.shape[1]
    return _masked_attention(q, k, v, visible(jnp.arange(length), jnp.arange(length), window))


def visible(query_positions: Array, key_positions: Array, window: int | None) -> Array:
    """Boolean [Tq, Tk]: may this query see this key? Negative key positions are padding."""
    distance = query_positions[:, None] - key_positions[None, :]
    mask = (distance >= 0) & (key_positions[None, :] >= 0)
    return mask if window is None else mask & (distance < window)


def _masked_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [B, Tq, H, K], k and v [B, Tk, H, K], mask [Tq, Tk] -> [B, Tq, H, K]."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # heads outside: two plain batched products
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhtk,bhsk->bhts", q * q.shape[-1] ** -0.5, k, preferred_element_type=accumulate)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("bhts,bhsk->bhtk", weights, v).transpose(0, 2, 1, 3)


def blockwise(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Attention by blocks of queries that touches only the key blocks a query can see.

    Banded: O(T (W + BLOCK)). Dense: the key range grows with the query block, so about half of T².
    """
    length = q.shape[1]
    if window is None or window >= length:
        return _blockwise_dense(q, k, v)
    return _blockwise_banded(q, k, v, window)


def _blockwise_dense(q: Array, k: Array, v: Array) -> Array:
    length = q.shape[1]
    block = max(BLOCK, -(-length // 8))  # at most 8 unrolled blocks: program size stays bounded
    attend = jax.checkpoint(_masked_attention) if length > block else _masked_attention
    out = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        mask = visible(jnp.arange(start, stop), jnp.arange(stop), None)
        out.append(attend(q[:, start:stop], k[:, :stop], v[:, :stop], mask))
    return jnp.concatenate(out, axis=1)


def _blockwise_banded(q: Array, k: Array, v: Array, window: int) -> Array:
    batch, length, heads, head_dim = q.shape
    block = min(BLOCK, max(16, 1 << (window - 1).bit_length()))
    blocks = -(-length // block)
    behind = -(-(window - 1) // block)  # earlier key blocks that the first query of a block can reach
    tail = blocks * block - length

    def split(x: Array) -> Array:  # [B, T, H, K] -> [N, B, block, H, K]
        return x.reshape(batch, -1, block, heads, head_dim).swapaxes(0, 1)

    def spans(x: Array) -> Array:  # every block with the `behind` blocks before it: [N, B, (behind + 1) block, H, K]
        padded = split(jnp.pad(x, ((0, 0), (behind * block, tail), (0, 0), (0, 0))))
        return jnp.concatenate([padded[i : i + blocks] for i in range(behind + 1)], axis=2)

    starts = jnp.arange(blocks)[:, None] * block
    queries = starts + jnp.arange(block)
    keys = starts - behind * block + jnp.arange((behind + 1) * block)
    masks = jax.vmap(visible, (0, 0, None))(queries, keys, window)  # [N, block, span]
    padded_q = split(jnp.pad(q, ((0, 0), (0, tail), (0, 0), (0, 0))))
    out = jax.vmap(_masked_attention)(padded_q, spans(k), spans(v), masks)
    return out.swapaxes(0, 1).reshape(batch, blocks * block, heads, head_dim)[:, :length]


def cached(q: Array, k: Array, v: Array, start: Array, window: int | None) -> Array:
    """Queries at positions start .. start+Tq-1 against a cache whose slot j holds position j.

    q [B, Tq, H, K], k and v [B, S, H, K]; slots after a query's position are not seen.
    """
    return _masked_attention(q, k, v, visible(start + jnp.arange(q.shape[1]), jnp.arange(k.shape[1]), window))


BACKENDS: dict[str, Callable[[Array, Array, Array, int | None], Array]] = {
    "reference": reference,
    "blockwise": blockwise,
}


def choose_backend(name: str, platform: str) -> tuple[str, str]:
    """The backend and the reason for it, for `model.attention` on a platform (cpu, gpu, tpu)."""
    if name == "auto":
        return "blockwise", f"portable O(T·W) XLA path; no kernel of its own for {platform} yet"
    if name not in BACKENDS:
        raise UserError(f"model.attention = {name}: choose from auto, {', '.join(BACKENDS)}")
    return name, "named by the config"
