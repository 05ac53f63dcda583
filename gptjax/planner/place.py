"""A config on a mesh, seen from one device: the sizes that every formula of the planner is made of."""

import math
from dataclasses import dataclass
from functools import cached_property

import jax

from gptjax.config import Config
from gptjax.model.gpt import compute_dtype
from gptjax.parallel import pipeline
from gptjax.parallel.network import Network
from gptjax.planner.chips import Topology
from gptjax.sharding.mesh import MESH_AXES, check, degrees
from gptjax.sharding.rules import Rules, is_boxed, leaf_name, partition_spec, rule_table
from gptjax.train.step import muon_axes

FLOAT = 4  # bytes of a master weight, a moment, a gradient


@dataclass(frozen=True)
class Array:
    """One array of the parameters."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def parameters(config: Config) -> tuple[Array, ...]:
    """Shapes and logical axes of all parameters; the same on every layout."""
    boxed = jax.eval_shape(Network(config, "tpu").init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_boxed)
    return tuple(Array(leaf_name(path), leaf.value.shape, leaf.names) for path, leaf in leaves)


@dataclass(frozen=True)
class Place:
    """A config on a mesh, seen from one device."""

    config: Config
    topology: Topology
    mesh: dict[str, int]
    arrays: tuple[Array, ...]
    rules: Rules

    def ways(self, axis: str) -> int:
        """Parts into which the rules cut a logical axis."""
        return math.prod(self.mesh[name] for name in self.rules[axis])

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return compute_dtype(self.config.model, self.topology.chip.platform).itemsize

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch on this device's stage."""
        return self.config.micro_batch_size // self.ways("batch")

    @property
    def length(self) -> int:
        return self.config.model.seq_len // self.ways("length")

    @property
    def residual_length(self) -> int:
        return self.config.model.seq_len // self.ways("residual_length")

    @property
    def tokens(self) -> int:
        """Of a micro-batch, inside the layers."""
        return self.rows * self.length

    @property
    def outside_tokens(self) -> float:
        """Of a micro-batch, in the embedding and the loss."""
        return self.tokens / self.mesh["pipeline"]

    @property
    def layers(self) -> float:
        return self.config.model.num_layers / self.mesh["pipeline"]

    @property
    def chunks(self) -> int:
        """Parts of the micro-batch in the pipeline; 1 without one."""
        return pipeline.num_chunks(self.config, self.ways("batch")) if self.mesh["pipeline"] > 1 else 1

    @property
    def ticks(self) -> int:
        """Times at which the stages work on a micro-batch: m r + p - 1."""
        return self.chunks * self.config.layout.pipeline_rounds + self.mesh["pipeline"] - 1

    @property
    def stretch(self) -> float:
        """Work done, bubble included, over work that counts."""
        return 1 / (1 - pipeline.bubble(self.mesh["pipeline"], self.config.layout.pipeline_rounds, self.chunks))

    @property
    def matrices(self) -> float:
        """W: bytes of one layer's matrices, whole over fsdp."""
        return 12 * self.config.model.embed_dim**2 * self.width / self.mesh["tensor"]

    @property
    def vectors(self) -> float:
        """Bytes of the gradients of a stage's biases and LayerNorms, whole."""
        arrays = [array for array in self.arrays if array.name.endswith(("bias", "scale"))]
        return FLOAT * sum(math.prod(array.shape) for array in arrays) / self.mesh["pipeline"]

    @property
    def residual(self) -> float:
        """Bytes of the residual stream of a micro-batch, whole over tensor."""
        return self.tokens * self.config.model.embed_dim * self.width

    @property
    def resting(self) -> float:
        """Bytes of the residual stream of a micro-batch as a device holds it between layers."""
        return self.rows * self.residual_length * self.config.model.embed_dim * self.width

    @property
    def embedding(self) -> float:
        """Bytes of the embedding in the compute dtype, whole over fsdp."""
        return self.config.model.padded_vocab_size * self.config.model.embed_dim * self.width / self.mesh["tensor"]

    def local(self, array: Array) -> float:
        """Numbers of a parameter on this device."""
        spec = partition_spec(self.rules, array.axes, array.name)
        total = 1.0
        for size, axis, entry in zip(array.shape, array.axes, spec, strict=True):
            names = () if entry is None else (entry,) if isinstance(entry, str) else entry
            part = math.ceil(size / math.prod(self.mesh[name] for name in names))
            if axis == "embed" and len(array.shape) > 2 and self.topology.chip.platform == "tpu":
                part = -(-part // 8) * 8  # a TPU's registers have 8 rows, and memory is laid out for them
            total *= part
        return total

    @cached_property
    def local_parameters(self) -> float:
        return sum(self.local(array) for array in self.arrays)

    @cached_property
    def local_moments(self) -> float:
        """Numbers that the optimizer keeps: Adam two a parameter, Muon one."""
        muon = self.config.optimizer.kind == "muon"
        return sum(self.local(array) * (1 if muon and muon_axes(array.name) else 2) for array in self.arrays)


def place(
    config: Config, topology: Topology, arrays: tuple[Array, ...] | None = None, rules: Rules | None = None
) -> Place:
    """`arrays` saves deriving the parameters again, `rules` tries another table. Raises UserError where the layout does
    not fit the devices or the model."""
    sizes = degrees(config.layout, topology.num_devices)
    check(config, sizes)
    mesh = dict(zip(MESH_AXES, sizes, strict=True))
    return Place(config, topology, mesh, arrays or parameters(config), rules or rule_table(config.layout))
