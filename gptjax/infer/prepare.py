"""Parameters as an engine holds them: in the type that is computed in, or in 8 bits, and apart by layer where that
pays."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.config import ModelConfig
from gptjax.model.int8 import quantised

DTYPES = ("auto", "float32", "bfloat16", "int8")


def unrolled(config: ModelConfig) -> ModelConfig:
    """The model with its layers one by one: on a CPU a scan would copy each layer's weights for every token."""
    return replace(config, scan_layers=False)


def apart(params: Any, config: ModelConfig) -> Any:
    """Stacked parameters as those of `unrolled`; others as they are."""
    if "units" not in params:
        return params
    count = config.num_layers // len(config.attention_pattern)
    units = {f"unit_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["units"]) for i in range(count)}
    return {name: value for name, value in params.items() if name != "units"} | units


def prepared(params: Any, weights: str, dtype: jnp.dtype) -> Any:
    """Parameters with matrices in `weights`, one of DTYPES; auto is the type that the model computes in. LayerNorms
    and biases stay in float32. For a jit."""
    if weights == "int8":
        return quantised(params)
    return jax.tree.map(partial(_narrowed, dtype=dtype if weights == "auto" else jnp.dtype(weights)), params)


def _narrowed(leaf: Array, dtype: jnp.dtype) -> Array:
    return leaf.astype(dtype) if leaf.ndim > 1 else leaf
