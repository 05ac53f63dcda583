"""What decoding keeps of the past: keys and values of every layer, all of them for a dense layer, the last W for a
banded one.

One rule places both: the token at position p lies in slot p mod R of R. A dense layer has as many slots as positions,
so nothing is ever overwritten; a banded layer has W, and its ring holds what its window can still see. Which position a
slot holds follows from how many tokens went in, so none is stored.

Letters beside the model's: N rows of the cache, R slots of a row.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.config import ModelConfig
from gptjax.model.attention import Mask
from gptjax.model.positions import biases

Cache = Any
"""Per block of the pattern: (keys, values), each [U, N, H, R, K]; with cross-attention also those of what the encoder
made of each row's text, [U, N, H, S, K], which decoding reads alone."""
BLOCK = 128  # slots that are read at once where only the occupied ones are: 12 heads of 64 are 400 kB, within a cache
AXES = ("layers", "batch", "heads", None, None)


class At(NamedTuple):
    """Where the B rows of tokens of a call stand, each after its own past."""

    start: Array
    """int32 [B]: tokens that came before."""
    num_new: Array
    """int32 [B]: how many of the T are real; the rest, at the end, leave no trace."""
    rows: Array | None = None
    """int32 [B]: their rows in the cache; None for the first B."""
    memory: Array | None = None
    """int32 [B]: tokens of the text that each looks at by cross-attention."""


def ring_size(config: ModelConfig, kind: str, capacity: int) -> int:
    """Slots R that a layer of a kind needs for texts of up to `capacity` tokens."""
    return min(config.window, capacity) if kind == "banded" else capacity


def cache_shapes(config: ModelConfig, rows: int, capacity: int) -> list[tuple[int, ...]]:
    """[U, N, H/G, R, K] of the keys, and of the values, of each block of the pattern."""
    units = config.num_layers // len(config.attention_pattern)
    sizes = [ring_size(config, kind, capacity) for kind in config.attention_pattern]
    return [(units, rows, config.kv_heads, size, config.head_dim) for size in sizes]


def empty_cache(config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype, source: int = 0) -> Cache:
    """A zeroed cache for so many texts of up to `capacity` tokens, each of which looks at one of up to `source`."""

    def one(shape: tuple[int, ...]) -> tuple[Array, ...]:
        memory = (*shape[:2], config.num_heads, source, shape[4])
        return tuple(jnp.zeros(size, dtype) for size in (shape, shape, *[memory] * 2 * (source > 0)))

    return tuple(map(one, cache_shapes(config, rows, capacity)))


def memory_of(config: ModelConfig, params: Any, hidden: Array) -> Cache:
    """What cross-attention looks at of encoder states [B, S, D], by parameters as they are trained: per block of the
    pattern (keys, values), each [U, B, H, S, K]."""
    units = config.num_layers // len(config.attention_pattern)

    def one(block: str) -> tuple[Array, Array]:
        if config.scan_layers:
            weights = params["units"][block]["cross_keys_values"]
        else:
            every = [params[f"unit_{i}"][block]["cross_keys_values"] for i in range(units)]
            weights = jax.tree.map(lambda *parts: jnp.stack(parts), *every)
        made = jnp.einsum("bsd,udnhk->unbhsk", hidden, weights["kernel"].astype(hidden.dtype))
        if "bias" in weights:  # [U, 2, H, K]
            made += weights["bias"].astype(hidden.dtype)[:, :, None, :, None]
        return made[:, 0], made[:, 1]

    return tuple(one(f"block_{i}") for i in range(len(config.attention_pattern)))


def copy_row(cache: Cache, source: Array, target: Array) -> Cache:
    """With row `target` as row `source` is."""

    def one(leaf: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(leaf, source, axis=1)
        return jax.lax.dynamic_update_index_in_dim(leaf, row, target, axis=1)

    return jax.tree.map(one, cache)


@partial(jax.jit, static_argnames="scale")
def attend_memory(q: Array, memory: tuple[Array, Array], unit: Any, at: At, scale: float) -> Array:
    """q [B, T, H, K] attend to all of the text that each row looks at: [B, T, H, K]."""
    assert at.memory is not None
    k, v = (_slots(leaf, unit, at.rows, len(q), 0, leaf.shape[3]) for leaf in memory)  # [B, H, S, K]
    seen = jnp.arange(k.shape[2]) < jnp.maximum(at.memory, 1)[:, None, None]  # a row that rests looks at something
    soft = _Softmax.of(jnp.moveaxis(q * scale, 1, 2), k, v, jnp.broadcast_to(seen, (len(q), q.shape[1], k.shape[2])))
    return jnp.moveaxis(soft.value / soft.total[..., None], 1, 2).astype(q.dtype)


@partial(jax.jit, static_argnames=("mask", "scale", "read", "reach"))  # traced once for all layers of a kind
def attend_cached(
    q: Array,
    k: Array,
    v: Array,
    cache: tuple[Array, Array],
    unit: Any,
    at: At,
    mask: Mask,
    scale: float,
    read: int,
    table: Array | None = None,
    reach: int = 0,
) -> tuple[Array, tuple[Array, Array]]:
    """T new tokens a row attend to their past and to each other, and become a part of it: q [B, T, H, K], k and v
    [B, T, H/G, K] -> ([B, T, H, K], cache). The G heads of queries that share keys stand one after another, as G times
    as many queries. table, reach: of relative positions, where no heads share keys; see positions.biases.

    `unit` says whose keys and values of the stacked ones. `read` is how many slots to read, at least those that are
    occupied (a program for each); 0, for CPUs, reads what is occupied by the longest of the rows, in a loop (one
    program), which an accelerator would leave for the host at each turn.
    """
    keys, values = cache
    size = keys.shape[3]
    first = at.start[:, None]  # [B, 1]
    here = first + jnp.arange(q.shape[1])  # [B, T]
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q * scale, k, v))  # [B, H, T, K]
    shape, group = q.shape, q.shape[1] // k.shape[1]
    q, asking = q.reshape(len(q), k.shape[1], -1, q.shape[3]), jnp.tile(here, (1, group))  # [B, H/G, G T, K], [B, G T]

    def join(soft: "_Softmax", some: tuple[Any, ...], offset: Any, width: int, fresh: Any = 0) -> "_Softmax":
        """With `width` slots from `offset` on, of which the ones before `fresh` have been seen, of some of the rows."""
        q, first, asking, rows = some
        index = offset + jnp.arange(width)
        place = (first - 1) - (first - 1 - index) % size  # the last that went into each slot: [B, width]
        seen = (place >= 0) & (index >= fresh)
        distance = asking[:, :, None] - place[:, None]  # [B, G T, width]
        seen = seen[:, None] & _within(mask, distance)
        old_k, old_v = (_slots(leaf, unit, rows, len(q), offset, width) for leaf in (keys, values))
        return soft.join(q, old_k, old_v, seen, bias(distance))

    def bias(distance: Array) -> Array | None:
        return None if table is None else biases(table, -distance, reach, causal=True)

    distance = asking[:, :, None] - here[:, None]
    soft = _Softmax.of(q, k, v, (distance >= 0) & _within(mask, distance), bias(distance))
    if read:
        soft = join(soft, (q, first, asking, at.rows), 0, min(read, size))
    else:
        every = q, first, asking, jnp.arange(len(q)) if at.rows is None else at.rows
        width = min(BLOCK, size)
        blocks = (jnp.minimum(jnp.where(at.num_new > 0, at.start, 0), size) + width - 1) // width  # [B]

        def one_row(i: Array, soft: "_Softmax") -> "_Softmax":
            own, mine = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), (soft, every))

            def block(j: Array, own: "_Softmax") -> "_Softmax":
                return join(own, mine, jnp.minimum(j * width, size - width), width, j * width)

            own = jax.lax.fori_loop(0, blocks[i], block, own)
            return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i, 0), soft, own)

        soft = jax.lax.fori_loop(0, len(q), one_row, soft)
    out = jnp.moveaxis((soft.value / soft.total[..., None]).reshape(shape), 1, 2).astype(q.dtype)
    # What is read is read before it is written: without this dependence, which always holds, the compiler would copy
    # the whole cache to be sure.
    at = at._replace(num_new=jnp.where(jnp.min(soft.total) > 0, at.num_new, 0))
    put = _put if read else _put_in_runs
    return out, (put(keys, k, unit, at), put(values, v, unit, at))


def _within(mask: Mask, distance: Array) -> Array:
    return jnp.bool_(True) if mask.window is None else distance < mask.window


class _Softmax(NamedTuple):
    """A softmax over keys that come part by part, in at least float32 (Milakov and Gimelshein, arXiv 1805.02867)."""

    top: Array
    """[B, H, T]: the largest score so far."""
    total: Array
    """[B, H, T]: the sum of exponentials less it."""
    value: Array
    """[B, H, T, K]: what they weigh."""

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, seen: Array, bias: Array | None = None) -> "_Softmax":
        """Of a part in which every query sees a key. q [B, H, T, K], k and v [B, H, S, K], seen [B, T, S], a bias
        [B, H, T, S] on the scores."""
        scores = _scores(q, k, seen, bias)
        top = scores.max(-1)
        weights = jnp.exp(scores - top[..., None])
        return cls(top, weights.sum(-1), _weigh(weights, v))

    def join(self, q: Array, k: Array, v: Array, seen: Array, bias: Array | None) -> "_Softmax":
        """With another part, of which a query may see nothing."""
        scores = _scores(q, k, seen, bias)
        top = jnp.maximum(self.top, scores.max(-1))
        weights, old = jnp.exp(scores - top[..., None]), jnp.exp(self.top - top)
        return _Softmax(top, self.total * old + weights.sum(-1), self.value * old[..., None] + _weigh(weights, v))


def _scores(q: Array, k: Array, seen: Array, bias: Array | None) -> Array:
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    scores = scores if bias is None else scores + bias
    return jnp.where(seen[:, None], scores, -jnp.inf)


def _weigh(weights: Array, v: Array) -> Array:
    return jnp.einsum("bhts,bhsk->bhtk", weights.astype(v.dtype), v, preferred_element_type=weights.dtype)


def _slots(leaf: Array, unit: Any, rows: Array | None, count: int, offset: Any, width: int) -> Array:
    """[B, H, width, K] of [U, N, H, R, K]."""
    _, _, heads, _, dim = leaf.shape

    def of(row: Any, many: int) -> Array:
        return jax.lax.dynamic_slice(leaf, (unit, row, 0, offset, 0), (1, many, heads, width, dim))[0]

    if rows is None:
        return of(0, count)
    if count == 1:
        return of(rows[0], 1)
    return jax.vmap(lambda row: of(row, 1)[0])(rows)


def _put(leaf: Array, new: Array, unit: Any, at: At) -> Array:
    """[U, N, H, R, K] with [B, H, T, K] in its slots; of more tokens than slots the last ones."""
    size, number = leaf.shape[3], jnp.arange(new.shape[2])
    kept = (number < at.num_new[:, None]) & (number >= at.num_new[:, None] - size)
    slots = jnp.where(kept, (at.start[:, None] + number) % size, size)  # beyond the last: dropped
    rows = jnp.arange(len(new)) if at.rows is None else at.rows
    return leaf.at[unit, rows[:, None], :, slots].set(jnp.moveaxis(new, 2, 1).astype(leaf.dtype), mode="drop")


def _put_in_runs(leaf: Array, new: Array, unit: Any, at: At) -> Array:
    """The same in place, for a scatter of which XLA's CPU backend copies the array (jaxlib 0.10.2): a row's tokens lie
    in one run of slots, or in two where they go round the ring."""
    size, (_, heads, length, dim) = leaf.shape[3], new.shape
    width = min(length, size)
    new = jnp.pad(new.astype(leaf.dtype), ((0, 0), (0, 0), (width, width), (0, 0)))
    shape = 1, 1, heads, width, dim

    def row(i: Array, leaf: Array) -> Array:
        target = i if at.rows is None else at.rows[i]
        dropped = jnp.maximum(at.num_new[i] - size, 0)  # overwritten at once
        count, begin = at.num_new[i] - dropped, (at.start[i] + dropped) % size

        def run(number: Array, leaf: Array) -> Array:
            at_slot = begin - number * size
            window = jnp.clip(at_slot, 0, size - width)
            shift = jnp.clip(at_slot - window, -width, width)  # of the first token in the window
            fresh = jax.lax.dynamic_slice(new, (i, 0, width + dropped - shift, 0), (1, heads, width, dim))
            token = jnp.arange(width)[:, None] - shift
            place = unit, target, 0, window, 0
            both = jnp.where((token >= 0) & (token < count), fresh[None], jax.lax.dynamic_slice(leaf, place, shape))
            return jax.lax.dynamic_update_slice(leaf, both, place)

        return jax.lax.fori_loop(0, jnp.where(count > 0, 1 + (begin + count > size), 0), run, leaf)

    return jax.lax.fori_loop(0, len(new), row, leaf)
