"""Attention whose sequence is split over the `context` axis: a ring for dense layers, a halo for banded ones.

The sequence is cut into 2c chunks and device i of c holds chunks i and 2c-1-i, so that under a causal mask every
device has the same work. `order` is that arrangement; tokens and positions are put into it once, at the model's
input, and everything but attention is blind to it.

Dense (Liu et al., arXiv 2310.01889): keys and values travel round the ring; of the four products of a device's
chunks with a visitor's, two are needed, whole and without a mask. Banded: a chunk needs the W-1 keys before it,
which are the tail of a chunk on a neighbouring device, and nothing else is sent.

The functions below run inside shard_map on chunks [2, B, H, C, K]: the lower and the higher one of this device.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from gptjax.errors import UserError
from gptjax.model.attention import KEPT, Attend, Mask
from gptjax.model.kernels.blockwise import Places, banded, rows_backward, rows_forward
from gptjax.sharding.rules import Layout

AXIS = "context"
CAUSAL, FULL = Mask(), Mask(causal=False)
# Products (query chunk, key chunk) of a device with itself.
OWN = ((0, 0, CAUSAL), (1, 1, CAUSAL), (1, 0, FULL))

Visitor = tuple[Array, Array, Array | None]
"""Keys and values [2, B, H, C, K] and segments [2, B, C] of one device, its own or another's."""


def order(length: int, ways: int) -> np.ndarray:
    """int [T]: the positions in the order in which they are stored over `ways` devices."""
    chunks = np.arange(length).reshape(2 * ways, -1)
    return np.concatenate([part for i in range(ways) for part in (chunks[i], chunks[-1 - i])])


def on_mesh(local: Attend, layout: Layout) -> Attend:
    """`local` on each device's own rows and heads; the ring and the halo in its place where the layout splits the
    sequence, whose arrays must then be in `order`."""
    ways = layout.mesh.shape[AXIS]
    function = partial(attend, ways=ways) if ways > 1 else local
    spec = layout.sharding(("batch", "length", "heads", None), "attention").spec
    ids_spec = layout.sharding(("batch", "length"), "attention").spec

    def run(q: Array, k: Array, v: Array, mask: Mask, scale: float, segments: Array | None = None) -> Array:
        ids = () if segments is None else (segments,)
        specs = (spec, spec, spec, *(ids_spec for _ in ids))

        def here(q: Array, k: Array, v: Array, *ids: Array) -> Array:
            return function(q, k, v, mask, scale, ids[0] if ids else None)

        return jax.shard_map(here, mesh=layout.mesh, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, *ids)

    return run


def attend(
    q: Array, k: Array, v: Array, mask: Mask, scale: float, segments: Array | None = None, *, ways: int
) -> Array:
    """See attention.Attend: a device's part [B, T/c, H, K] of arrays in `order`.

    Raises UserError for a mask that is not causal: both ways of splitting leave out what causality hides.
    """
    if not mask.causal:
        raise UserError(f"layout.context = {ways}: only causal attention can be split; use 1")
    batch, length, heads, head_dim = q.shape
    mask = mask.within(length * ways)
    q, k, v = (x.reshape(batch, 2, -1, heads, head_dim).transpose(1, 0, 3, 2, 4) for x in (q, k, v))
    ids = None if segments is None else segments.reshape(batch, 2, -1).swapaxes(0, 1)
    out = _ring(scale, ways, q, k, v, ids) if mask.window is None else _halo(q, k, v, mask, scale, ways, ids)
    return out.transpose(1, 0, 3, 2, 4).reshape(batch, length, heads, head_dim)


def _halo(q: Array, k: Array, v: Array, mask: Mask, scale: float, ways: int, ids: Array | None) -> Array:
    """Each chunk with the W-1 keys before it. The gradient of keys and values goes back the same way."""
    assert mask.window is not None
    history, index = mask.window - 1, jax.lax.axis_index(AXIS)
    keys = _with_history(jnp.stack([k, v], axis=1), 4, history, ways)  # [2, k and v, B, H, W-1+C, K]
    ids = None if ids is None else _with_history(ids, 2, history, ways)
    starts = jnp.stack([index, 2 * ways - 1 - index]) * q.shape[3]

    def one(q: Array, keys: Array, start: Array, ids: Array | None) -> Array:
        return banded(q, keys[0], keys[1], mask, scale, start, ids)

    return jax.vmap(one)(q, keys, starts, ids)


def _with_history(chunks: Array, axis: int, history: int, ways: int) -> Array:
    """Both chunks behind the `history` positions that come before them along `axis`.

    The chunk before i is on device i-1. The one before 2c-1-i is on device i+1, and on the last device its own
    lower chunk. Before chunk 0 there is nothing: zeros, at negative positions.
    """
    length = chunks.shape[axis]
    low, high = jax.lax.slice_in_dim(chunks, length - history, length, axis=axis)
    up, down = [(i, i + 1) for i in range(ways - 1)], [(i + 1, i) for i in range(ways - 1)]
    last = jax.lax.axis_index(AXIS) == ways - 1
    before = jax.lax.ppermute(low, AXIS, up), jnp.where(last, low, jax.lax.ppermute(high, AXIS, down))
    return jnp.concatenate([jnp.stack(before), chunks], axis=axis)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(scale: float, ways: int, q: Array, k: Array, v: Array, ids: Array | None) -> Array:
    """Dense causal attention; its gradient is spelled out, since autodiff would keep every visitor."""
    return _ring_forward(scale, ways, q, k, v, ids)[0]


def _ring_forward(scale: float, ways: int, q: Array, k: Array, v: Array, ids: Array | None) -> tuple[Array, tuple]:
    def meet(products: tuple, visitor: Visitor, out: Array, log_z: Array) -> tuple[Array, Array]:
        for a, b, mask in products:
            keys, values, places = _side(ids, visitor, a, b, q.shape[3])
            more, more_z = rows_forward(mask, scale, q[a], keys, values, places)
            total = jnp.logaddexp(log_z[a], more_z)
            safe = jnp.where(total == -jnp.inf, 0, total)  # rows that see no key yet
            weights = (jnp.exp(z - safe)[..., None] for z in (log_z[a], more_z))
            out = out.at[a].set(sum(w * x for w, x in zip(weights, (out[a], more), strict=True)))
            log_z = log_z.at[a].set(total)
        return out, log_z

    def visit(step: Array, carry: tuple) -> tuple:
        visitor, *sums = carry
        visitor = _pass_on(visitor, ways)
        return visitor, *meet(_products(step), visitor, *sums)

    wide = jnp.promote_types(q.dtype, jnp.float32)
    sums = meet(OWN, (k, v, ids), jnp.zeros(q.shape, wide), jnp.full(q.shape[:-1], -jnp.inf, wide))
    _, out, log_z = jax.lax.fori_loop(1, ways, visit, ((k, v, ids), *sums))
    out, log_z = checkpoint_name(out.astype(q.dtype), KEPT), checkpoint_name(log_z, KEPT)
    return out, (q, k, v, ids, out, log_z)


def _ring_backward(scale: float, ways: int, saved: tuple, grad: Array) -> tuple[Array, Array, Array, None]:
    """The gradients of keys and values travel with them, and one step further: home."""
    q, k, v, ids, out, log_z = saved
    row = jnp.sum(out * grad, axis=-1, dtype=log_z.dtype)

    def meet(products: tuple, visitor: Visitor, grads: tuple[Array, ...]) -> tuple[Array, ...]:
        for a, b, mask in products:
            keys, values, places = _side(ids, visitor, a, b, q.shape[3])
            *more, _ = rows_backward(mask, scale, q[a], keys, values, places, log_z[a], row[a], grad[a])
            grads = tuple(g.at[i].add(m.astype(g.dtype)) for g, m, i in zip(grads, more, (a, b, b), strict=True))
        return grads

    def visit(step: Array, carry: tuple) -> tuple:
        visitor, grad_q, *grad_kv = carry
        visitor, grad_kv = _pass_on((visitor, grad_kv), ways)
        return visitor, *meet(_products(step), visitor, (grad_q, *grad_kv))

    zeros = tuple(jnp.zeros(x.shape, log_z.dtype) for x in (q, k, v))
    carry = (k, v, ids), *meet(OWN, (k, v, ids), zeros)
    _, grad_q, *grad_kv = jax.lax.fori_loop(1, ways, visit, carry)
    grads = grad_q, *_pass_on(grad_kv, ways)
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None  # type: ignore[return-value]


_ring.defvjp(_ring_forward, _ring_backward)


def _side(ids: Array | None, visitor: Visitor, a: int | Array, b: int | Array, length: int) -> tuple:
    """Keys, values and places for query chunk a and the visitor's chunk b."""
    keys, values, key_ids = visitor
    positions = jnp.arange(length)
    segments = (None, None) if ids is None or key_ids is None else (ids[a], key_ids[b])
    return keys[b], values[b], Places(positions, positions, *segments)


def _products(step: Array) -> tuple:
    """What is visible of the visitor that came `step` devices up the ring: its lower chunk to our higher one, and
    lower to lower if it comes earlier in the sequence, higher to higher if later."""
    same = jnp.where(jax.lax.axis_index(AXIS) >= step, 0, 1)
    return (1, 0, FULL), (same, same, FULL)


def _pass_on(tree: Any, ways: int) -> Any:
    return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % ways) for i in range(ways)])
