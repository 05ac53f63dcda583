"""A model over a layout, and what it makes of rows: a decoder, an encoder, or one of each side by side."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import ENCODER, Config, EncoderDecoderConfig
from gptjax.data.rows import PairRows, Rows
from gptjax.model.attention import Need
from gptjax.model.block import Parallelism, layer_mask
from gptjax.model.gpt import GPT, compute_dtype, forward
from gptjax.model.kernels import BACKENDS, choose
from gptjax.model.loss import Head
from gptjax.parallel import context, pipeline
from gptjax.sharding.rules import Layout


@dataclass(frozen=True)
class Network:
    """The model of a config, a decoder or an encoder, on the devices of a layout."""

    config: Config
    platform: str
    """Where it computes: cpu, gpu or tpu."""
    layout: Layout | None = None
    """None on a single device."""

    @cached_property
    def attention(self) -> tuple[str, str]:
        """The backend and the reason for it; see kernels.choose."""
        model, ways = self.config.model, self._ways
        masks = tuple(layer_mask(model, kind) for kind in dict.fromkeys(model.attention_pattern))
        dtype = self.plain_model.dtype
        need = Need(
            self.platform,
            dtype,
            model.head_dim,
            model.seq_len,
            masks,
            segments=self.config.separates,
            bias=model.positions == "relative",
            context=ways,
            deterministic=self.config.train.deterministic,
        )
        name, reason = choose(model.attention, need)
        split = f"; the sequence in {2 * ways} chunks, a ring for dense layers and a halo for banded ones"
        return name, reason + (split if ways > 1 else "")

    @cached_property
    def model(self) -> GPT:
        """It over the whole layout."""
        attend = BACKENDS[self.attention[0]].attend
        if self.layout is None:
            return self.plain_model.clone(parallelism=Parallelism(attend))
        layout, stages = self.layout, None
        if layout.mesh.shape[pipeline.AXIS] > 1:
            units = jax.eval_shape(self.init, jax.random.key(0))["units"]
            stages = pipeline.on_mesh(self.config, layout, units, self.plain_model.dtype)
            layout = pipeline.inside(layout)
        attend = context.on_mesh(attend, layout)
        merge_qkv = layout.mesh.shape["tensor"] > 1
        how = Parallelism(attend, layout.constrain, self._ways == 1, merge_qkv, pipeline=stages)
        return self.plain_model.clone(parallelism=how)

    @cached_property
    def alone(self) -> Self:
        """The same for a batch of any size, which XLA lays out as the parameters lie."""
        return replace(self, layout=None)

    @cached_property
    def decoder(self) -> GPT:
        """The same function for decoding, which pins its activations to the layout by itself (infer.programs)."""
        return self.plain_model.clone(parallelism=Parallelism(merge_qkv=True))

    @cached_property
    def plain_model(self) -> GPT:
        """The same function without constraints on shapes: for initialising."""
        dtype = compute_dtype(self.config.model, self.platform)
        return GPT(self.config.model, dtype, lora=self.config.adapter)

    def init(self, key: Array) -> Any:
        """Parameters boxed with their logical axes."""
        return self._init(key)

    @cached_property
    def _init(self) -> Callable[[Array], Any]:
        """Traced once, though shapes are asked for several times; the shape of the dummy batch does not matter."""
        model = self.plain_model.clone(parallelism=Parallelism(lambda q, k, v, *mask: v))  # it has no parameters

        def made(key: Array) -> Any:
            return model.init(key, jnp.zeros((1, 1), jnp.int32), **self._from_others)["params"]

        return jax.jit(made, inline=True)

    @property
    def _from_others(self) -> dict[str, Any]:
        """What the model takes of another, of the smallest shapes."""
        if not self.config.model.cross_attention:
            return {}
        return {"memory": jnp.zeros((1, 1, self.config.model.embed_dim), self.plain_model.dtype)}

    def hidden(self, params: Any, rows: Rows, key: Array | None, **beside: Any) -> tuple[Array, Head]:
        """rows [b, T], in the order of `context` where the sequence is split -> hidden [b, T, D], and the head. beside:
        what GPT takes of another model. A key of None switches dropout off."""
        about = {"segments": rows.segments, "restarted": rows.positions, "types": rows.types, "dropout_key": key}
        length = rows.tokens.shape[1]
        positions = context.order(length, self._ways) if self._ways > 1 else None
        return forward(self.model, params, rows.tokens, positions=positions, **about, **beside)[:2]

    def before_head(self, params: Any, rows: Rows, key: Array | None) -> tuple[Array, Head, Array]:
        """rows [b, T] -> hidden [b, T, D], the head, targets [b, T]; where the sequence is split over `ways` devices,
        [b, ways, T/ways] in place of [b, T]. A key of None switches dropout off."""
        ways = self._ways
        if ways > 1:
            positions = context.order(rows.tokens.shape[1], ways)
            rows = jax.tree.map(lambda leaf: leaf[:, positions], rows)
        hidden, head = self.hidden(params, rows, key)
        targets = rows.targets
        if ways > 1:  # every device's part of the sequence on an axis of its own: a chunk of the loss stays where it is
            parts = (len(targets), ways, -1)
            hidden, targets = hidden.reshape(*parts, hidden.shape[-1]), targets.reshape(parts)
        return hidden, head, targets

    def in_order(self, values: Array) -> Array:
        """[b, T] in the order of the rows, of what was made of each target of `before_head`."""
        if self._ways == 1:
            return values
        flat = values.reshape(len(values), -1)
        return flat[:, np.argsort(context.order(flat.shape[1], self._ways))]

    @property
    def _ways(self) -> int:
        """Parts that the layout cuts a sequence into."""
        return self.layout.mesh.shape[context.AXIS] if self.layout else 1


class Encoder(Network):
    """The encoder of an encoder-decoder, which reads by the decoder's embedding."""

    @property
    def _from_others(self) -> dict[str, Any]:
        return {"table": jnp.zeros((1, self.config.model.embed_dim), self.plain_model.dtype)}


@dataclass(frozen=True)
class EncoderDecoder(Network):
    """A decoder, and an encoder at whose text it looks."""

    config: EncoderDecoderConfig

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(replace(self.config, model=self.config.encoder), self.platform, self.layout)

    def init(self, key: Array) -> Any:
        return super().init(key) | {ENCODER: self.encoder.init(jax.random.fold_in(key, 1))}

    def encode(self, params: Any, source: Array, segments: Array, key: Array | None) -> Array:
        """source and segments [b, S] -> [b, S, D]."""
        table = params["embedding"].astype(self.plain_model.dtype)
        if self.layout:
            table = self.layout.constrain(table, ("vocab", None))
        return self.encoder.hidden(params[ENCODER], Rows(source, None, segments), key, table=table)[0]

    def before_head(  # type: ignore[override]
        self, params: Any, rows: PairRows, key: Array | None
    ) -> tuple[Array, Head, Array]:
        """rows [b, ...] -> hidden [b, T, D], the head, targets [b, T] of what is to be written."""
        keys = (None, None) if key is None else jax.random.split(key)
        memory = self.encode(params, rows.source, rows.source_segments, keys[0])
        own = Rows(rows.tokens, rows.targets, rows.segments)
        beside = {"memory": memory, "memory_segments": rows.source_segments}
        return *self.hidden(params, own, keys[1], **beside), rows.targets
