"""Where several processes hold the same parts of the arrays: some of them get theirs from a file, and the others from
them, over the network that the devices have between them.

One array after another: beside the arrays themselves this takes the memory of one device's part of the largest.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Parts = list[list[Array]]
"""Of each array of a tree the parts that this process's devices hold, each on its device."""


@dataclass(frozen=True)
class Copies:
    """Of the arrays of one mesh."""

    mesh: Mesh
    """Axes `copy` and `part`: devices along `copy` hold the same, one of each process that does."""
    groups: tuple[tuple[int, ...], ...]
    """Processes that hold the same, one for each copy."""

    @property
    def is_first(self) -> bool:
        """Whether this process holds parts of the first copy."""
        return any(group[0] == jax.process_index() for group in self.groups)

    def spread(self, abstract: Any, parts: Parts | None) -> Any:
        """The tree of `abstract`, of which this process has its `parts`, or None; one of each group has them. All
        processes call it."""
        leaves, tree = jax.tree.flatten(abstract)
        apart, one = PartitionSpec(("copy", "part")), PartitionSpec("part")
        add = jax.jit(jax.shard_map(_sum, mesh=self.mesh, in_specs=apart, out_specs=one), donate_argnums=0)
        made = []
        for leaf in leaves:
            own = _nothing(leaf) if parts is None else parts.pop(0)
            shape = leaf.sharding.shard_shape(leaf.shape) or (1,)
            full, there = (self.mesh.size * shape[0], *shape[1:]), NamedSharding(self.mesh, apart)
            rows = [part.reshape(shape) for part in own]
            summed = add(jax.make_array_from_single_device_arrays(full, there, rows))
            jax.block_until_ready(summed)  # of several at once a CPU's processes may each wait for another
            own = [shard.data.reshape(leaf.sharding.shard_shape(leaf.shape)) for shard in summed.addressable_shards]
            made.append(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, own))
        return jax.tree.unflatten(tree, made)

    def of_first(self, abstract: Any) -> Any:
        """`abstract` on the devices of the first copy alone; None where they are no box of its mesh."""
        mesh = jax.tree.leaves(abstract)[0].sharding.mesh
        places = np.argwhere(np.isin(mesh.devices, self.mesh.devices[0]))
        box = mesh.devices[np.ix_(*(np.unique(along) for along in places.T))]
        if box.size != len(places):
            return None
        first = Mesh(box, mesh.axis_names, axis_types=mesh.axis_types)

        def there(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(first, leaf.sharding.spec))

        return jax.tree.map(there, abstract)


def in_words(abstract: Any) -> str:
    """Who reads a checkpoint; empty where everyone does."""
    if (one := one_copy(abstract)) is None:
        return ""
    groups = one[0].groups
    return f"checkpoints by {len(groups)} of {sum(map(len, groups))} processes, which send them to the others"


def one_copy(abstract: Any) -> tuple[Copies, Any] | None:
    """The copies, and `abstract` as the first of them holds it, where that can be read by itself."""
    found = copies(abstract)
    first = found.of_first(abstract) if found else None
    return (found, first) if found and first is not None else None


def copies(abstract: Any) -> Copies | None:
    """Those of what the shardings of `abstract` say; None with one process, and where no process holds what another
    one does, or only a part of that."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(abstract)]
    named = [each for each in shardings if isinstance(each, NamedSharding) and isinstance(each.mesh, Mesh)]
    if jax.process_count() == 1 or len(named) < len(shardings) or len({each.mesh for each in named}) != 1:
        return None
    mesh = named[0].mesh
    entries = {entry for each in named for entry in each.spec if entry}
    cut = {axis for entry in entries for axis in (entry if isinstance(entry, tuple) else (entry,))}
    held: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)
    for index, device in np.ndenumerate(mesh.devices):
        part = tuple(i for axis, i in zip(mesh.axis_names, index, strict=True) if axis in cut)
        held[device.process_index].append((part, device.id))
    groups = twins({process: sorted(part for part, _ in parts) for process, parts in held.items()})
    if groups is None:
        return None
    by_id = {device.id: device for device in mesh.devices.flat}
    rows = [[by_id[i] for group in groups for _, i in sorted(held[group[copy]])] for copy in range(len(groups[0]))]
    return Copies(Mesh(np.array(rows), ("copy", "part")), groups)


def twins(held: Mapping[int, Sequence[Hashable]]) -> tuple[tuple[int, ...], ...] | None:
    """Groups of processes that hold the same parts; None where they are not equally large, or of one each."""
    groups: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for process in sorted(held):
        groups[tuple(held[process])].append(process)
    sizes = {len(group) for group in groups.values()}
    return None if len(sizes) > 1 or sizes == {1} else tuple(tuple(group) for group in groups.values())


def parts_of(tree: Any) -> Parts:
    """Those of whole arrays."""
    return [[shard.data for shard in leaf.addressable_shards] for leaf in jax.tree.leaves(tree)]


def whole(abstract: Any, parts: Parts) -> Any:
    """The tree of `abstract`, of which each process has all its parts."""
    leaves, tree = jax.tree.flatten(abstract)
    pairs = zip(leaves, parts, strict=True)
    made = [jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, own) for leaf, own in pairs]
    return jax.tree.unflatten(tree, made)


def _nothing(leaf: Any) -> list[Array]:
    zeros = np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
    return [jax.device_put(zeros, device) for device in leaf.sharding.addressable_devices]


def _sum(part: Array) -> Array:
    """Over the copies, of which one has other bits than zeros: as whole numbers, for a float may be -0."""
    if part.dtype == bool:
        return jax.lax.psum(part.astype(jnp.uint32), "copy").astype(bool)
    word = jnp.dtype(f"uint{8 * part.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(part, word)
    wide = bits.astype(jnp.uint32) if word.itemsize < 4 else bits  # NCCL sums no words of 16 bits
    return jax.lax.bitcast_convert_type(jax.lax.psum(wide, "copy").astype(word), part.dtype)
