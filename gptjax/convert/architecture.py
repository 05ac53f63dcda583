"""What a Hugging Face architecture is to us: a config in other words, and a table that says which part of our
parameters each of its tensors is. The table reads and writes, whole or any slice, without knowing the model. An
encoder-decoder is two of them, one a side, that share the words and the embedding."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gptjax.config import ENCODER, ModelConfig
from gptjax.errors import UserError

Index = tuple[slice, ...]

"""The section of our config, and where its parameters stand beside the decoder's."""

GELU = ("gelu_new", "gelu_pytorch_tanh")  # two names of the tanh approximation
COMMON: dict[str, tuple[Any, ...]] = {
    "activation_function": GELU,
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
}
"""What GPT-2 and GPT-Neo fix and name alike: the values that are read, the first of which is written."""


@dataclass(frozen=True)
class Box:
    """A tensor, and the block of one leaf of our parameters that it fills: transposed if it says so, then reshaped
    to `extent`. What the boxes of a leaf leave free is zero."""

    tensor: str
    shape: tuple[int, ...]
    leaf: str
    """Path of the leaf, such as units/block_0/qkv/kernel."""
    extent: tuple[int, ...]
    """Size of the block."""
    offset: tuple[int, ...] = ()
    """Where the block starts in the leaf; () is the leaf's start."""
    transposed: bool = False
    scale: float = 1.0
    """What the block is multiplied by when it is written."""
    swapped: tuple[int, int] = (0, 0)
    """Two axes of the block that stand in each other's place in the tensor."""

    def block(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor as our block, a view."""
        extent, (a, b) = list(self.extent), self.swapped
        extent[a], extent[b] = extent[b], extent[a]
        return (tensor.T if self.transposed else tensor).reshape(extent).swapaxes(a, b)

    def tensor_of(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse: the tensor cut out of the leaf, a view unless it is scaled or axes are swapped."""
        block = leaf[tuple(slice(o, o + e) for o, e in zip(self.offset, self.extent, strict=True))]
        block = block.swapaxes(*self.swapped)
        matrix = block.reshape(self.shape[::-1]).T if self.transposed else block.reshape(self.shape)
        return matrix if self.scale == 1 else matrix * np.float32(self.scale)


@dataclass(frozen=True)
class Architecture:
    """One of the architectures that convert."""

    model_type: str
    classes: tuple[str, ...]
    """What `architectures` may say; the first is written."""
    read: Callable[[dict[str, Any], str], ModelConfig]
    """(values of config.json, its name for messages) -> our config. Raises UserError for what our model has not."""
    write: Callable[[ModelConfig], dict[str, Any]]
    block: Callable[[ModelConfig], list[Box]]
    """The tensors of one layer, names and leaves relative to it."""
    fixed: Callable[[ModelConfig], dict[str, tuple[Any, ...]]]
    """Of a model that is to be written, the values that fields of its config may have."""
    outside: Callable[[ModelConfig], list[Box]]
    """The tensors outside the layers, the embedding first."""
    prefix: str = "transformer."
    """Of the model's tensors below a language-model head, which some files leave out."""
    layers: str = "h"
    """Where the layers are, by number."""
    constants: re.Pattern[str] = re.compile(r"(?!)")
    """Tensors that older versions saved and none needs."""
    copies: tuple[str, ...] = ()
    """Names under which the embedding may be saved, too, or alone."""
    optional: tuple[str, ...] = ()
    """Tensors that a file may lack, which are zero then."""
    twins: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> another that it equals, which alone is needed."""
    beside: re.Pattern[str] = re.compile(r"lm_head\.weight|final_logits_bias")
    """Tensors that stand beside the model, not below its prefix."""
    replaced: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> another beside which no class reads it, which is left out there."""
    heads: Mapping[str, Callable[[ModelConfig, int], list[Box]]] = field(default_factory=dict)
    """Name of a head (see model.heads) -> its tensors, of which a directory has all or none; the number is that of
    classes, 0 without a classifier."""
    class_of: Mapping[frozenset[str], str] = field(default_factory=dict)
    """Heads -> the class that has exactly these; else there are no heads, and the first class is meant."""
    encoder: "Architecture | None" = None
    """Of an encoder-decoder the other side, which is read from the same config.json."""
    shared: tuple[str, ...] = ()
    """Of an encoder the fields that its config has once for both sides."""

    @property
    def sides(self) -> dict[str, "Architecture"]:
        """By the section of our config; see config.Config.models."""
        return {"model": self} | ({ENCODER: self.encoder} if self.encoder else {})


def every_box(architecture: Architecture, models: Mapping[str, ModelConfig]) -> list[Box]:
    """The tensors of all sides; an encoder's leaves lie below its name."""
    return [
        box if section == "model" else replace(box, leaf=f"{section}/{box.leaf}")
        for section, side in architecture.sides.items()
        for box in boxes(side, models[section])
    ]


def boxes(architecture: Architecture, config: ModelConfig) -> list[Box]:
    """Every tensor of a model or of a side, named without the prefix of its architecture."""
    every, block = architecture.outside(config), architecture.block(config)
    for layer in range(config.num_layers):
        every += [_in_layer(box, f"{architecture.layers}.{layer}", layer, config) for box in block]
    return _placed(every)


def head_boxes(
    architecture: Architecture, config: ModelConfig, names: Collection[str], classes: int
) -> dict[str, list[Box]]:
    """The tensors of each of these heads; classes: 0 where no classifier is among them."""
    return {name: _placed(make(config, classes)) for name, make in architecture.heads.items() if name in names}


def _placed(boxes: list[Box]) -> list[Box]:
    """With the offsets that are not said."""
    return [box if box.offset else replace(box, offset=(0,) * len(box.extent)) for box in boxes]


def _in_layer(box: Box, name: str, layer: int, config: ModelConfig) -> Box:
    unit, position = divmod(layer, len(config.attention_pattern))
    tensor, leaf = f"{name}.{box.tensor}", f"block_{position}/{box.leaf}"
    if not config.scan_layers:
        return replace(box, tensor=tensor, leaf=f"unit_{unit}/{leaf}")
    offset, (a, b) = box.offset or (0,) * len(box.extent), box.swapped
    swapped = (a + 1, b + 1)
    return replace(  # stacked over the units
        box, tensor=tensor, leaf=f"units/{leaf}", offset=(unit, *offset), extent=(1, *box.extent), swapped=swapped
    )


def usual(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """What the decoders that convert have in common; see Architecture.fixed."""
    of_norms = ("norm_bias", "norm_place", "norm_embedding")
    of_embeddings = ("position_offset", "scale_embedding", "token_types", "head_bias", "scale_head")
    return defaults(config, *of_norms, *of_embeddings, "causal", "cross_attention")


def defaults(config: ModelConfig, *names: str) -> dict[str, tuple[Any, ...]]:
    """Fields that must be as they are where nothing is said; see Architecture.fixed."""
    plain = ModelConfig(1, config.num_heads, config.embed_dim)
    return {name: (getattr(plain, name),) for name in names}


def dense(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """Of those without a band; see Architecture.fixed."""
    return {"attention_pattern": (("dense",),)} if "banded" in config.attention_pattern else {}


def plain(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """Of GPT-2 and GPT-Neo, whose block is that of the defaults."""
    names = ("biases", "num_kv_heads", "head_size", "mlp_size", "norm", "norm_eps", "activation", "parallel_mlp")
    return defaults(config, *names, "tied_head")


def of_gpt(config: ModelConfig) -> list[Box]:
    """The tensors outside the layers of GPT-2 and GPT-Neo."""
    vocab, dim = config.vocab_size, config.embed_dim
    return [
        Box("wte.weight", (vocab, dim), "embedding", (vocab, dim)),
        Box("wpe.weight", (config.seq_len, dim), "positions", (config.seq_len, dim)),
        *norm("ln_f", "norm_final", dim),
    ]


def linear(
    tensor: str, leaf: str, extent: tuple[int, ...], num_in: int, num_out: int, has_bias: bool = True
) -> list[Box]:
    """A kernel [out, in], and its bias if it has one."""
    bias = [Box(f"{tensor}.bias", (num_out,), f"{leaf}/bias", (num_out,))] if has_bias else []
    return [Box(f"{tensor}.weight", (num_out, num_in), f"{leaf}/kernel", extent, transposed=True), *bias]


def heads_of(tensor: str, config: ModelConfig, first: int, count: int) -> list[Box]:
    """`count` of the G + 2 parts of qkv, from one tensor in which those of a group of heads stand side by side."""
    about, out = (count, config.kv_heads, config.head_dim), count * config.kv_heads * config.head_dim
    extent, offset = (config.embed_dim, *about), (0, first, 0, 0)
    shape = out, config.embed_dim
    kernel = Box(f"{tensor}.weight", shape, "qkv/kernel", extent, offset, transposed=True, swapped=(1, 2))
    bias = Box(f"{tensor}.bias", (out,), "qkv/bias", about, (first, 0, 0), swapped=(0, 1))
    return [kernel, bias] if config.qkv_bias else [kernel]


def self_attention(tensors: Sequence[str], config: ModelConfig) -> list[Box]:
    """Four kernels [out, in]: of queries, of keys, of values, and of what goes on from them."""
    queries, keys, values, out = tensors
    heads, size, group = config.num_heads, config.head_dim, config.num_heads // config.kv_heads
    extent = heads, size, config.embed_dim
    return [
        *heads_of(queries, config, 0, group),
        *heads_of(keys, config, group, 1),
        *heads_of(values, config, group + 1, 1),
        *linear(out, "projection", extent, heads * size, config.embed_dim, config.biases),
    ]


def cross_attention(tensors: Sequence[str], config: ModelConfig) -> list[Box]:
    """The same of cross-attention."""
    dim, heads, size = config.embed_dim, config.num_heads, config.head_dim
    queries, keys, values, out = tensors

    def one(tensor: str, leaf: str, part: tuple[int, ...] = ()) -> list[Box]:
        """`part`: which of keys and values that is, where they share a leaf."""
        about, offset = (*(1 for _ in part), heads, size), (*part, 0, 0)
        extent, shape = (dim, *about), (heads * size, dim)
        kernel = Box(f"{tensor}.weight", shape, f"{leaf}/kernel", extent, (0, *offset), transposed=True)
        bias = Box(f"{tensor}.bias", shape[:1], f"{leaf}/bias", about, offset)
        return [kernel, bias] if config.qkv_bias else [kernel]

    return [
        *one(queries, "cross_query"),
        *one(keys, "cross_keys_values", (0,)),
        *one(values, "cross_keys_values", (1,)),
        *linear(out, "cross_projection", (heads, size, dim), heads * size, dim, config.biases),
    ]


def gated(tensors: Sequence[str], config: ModelConfig) -> list[Box]:
    """The two kernels [out, in] of what goes up: the one that is activated, and the one that it is multiplied with."""
    dim, mlp, leaf = config.embed_dim, config.mlp_dim, "mlp_gate_up"

    def one(tensor: str, number: int) -> list[Box]:
        extent, offset = (dim, 1, mlp), (0, number, 0)
        kernel = Box(f"{tensor}.weight", (mlp, dim), f"{leaf}/kernel", extent, offset, transposed=True)
        bias = Box(f"{tensor}.bias", (mlp,), f"{leaf}/bias", (1, mlp), (number, 0))
        return [kernel, bias] if config.biases else [kernel]

    return [box for number, tensor in enumerate(tensors) for box in one(tensor, number)]


def own_head(config: ModelConfig) -> list[Box]:
    """The head where it is a table of its own."""
    shape = config.vocab_size, config.embed_dim
    return [] if config.tied_head else [Box("lm_head.weight", shape, "head", shape)]


def norm(tensor: str, leaf: str, dim: int) -> list[Box]:
    """A LayerNorm's two vectors."""
    return [
        Box(f"{tensor}.weight", (dim,), f"{leaf}/scale", (dim,)),
        Box(f"{tensor}.bias", (dim,), f"{leaf}/bias", (dim,)),
    ]


def assemble(index: Index, shape: tuple[int, ...], parts: list[tuple[Box, Callable[[], np.ndarray]]]) -> np.ndarray:
    """`leaf[index]` in float32 for a leaf of `shape`, reading only what lies in it of the tensors (opened by the
    functions beside the boxes)."""
    low = np.array([s.indices(n)[0] for s, n in zip(index, shape, strict=True)])
    high = np.array([s.indices(n)[1] for s, n in zip(index, shape, strict=True)])
    out = np.zeros(high - low, np.float32)
    for box, open_tensor in parts:
        offset = np.array(box.offset)
        start, stop = np.maximum(low, offset), np.minimum(high, offset + box.extent)
        if (start < stop).all():
            out[_slices(start - low, stop - low)] = box.block(open_tensor())[_slices(start - offset, stop - offset)]
    return out


def _slices(start: np.ndarray, stop: np.ndarray) -> Index:
    return tuple(map(slice, start.tolist(), stop.tolist()))


def common() -> dict[str, Any]:
    """COMMON as it is written."""
    return {name: options[0] for name, options in COMMON.items()}


def whole(values: dict[str, Any], name: str, where: str) -> int:
    """A size of config.json. Raises UserError where it is missing or no positive whole number."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {name} = {value!r}: expected a positive whole number")
    return value


def rate(values: dict[str, Any], name: str, where: str) -> float:
    """A dropout rate of config.json, 0 where it is missing."""
    value = values.get(name, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{where}: {name} = {value!r}: expected a rate in [0, 1)")
    return float(value)


def rotary_base(values: dict[str, Any], where: str) -> float:
    """Of rotary positions: `rope_parameters` since transformers 5, `rope_theta` and `rope_scaling` before. Raises
    UserError for any but the plain kind."""
    for name in ("rope_parameters", "rope_scaling"):
        given = values.get(name) or {}
        kind = given.get("rope_type", given.get("type", "default")) if isinstance(given, dict) else given
        if kind != "default":
            raise UserError(f"{where}: {name} = {given!r}: gptjax has only 'default'; it cannot convert this model")
    given = {"rope_theta": 10_000.0} | values | (values.get("rope_parameters") or {})
    return above_zero(given, "rope_theta", where)


def of_rotary(config: ModelConfig) -> dict[str, Any]:
    """The same as it is written, for older versions, too."""
    base = config.rotary_base
    return {"rope_theta": base, "rope_parameters": {"rope_type": "default", "rope_theta": base}}


def above_zero(values: dict[str, Any], name: str, where: str) -> float:
    """A number of config.json. Raises UserError where it is missing or not above zero."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{where}: {name} = {value!r}: expected a number above 0")
    return float(value)


def expect(values: dict[str, Any], where: str, **allowed: tuple[Any, ...]) -> None:
    """Raises UserError for a setting that our model has not; a missing one is the first of those allowed."""
    for name, options in allowed.items():
        if (value := values.get(name, options[0])) not in options:
            choices = " or ".join(map(repr, options))
            raise UserError(f"{where}: {name} = {value!r}: gptjax has only {choices}; it cannot convert this model")
