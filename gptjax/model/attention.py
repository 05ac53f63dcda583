"""Causal self-attention with an optional band, as interchangeable backends.

A window W means that position i sees keys max(0, i-W+1) .. i: W keys, itself included; None is dense.
Every backend maps q, k, v [B, T, H, K] to [B, T, H, K] and is tested against `reference`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.errors import UserError

# Block edge of `blockwise`: 64-128 measured best on CPU for W = 256.
BLOCK = 128


def reference(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Plain masked softmax attention, O(T²) in time and memory; any dtype, softmax in at least float32."""
    positions = jnp.arange(q.shape[1])
    return _heads_inside(_attend(*_heads_outside(q, k, v), visible(positions, positions, window))[0])


def visible(query_positions: Array, key_positions: Array, window: int | None) -> Array:
    """Boolean [Tq, Tk]: may this query see this key? Negative key positions are padding."""
    distance = query_positions[:, None] - key_positions[None, :]
    mask = (distance >= 0) & (key_positions[None, :] >= 0)
    return mask if window is None else mask & (distance < window)


def _heads_outside(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """[B, T, H, K] -> [B, H, T, K]: the products of attention become plain batched ones."""
    return q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)


def _heads_inside(x: Array) -> Array:
    return x.swapaxes(1, 2)


def _attend(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    """q [B, H, Tq, K], k and v [B, H, Tk, K], mask [Tq, Tk] -> out [B, H, Tq, K], weights [B, H, Tq, Tk]."""
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhtk,bhsk->bhts", q * q.shape[-1] ** -0.5, k, preferred_element_type=accumulate)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bhsk->bhtk", weights.astype(q.dtype), v), weights


@jax.custom_vjp
def _attend_lean(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """`_attend` that keeps no weights for the backward pass: it makes them again (FlashAttention's trade)."""
    return _attend(q, k, v, mask)[0]


def _lean_forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    out = _attend_lean(q, k, v, mask)
    return out, (q, k, v, mask, out)


def _lean_backward(saved: tuple[Array, ...], grad: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, out = saved
    _, weights = _attend(q, k, v, mask)
    grad_weights = jnp.einsum("bhtk,bhsk->bhts", grad, v, preferred_element_type=weights.dtype)
    # The softmax's row sum of weights * grad_weights equals that of out * grad, which is T / K times shorter.
    row = jnp.sum(out * grad, axis=-1, keepdims=True, dtype=weights.dtype)
    grad_scores = (weights * (grad_weights - row) * q.shape[-1] ** -0.5).astype(q.dtype)
    return (
        jnp.einsum("bhts,bhsk->bhtk", grad_scores, k),
        jnp.einsum("bhts,bhtk->bhsk", grad_scores, q),
        jnp.einsum("bhts,bhtk->bhsk", weights.astype(q.dtype), grad),
        None,
    )


_attend_lean.defvjp(_lean_forward, _lean_backward)


def blockwise(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Attention by blocks of queries that touches only the key blocks a query can see.

    Banded: O(T (W + BLOCK)). Dense: the key range grows with the query block, so about half of T².
    """
    length = q.shape[1]
    q, k, v = _heads_outside(q, k, v)
    if window is None or window >= length:
        return _heads_inside(_blockwise_dense(q, k, v))
    return _heads_inside(_blockwise_banded(q, k, v, window))


def _blockwise_dense(q: Array, k: Array, v: Array) -> Array:
    length = q.shape[2]
    block = max(BLOCK, -(-length // 8))  # at most 8 unrolled blocks: program size stays bounded
    out = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        mask = visible(jnp.arange(start, stop), jnp.arange(stop), None)
        out.append(_attend_lean(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask))
    return jnp.concatenate(out, axis=2)


def _blockwise_banded(q: Array, k: Array, v: Array, window: int) -> Array:
    batch, heads, length, head_dim = q.shape
    block = min(BLOCK, max(16, 1 << (window - 1).bit_length()))
    blocks = -(-length // block)
    behind = -(-(window - 1) // block)  # earlier key blocks that the first query of a block can reach
    tail = blocks * block - length

    def split(x: Array, before: int) -> Array:  # [B, H, T, K] -> [N, B, H, block, K]
        padded = jnp.pad(x, ((0, 0), (0, 0), (before * block, tail), (0, 0)))
        return jnp.moveaxis(padded.reshape(batch, heads, -1, block, head_dim), 2, 0)

    def spans(x: Array) -> Array:  # every block with the `behind` blocks before it: [N, B, H, (behind + 1) block, K]
        parts = split(x, behind)
        return jnp.concatenate([parts[i : i + blocks] for i in range(behind + 1)], axis=3)

    starts = jnp.arange(blocks)[:, None] * block
    queries = starts + jnp.arange(block)
    keys = starts - behind * block + jnp.arange((behind + 1) * block)
    masks = jax.vmap(visible, (0, 0, None))(queries, keys, window)  # [N, block, span]
    out = jax.vmap(_attend_lean)(split(q, 0), spans(k), spans(v), masks)
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, blocks * block, head_dim)[:, :, :length]


def cached(q: Array, k: Array, v: Array, start: Array, window: int | None) -> Array:
    """Queries at positions start .. start+Tq-1 against a cache whose slot j holds position j.

    q [B, Tq, H, K], k and v [B, S, H, K]; slots after a query's position are not seen.
    """
    mask = visible(start + jnp.arange(q.shape[1]), jnp.arange(k.shape[1]), window)
    return _heads_inside(_attend(*_heads_outside(q, k, v), mask)[0])


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
