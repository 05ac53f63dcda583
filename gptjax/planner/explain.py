"""Why an array lies where it lies, and how two layouts differ."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen as nn
from jax import Array

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.planner.chips import Topology
from gptjax.planner.place import parameters
from gptjax.planner.search import Candidate, named, priced
from gptjax.sharding.mesh import abstract_mesh
from gptjax.sharding.rules import Axes, Layout, partition_spec, rule_table
from gptjax.stages import stage_class
from gptjax.train.step import abstract_state

# What the model pins, by the axes it names there.
ACTIVATIONS: dict[Axes, str] = {
    ("batch", "length", None): "norm",
    ("batch", "length", None, "heads", None): "qkv",
    ("batch", "length", "heads", None): "attention",
    ("batch", "length", "mlp"): "mlp",
    ("batch", "residual_length", None): "residual",
    ("rows", "residual_length", None): "residual outside the layers",
    ("rows", "length", None): "hidden",
    ("vocab", None): "embedding as the head reads it",
    (None, "lookup"): "embedding, restarted positions and types as tokens look them up",
    ("heads", None, None): "numbers for distances on the scores",
    ("stages", "batch", "residual_length", None): "batch in chunks on its way through the stages",
    ("stages", None, "batch", "residual_length", None): "chunks that wait for their next round",
}


@dataclass(frozen=True)
class Recorder(Layout):
    """A layout that notes what it is asked to pin."""

    seen: dict[Axes, tuple[tuple[int, ...], Any]] = field(default_factory=dict)

    def constrain(self, x: Array, axes: Axes) -> Array:
        self.seen.setdefault(axes, (x.shape, x.dtype))
        return super().constrain(x, axes)


def explain(config: Config, topology: Topology, wanted: str) -> str:
    """Logical axes, rules, mesh axes and bytes of the parameters and activations whose name has `wanted` in it.

    Raises UserError where none has, or the layout does not fit.
    """
    mesh = abstract_mesh(config, topology.num_devices)
    rules = rule_table(config.layout)
    found = [(array.name, array.shape, array.axes, array.dtype) for array in parameters(config, topology.chip.platform)]
    found += [(f"activation {name}", *rest) for name, *rest in _activations(config, Recorder(mesh, rules))]
    matches = [entry for entry in found if wanted in entry[0]]
    if not matches:
        raise UserError(
            f"--explain {wanted}: no such parameter or activation; there are {', '.join(n for n, *_ in found)}"
        )
    return "\n\n".join(_one(Layout(mesh, rules), *entry) for entry in matches)


def _activations(config: Config, recorder: Recorder) -> list[tuple[str, tuple[int, ...], Axes, Any]]:
    """What the loss of one micro-batch pins; plain attention stands in for kernels, which pin nothing."""
    plain = config.with_models(attention="blockwise")
    stage = stage_class(plain)(plain, "tpu", recorder)
    params = nn.unbox(abstract_state(plain, stage).every_param)
    size = config.micro_batch_size
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), stage.row)
    counts: Any = stage.counts  # a tree of the stage's own
    jax.eval_shape(lambda p, r: stage.loss(p, r, counts(r), None), params, rows)
    return [(ACTIVATIONS.get(axes, str(axes)), shape, axes, dtype) for axes, (shape, dtype) in recorder.seen.items()]


def _one(layout: Layout, name: str, shape: tuple[int, ...], axes: Axes, dtype: Any) -> str:
    spec = partition_spec(layout.rules, axes, name)
    lines = [f"{name}  {dtype}{list(shape)}"]
    whole = math.prod(shape) * dtype.itemsize
    share = whole
    for size, axis, entry in zip(shape, axes, spec, strict=True):
        ways = layout.ways(entry)
        share = share / size * math.ceil(size / ways)
        lines.append(
            f"  {axis or '-':16}{size:>8,}  {_rule(layout, axis)}{f'  -> {size // ways:,}' if ways > 1 else ''}"
        )
    lines.append(f"  {share / 1e6:,.2f} MB of {whole / 1e6:,.2f} MB on each device")
    if share == whole and layout.mesh.size > 1:
        lines.append(f"  replicated: {_why(layout, axes)}")
    return "\n".join(lines)


def _rule(layout: Layout, axis: str | None) -> str:
    """The rule that fired."""
    if axis is None:
        return "no logical axis"
    names = layout.rules[axis]
    return f"rule {axis} -> {' x '.join(f'{n} {layout.mesh.shape[n]}' for n in names) or 'nothing'}"


def _why(layout: Layout, axes: Axes) -> str:
    """Why no mesh axis cuts an array."""
    named_axes = [axis for axis in axes if axis is not None]
    if not named_axes:
        return "it has no logical axis"
    if all(not layout.rules[axis] for axis in named_axes):
        return f"the table maps {', '.join(named_axes)} to nothing"
    ones = dict.fromkeys(name for axis in named_axes for name in layout.rules[axis])
    return f"its rules name {', '.join(ones)}, of degree 1 in this layout"


def diff(config: Config, topology: Topology, first: str, second: str) -> str:
    """Two layouts side by side: memory, time and traffic; see search.named for their names."""
    a, b = (priced(named(config, text), topology) for text in (first, second))
    lines = [f"{'':54}{a.name:>28}{b.name:>28}"]

    def section(title: str, left: dict[str, float], right: dict[str, float], unit: float, form: str) -> None:
        lines.append(title)
        for key in dict.fromkeys((*left, *right)):
            x, y = left.get(key, 0.0) / unit, right.get(key, 0.0) / unit
            if x or y:
                change = f"{y / x - 1:+.0%}" if x else "new"
                lines.append(f"  {key:52}{form.format(x):>28}{form.format(y):>28}  {'' if x == y else change}")

    total = "together"
    x, y = a.estimate, b.estimate
    section("memory, GB on each device", x.memory | {total: x.peak}, y.memory | {total: y.peak}, 1e9, "{:,.2f}")
    times = x.seconds | {total: x.step_seconds}, y.seconds | {total: y.step_seconds}
    section("a step, s", times[0], times[1], 1.0, "{:,.3f}")
    section("traffic, GB of whole arrays a step", _sent(a), _sent(b), 1e9, "{:,.2f}")
    return "\n".join(lines)


def _sent(candidate: Candidate) -> dict[str, float]:
    sent: dict[str, float] = {}
    for t in candidate.estimate.transfers:
        key = f"{t.kind}, {' x '.join(t.axes)}: {t.what}"
        sent[key] = sent.get(key, 0.0) + t.bytes
    return sent
