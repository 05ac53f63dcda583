"""A layer as data: GPT-3's, and what encoders, encoder-decoders and later decoders do otherwise in the same place.

`Parallelism` is the only trace of a mesh, of which the model knows nothing. Letters: B batch, T length, S length of the
text that cross-attention looks at, D embed, H heads, K head_dim, F mlp, V' padded vocab, L layers, U pattern units, G
heads of queries to each of keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import LoRAConfig, ModelConfig
from gptjax.model.attention import Attend, Mask
from gptjax.model.cache import At, Cache, attend_cached, attend_memory
from gptjax.model.dropout import dropout
from gptjax.model.kernels import blockwise
from gptjax.model.lora import NAME as ADAPTER
from gptjax.model.lora import LowRank
from gptjax.model.norms import Norm
from gptjax.model.positions import rotated
from gptjax.model.products import Axes, Product

Constrain = Callable[[Array, Axes], Array]
RESIDUAL: Axes = ("batch", "residual_length", None)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": jax.nn.gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
}


def unconstrained(x: Array, axes: Axes) -> Array:
    return x


@dataclass(frozen=True)
class Parallelism:
    """What a layout changes in the model: how, never what it computes. The defaults are a single device's."""

    attend: Attend = blockwise.attend
    constrain: Constrain = unconstrained
    """Pins an activation's layout by the names of its axes."""
    merge_rows: bool = True
    """Weight gradients over [B, T] as one axis; False where the length is split, since no layout of the merged axis
    then keeps the rows where they are."""
    merge_qkv: bool = False
    """Queries, keys and values from one product: where heads are split over devices, the gradient that three products
    send back would be summed over them three times; and in decoding, where a third of the matrix would be copied for
    each of three (a CPU decodes GPT-2 124M in 27 ms a token, and in 45 so)."""
    outputs_first: bool = False
    """Matrices lie as [*out, *in], and have no gradients; see Product."""
    pipeline: Callable[..., Array] | None = None
    """Runs the stacked units in place of a scan; see parallel.pipeline."""
    read: int = 0
    """Slots of a cache that are read at once; see cache.attend_cached."""


def named(init: Any, axes: Axes) -> Any:
    """An initialiser whose array carries its logical axes."""
    return nn.with_logical_partitioning(init, axes)


def affine(x: Array, kernel: Array, bias: Array | None, num_in: int, product: Product, merge: bool = True) -> Array:
    """The product in the dtype of x, plus the bias [*out], as one axis where nothing is cut behind its first axis."""
    out = product(x, kernel.astype(x.dtype), num_in)
    if bias is None:
        return out
    if not merge:
        return out + bias.astype(x.dtype)
    return (out.reshape(*x.shape[:-num_in], -1) + bias.astype(x.dtype).reshape(-1)).reshape(out.shape)


class Linear(nn.Module):
    """y = x W + b over the leading `num_in` axes of W, which keep their logical names whatever the product."""

    shape: tuple[int, ...]
    axes: Axes
    num_in: int
    std: float
    has_bias: bool
    product: Product
    lora: LoRAConfig | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape, axes = self.product.lie(self.shape, self.axes, self.num_in)
        kernel = self.param("kernel", named(nn.initializers.normal(self.std), axes), shape)
        out_shape, out_axes = self.shape[self.num_in :], self.axes[self.num_in :]
        bias = self.param("bias", named(nn.initializers.zeros, out_axes), out_shape) if self.has_bias else None
        out = affine(x, kernel, bias, self.num_in, self.product, merge=out_axes[0] is not None)
        if self.lora:
            out += LowRank(self.lora, self.shape, self.axes, self.num_in, self.product, name=ADAPTER)(x)
        return out


class Heads(nn.Module):
    """x [B, T, D] -> queries [B, T, H, K], keys and values [B, T, H/G, K]: one array of weights, and a product for
    each, since a GPU's attention kernel would need copies of the three parts of one; or one product where the layout
    says so.

    The weights are [D, G+2, H/G, K]: of each group of heads that share keys the G queries, the keys and the values. So
    `tensor` cuts all of them between groups.
    """

    num_heads: int
    kv_heads: int
    head_dim: int
    has_bias: bool
    product: Product
    merged: bool
    lora: LoRAConfig | None

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        group = self.num_heads // self.kv_heads
        out_shape, out_axes = (group + 2, self.kv_heads, self.head_dim), (None, "heads", "head_dim")
        shape, axes = (x.shape[-1], *out_shape), ("embed", *out_axes)
        size, names = self.product.lie(shape, axes, 1)
        kernel = self.param("kernel", named(nn.initializers.normal(0.02), names), size)
        biases: Any = None
        if self.has_bias:
            biases = self.param("bias", named(nn.initializers.zeros, out_axes), out_shape)
        parts = (slice(group) if group > 1 else 0, group, group + 1)
        if self.merged:
            out = self.product(x, kernel.astype(x.dtype), 1)
            out = out + biases.astype(x.dtype) if self.has_bias else out
            made = [out[:, :, part] for part in parts]
        else:
            made = [
                affine(x, kernel[:, part], biases[part] if self.has_bias else None, 1, self.product) for part in parts
            ]
        if self.lora:
            more = LowRank(self.lora, shape, axes, 1, self.product, name=ADAPTER)(x)
            made = [own + more[:, :, part] for own, part in zip(made, parts, strict=True)]
        if group > 1:  # queries [B, T, G, H/G, K], whose groups come first
            made[0] = made[0].swapaxes(2, 3).reshape(*x.shape[:2], self.num_heads, self.head_dim)
        return tuple(made)


class Beside(NamedTuple):
    """What every layer reads beside the residual stream."""

    segments: Array | None = None
    """int32 [B, T]: a token attends only to its own number."""
    noise: Array | None = None
    """Keys [B, T] of the tokens, only with dropout."""
    places: Array | None = None
    """int32 [B, T], only with rotary positions: where each token stands."""
    bias: Array | None = None
    """float32 [H, T, T] on the scores, only with relative positions; in decoding the table that it is made of."""
    memory: Array | None = None
    """[B, S, D], only with cross-attention: what an encoder made of a text. In decoding the cache has it."""
    memory_segments: Array | None = None
    """int32 [B, S]; tokens look at their own number there."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), GPT-2's order; or both at once; or norm(x + ...) each time. With
    cross-attention in between where there is an encoder."""

    config: ModelConfig
    kind: str
    parallelism: Parallelism
    lora: LoRAConfig | None

    @nn.compact
    def __call__(
        self, x: Array, cache: Cache, unit: Any, at: At | None, beside: Beside, layer: Any
    ) -> tuple[Array, Cache]:
        """x [B, T, D]; cache and at only in decoding: (keys, values) of all units, and where x stands; unit, layer:
        which of the U and of the L this is."""
        c = self.config
        h = read = self._enter("norm_attention", x)
        h, cache = self._attention(h, cache, unit, at, beside)
        attended = dropout(h, c.dropout, beside.noise, 2 * layer + 1)
        if c.parallel_mlp == "no":
            x = self._leave("norm_attention", x + attended)
        if c.cross_attention:
            h = self._cross_attention(self._enter("norm_cross", x), cache, unit, at, beside)
            h = dropout(h, c.dropout, beside.noise, 2 * c.num_layers + 1 + layer)
            x = self._leave("norm_cross", x + h)
        h = self._mlp(read if c.parallel_mlp == "one_norm" else self._enter("norm_mlp", x))
        h = dropout(h, c.dropout, beside.noise, 2 * layer + 2)
        return self._leave("norm_mlp", x + (h if c.parallel_mlp == "no" else attended + h)), cache

    def _enter(self, name: str, x: Array) -> Array:
        """What a part of the layer reads."""
        h = norm(self.config, name)(x) if self.config.norm_place == "before" else x
        return self.parallelism.constrain(h, ("batch", "length", None))

    def _leave(self, name: str, x: Array) -> Array:
        """What goes on from it."""
        x = norm(self.config, name)(x) if self.config.norm_place == "after" else x
        return self.parallelism.constrain(x, RESIDUAL)

    @property
    def _product(self) -> Product:
        return Product(self.parallelism.merge_rows, self.config.fp8, self.parallelism.outputs_first)

    def _linear(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...], num_in: int, name: str, last: bool = False
    ) -> Linear:
        """last: whether what it gives is added to the residual stream, which is GPT-2's reason to draw it smaller
        (section 2.3)."""
        c = self.config
        std = 0.02 * (2 * c.num_layers) ** -0.5 if last else 0.02
        has_bias = c.qkv_bias if name in ("cross_query", "cross_keys_values") else c.biases
        return Linear(shape, axes, num_in, std, has_bias, self._product, beside_of(self.lora, name), name=name)

    def _attention(self, h: Array, cache: Cache, unit: Any, at: At | None, beside: Beside) -> tuple[Array, Cache]:
        c, constrain = self.config, self.parallelism.constrain
        mask = layer_mask(c, self.kind)
        about = self._product, self.parallelism.merge_qkv, beside_of(self.lora, "qkv")
        q, k, v = Heads(c.num_heads, c.kv_heads, c.head_dim, c.qkv_bias, *about, name="qkv")(h)
        if beside.places is not None:
            q, k = (rotated(part, beside.places, c.rotary_base) for part in (q, k))
        q, k, v = (checkpoint_name(constrain(part, ("batch", "length", "heads", None)), "qkv") for part in (q, k, v))
        with jax.named_scope("attention"):
            if at is not None:
                how = mask, score_scale(c), self.parallelism.read, beside.bias, c.position_reach
                h, own = attend_cached(q, k, v, cache[:2], unit, at, *how)
                cache = (*own, *cache[2:])
            else:
                k, v = (_shared(part, c.num_heads) for part in (k, v))
                if beside.bias is None:
                    h = self.parallelism.attend(q, k, v, mask, score_scale(c), beside.segments)
                else:
                    ids = beside.segments, beside.segments
                    h = blockwise.attend_across(q, k, v, mask, score_scale(c), ids, beside.bias)
        h = constrain(h, ("batch", "length", "heads", None))
        return self._projection(h, "projection"), cache

    def _projection(self, h: Array, name: str) -> Array:
        """h [B, T, H, K] -> [B, T, D]."""
        c = self.config
        shape, axes = (c.num_heads, c.head_dim, c.embed_dim), ("heads", "head_dim", "embed")
        return checkpoint_name(self._linear(shape, axes, 2, name, last=True)(h), "projection")

    def _cross_attention(self, h: Array, cache: Cache, unit: Any, at: At | None, beside: Beside) -> Array:
        c, heads = self.config, ("batch", "length", "heads", None)
        shape, axes = (c.embed_dim, c.num_heads, c.head_dim), ("embed", "heads", "head_dim")
        q = self.parallelism.constrain(self._linear(shape, axes, 1, "cross_query")(h), heads)
        scale = score_scale(c)
        with jax.named_scope("attention"):
            if at is not None:
                h = attend_memory(q, cache[2:], unit, at, scale)
            else:
                k, v = self._keys_values(beside.memory)
                ids = beside.segments, beside.memory_segments
                h = blockwise.attend_across(q, k, v, Mask(causal=False), scale, ids)
        return self._projection(self.parallelism.constrain(h, heads), "cross_projection")

    def _keys_values(self, memory: Any) -> tuple[Array, Array]:
        """memory [B, S, D] -> keys and values [B, S, H, K]."""
        c = self.config
        shape, axes = (c.embed_dim, 2, c.num_heads, c.head_dim), ("embed", None, "heads", "head_dim")
        made = self._linear(shape, axes, 1, "cross_keys_values")(memory)
        made = self.parallelism.constrain(made, ("batch", "length", None, "heads", None))
        return made[:, :, 0], made[:, :, 1]

    def _mlp(self, h: Array) -> Array:
        c, constrain = self.config, self.parallelism.constrain
        with jax.named_scope("mlp"):
            if c.gated:  # [B, T, 2, F]: one product, whose gradient is summed over tensor once
                h = self._linear((c.embed_dim, 2, c.mlp_dim), ("embed", None, "mlp"), 1, "mlp_gate_up")(h)
            else:
                h = self._linear((c.embed_dim, c.mlp_dim), ("embed", "mlp"), 1, "mlp_up")(h)
            # Its gradient from its input: autodiff would keep four more arrays of this size in every scanned layer.
            activate = jax.checkpoint(partial(_activated, c), prevent_cse=not c.scan_layers)
            axes = ("batch", "length", None, "mlp") if c.gated else ("batch", "length", "mlp")
            h = checkpoint_name(constrain(h, axes), "mlp_up")
            # XLA would make GELU part of the float8 product and fail on what its gradient needs (jaxlib 0.10.2).
            h = activate(jax.lax.optimization_barrier(h) if c.fp8 else h)
            if c.gated:  # else the gradients of the two parts travel over tensor (CPU compiler, sequence_sharding)
                h = constrain(h, ("batch", "length", "mlp"))
            return self._linear((c.mlp_dim, c.embed_dim), ("mlp", "embed"), 1, "mlp_down", last=True)(h)


def norm(config: ModelConfig, name: str) -> Norm:
    """The model's norm under a name."""
    return Norm(config.norm, config.norm_eps, config.norm_bias, name=name)


def layer_mask(config: ModelConfig, kind: str) -> Mask:
    """The mask of a layer of a kind (dense, banded)."""
    return Mask(config.window if kind == "banded" else None, config.causal)


def score_scale(config: ModelConfig) -> float:
    """What products of queries and keys are multiplied by."""
    return config.head_dim**-0.5 if config.scale_scores else 1.0


def _activated(config: ModelConfig, x: Array) -> Array:
    """What goes down again of an MLP's [B, T, F], or [B, T, 2, F] with a gate."""
    activation = ACTIVATIONS[config.activation]
    return activation(x[:, :, 0]) * x[:, :, 1] if config.gated else activation(x)


def _shared(x: Array, num_heads: int) -> Array:
    """Keys or values [B, T, H/G, K] for each head of queries [B, T, H, K]."""
    group = num_heads // x.shape[2]
    return x if group == 1 else jnp.repeat(x, group, axis=2)


def beside_of(config: LoRAConfig | None, name: str) -> LoRAConfig | None:
    """The adapter of one of the matrices, if it has one; an MLP's gate is a part of what goes up."""
    return config if config and name.replace("gate_", "") in config.matrices else None
