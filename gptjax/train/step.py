"""The state of training and the one jitted step that every stage shares."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.config import Config, OptimizerConfig
from gptjax.hardware import compiler_options
from gptjax.model.gpt import compute_dtype
from gptjax.sharding.rules import COPIES, Layout, is_boxed, leaf_name
from gptjax.train.parts import Params, join, split

if TYPE_CHECKING:
    import optax
    from optax.contrib import MuonDimensionNumbers

Metrics = dict[str, Array]
Rows = Any
"""A batch: a tree of arrays [b, ...], or of micro-batches [M, b, ...]. What they mean only the stage knows."""
Counts = Any
"""A tree of float32 scalars: what the terms of a loss are means over, such as targets or summed weights."""


class Parametrised(Protocol):
    """What has parameters."""

    def init(self, key: Array, /) -> Params:
        """All of them, boxed with their logical axes."""
        ...

    def is_frozen(self, name: str, /) -> bool:
        """Whether no step changes a parameter, such as units/block_0/qkv/kernel."""
        ...

    def is_carried(self, name: str, /) -> bool:
        """Whether a step changes a parameter by `carry` and not by its gradient, such as an average of others."""
        ...

    @property
    def rates(self) -> Mapping[str, float]:
        """First part of the names of parameters that have an optimizer of their own, clipped by their own norm -> their
        learning rate as a share of the others'."""
        ...


class Objective(Protocol):
    """What a stage minimises: a sum over the micro-batches of a step, every term over its count in the whole step."""

    def on(self, layout: Layout, /) -> Self:
        """The same on another layout."""
        ...

    def counts(self, rows: Rows, /) -> Counts:
        """Those of rows [b, ...]; those of a step are their sums over all micro-batches and processes."""
        ...

    def loss(self, params: Params, rows: Rows, counts: Counts, key: Array | None, /) -> Array:
        """The part of rows [b, ...] in the step's mean, nats; a key of None switches dropout off."""
        ...

    def loss_and_figures(
        self, params: Params, rows: Rows, counts: Counts, key: Array | None, /
    ) -> tuple[Array, dict[str, Array]]:
        """The same, and what else is to be logged of rows [b, ...]: parts that add up, as the loss is one, or `maxima`
        of what is never negative."""
        ...

    @property
    def maxima(self) -> Collection[str]:
        """The figures of which the largest of a step's micro-batches is told, and not their sum."""
        ...

    def summary(self, figures: dict[str, Array], /) -> dict[str, Array]:
        """What a step of several updates says of its figures, each [updates]."""
        ...

    def carry(self, carried: Params, params: Params, rows: Rows, /) -> Params:
        """The `carried` ones after a step that led to the trained `params`, whose rows were [M, b, ...]."""
        ...


class Trained(Parametrised, Objective, Protocol):
    """What a step trains."""


NO_RATES: Mapping[str, float] = MappingProxyType({})
MICRO_BATCHES = (None, "batch")  # logical axes that every array of a batch begins with
SPIKE_WARMUP = 100  # accepted steps before the loss statistics may reject one, and the steps that they remember
SPIKE_REACH = 4.0  # deviations from the mean at which a loss pulls at the statistics, however far it lies


class ByGradient:
    """What most stages have in common: one loss, one optimizer, and nothing that is carried."""

    maxima: Collection[str] = ()

    def loss(self, params: Params, rows: Rows, counts: Counts, key: Array | None) -> Array:
        raise NotImplementedError

    def loss_and_figures(self, params: Params, rows: Rows, counts: Counts, key: Array | None) -> tuple[Array, Metrics]:
        return self.loss(params, rows, counts, key), {}

    def summary(self, figures: Metrics) -> Metrics:
        return jax.tree.map(jnp.mean, figures)

    def is_carried(self, name: str) -> bool:
        return False

    @property
    def rates(self) -> Mapping[str, float]:
        return NO_RATES

    def carry(self, carried: Params, params: Params, rows: Rows) -> Params:
        return carried


class TrainState(struct.PyTreeNode):
    """What a step changes, and what it needs. The position (step, tokens, data) is kept by the host."""

    params: Params
    """The trainable ones."""
    opt_state: Any
    accepted: Array
    """int32: steps that changed the parameters."""
    skipped: Array
    """int32: steps left out because of a spike or a non-finite value."""
    bad_streak: Array
    """int32: steps in a row, up to the last, that were not finite or left out."""
    loss_mean: Array
    loss_variance: Array
    """Running statistics of the loss, for the spike test."""
    frozen: Params = struct.field(default_factory=dict)
    """Parameters that no step changes: on the devices as any others, with no room in the optimizer or a checkpoint."""

    carried: Params = struct.field(default_factory=dict)
    """Parameters that each step changes, though not by a gradient; see Parametrised."""

    @property
    def every_param(self) -> Params:
        """What a model takes."""
        return join(join(self.params, self.carried), self.frozen)

    @property
    def kept(self) -> dict[str, Any]:
        """What a checkpoint holds, by field."""
        unkept = {"frozen"} | ({"carried"} if not self.carried else set())
        return {name: value for name, value in vars(self).items() if name not in unkept}


def make_optimizer(config: OptimizerConfig, rates: Mapping[str, float] = NO_RATES) -> "optax.GradientTransformation":
    """Clip, Adam or Muon, decoupled decay, one such for each of `rates`. The learning rate is applied by the step: it
    is a function of tokens."""
    import optax  # here, as below: it takes 0.2 s, and what only asks a model does without

    if rates:
        each = {name: optax.chain(make_optimizer(config), optax.scale(rate)) for name, rate in rates.items()}
        labels = _by_name(lambda name: part if (part := name.split("/")[0]) in rates else "")
        return optax.partition({"": make_optimizer(config), **each}, labels)

    direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.kind == "muon":
        # optax's Muon ends in a product with minus the learning rate, and the step subtracts: hence -1. Its own Adam
        # for the rest would be Nesterov's, hence the partition. 0.2: the RMS of Adam's updates (arXiv 2502.16982).
        muon = optax.contrib.muon(-1.0, muon_weight_dimension_numbers=_by_name(muon_axes), consistent_rms=0.2)
        labels = _by_name(lambda name: "muon" if muon_axes(name) else "adam")
        direction = optax.partition({"muon": muon, "adam": direction}, labels)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
    )


def muon_axes(name: str) -> "MuonDimensionNumbers | None":
    """Input and output axes of a layer's matrix, the others count matrices; None for what Adam updates.

    Counted from the end, since scanned layers are stacked in front. Queries, keys and values are matrices each,
    queries that share keys G of them.
    """
    from optax.contrib import MuonDimensionNumbers

    axes = {
        "qkv": MuonDimensionNumbers(-4, (-2, -1)),  # [D, G+2, H/G, K]
        "projection": MuonDimensionNumbers((-3, -2), -1),  # [H, K, D]
        "cross_query": MuonDimensionNumbers(-3, (-2, -1)),  # [D, H, K]
        "cross_keys_values": MuonDimensionNumbers(-4, (-2, -1)),  # [D, 2, H, K]
        "cross_projection": MuonDimensionNumbers((-3, -2), -1),
        "mlp_up": MuonDimensionNumbers(-2, -1),
        "mlp_gate_up": MuonDimensionNumbers(-3, -1),  # [D, 2, F]
        "mlp_down": MuonDimensionNumbers(-2, -1),
    }
    parts = name.split("/")
    return next((axes[part] for part in parts if part in axes), None) if "kernel" in parts else None


def _by_name(choose: Callable[[str], Any]) -> Callable[[Params], Any]:
    """The tree of what `choose` says of each parameter's name."""
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: choose(leaf_name(path)), params)


def is_decayed(params: Params) -> Any:
    """True for matrices and embeddings, False for biases and LayerNorm scales, whatever the stacking."""
    return _by_name(lambda name: {"bias", "scale", "head_bias"}.isdisjoint(name.split("/")))(params)


def abstract_state(config: Config, stage: Parametrised) -> TrainState:
    """Shapes of the whole state, each leaf boxed with its logical axes; nothing is allocated."""
    return jax.eval_shape(lambda key: _initial(config, stage, stage.init(key)), jax.random.key(0))


def _initial(config: Config, stage: Parametrised, every: Params) -> TrainState:
    rest, frozen = split(every, stage.is_frozen)
    params, carried = split(rest, stage.is_carried)
    opt_state = make_optimizer(config.optimizer, stage.rates).init(params)
    return TrainState(
        params=params,
        frozen=frozen,
        carried=carried,
        # Of a parameter that one optimizer leaves to another, optax keeps the box with an empty node in it.
        opt_state=jax.tree.map(lambda x: x if jax.tree.leaves(x) else nn.unbox(x), opt_state, is_leaf=is_boxed),
        accepted=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        bad_streak=jnp.zeros((), jnp.int32),
        loss_mean=jnp.zeros(()),
        loss_variance=jnp.zeros(()),
    )


def start_state(config: Config, stage: Parametrised, params: Params, shardings: Any) -> TrainState:
    """The initial state around parameters that are there already, all of them; they are donated."""
    return jax.jit(lambda p: _initial(config, stage, p), out_shardings=shardings, donate_argnums=0)(params)


def placed(abstract: Any, shardings: Any) -> Any:
    """Plain shapes that say where each array belongs."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(abstract),
        shardings,
    )


def abstract_rows(config: Config, row: Rows, layout: Layout) -> Rows:
    """The shapes of a step's batch, and where it lies, from those of one row."""
    shape = config.updates * config.max_accumulation, config.micro_batch_size
    sharding = layout.sharding(MICRO_BATCHES)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*shape, *leaf.shape), leaf.dtype, sharding=sharding), row)


def init_state(config: Config, stage: Parametrised, shardings: Any) -> TrainState:
    """The initial state, each array born with its sharding. Equal on every layout."""
    make = jax.jit(lambda key: nn.unbox(_initial(config, stage, stage.init(key))), out_shardings=shardings)
    return make(jax.random.key(config.train.seed))


def make_step(
    config: Config, stage: Trained, shardings: Any, layout: Layout, options: dict[str, str] | None = None
) -> Any:
    """jit of (state, rows [M, b, ...], lr, num_micro, step) -> (state, metrics); the state is donated.

    Only the first num_micro of the M micro-batches count: the batch ramp changes a number, not a shape. With several
    `updates` a step the rows are those of one after another, [updates * M, b, ...], and figures means over them.
    `options` are the compiler's, in place of those of the devices.
    """
    import optax

    device = layout.mesh.devices.flat[0]
    options = compiler_options(device, config.train.deterministic) if options is None else options
    dtype = compute_dtype(config.model, device.platform)
    apart = copies_apart(config, layout.mesh.shape, dtype.itemsize)
    mean_gradient = partial(_mean_gradient, stage, Copies(layout, shardings.params) if apart else None)
    optimizer = make_optimizer(config.optimizer, stage.rates)

    def update(state: TrainState, rows: Rows, lr: Array, num_micro: Array, key: Array) -> tuple[TrainState, Metrics]:
        params = state.params if _num_micro(rows) == 1 else narrow(state.params, dtype)
        frozen = join(state.frozen, state.carried)
        (loss, figures), grads = mean_gradient(params, frozen, rows, num_micro, key)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
            grad_norm = optax.tree.norm(grads)
            new = guard(config.optimizer, state, state.replace(params=params, opt_state=opt_state), loss, grad_norm)
        return new, {"loss": loss, "grad_norm": grad_norm, **figures}

    def step(state: TrainState, rows: Rows, lr: Array, num_micro: Array, index: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), index)
        if config.updates == 1:
            new, metrics = update(state, rows, lr, num_micro, key)
        else:
            parts = jax.tree.map(lambda leaf: leaf.reshape(config.updates, -1, *leaf.shape[1:]), rows)
            keys = jax.random.split(key, config.updates)
            new, each = jax.lax.scan(
                lambda now, part: update(now, part[0], lr, num_micro, part[1]), state, (parts, keys)
            )
            metrics = stage.summary(each)
        new = new.replace(carried=stage.carry(state.carried, new.params, rows))
        return new, {**metrics, "skipped": new.skipped, "bad_streak": new.bad_streak}

    scalar = layout.sharding(())
    batch = layout.sharding(MICRO_BATCHES)
    return jax.jit(
        step,
        in_shardings=(shardings, batch, scalar, scalar, scalar),
        out_shardings=(shardings, scalar),
        donate_argnums=0,
        compiler_options=options,
    )


def narrow(params: Params, dtype: jnp.dtype) -> Params:
    """The matrices as the products take them: made once a step and not in every micro-batch, where that is 2% of the
    bytes of GPT-2 1558M in 64 micro-batches. The vector of a scalar head is none: scores are float32."""

    def one(p: Array, decayed: bool) -> Array:
        return p.astype(dtype) if decayed and p.ndim > 1 else p

    return jax.tree.map(one, params, is_decayed(params))


Gradient = Callable[[Params, Rows, Counts, Array], tuple[tuple[Array, Metrics], Params]]
"""(trainable parameters, rows [b, ...], counts, key) -> (loss, figures), gradients."""


def copies_apart(config: Config, mesh: Mapping[str, int], width: int) -> bool:
    """Whether a step sums the gradients of the copies of the parameters once, in float32, and not in every micro-batch,
    in a compute dtype of so many bytes: where less crosses the network then.

    Dropout draws by a row's place in the batch, and a pipeline has a way of its own to sum over its chunks.
    """
    fewer = config.max_accumulation * width > np.dtype(np.float32).itemsize
    drops = any(model.dropout for model in config.models.values())
    return fewer and math.prod(mesh[axis] for axis in COPIES) > 1 and not drops and mesh["pipeline"] == 1


@dataclass(frozen=True)
class Copies:
    """The copies of parameters that a layout has, each with its part of the rows."""

    layout: Layout
    places: Any
    """Where each gradient belongs."""

    def apart(self, gradient: Gradient) -> Gradient:
        """What a gradient on the layout of a copy gives for the rows of each, as [copies, ...]: nothing of it crosses
        from one to another."""
        each = jax.vmap(gradient, in_axes=(None, 0, None, None), spmd_axis_name=COPIES)
        rows_spec = self.layout.of_a_copy.sharding(("batch",)).spec

        def run(params: Params, rows: Rows, counts: Counts, key: Array) -> tuple[tuple[Array, Metrics], Params]:
            ways = self.layout.ways(COPIES)
            cut = jax.tree.map(lambda leaf: self._pin(leaf.reshape(ways, -1, *leaf.shape[1:]), rows_spec), rows)
            told, grads = each(params, cut, counts, key)
            return told, jax.tree.map(lambda grad, place: self._pin(grad, place.spec), grads, self.places)

        return run

    def _pin(self, x: Array, spec: PartitionSpec) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.layout.mesh, PartitionSpec(COPIES, *spec)))


def _mean_gradient(
    objective: Objective,
    copies: Copies | None,
    params: Params,
    frozen: Params,
    rows: Rows,
    num_micro: Array,
    key: Array,
) -> tuple[tuple[Array, Metrics], Params]:
    """Loss and figures of the first num_micro micro-batches and the gradient for `params`, summed in float32; of
    figures that are `maxima` the largest.

    The counts come first: a term is divided by what it is a mean over before it meets another. Where nothing counts the
    loss is not a number, and the step is one that is left out.
    """
    inside = objective.on(copies.layout.of_a_copy) if copies else objective
    gradient: Gradient = jax.value_and_grad(
        lambda trained, *rest: inside.loss_and_figures(join(trained, frozen), *rest), has_aux=True
    )
    if copies:
        gradient = copies.apart(gradient)
    # Its shapes are asked for first: it is traced once, which takes seconds in large models.
    gradient = jax.jit(gradient, inline=True)
    used = jnp.arange(_num_micro(rows)) < num_micro
    counts = jax.tree.map(lambda each: jnp.sum(jnp.where(used, each, 0)), jax.vmap(objective.counts)(rows))

    def about(i: Array | int) -> tuple[Params, Rows, Counts, Array]:
        return params, jax.tree.map(lambda leaf: leaf[i], rows), counts, jax.random.fold_in(key, i)

    if _num_micro(rows) == 1:
        return gradient(*about(0))

    def with_next(i: Array, total: Any) -> Any:
        new = gradient(*about(i))
        (loss, figures), grads = jax.tree.map(jnp.add, total, new)
        most = {name: jnp.maximum(total[0][1][name], new[0][1][name]) for name in objective.maxima}
        return (loss, figures | most), grads

    empty = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(gradient, *about(0)))
    total: tuple[tuple[Array, Metrics], Params] = jax.lax.fori_loop(0, num_micro, with_next, empty)
    if copies is None:
        return total
    (loss, figures), grads = jax.tree.map(lambda x: jnp.sum(x, 0), total)
    return (loss, figures | {name: jnp.max(total[0][1][name], 0) for name in objective.maxima}), grads


def _num_micro(rows: Rows) -> int:
    return int(jax.tree.leaves(rows)[0].shape[0])


def guard(config: OptimizerConfig, old: TrainState, new: TrainState, loss: Array, grad_norm: Array) -> TrainState:
    """The new state, or the old one where the step is left out; either with its counters and statistics moved on."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spike = jnp.array(False)
    if config.skip_spike_sigma:
        above = loss > old.loss_mean + config.skip_spike_sigma * _deviation(old)
        spike = above & (old.accepted >= SPIKE_WARMUP)
    good = finite & ~spike
    taken = good if config.skip_nonfinite else ~spike
    if config.skip_nonfinite or config.skip_spike_sigma:
        new = jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)
    mean, variance = _statistics(old, loss)
    return new.replace(
        accepted=old.accepted + taken,
        skipped=old.skipped + ~taken,
        bad_streak=jnp.where(good, 0, old.bad_streak + 1),
        loss_mean=mean,
        loss_variance=variance,
    )


def _deviation(state: TrainState) -> Array:
    """Of the loss; never below what float32 resolves, else a loss that stood still could never rise again."""
    return jnp.maximum(jnp.sqrt(state.loss_variance), 1e-6 * (1 + jnp.abs(state.loss_mean)))


def _statistics(state: TrainState, loss: Array) -> tuple[Array, Array]:
    """Running mean and variance of every finite loss, that of a step left out included: they follow a lasting change.

    By deviations from the mean (West, CACM 22(9), 1979): in float32 the mean of squares less the square of the mean
    has no digit left at 3 +- 0.002. A loss further than SPIKE_REACH deviations pulls as one there, so that a spike
    moves the deviation by 7%; with each bad step in a row it reaches twice as far, so that a new level, at whatever
    distance, is normal within some 30 steps. The first SPIKE_WARMUP steps are averaged plainly.
    """
    weight = 1 / jnp.minimum(state.accepted + 1.0, SPIKE_WARMUP)
    reach = SPIKE_REACH * _deviation(state) * jnp.exp2(state.bad_streak.astype(jnp.float32))
    reach = jnp.where(state.accepted < SPIKE_WARMUP, jnp.inf, reach)
    pull = jnp.clip(loss - state.loss_mean, -reach, reach)
    mean = state.loss_mean + weight * pull
    variance = (1 - weight) * (state.loss_variance + weight * pull**2)
    finite = jnp.isfinite(loss)
    return jnp.where(finite, mean, state.loss_mean), jnp.where(finite, variance, state.loss_variance)
