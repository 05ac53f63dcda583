"""GPT-3's decoder as Flax Linen modules used functionally: `init` and `apply` on plain pytrees. What LLaMA's does
otherwise is data of the same block: see `num_kv_heads` and the fields after it in config.ModelConfig.

Every parameter names its logical axes; `Parallelism` is the only trace of a mesh, of which the model knows nothing.
Letters: B batch, T length, D embed, H heads, K head_dim, F mlp, V' padded vocab, L layers, U pattern units, G heads
of queries to each of keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import LoRAConfig, ModelConfig
from gptjax.model.attention import KEPT, Attend, Mask
from gptjax.model.cache import At, Cache, attend_cached
from gptjax.model.dropout import dropout, token_keys
from gptjax.model.kernels import blockwise
from gptjax.model.lora import NAME as ADAPTER
from gptjax.model.lora import LowRank, LowRankTable
from gptjax.model.norms import Norm
from gptjax.model.products import Axes, Product
from gptjax.model.rotary import rotated

Constrain = Callable[[Array, Axes], Array]
RESIDUAL: Axes = ("batch", "residual_length", None)
OUTSIDE: Axes = ("rows", "residual_length", None)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": jax.nn.gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
}
# What each remat policy keeps for the backward pass; `full` keeps only the inputs of a unit.
SAVED_NAMES = {"dots": ("qkv", KEPT, "projection", "mlp_up"), "full": ()}


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


def affine(x: Array, kernel: Array, bias: Array | None, num_in: int, product: Product) -> Array:
    """The product in the dtype of x, plus the bias [*out]."""
    out = product(x, kernel.astype(x.dtype), num_in)
    if bias is None:
        return out
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
        out = affine(x, kernel, bias, self.num_in, self.product)
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


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); or both at once."""

    config: ModelConfig
    kind: str
    parallelism: Parallelism
    lora: LoRAConfig | None

    @nn.compact
    def __call__(
        self, x: Array, cache: Cache, unit: Any, at: At | None, segments: Any, noise: Any, places: Any, layer: Any
    ) -> tuple[Array, Cache]:
        """x [B, T, D]; cache and at only in decoding: (keys, values) of all units, and where x stands; noise [B, T]
        only with dropout: the tokens' keys; places [B, T] only with rotary positions: where each token stands; unit,
        layer: which of the U and of the L this is."""
        c, constrain = self.config, self.parallelism.constrain
        product = Product(self.parallelism.merge_rows, c.fp8, self.parallelism.outputs_first)

        def linear(shape: tuple[int, ...], axes: Axes, num_in: int, std: float, name: str) -> Linear:
            return Linear(shape, axes, num_in, std, c.biases, product, _beside(self.lora, name), name=name)

        residual_std = 0.02 * (2 * c.num_layers) ** -0.5  # GPT-2, section 2.3
        mask = layer_mask(c, self.kind)
        scale = c.head_dim**-0.5 if c.scale_scores else 1.0

        h = read = constrain(norm(c, "norm_attention")(x), ("batch", "length", None))
        about = product, self.parallelism.merge_qkv, _beside(self.lora, "qkv")
        q, k, v = Heads(c.num_heads, c.kv_heads, c.head_dim, c.qkv_bias, *about, name="qkv")(h)
        if places is not None:
            q, k = (rotated(part, places, c.rotary_base) for part in (q, k))
        q, k, v = (checkpoint_name(constrain(part, ("batch", "length", "heads", None)), "qkv") for part in (q, k, v))
        with jax.named_scope("attention"):
            if at is None:
                k, v = (_shared(part, c.num_heads) for part in (k, v))
                h = self.parallelism.attend(q, k, v, mask, scale, segments)
            else:
                h, cache = attend_cached(q, k, v, cache, unit, at, mask, scale, self.parallelism.read)
        h = constrain(h, ("batch", "length", "heads", None))
        out_shape, out_axes = (c.num_heads, c.head_dim, c.embed_dim), ("heads", "head_dim", "embed")
        h = checkpoint_name(linear(out_shape, out_axes, 2, residual_std, name="projection")(h), "projection")
        attended = dropout(h, c.dropout, noise, 2 * layer + 1)
        if c.parallel_mlp == "no":
            x = constrain(x + attended, RESIDUAL)

        h = read if c.parallel_mlp == "one_norm" else constrain(norm(c, "norm_mlp")(x), ("batch", "length", None))
        with jax.named_scope("mlp"):
            if c.gated:  # [B, T, 2, F]: one product, whose gradient is summed over tensor once
                h = linear((c.embed_dim, 2, c.mlp_dim), ("embed", None, "mlp"), 1, 0.02, name="mlp_gate_up")(h)
            else:
                h = linear((c.embed_dim, c.mlp_dim), ("embed", "mlp"), 1, 0.02, name="mlp_up")(h)
            # Its gradient from its input: autodiff would keep four more arrays of this size in every scanned layer.
            activate = jax.checkpoint(partial(_activated, c), prevent_cse=not c.scan_layers)
            axes = ("batch", "length", None, "mlp") if c.gated else ("batch", "length", "mlp")
            h = checkpoint_name(constrain(h, axes), "mlp_up")
            # XLA would make GELU part of the float8 product and fail on what its gradient needs (jaxlib 0.10.2).
            h = activate(jax.lax.optimization_barrier(h) if c.fp8 else h)
            if c.gated:  # else the gradients of the two parts travel over tensor (CPU compiler, sequence_sharding)
                h = constrain(h, ("batch", "length", "mlp"))
            h = linear((c.mlp_dim, c.embed_dim), ("mlp", "embed"), 1, residual_std, name="mlp_down")(h)
        h = dropout(h, c.dropout, noise, 2 * layer + 2)
        return constrain(x + (h if c.parallel_mlp == "no" else attended + h), RESIDUAL), cache


def norm(config: ModelConfig, name: str) -> Norm:
    """The model's norm under a name."""
    return Norm(config.norm, config.norm_eps, name=name)


def _activated(config: ModelConfig, x: Array) -> Array:
    """What goes down again of an MLP's [B, T, F], or [B, T, 2, F] with a gate."""
    activation = ACTIVATIONS[config.activation]
    return activation(x[:, :, 0]) * x[:, :, 1] if config.gated else activation(x)


def _shared(x: Array, num_heads: int) -> Array:
    """Keys or values [B, T, H/G, K] for each head of queries [B, T, H, K]."""
    group = num_heads // x.shape[2]
    return x if group == 1 else jnp.repeat(x, group, axis=2)


def _beside(config: LoRAConfig | None, name: str) -> LoRAConfig | None:
    """The adapter of one of the matrices, if it has one; an MLP's gate is a part of what goes up."""
    return config if config and name.replace("gate_", "") in config.matrices else None


class Unit(nn.Module):
    """One repeat of the attention pattern: the body that the scan over layers repeats."""

    config: ModelConfig
    parallelism: Parallelism
    lora: LoRAConfig | None

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Cache], at: Any, segments: Any, noise: Any, places: Any, number: Any
    ) -> tuple[tuple[Array, Cache], None]:
        """carry: x and, in decoding, the whole cache, so that each layer writes into it and none copies it; the rest as
        for Block; number: which of the U units this is."""
        pattern, (x, cache) = self.config.attention_pattern, carry
        caches = list(cache) if cache is not None else [None] * len(pattern)
        for i, kind in enumerate(pattern):
            block = Block(self.config, kind, self.parallelism, self.lora, name=f"block_{i}")
            x, caches[i] = block(x, caches[i], number, at, segments, noise, places, number * len(pattern) + i)
        return (x, None if cache is None else tuple(caches)), None


@jax.custom_vjp
def look_up(table: Array, tokens: Array) -> Array:
    """table [V', D], tokens [B, T] -> [B, T, D]. The gradient sums a token's places in at least float32: in bfloat16
    the sum of a frequent token stands still once it is 256 times what each place adds."""
    return table[tokens]


def _look_up_forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[tokens], (table, tokens)


def _look_up_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    table, tokens = saved
    wide = jnp.promote_types(table.dtype, jnp.float32)
    summed = jnp.zeros(table.shape, wide).at[tokens].add(grad.astype(wide))
    return summed.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def _positions(places: Array, shape: tuple[int, ...], positions: Any, own: Any) -> Array:
    """The position embedding [B, T, D] of tokens of a shape; own [B, T]: where each stands, else `positions` as for
    GPT."""
    if own is not None:
        return look_up(places, own)
    here = places[: shape[1]] if positions is None else places[positions]
    # A product with ones: its gradient is a product, too. The sum over B that plain broadcasting gives makes the
    # GPU compiler lay the whole residual stream out with B innermost.
    return jnp.einsum("b,td->btd", jnp.ones(shape[:1], places.dtype), here)


class GPT(nn.Module):
    """Token and position embeddings, U units, a final norm. The product with the head is in `loss.logits`."""

    config: ModelConfig
    dtype: jnp.dtype
    parallelism: Parallelism = Parallelism()
    lora: LoRAConfig | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        *,
        positions: Any = None,
        segments: Array | None = None,
        restarted: Array | None = None,
        cache: Cache = None,
        at: At | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Array, Array, Cache]:
        """tokens [B, T] -> hidden [B, T, D], head [V', D] (both in the compute dtype), cache. The head is the embedding
        unless it is a table of its own.

        positions [T]: where the tokens stand, 0..T-1 unless given (`attend` must then expect that order);
        segments [B, T]: a token attends only to its own number; restarted [B, T]: each token's position in its own
        segment, whose embedding it gets in place of that of where it stands; cache and at: decoding, after the past
        that the cache holds; dropout_key: of this micro-batch, or None for no dropout.
        """
        c, constrain = self.config, self.parallelism.constrain
        table = named(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding = self.param("embedding", table, (c.padded_vocab_size, c.embed_dim))
        if beside := _beside(self.lora, "embedding"):
            embedding += LowRankTable(beside, (c.padded_vocab_size, c.embed_dim), name=ADAPTER)()
        # Gathered over fsdp once, here: a lookup in a table split over fsdp would reshard every token instead.
        embedding = constrain(embedding.astype(self.dtype), ("vocab", None))
        head = embedding
        if not c.tied_head:
            own_head = self.param("head", table, (c.padded_vocab_size, c.embed_dim))
            head = constrain(own_head.astype(self.dtype), ("vocab", None))
        length = tokens.shape[1]
        # The head splits the vocabulary over tensor; a lookup in a split vocabulary would gather the whole of it.
        lookup = constrain(embedding, (None, "lookup"))
        own = restarted
        if at is not None:  # beyond the last position stands only what leaves no trace
            own = jnp.minimum(at.start[:, None] + jnp.arange(length), c.seq_len - 1)
        x, places = look_up(lookup, tokens), None
        if c.positions == "learned":
            init = named(nn.initializers.normal(0.02), (None, "embed"))
            learned = self.param("positions", init, (c.seq_len, c.embed_dim)).astype(self.dtype)
            if own is not None:  # cut as the embedding is: the sum is gathered then, and not each part of it
                learned = constrain(learned, (None, "lookup"))
            x = x + _positions(learned, tokens.shape, positions, own)
        else:
            stands = (jnp.arange(length) if positions is None else jnp.asarray(positions)) if own is None else own
            places = jnp.broadcast_to(stands, tokens.shape)
        x = constrain(x, OUTSIDE)
        noise = None
        if dropout_key is not None and c.dropout:
            noise = token_keys(dropout_key, len(tokens), jnp.arange(length) if positions is None else positions)
        x = dropout(x, c.dropout, noise, 0)

        unit = Unit
        if c.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES[c.remat])
            unit = nn.remat(Unit, policy=policy, prevent_cse=not c.scan_layers)
        settings = (c, self.parallelism, self.lora)
        units = c.num_layers // len(c.attention_pattern)
        if self.parallelism.pipeline is not None:
            one_unit = unit(*settings, parent=None)

            def apply(weights: Any, number: Array, x: Array, beside: Any) -> Array:
                return one_unit.apply({"params": weights}, (x, None), None, *beside, number)[0][0]

            x = self.parallelism.pipeline(apply, self.variables["params"]["units"], x, (segments, noise, places))
        elif c.scan_layers:
            scanned = nn.scan(
                unit,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0),
                length=units,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            every = scanned(*settings, name="units")
            (x, cache), _ = every((x, cache), at, segments, noise, places, jnp.arange(units))
        elif at is not None:  # traced once for all units, which is most of what the start of an engine takes
            one_unit = Unit(*settings, parent=None)

            @jax.jit
            def go(weights: Any, x: Array, cache: Cache, at: At, places: Any, number: Any) -> tuple[Array, Cache]:
                return one_unit.apply({"params": weights}, (x, cache), at, None, None, places, number)[0]

            for i in range(units):
                x, cache = go(self.variables["params"][f"unit_{i}"], x, cache, at, places, i)
        else:
            for i in range(units):
                (x, cache), _ = unit(*settings, name=f"unit_{i}")((x, cache), at, segments, noise, places, i)
        x = norm(c, "norm_final")(constrain(x, OUTSIDE))
        # The head splits the vocabulary over tensor, so a length split over it is gathered: here, and not per chunk.
        return constrain(x, ("rows", "length", None)), head, cache


def layer_mask(config: ModelConfig, kind: str) -> Mask:
    """The mask of a layer of a kind (dense, banded)."""
    return Mask(config.window if kind == "banded" else None)


def forward(model: GPT, params: Any, tokens: Array, **kwargs: Any) -> tuple[Array, Array, Cache]:
    """`model` as a pure function of plain parameters; see GPT.__call__."""
    return model.apply({"params": params}, tokens, **kwargs)  # type: ignore[return-value]


def compute_dtype(config: ModelConfig, platform: str) -> jnp.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, float32 on CPU."""
    if config.dtype == "auto":
        return jnp.dtype("float32" if platform == "cpu" else "bfloat16")
    return jnp.dtype(config.dtype)
