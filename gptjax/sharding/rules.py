"""The rule table: logical axis -> mesh axes. Swapping the table is swapping the layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from gptjax.config import LayoutConfig
from gptjax.errors import UserError
from gptjax.sharding.mesh import MESH_AXES

Rules = dict[str, tuple[str, ...]]
Axes = tuple[str | None, ...]
"""A logical axis, or None, for each dimension of an array."""
COPIES = ("replica", "data")
"""Mesh axes over which parameters are whole: devices along them differ in their rows alone."""
# What a replicated bias may cost; a forgotten matrix costs far more.
TOLERANCE = 0.005


def rule_table(config: LayoutConfig) -> Rules:
    """Exactly one entry per logical axis; () means not sharded.

    `embed` is the width of parameters (FSDP); activations keep their width whole and shard batch and length.
    `lookup` is the width of the embedding where tokens are looked up, `vocab` its other axis where they are scored.
    `rows` is the batch outside the layers: pipeline stages work on one batch, and share its embedding and loss.
    `residual_length` is the length between blocks: sharding it over `tensor` as well turns each all-reduce of
    tensor parallelism into a reduce-scatter and an all-gather and divides the saved residuals (Korthikanti et
    al., arXiv 2205.05198).
    """
    return {
        "batch": (*COPIES, "fsdp"),
        "rows": (*COPIES, "fsdp", "pipeline"),
        "length": ("context",),
        "residual_length": ("context", "tensor") if config.sequence_sharding else ("context",),
        "embed": ("fsdp",),
        "heads": ("tensor",),
        "head_dim": (),
        "mlp": ("tensor",),
        "vocab": ("tensor",),
        "lookup": ("tensor",),
        "layers": ("pipeline",),
        "stages": ("pipeline",),
    }


def partition_spec(rules: Rules, axes: Axes, what: str) -> PartitionSpec:
    """The mesh axes of one array. Raises UserError for an unknown logical axis, an unknown mesh axis, or a mesh
    axis that two dimensions claim; `what` names the array in the message."""
    used: dict[str, str] = {}
    entries: list[tuple[str, ...] | str | None] = []
    for axis in axes:
        if axis is None:
            entries.append(None)
            continue
        if axis not in rules:
            raise UserError(f"{what}: no rule for the logical axis {axis}; the table has {', '.join(rules)}")
        for mesh_axis in rules[axis]:
            if mesh_axis not in MESH_AXES:
                raise UserError(f"{what}: rule {axis} -> {mesh_axis}: mesh axes are {', '.join(MESH_AXES)}")
            if mesh_axis in used:
                raise UserError(f"{what}: mesh axis {mesh_axis} is claimed by both {used[mesh_axis]} and {axis}")
            used[mesh_axis] = axis
        entries.append(rules[axis][0] if len(rules[axis]) == 1 else rules[axis] or None)
    return PartitionSpec(*entries)


@dataclass(frozen=True)
class Layout:
    """A mesh and a rule table: everything that parallelism adds to the model."""

    mesh: Mesh | AbstractMesh
    rules: Rules

    def sharding(self, axes: Axes, what: str = "array") -> NamedSharding:
        return NamedSharding(self.mesh, partition_spec(self.rules, axes, what))

    @property
    def of_a_copy(self) -> "Layout":
        """As the parameters' copies see it each for itself, where their parts of the batch are mapped one by one."""
        return Layout(self.mesh, {k: tuple(a for a in axes if a not in COPIES) for k, axes in self.rules.items()})

    def constrain(self, x: Array, axes: Axes) -> Array:
        """Pin an activation; what the model calls as `constrain`."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, f"activation {axes}"))

    def shardings(self, boxed: Any) -> Any:
        """A pytree of NamedSharding for a tree whose leaves Linen boxed with logical axes.

        Leaves without names (counters, scalars) are replicated. Raises UserError where a dimension is not divisible.
        """

        def one(path: Any, leaf: Any) -> NamedSharding:
            what = leaf_name(path)
            axes = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
            sharding = self.sharding(axes, what)
            shape = leaf.value.shape if isinstance(leaf, nn.LogicallyPartitioned) else leaf.shape
            for size, axis, entry in zip(shape, axes, sharding.spec, strict=False):
                ways = self.ways(entry)
                if size % ways:
                    raise UserError(
                        f"{what}: {axis} = {size} is not divisible by {entry} = {ways}; change layout.{entry}"
                    )
            return sharding

        return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_boxed)

    def ways(self, entry: Any) -> int:
        """Parts that one entry of a PartitionSpec cuts a dimension into."""
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        return int(np.prod([self.mesh.shape[name] for name in names], dtype=int))

    def table(self, boxed: Any) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
        """Per parameter: name, shape, spec, bytes per device."""
        shardings = self.shardings(boxed)
        leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
            local = int(np.prod(sharding.shard_shape(leaf.shape), dtype=int))
            yield leaf_name(path), leaf.shape, str(tuple(sharding.spec)), local * leaf.dtype.itemsize

    def replicated(self, boxed: Any) -> list[str]:
        """Names of the matrices whose copies cost a device more than TOLERANCE of its share of the whole tree."""
        ways = self.mesh.shape["fsdp"] * self.mesh.shape["tensor"]  # the stages do not divide the embeddings
        leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
        share = sum(leaf.size for _, leaf in leaves) / ways
        pairs = zip(leaves, jax.tree.leaves(self.shardings(boxed)), strict=True)
        return [
            leaf_name(path)
            for (path, leaf), sharding in pairs
            if np.prod(sharding.shard_shape(leaf.shape)) - leaf.size / ways > TOLERANCE * share
            and not is_vector(leaf_name(path))
        ]


def is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def is_vector(name: str) -> bool:
    """Whether a parameter is a bias or a norm's, of which devices have copies by design."""
    return name.endswith(("bias", "scale"))


def leaf_name(path: Any) -> str:
    """units/block_0/qkv/kernel for a pytree path."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
