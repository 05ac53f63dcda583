"""The decoder over a layout, and what it makes of rows."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import Config
from gptjax.data.rows import Rows
from gptjax.model.attention import Need
from gptjax.model.gpt import GPT, Parallelism, compute_dtype, forward, layer_mask
from gptjax.model.kernels import BACKENDS, choose
from gptjax.parallel import context, pipeline
from gptjax.sharding.rules import Layout


@dataclass(frozen=True)
class Network:
    """A config's decoder on the devices of a layout."""

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
        about = self.config.separates, ways, self.config.train.deterministic
        need = Need(self.platform, dtype, model.head_dim, model.seq_len, masks, *about)
        name, reason = choose(model.attention, need)
        split = f"; the sequence in {2 * ways} chunks, a ring for dense layers and a halo for banded ones"
        return name, reason + (split if ways > 1 else "")

    @cached_property
    def model(self) -> GPT:
        """The decoder over the whole layout."""
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
    def decoder(self) -> GPT:
        """The same function for decoding, which pins its activations to the layout by itself (infer.programs)."""
        return self.plain_model.clone(parallelism=Parallelism(merge_qkv=True))

    @cached_property
    def plain_model(self) -> GPT:
        """The same function without constraints on shapes: for initialising."""
        dtype = compute_dtype(self.config.model, self.platform)
        return GPT(self.config.model, dtype, lora=self.config.adapter)

    def init(self, key: Array) -> Any:
        """Parameters boxed with their logical axes; the shape of the dummy batch does not matter."""
        model = self.plain_model.clone(parallelism=Parallelism(lambda q, k, v, *mask: v))  # it has no parameters
        return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def before_head(self, params: Any, rows: Rows, key: Array | None) -> tuple[Array, Array, Array]:
        """rows [b, T] -> hidden [b, T, D], embedding [V', D], targets [b, T]; where the sequence is split over
        `ways` devices, [b, ways, T/ways] in place of [b, T]. A key of None switches dropout off."""
        inputs, targets, segments, restarted = rows
        ways, positions = self._ways, None
        if ways > 1:
            positions = context.order(inputs.shape[1], ways)
            inputs, targets, segments, restarted = jax.tree.map(lambda leaf: leaf[:, positions], rows)
        hidden, embedding, _ = forward(
            self.model,
            params,
            inputs,
            positions=positions,
            segments=segments,
            restarted=restarted,
            dropout_key=key,
        )
        if ways > 1:  # every device's part of the sequence on an axis of its own: a chunk of the loss stays where it is
            parts = (len(targets), ways, -1)
            hidden, targets = hidden.reshape(*parts, hidden.shape[-1]), targets.reshape(parts)
        return hidden, embedding, targets

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
