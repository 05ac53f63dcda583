"""A config on a mesh, seen from one device: the sizes that every formula of the planner is made of."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np

from gptjax.config import Config, ModelConfig
from gptjax.hardware import require_float8
from gptjax.model.accounting import Reading, matrices, memory_matrix
from gptjax.model.gpt import compute_dtype
from gptjax.model.heads import is_head
from gptjax.model.lora import is_adapter
from gptjax.parallel import pipeline
from gptjax.planner.chips import Topology
from gptjax.planner.products import Product
from gptjax.sharding.mesh import MESH_AXES, check, degrees
from gptjax.sharding.rules import Rules, is_boxed, is_vector, leaf_name, partition_spec, rule_table
from gptjax.stages import AnyStage, stage_class
from gptjax.train.step import muon_axes

FLOAT = 4  # bytes of a master weight, a moment, a gradient


@dataclass(frozen=True)
class Array:
    """One array of the parameters."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: np.dtype
    frozen: bool
    """It has neither a gradient nor moments: no step changes it, or one that carries it on."""


def parameters(config: Config, platform: str) -> tuple[Array, ...]:
    """All parameters as a state has them on devices of a platform; the same on every layout."""
    stage = stage_class(config)(config, platform)
    boxed = jax.eval_shape(stage.init, jax.random.key(0))
    leaves = [(leaf_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_boxed)]

    def frozen(name: str) -> bool:
        return stage.is_frozen(name) or stage.is_carried(name)

    return tuple(Array(name, x.value.shape, x.names, x.value.dtype, frozen(name)) for name, x in leaves)


@dataclass(frozen=True)
class Place:
    """A config on a mesh, or one of its models, seen from one device."""

    config: Config
    topology: Topology
    mesh: dict[str, int]
    arrays: tuple[Array, ...]
    numbers: dict[str, float]
    """Of each parameter, how many lie on this device."""
    rules: Rules
    reading: Reading
    """Who reads the tokens that are counted here: of a whole config the decoder."""

    @cached_property
    def stage(self) -> AnyStage:
        return stage_class(self.config)(self.config, self.topology.chip.platform)

    @cached_property
    def learners(self) -> tuple["Place", ...]:
        """Each model that reads the rows of an update."""
        return tuple(map(self.of, self.stage.learning))

    @cached_property
    def judges(self) -> tuple["Place", ...]:
        """Each model that reads the rows of a step before any is learned from."""
        return tuple(map(self.of, self.stage.judging))

    def of(self, reading: Reading) -> "Place":
        """One model of these."""
        beside = self.stage.beside

        def is_own(first: str) -> bool:
            return first == reading.name if reading.name else first not in beside

        own = tuple(array for array in self.arrays if is_own(array.name.split("/")[0]))
        return replace(self, reading=reading, arrays=own)

    @property
    def model(self) -> ModelConfig:
        return self.reading.model

    def ways(self, axis: str) -> int:
        """Parts into which the rules cut a logical axis."""
        return math.prod(self.mesh[name] for name in self.rules[axis])

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return compute_dtype(self.model, self.topology.chip.platform).itemsize

    @property
    def padding(self) -> float:
        """Numbers in memory for each of a head's: a TPU's registers have 128 lanes, to which smaller heads are
        padded."""
        size = self.model.head_dim
        return math.ceil(size / 128) * 128 / size if self.topology.chip.platform == "tpu" else 1.0

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch on this device's stage."""
        return self.config.micro_batch_size // self.ways("batch") * self.reading.sequences

    @property
    def length(self) -> int:
        return self.model.seq_len // self.ways("length")

    @property
    def residual_length(self) -> int:
        return self.model.seq_len // self.ways("residual_length")

    @property
    def tokens(self) -> int:
        """Of a micro-batch, inside the layers."""
        return self.rows * self.length

    @property
    def memory_tokens(self) -> int:
        """Of a micro-batch, at which the layers look by cross-attention."""
        return self.rows * self.reading.memory_length

    @property
    def outside_tokens(self) -> float:
        """Of a micro-batch, in the embedding and the loss."""
        return self.tokens / self.mesh["pipeline"]

    @property
    def layers(self) -> float:
        return self.model.num_layers / self.mesh["pipeline"]

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

    @cached_property
    def products(self) -> dict[str, Product]:
        """Of a layer's matrices with a micro-batch, as one device computes them."""
        tensor, sides = self.mesh["tensor"], matrices(self.model)

        def cut(name: str, inner: int, outer: int) -> Product:
            if name in ("projection", "mlp_down", "cross_projection"):
                return Product(self.tokens, inner / tensor, outer)
            return Product(self.tokens, inner, outer / tensor)

        made = {name: cut(name, *each) for name, each in sides.items()}
        if self.model.cross_attention:
            inner, outer = memory_matrix(self.model)
            made["cross_keys_values"] = Product(self.memory_tokens, inner, outer / tensor)
        return made

    def share_of(self, name: str) -> float:
        """Of a layer's weights that are those of one of its products."""
        own = self.products[name]
        return own.inner * own.outer * self.width / self.matrices

    @property
    def recomputed(self) -> dict[str, float]:
        """Share of a layer's products, and of its attention, that the backward pass computes again: under full remat
        all but a unit's last product."""
        if self.model.remat != "full":
            return {}
        unit = len(self.model.attention_pattern)
        return dict.fromkeys(self.products, 1.0) | {"mlp_down": (unit - 1) / unit, "attention": 1.0}

    @property
    def attention_width(self) -> int:
        """Of queries over all heads."""
        return self.model.num_heads * self.model.head_dim

    @property
    def between(self) -> float:
        """Numbers that a layer's forward pass reads and writes between its products, a token: 12 D of the residual
        stream; of what tensor splits 7 times attention's width and five passes over the MLP's, of which a gate adds
        half. Cross-attention adds half of the first and all of the second once more."""
        model, across = self.model, self.model.cross_attention
        inside = 7 * self.attention_width * (1 + across) + 5 * model.mlp_dim * (1 + model.gated / 2)
        stream = (12 + 6 * across) * model.embed_dim * self.residual_length / self.length
        return stream + inside / self.mesh["tensor"]

    @property
    def matrices(self) -> float:
        """W: bytes of one layer's matrices, whole over fsdp."""
        return sum(product.inner * product.outer for product in self.products.values()) * self.width

    @property
    def heads(self) -> float:
        """Bytes of the matrices of what stands on an encoder, whole over fsdp."""
        arrays = [array for array in self.trained if is_head(array.name) and array.name.endswith("kernel")]
        return sum(math.prod(array.shape) for array in arrays) * self.width

    @property
    def vectors(self) -> float:
        """Bytes of the gradients of a stage's biases and LayerNorms, whole."""
        arrays = [array for array in self.trained if is_vector(array.name)]
        return FLOAT * sum(math.prod(array.shape) for array in arrays) / self.mesh["pipeline"]

    @property
    def adapters(self) -> tuple[float, float]:
        """Bytes of a layer's adapters in the compute dtype: those cut over fsdp, whole, and the others."""
        split, rest = 0.0, 0.0
        for array in self.arrays:
            if is_adapter(array.name) and array.name.startswith("unit"):
                numbers = math.prod(array.shape) / self.model.num_layers
                if "embed" in array.axes:
                    split += numbers
                else:
                    rest += numbers / self.mesh["tensor"]
        return split * self.width, rest * self.width

    @cached_property
    def restarts(self) -> bool:
        """Whether tokens look their positions up: those of a row begin anew with each conversation."""
        return getattr(self.stage.row, "positions", None) is not None

    @property
    def residual(self) -> float:
        """Bytes of the residual stream of a micro-batch, whole over tensor."""
        return self.tokens * self.model.embed_dim * self.width

    @property
    def resting(self) -> float:
        """Bytes of the residual stream of a micro-batch as a device holds it between layers."""
        return self.rows * self.residual_length * self.model.embed_dim * self.width

    @property
    def memory(self) -> float:
        """Bytes of what an encoder made of a micro-batch, at which the layers look."""
        return self.memory_tokens * self.model.embed_dim * self.width

    @property
    def embedding(self) -> float:
        """Bytes of the embedding in the compute dtype, whole over fsdp."""
        return self.model.padded_vocab_size * self.model.embed_dim * self.width / self.mesh["tensor"]

    def local(self, array: Array) -> float:
        """Numbers of a parameter on this device."""
        return self.numbers[array.name]

    @property
    def trained(self) -> list[Array]:
        """The parameters that steps change."""
        return [array for array in self.arrays if not array.frozen]

    @cached_property
    def local_trained(self) -> float:
        """Numbers of the trained parameters on this device."""
        return sum(self.local(array) for array in self.trained)

    @cached_property
    def local_frozen(self) -> float:
        """Bytes of the frozen parameters on this device."""
        return sum(self.local(array) * array.dtype.itemsize for array in self.arrays if array.frozen)

    @cached_property
    def local_moments(self) -> float:
        """Numbers that the optimizer keeps: Adam two a parameter, Muon one."""
        muon = self.config.optimizer.kind == "muon"
        return sum(self.local(array) * (1 if muon and muon_axes(array.name) else 2) for array in self.trained)


def local(array: Array, mesh: dict[str, int], rules: Rules, platform: str) -> float:
    """Numbers of a parameter on one device of a mesh."""
    spec = partition_spec(rules, array.axes, array.name)
    total = 1.0
    for size, axis, entry in zip(array.shape, array.axes, spec, strict=True):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        part = math.ceil(size / math.prod(mesh[name] for name in names))
        if axis == "embed" and len(array.shape) > 2 and platform == "tpu":
            part = -(-part // 8) * 8  # a TPU's registers have 8 rows, and memory is laid out for them
        total *= part
    return total


def place(
    config: Config,
    topology: Topology,
    arrays: tuple[Array, ...] | None = None,
    rules: Rules | None = None,
    numbers: dict[str, float] | None = None,
) -> Place:
    """`arrays` saves deriving the parameters again, and `numbers` how many of them lie on a device of this layout;
    `rules` tries another table. Raises UserError where the layout does not fit the devices or the model, or where the
    trainer would for products that the chip does not have."""
    if any(model.fp8 for model in config.models.values()):
        require_float8(topology.chip)
    sizes = degrees(config.layout, topology.num_devices)
    check(config, sizes)
    mesh = dict(zip(MESH_AXES, sizes, strict=True))
    platform = topology.chip.platform
    arrays, rules = arrays or parameters(config, platform), rules or rule_table(config.layout)
    numbers = numbers or {array.name: local(array, mesh, rules, platform) for array in arrays}
    decoder = stage_class(config)(config, platform).learning[0]
    return Place(config, topology, mesh, arrays, numbers, rules, decoder)
