"""Layers dealt to pipeline stages: a circular schedule as one scan over time, without a line in the model.

The U stacked units are cut into p x r groups of k consecutive ones; group j belongs to stage j mod p, so that the
batch goes round the p stages r times. The batch is cut into m chunks. At time t stage s works on item t - s, where
item i is chunk i mod m in round i div m; then every stage hands its result to the next. That takes m r + p - 1
times, of which p - 1 are the bubble (Huang et al., arXiv 1811.06965; rounds: Narayanan et al., arXiv 2104.04473).

The stages are an array axis that `vmap` maps and the `pipeline` mesh axis shards; handing on is a rotation of it.
Idle stages compute on whatever is there, and nothing reads the result.

Parameters rest as everywhere, stacked in the order of the layers, each stage with its consecutive share, and are
dealt out and gathered over `fsdp` once per batch instead of at every time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.config import Config
from gptjax.sharding.rules import Layout, is_boxed

AXIS = "pipeline"
Apply = Callable[[Any, Array, Array | None, Array | None], Array]
"""(parameters of one unit, x [b, T, D], segments [b, T] or None, dropout key or None) -> x."""


def bubble(stages: int, rounds: int, chunks: int) -> float:
    """Share of the schedule's time in which a stage has nothing to do: (p - 1) / (m r + p - 1)."""
    return (stages - 1) / (chunks * rounds + stages - 1)


def num_chunks(config: Config, batch_ways: int) -> int:
    """m: as the layout says, or one row per device and chunk, which makes the bubble smallest."""
    return config.layout.pipeline_chunks or config.micro_batch_size // batch_ways


def on_mesh(config: Config, layout: Layout, boxed: Any, dtype: jnp.dtype) -> Callable[..., Array]:
    """What runs the stacked units: (apply, parameters [U, ...], x [B, T, D], segments [B, T], dropout key) -> x.

    boxed: the shapes of the stacked parameters with their logical axes; dtype: of the products, in which weights
    are gathered.
    """
    stages, rounds = layout.mesh.shape[AXIS], config.layout.pipeline_rounds
    chunks = num_chunks(config, layout.ways(layout.rules["batch"]))
    names = jax.tree.map(lambda leaf: leaf.names, boxed, is_leaf=is_boxed)

    def run(apply: Apply, stacked: Any, x: Array, segments: Array | None, key: Array | None) -> Array:
        weights = jax.tree_util.tree_map_with_path(
            partial(_deal, layout, stages, rounds, dtype), stacked, names, is_leaf=lambda leaf: leaf is None
        )
        cut_axes = ("stages", "batch", "residual_length", None)
        x = layout.constrain(_cut(x, chunks), cut_axes)
        ids = None if segments is None else layout.constrain(_cut(segments, chunks), (None, "batch", "length"))
        out = layout.constrain(_schedule(apply, weights, x, ids, key, stages, rounds, layout.constrain), cut_axes)
        return jnp.moveaxis(out, 0, 1).reshape(-1, *out.shape[2:])

    return run


def _cut(x: Array, chunks: int) -> Array:
    """[B, ...] -> [m, B/m, ...]: every m-th row, so that each device keeps the rows that it has."""
    return jnp.moveaxis(x.reshape(-1, chunks, *x.shape[1:]), 1, 0)


def _deal(layout: Layout, stages: int, rounds: int, dtype: jnp.dtype, path: Any, weight: Array, names: Any) -> Array:
    """[U, ...] as stored -> [r, p, k, ...], whole over fsdp. Matrices travel in the compute dtype and come back to
    their own, in which the gradients of the chunks are then summed."""
    is_matrix = path[-1].key == "kernel"
    dealt = (weight.astype(dtype) if is_matrix else weight).reshape(rounds, stages, -1, *weight.shape[1:])
    axes = (None, "stages", None, *names[1:])
    dealt = layout.constrain(dealt, axes)
    whole = layout.constrain(dealt, tuple(None if axis == "embed" else axis for axis in axes))
    return whole.astype(weight.dtype)


def _schedule(
    apply: Apply,
    weights: Any,
    x: Array,
    segments: Array | None,
    key: Array | None,
    stages: int,
    rounds: int,
    constrain: Callable,
) -> Array:
    """x [m, b, T, D] -> the same after all units; weights [r, p, k, ...]."""
    chunks = x.shape[0]

    def stage(own: Any, x: Array, ids: Array | None, key: Array | None) -> Array:
        """One group of k units on one chunk."""

        def unit(x: Array, part: tuple[Any, Array]) -> tuple[Array, None]:
            weights, index = part
            return apply(weights, x, ids, None if key is None else jax.random.fold_in(key, index)), None

        count = jax.tree.leaves(own)[0].shape[0]
        return jax.lax.scan(unit, x, (own, jnp.arange(count)))[0]

    every = jax.vmap(stage, spmd_axis_name=AXIS)
    flow_axes = ("stages", "batch", "residual_length", None)
    first = (jnp.arange(stages) == 0)[:, None, None, None]

    def tick(carry: tuple[Array, Array], time: Array) -> tuple[tuple[Array, Array], None]:
        """Each stage's input [p, b, T, D], and the chunks that wait for their next round [p, m, b, T, D]: what
        the first stage is handed. The others store what they are handed as well, and never look at it: to leave
        it out would cost a copy over the network."""
        flow, waiting = carry
        item = jnp.clip(time - jnp.arange(stages), 0, chunks * rounds - 1)  # [p]
        entry = jax.lax.dynamic_index_in_dim(waiting, time % chunks, axis=1, keepdims=False)
        own = jax.tree.map(lambda w: _pick(w, item // chunks), weights)
        ids = None if segments is None else segments[item % chunks]
        keys = None if key is None else jax.vmap(partial(jax.random.fold_in, key))(item * stages + jnp.arange(stages))
        out = constrain(every(own, constrain(jnp.where(first, entry, flow), flow_axes), ids, keys), flow_axes)
        flow = constrain(jnp.roll(out, 1, axis=0), flow_axes)
        slot = (time - stages + 1) % chunks
        old = jax.lax.dynamic_index_in_dim(waiting, slot, axis=1, keepdims=False)
        done = jnp.where(time >= stages - 1, flow, old)
        return (flow, jax.lax.dynamic_update_index_in_dim(waiting, done, slot, axis=1)), None

    waiting_axes = ("stages", None, *flow_axes[1:])
    waiting = constrain(jnp.broadcast_to(x, (stages, *x.shape)), waiting_axes)
    start = constrain(jnp.zeros((stages, *x.shape[1:]), x.dtype), flow_axes)
    (_, waiting), _ = jax.lax.scan(tick, (start, waiting), jnp.arange(chunks * rounds + stages - 1))
    return jnp.sum(jnp.where(first[:, None], constrain(waiting, waiting_axes), 0), axis=0)


def _pick(weights: Array, rounds: Array) -> Array:
    """[r, p, k, ...] -> [p, k, ...]: each stage's group of the round that it is in."""
    if weights.shape[0] == 1:
        return weights[0]
    return jax.vmap(lambda own, r: jax.lax.dynamic_index_in_dim(own, r, keepdims=False), (1, 0))(weights, rounds)
