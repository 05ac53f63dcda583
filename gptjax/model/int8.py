"""Weights in 8 bits, for inference alone: a quarter of float32's bytes, of which a decoding step reads every one.

Each output channel of a matrix, and each row of the embedding and of a head, has a scale of its own, its largest value
over 127 (LLM.int8(), arXiv 2208.07339, section 2.1, without the split by outliers). Activations stay as they are.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.model.lora import is_adapter
from gptjax.sharding.rules import leaf_name

INPUTS = {"qkv": 1, "projection": 2, "mlp_up": 1, "mlp_gate_up": 1, "mlp_down": 1} | {
    "cross_query": 1,
    "cross_keys_values": 1,
    "cross_projection": 2,
}
"""Leading axes of each matrix that a product sums over."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """A matrix."""

    values: Array
    """int8"""
    scale: Array
    """float32, 1 along the axes that share one."""

    def wide(self, dtype: jnp.dtype) -> Array:
        return self.values.astype(dtype) * self.scale.astype(dtype)


def quantised(params: Any) -> Any:
    """Parameters with the layers' matrices, the embedding and the head as Int8."""

    def one(path: Any, leaf: Array) -> Any:
        name = leaf_name(path)
        words = name.split("/")
        if name in ("embedding", "head"):
            return _rounded(leaf, (1,))
        if words[-1] != "kernel" or is_adapter(name):
            return leaf
        first = int(words[0] == "units")  # stacked over the units
        return _rounded(leaf, tuple(range(first, first + INPUTS[words[-2]])))

    return jax.tree_util.tree_map_with_path(one, params)


def _rounded(x: Array, axes: tuple[int, ...]) -> Int8:
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axes, keepdims=True), 1e-30) / 127
    return Int8(jnp.round(x / scale).astype(jnp.int8), scale)


def widened(params: Any, dtype: jnp.dtype) -> Any:
    """Parameters as the model reads them, in a program that reads 8 bits of each."""
    return jax.tree.map(
        lambda leaf: leaf.wide(dtype) if isinstance(leaf, Int8) else leaf, params, is_leaf=lambda x: isinstance(x, Int8)
    )
