"""Layers dealt to pipeline stages: a circular schedule as one scan over time, without a line in the model.

The U stacked units are cut into p x r groups of k consecutive ones; group j belongs to stage j mod p, so that the
batch goes round the p stages r times. The batch is cut into m chunks. At time t stage s works on item t - s, where
item i is chunk i mod m in round i div m; then every stage hands its result to the next. That takes m r + p - 1
times, of which p - 1 are the bubble (Huang et al., arXiv 1811.06965; rounds: Narayanan et al., arXiv 2104.04473).

The stages are an array axis that `vmap` maps and the `pipeline` mesh axis shards; handing on is a rotation of it.
Idle stages compute on whatever is there, and nothing reads the result.

Parameters rest as everywhere, stacked in the order of the layers, each stage with its consecutive share. Once per
batch they are dealt out and gathered over `fsdp`; and so that their gradients cross the network once per batch, too,
every part of the batch gets, by another mapped axis, parameters of its own whose gradients are summed at the end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from gptjax.config import Config
from gptjax.sharding.rules import Axes, Layout, is_boxed

AXIS = "pipeline"
Apply = Callable[[Any, Array, Array, Any], Array]
"""(parameters of one unit, its number among the U, x [b, T, D], what goes beside x: a tree of [b, T]) -> x."""


def bubble(stages: int, rounds: int, chunks: int) -> float:
    """Share of the schedule's time in which a stage has nothing to do: (p - 1) / (m r + p - 1)."""
    return (stages - 1) / (chunks * rounds + stages - 1)


def num_chunks(config: Config, batch_ways: int) -> int:
    """m: as the layout says, or one row per device and chunk, which makes the bubble smallest."""
    return config.layout.pipeline_chunks or config.micro_batch_size // batch_ways


def inside(layout: Layout) -> Layout:
    """The layout as the stages see it: the parts of the batch are mapped one by one."""
    return Layout(layout.mesh, layout.rules | {"batch": ()})


def on_mesh(config: Config, layout: Layout, boxed: Any, dtype: jnp.dtype) -> Callable[..., Array]:
    """What runs the stacked units: (apply, parameters [U, ...], x [B, T, D], beside: a tree of [B, T]) -> x.

    `apply` must expect the layout of `inside`. boxed: the shapes of the stacked parameters with their logical axes;
    dtype: of the products, in which weights are gathered.
    """
    parts = layout.rules["batch"]
    ways = layout.ways(parts)
    chunks = num_chunks(config, ways)
    names = jax.tree.map(lambda leaf: leaf.names, boxed, is_leaf=is_boxed)
    deal = partial(_deal, layout, names, config.layout.pipeline_rounds, dtype)

    def run(apply: Apply, stacked: Any, x: Array, beside: Any) -> Array:
        axes: Axes = ("batch", "stages", None, "residual_length", None)
        cut = layout.constrain(x.reshape(ways, chunks, -1, *x.shape[1:]), axes)  # [d, m, b, T, D]
        beside = jax.tree.map(lambda ids: ids.reshape(ways, chunks, -1, ids.shape[1]), beside)
        beside = jax.tree.map(lambda ids: layout.constrain(ids, ("batch", None, None, "length")), beside)
        each = jax.vmap(partial(_schedule, apply, inside(layout)), spmd_axis_name=parts)
        out = each(jax.lax.stop_gradient(deal(stacked)), _sums(deal, stacked), cut, beside)
        return layout.constrain(out, axes).reshape(x.shape)

    return run


def _deal(layout: Layout, names: Any, rounds: int, dtype: jnp.dtype, stacked: Any) -> Any:
    """[U, ...] as stored -> [d, r, p, k, ...], whole over fsdp, for each of the d parts of the batch. Matrices are
    then in the compute dtype."""
    stages, ways = layout.mesh.shape[AXIS], layout.ways(layout.rules["batch"])

    def one(path: Any, weight: Array, own: Axes) -> Array:
        dealt = (weight.astype(dtype) if path[-1].key == "kernel" else weight).reshape(
            rounds, stages, -1, *weight.shape[1:]
        )
        axes: Axes = (None, "stages", None, *own[1:])
        dealt = layout.constrain(dealt, axes)
        whole = ("batch", *(None if axis == "embed" else axis for axis in axes))
        return layout.constrain(jnp.broadcast_to(dealt, (ways, *dealt.shape)), whole)

    return jax.tree_util.tree_map_with_path(one, stacked, names)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(deal: Callable[[Any], Any], stacked: Any) -> Any:
    """Float32 zeros in the place of dealt weights: where their gradients are summed over the chunks. Nothing reads
    them going forward."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), jax.eval_shape(deal, stacked))


def _sums_forward(deal: Callable[[Any], Any], stacked: Any) -> tuple[Any, Any]:
    return _sums(deal, stacked), stacked


def _sums_backward(deal: Callable[[Any], Any], stacked: Any, grads: Any) -> tuple[Any]:
    dealt, back = jax.vjp(deal, stacked)
    return back(jax.tree.map(lambda g, w: g.astype(w.dtype), grads, dealt))


_sums.defvjp(_sums_forward, _sums_backward)


@jax.custom_vjp
def _summed_in(weight: Array, total: Array) -> Array:
    """`weight`, whose gradient goes to `total`."""
    return weight


def _summed_in_forward(weight: Array, total: Array) -> tuple[Array, None]:
    return weight, None


def _summed_in_backward(_: None, grad: Array) -> tuple[None, Array]:
    return None, grad.astype(jnp.float32)


_summed_in.defvjp(_summed_in_forward, _summed_in_backward)


def _schedule(apply: Apply, layout: Layout, weights: Any, sums: Any, x: Array, beside: Any) -> Array:
    """x [m, b, T, D] and beside [m, b, T] -> x after all units; weights and sums [r, p, k, ...]."""
    chunks, constrain = x.shape[0], layout.constrain
    rounds, stages, count = jax.tree.leaves(weights)[0].shape[:3]
    numbers = jnp.arange(rounds * stages * count).reshape(rounds, stages, count)  # as the weights are dealt

    def stage(own: Any, numbers: Array, x: Array, beside: Any) -> Array:
        """One group of k units on one chunk."""

        def unit(x: Array, part: tuple[Any, Array]) -> tuple[Array, None]:
            return apply(*part, x, beside), None

        return jax.lax.scan(unit, x, (own, numbers))[0]

    every = jax.vmap(stage, spmd_axis_name=AXIS)
    flow_axes: Axes = ("stages", "batch", "residual_length", None)
    first = (jnp.arange(stages) == 0)[:, None, None, None]

    def tick(carry: tuple[Array, Array], time: Array) -> tuple[tuple[Array, Array], None]:
        """Each stage's input [p, b, T, D], and the chunks that wait for their next round [p, m, b, T, D]: what
        the first stage is handed. The others store what they are handed as well, and never look at it: to leave
        it out would cost a copy over the network."""
        flow, waiting = carry
        item = jnp.clip(time - jnp.arange(stages), 0, chunks * rounds - 1)  # [p]
        entry = jax.lax.dynamic_index_in_dim(waiting, time % chunks, axis=1, keepdims=False)
        own = jax.tree.map(lambda w, s: _summed_in(_pick(w, item // chunks), _pick(s, item // chunks)), weights, sums)
        theirs = jax.tree.map(lambda ids: ids[item % chunks], beside)
        flow = constrain(jnp.where(first, entry, flow), flow_axes)
        out = constrain(every(own, _pick(numbers, item // chunks), flow, theirs), flow_axes)
        flow = _hand_on(out, layout.sharding(flow_axes), stages)
        slot = (time - stages + 1) % chunks
        old = jax.lax.dynamic_index_in_dim(waiting, slot, axis=1, keepdims=False)
        done = jnp.where(time >= stages - 1, flow, old)
        return (flow, jax.lax.dynamic_update_index_in_dim(waiting, done, slot, axis=1)), None

    waiting_axes: Axes = ("stages", None, *flow_axes[1:])
    waiting = constrain(jnp.broadcast_to(x, (stages, *x.shape)), waiting_axes)
    start = constrain(jnp.zeros((stages, *x.shape[1:]), x.dtype), flow_axes)
    (_, waiting), _ = jax.lax.scan(tick, (start, waiting), jnp.arange(chunks * rounds + stages - 1))
    return jnp.sum(jnp.where(first[:, None], constrain(waiting, waiting_axes), 0), axis=0)


def _hand_on(x: Array, sharding: NamedSharding, stages: int) -> Array:
    """x [p, ...] one place round. Spelled out: a rotation of the axis would be sent in two pieces."""
    ring = [(i, (i + 1) % stages) for i in range(stages)]
    send = partial(jax.lax.ppermute, axis_name=AXIS, perm=ring)
    return jax.shard_map(send, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec)(x)


def _pick(weights: Array, rounds: Array) -> Array:
    """[r, p, k, ...] -> [p, k, ...]: each stage's group of the round that it is in."""
    if weights.shape[0] == 1:
        return weights[0]
    return jax.vmap(lambda own, r: jax.lax.dynamic_index_in_dim(own, r, keepdims=False), (1, 0))(weights, rounds)
