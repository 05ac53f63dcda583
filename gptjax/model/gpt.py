"""GPT-3's decoder as Flax Linen modules used functionally: `init` and `apply` on plain pytrees. Encoders, and the two
sides of an encoder-decoder, are other values of the same config; see config.ModelConfig.

Every parameter names its logical axes. Letters as in `block`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from gptjax.config import LoRAConfig, ModelConfig
from gptjax.model.attention import KEPT
from gptjax.model.block import Beside, Block, Parallelism, beside_of, named, norm
from gptjax.model.cache import At, Cache
from gptjax.model.dropout import dropout, token_keys
from gptjax.model.lora import NAME as ADAPTER
from gptjax.model.lora import LowRankTable
from gptjax.model.loss import Head
from gptjax.model.positions import biases, waves
from gptjax.model.products import Axes

OUTSIDE: Axes = ("rows", "residual_length", None)
# What each remat policy keeps for the backward pass; `full` keeps only the inputs of a unit.
SAVED_NAMES = {"dots": ("qkv", KEPT, "projection", "mlp_up"), "full": ()}


class Unit(nn.Module):
    """One repeat of the attention pattern: the body that the scan over layers repeats."""

    config: ModelConfig
    parallelism: Parallelism
    lora: LoRAConfig | None

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Cache], at: Any, beside: Beside, number: Any
    ) -> tuple[tuple[Array, Cache], None]:
        """carry: x and, in decoding, the whole cache, so that each layer writes into it and none copies it; the rest as
        for Block; number: which of the U units this is."""
        pattern, (x, cache) = self.config.attention_pattern, carry
        caches = list(cache) if cache is not None else [None] * len(pattern)
        for i, kind in enumerate(pattern):
            block = Block(self.config, kind, self.parallelism, self.lora, name=f"block_{i}")
            x, caches[i] = block(x, caches[i], number, at, beside, number * len(pattern) + i)
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


class GPT(nn.Module):
    """Token and position embeddings, U units, a final norm. The product with the head is in `loss.logits`. Also an
    encoder, where the config is one's."""

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
        types: Array | None = None,
        table: Array | None = None,
        memory: Array | None = None,
        memory_segments: Array | None = None,
        cache: Cache = None,
        at: At | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Array, Head, Cache]:
        """tokens [B, T] -> hidden [B, T, D] in the compute dtype, head, cache. The head's table is the embedding unless
        it is one of its own.

        positions [T]: where the tokens stand, 0..T-1 unless given (`attend` must then expect that order);
        segments [B, T]: a token attends only to its own number; restarted [B, T]: each token's position in its own
        segment, whose embedding it gets in place of that of where it stands; types [B, T]: the part of its row that a
        token belongs to, the first unless given; table [V', D]: another's embedding in place of one's own; memory
        [B, S, D] and memory_segments [B, S]: what cross-attention looks at; cache and at: decoding, after the past that
        the cache holds; dropout_key: of this micro-batch, or None for no dropout.
        """
        c, constrain = self.config, self.parallelism.constrain
        embedding, head = self._tables(table)
        length = tokens.shape[1]
        # The head splits the vocabulary over tensor; a lookup in a split vocabulary would gather the whole of it.
        lookup = constrain(embedding, (None, "lookup"))
        own = restarted
        if at is not None:  # beyond the last position stands only what leaves no trace
            own = jnp.minimum(at.start[:, None] + jnp.arange(length), c.seq_len - 1)
        x, places, bias = look_up(lookup, tokens), None, None
        if c.scale_embedding:
            x = x * c.embed_dim**0.5
        if c.positions in ("learned", "sinusoidal"):
            x = x + self._positions(tokens.shape, positions, own)
        elif c.positions == "rotary":
            stands = (jnp.arange(length) if positions is None else jnp.asarray(positions)) if own is None else own
            places = jnp.broadcast_to(stands, tokens.shape)
        elif c.positions == "relative":
            init = named(nn.initializers.normal(0.02), (None, "heads"))
            bias = self.param("distances", init, (c.position_buckets, c.num_heads))
            if at is None:
                ahead = jnp.arange(length)[None] - jnp.arange(length)[:, None]
                bias = constrain(biases(bias, ahead, c.position_reach, c.causal), ("heads", None, None))
        if c.token_types:
            init = named(nn.initializers.normal(0.02), (None, "embed"))
            parts = self.param("token_types", init, (c.token_types, c.embed_dim)).astype(self.dtype)
            x = x + look_up(constrain(parts, (None, "lookup")), jnp.zeros_like(tokens) if types is None else types)
        if c.norm_embedding:
            x = norm(c, "norm_embedding")(constrain(x, ("rows", "length", None)))
        x = constrain(x, OUTSIDE)
        noise = None
        if dropout_key is not None and c.dropout:
            noise = token_keys(dropout_key, len(tokens), jnp.arange(length) if positions is None else positions)
        x = dropout(x, c.dropout, noise, 0)
        beside = Beside(segments, noise, places, bias, memory, memory_segments)

        unit = Unit
        if c.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES[c.remat])
            unit = nn.remat(Unit, policy=policy, prevent_cse=not c.scan_layers)
        settings = (c, self.parallelism, self.lora)
        units = c.num_layers // len(c.attention_pattern)
        if self.parallelism.pipeline is not None:
            one_unit = unit(*settings, parent=None)

            def apply(weights: Any, number: Array, x: Array, beside: Any) -> Array:
                return one_unit.apply({"params": weights}, (x, None), None, beside, number)[0][0]

            x = self.parallelism.pipeline(apply, self.variables["params"]["units"], x, beside)
        elif c.scan_layers:
            scanned = nn.scan(
                unit,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),
                length=units,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            every = scanned(*settings, name="units")
            (x, cache), _ = every((x, cache), at, beside, jnp.arange(units))
        elif at is not None:  # traced once for all units, which is most of what the start of an engine takes
            one_unit = Unit(*settings, parent=None)

            @jax.jit
            def go(weights: Any, x: Array, cache: Cache, at: At, beside: Any, number: Any) -> tuple[Array, Cache]:
                return one_unit.apply({"params": weights}, (x, cache), at, beside, number)[0]

            for i in range(units):
                x, cache = go(self.variables["params"][f"unit_{i}"], x, cache, at, beside, i)
        else:
            for i in range(units):
                (x, cache), _ = unit(*settings, name=f"unit_{i}")((x, cache), at, beside, i)
        x = constrain(x, OUTSIDE)
        if c.norm_place == "before":
            x = norm(c, "norm_final")(x)
        # The head splits the vocabulary over tensor, so a length split over it is gathered: here, and not per chunk.
        return constrain(x, ("rows", "length", None)), head, cache

    def _tables(self, given: Array | None) -> tuple[Array, Head]:
        """The embedding [V', D], whole over fsdp, and the head; of an embedding that is given, that alone."""
        c, constrain = self.config, self.parallelism.constrain
        if given is not None:
            return given, Head(given)
        size, init = (c.padded_vocab_size, c.embed_dim), named(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding = self.param("embedding", init, size)
        if adapter := beside_of(self.lora, "embedding"):
            embedding += LowRankTable(adapter, size, name=ADAPTER)()
        # Gathered over fsdp once, here: a lookup in a table split over fsdp would reshard every token instead.
        embedding = table = constrain(embedding.astype(self.dtype), ("vocab", None))
        if not c.tied_head:
            own_head = self.param("head", init, size)
            table = constrain(own_head.astype(self.dtype), ("vocab", None))
        if c.scale_head:
            table = table * c.embed_dim**-0.5
        bias = None
        if c.head_bias:
            bias = self.param("head_bias", named(nn.initializers.zeros, ("vocab",)), (c.padded_vocab_size,))
        return embedding, Head(table, bias)

    def _positions(self, shape: tuple[int, ...], positions: Any, own: Any) -> Array:
        """The embedding [B, T, D] of where tokens of a shape stand; own [B, T]: where each does, else `positions`."""
        c = self.config
        if c.positions == "sinusoidal":
            learned = jnp.asarray(waves(c.seq_len, c.embed_dim), self.dtype)
        else:
            init = named(nn.initializers.normal(0.02), (None, "embed"))
            size = c.seq_len + c.position_offset, c.embed_dim
            learned = self.param("positions", init, size).astype(self.dtype)
            if own is not None:  # cut as the embedding is: the sum is gathered then, and not each part of it
                learned = self.parallelism.constrain(learned, (None, "lookup"))
        if own is not None:
            return look_up(learned, own + c.position_offset)
        first = c.position_offset
        here = learned[first : first + shape[1]] if positions is None else learned[positions + first]
        # A product with ones: its gradient is a product, too. The sum over B that plain broadcasting gives makes the
        # GPU compiler lay the whole residual stream out with B innermost.
        return jnp.einsum("b,td->btd", jnp.ones(shape[:1], learned.dtype), here)


def layers_of(params: Any, config: ModelConfig) -> list[Any]:
    """The parameters of each repeat of the pattern, stacked or not."""
    units = config.num_layers // len(config.attention_pattern)
    if "units" in params:
        return [jax.tree.map(lambda leaf, i=i: leaf[i], params["units"]) for i in range(units)]
    return [params[f"unit_{i}"] for i in range(units)]


def as_layers(units: list[Any], config: ModelConfig) -> dict[str, Any]:
    """The other way: parameters by name, stacked where the config scans its layers."""
    if config.scan_layers:
        return {"units": jax.tree.map(lambda *leaves: jnp.stack(leaves), *units)}
    return {f"unit_{i}": unit for i, unit in enumerate(units)}


def forward(model: GPT, params: Any, tokens: Array, **kwargs: Any) -> tuple[Array, Head, Cache]:
    """`model` as a pure function of plain parameters; see GPT.__call__."""
    return model.apply({"params": params}, tokens, **kwargs)  # type: ignore[return-value]


def compute_dtype(config: ModelConfig, platform: str) -> jnp.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, float32 on CPU."""
    if config.dtype == "auto":
        return jnp.dtype("float32" if platform == "cpu" else "bfloat16")
    return jnp.dtype(config.dtype)
