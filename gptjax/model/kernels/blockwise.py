"""Attention in plain XLA that touches only what a query can see: right on every platform, in every dtype.

Dense, and short sequences of any mask: a few segments of queries, unrolled, each with just the keys it can see.
Banded: O(T (W + BLOCK)), all blocks as one batched product. Both keep the log-normaliser of each row instead of its
weights and make the weights again in the backward pass (FlashAttention, arXiv 2205.14135), so memory is linear in T.
`rows_forward` and `rows_backward` are what ring attention calls too.
Letters beyond the model's: R query rows and S keys of one piece, N pieces.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from gptjax.model.attention import KEPT, Mask, visible

BLOCK = 128  # block edge of the band: 64-128 measured best on CPU for W = 256
SEGMENTS = 8  # unrolled at most; a dense causal layer then computes 9/16 of T² where the triangle has 1/2
SCORES = 1 << 22  # of one head in memory at once: 16 MB in float32


class Places(NamedTuple):
    """Where queries and keys stand: what decides, with a Mask, who sees whom."""

    queries: Array  # [R]; -1 is padding, which sees no key under a causal mask
    keys: Array  # [S]; negative is padding
    query_segments: Array | None = None  # [B, R]
    key_segments: Array | None = None  # [B, S]


def attend_across(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    scale: float,
    segments: tuple[Array | None, Array | None] = (None, None),
    bias: Array | None = None,
) -> Array:
    """q [B, T, H, K] against k, v [B, S, H, K] of another text, or of the same with a bias [H, T, S] that is added to
    the scores -> [B, T, H, K]. A query [B, T] sees only keys [B, S] of its own segment."""
    places = Places(jnp.arange(q.shape[1]), jnp.arange(k.shape[1]), *segments)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return rows(mask, scale, q, k, v, places, bias).swapaxes(1, 2)


def attend(q: Array, k: Array, v: Array, mask: Mask, scale: float, segments: Array | None = None) -> Array:
    """See attention.Attend."""
    length = q.shape[1]
    mask = mask.within(length)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if mask.window is not None and length > SEGMENTS * BLOCK:
        out = banded(q, k, v, mask, scale, 0, segments)
    else:
        out = _segments(q, k, v, mask, scale, segments)
    return out.swapaxes(1, 2)


def _segments(q: Array, k: Array, v: Array, mask: Mask, scale: float, segments: Array | None) -> Array:
    """q, k, v [B, H, T, K]."""
    length = q.shape[2]
    step = max(BLOCK, -(-length // SEGMENTS)) if mask.causal else length
    positions = jnp.arange(length)
    out = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        seen = slice(0 if mask.window is None else max(0, start - mask.window + 1), stop if mask.causal else length)
        ids = (None, None) if segments is None else (segments[:, start:stop], segments[:, seen])
        places = Places(positions[start:stop], positions[seen], *ids)
        out.append(rows(mask, scale, q[:, :, start:stop], k[:, :, seen], v[:, :, seen], places))
    return jnp.concatenate(out, axis=2)


def banded(
    q: Array, k: Array, v: Array, mask: Mask, scale: float, start: int | Array, key_segments: Array | None
) -> Array:
    """q [B, H, T, K] at positions start .. start+T-1; k, v [B, H, P+T, K] and key_segments [B, P+T] begin P
    positions earlier, of which those before position 0 are padding; P is at most W-1."""
    batch, heads, length, head_dim = q.shape
    assert mask.window is not None
    block = min(BLOCK, max(8, 1 << (mask.window - 1).bit_length()))
    blocks = -(-length // block)
    behind = -(-(mask.window - 1) // block)  # earlier key blocks that the first query of a block can reach
    front, tail = behind * block - (k.shape[2] - length), blocks * block - length

    def split(x: Array, axis: int, before: int) -> Array:  # axis -> a leading N and blocks
        padded = jnp.pad(x, [(before, tail) if i == axis else (0, 0) for i in range(x.ndim)])
        shape = (*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(padded.reshape(shape), axis, 0)

    def spans(x: Array, axis: int) -> Array:  # every block with the `behind` blocks before it
        parts = split(x, axis, front)
        return jnp.concatenate([parts[i : i + blocks] for i in range(behind + 1)], axis=axis + 1)

    first = start + jnp.arange(blocks)[:, None] * block  # [N, 1]
    places = Places(first + jnp.arange(block), first - behind * block + jnp.arange((behind + 1) * block))
    if key_segments is not None:
        ids = split(key_segments[:, -length:], 1, 0), spans(key_segments, 1)
        places = places._replace(query_segments=ids[0], key_segments=ids[1])
    out = jax.vmap(partial(rows, mask, scale))(split(q, 2, 0), spans(k, 2), spans(v, 2), places)
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, blocks * block, head_dim)[:, :, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def rows(mask: Mask, scale: float, q: Array, k: Array, v: Array, places: Places, bias: Array | None = None) -> Array:
    """q [B, H, R, K] against k, v [B, H, S, K], with a bias [H, R, S] on the scores: [B, H, R, K]."""
    return rows_forward(mask, scale, q, k, v, places, bias)[0]


def _keep(
    mask: Mask, scale: float, q: Array, k: Array, v: Array, places: Places, bias: Array | None
) -> tuple[Array, tuple]:
    out, log_z = (checkpoint_name(x, KEPT) for x in rows_forward(mask, scale, q, k, v, places, bias))
    return out, (q, k, v, places, bias, out, log_z)


def _gradient(mask: Mask, scale: float, saved: tuple, grad: Array) -> tuple[Array, Array, Array, None, Array | None]:
    q, k, v, places, bias, out, log_z = saved
    # The softmax's row sum of weights * grad_weights equals that of out * grad, which is S / K times shorter.
    row = jnp.sum(out * grad, axis=-1, dtype=log_z.dtype)
    *grads, grad_bias = rows_backward(mask, scale, q, k, v, places, log_z, row, grad, bias)
    grad_q, grad_k, grad_v = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v, None, None if bias is None else grad_bias.astype(bias.dtype)


rows.defvjp(_keep, _gradient)


def rows_forward(
    mask: Mask, scale: float, q: Array, k: Array, v: Array, places: Places, bias: Array | None = None
) -> tuple[Array, Array]:
    """(out [B, H, R, K], log-normaliser [B, H, R]); a row that sees no key gives 0 and -inf."""
    pieces = _pieces(q.shape[2], k.shape[2])
    if pieces == 1:
        return _piece_forward(mask, scale, q, k, v, places, bias)

    def one(part: tuple) -> tuple[Array, Array]:
        q, bias, queries, ids = part
        return _piece_forward(mask, scale, q, k, v, places._replace(queries=queries, query_segments=ids), bias)

    split_bias = None if bias is None else _split_rows(bias, 1, pieces)
    out, log_z = jax.lax.map(one, (_split_rows(q, 2, pieces), split_bias, *_split_queries(places, pieces)))
    return _join_rows(out, q.shape[2]), _join_rows(log_z[..., None], q.shape[2])[..., 0]


def rows_backward(
    mask: Mask,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    places: Places,
    log_z: Array,
    row: Array,
    grad: Array,
    bias: Array | None = None,
) -> tuple[Array, ...]:
    """Gradients of q, k, v from grad [B, H, R, K], and of a bias [H, R, S], of none zero; `row` [B, H, R] is the sum of
    out * grad over K. Those of k and v are in at least float32, ready to be summed."""
    pieces = _pieces(q.shape[2], k.shape[2])
    if pieces == 1:
        return _piece_backward(mask, scale, q, k, v, places, log_z, row, grad, bias)

    def one(total: tuple[Array, Array], part: tuple) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        q, queries, ids, *rest = part
        here = places._replace(queries=queries, query_segments=ids)
        grad_q, grad_k, grad_v, grad_bias = _piece_backward(mask, scale, q, k, v, here, *rest)
        return (total[0] + grad_k, total[1] + grad_v), (grad_q, grad_bias)

    rest = (_split_rows(x, 2, pieces) for x in (log_z, row, grad))
    split_bias = None if bias is None else _split_rows(bias, 1, pieces)
    parts = (_split_rows(q, 2, pieces), *_split_queries(places, pieces), *rest, split_bias)
    start = jnp.zeros(k.shape, log_z.dtype), jnp.zeros(v.shape, log_z.dtype)
    (grad_k, grad_v), (grad_q, grad_bias) = jax.lax.scan(one, start, parts)
    if bias is not None:  # [N, H, R, S]
        grad_bias = jnp.moveaxis(grad_bias, 0, 1).reshape(len(bias), -1, bias.shape[2])[:, : bias.shape[1]]
    return _join_rows(grad_q, q.shape[2]), grad_k, grad_v, grad_bias


def _piece_forward(
    mask: Mask, scale: float, q: Array, k: Array, v: Array, places: Places, bias: Array | None
) -> tuple[Array, Array]:
    scores = _scores(mask, scale, q, k, places, bias)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("bhrs,bhsk->bhrk", weights.astype(q.dtype), v)
    return out, (top + jnp.log(total))[..., 0]


def _piece_backward(
    mask: Mask,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    places: Places,
    log_z: Array,
    row: Array,
    grad: Array,
    bias: Array | None,
) -> tuple[Array, Array, Array, Array]:
    wide = log_z.dtype
    weights = jnp.exp(_scores(mask, scale, q, k, places, bias) - jnp.where(log_z == -jnp.inf, 0, log_z)[..., None])
    grad_weights = jnp.einsum("bhrk,bhsk->bhrs", grad, v, preferred_element_type=wide)
    grad_bias = jnp.zeros(()) if bias is None else jnp.sum(weights * (grad_weights - row[..., None]), axis=0)
    grad_scores = (weights * (grad_weights - row[..., None]) * scale).astype(q.dtype)
    return (
        jnp.einsum("bhrs,bhsk->bhrk", grad_scores, k),
        jnp.einsum("bhrs,bhrk->bhsk", grad_scores, q, preferred_element_type=wide),
        jnp.einsum("bhrs,bhrk->bhsk", weights.astype(q.dtype), grad, preferred_element_type=wide),
        grad_bias,
    )


def _scores(mask: Mask, scale: float, q: Array, k: Array, places: Places, bias: Array | None) -> Array:
    """Masked scores [B, H, R, S] in at least float32."""
    seen = visible(mask, places.queries, places.keys)
    if places.query_segments is not None and places.key_segments is not None:
        seen = seen & (places.query_segments[:, None, :, None] == places.key_segments[:, None, None, :])
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhrk,bhsk->bhrs", q * scale, k, preferred_element_type=wide)
    scores = scores if bias is None else scores + bias
    return jnp.where(seen, scores, -jnp.inf)


def _pieces(length: int, keys: int) -> int:
    """Pieces of the query rows such that one head's scores stay within SCORES."""
    return -(-length // max(1, min(length, SCORES // keys)))


def _split_rows(x: Array, axis: int, pieces: int, fill: int = 0) -> Array:
    """The rows along `axis`, padded and cut into pieces along a new leading axis."""
    edge = -(-x.shape[axis] // pieces)
    widths = [(0, pieces * edge - x.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)]
    shape = (*x.shape[:axis], pieces, edge, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, widths, constant_values=fill).reshape(shape), axis, 0)


def _split_queries(places: Places, pieces: int) -> tuple[Array, Array | None]:
    ids = places.query_segments
    split = None if ids is None else _split_rows(ids, 1, pieces, fill=-1)
    return _split_rows(places.queries, 0, pieces, fill=-1), split


def _join_rows(x: Array, length: int) -> Array:
    """[N, B, H, R, K] -> [B, H, length, K]."""
    joined = jnp.moveaxis(x, 0, 2)
    return joined.reshape(*joined.shape[:2], -1, joined.shape[-1])[:, :, :length]
