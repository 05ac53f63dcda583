"""Parameters as they are read for inference: in the type that is computed in, or in 8 bits; and as a CPU decodes with
them fastest."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.config import ModelConfig
from gptjax.model.gpt import GPT
from gptjax.model.int8 import INPUTS, Int8, quantised
from gptjax.model.lora import merge
from gptjax.sharding.rules import leaf_name

DTYPES = ("auto", "float32", "bfloat16", "int8")


def unrolled(config: ModelConfig) -> ModelConfig:
    """The model with its layers one by one."""
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
    return jax.tree.map(partial(_narrowed, dtype=_wanted(weights, dtype)), params)


def held(params: Any, weights: str, dtype: jnp.dtype) -> Any:
    """The same of arrays that are there; what is so already is left alone, where nothing would have to be compiled."""
    matrices = {leaf.dtype for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    if weights != "int8" and matrices == {_wanted(weights, dtype)}:
        return params
    return jax.jit(partial(prepared, weights=weights, dtype=dtype))(params)


def _wanted(weights: str, dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(dtype if weights == "auto" else weights)


def _narrowed(leaf: Array, dtype: jnp.dtype) -> Array:
    return leaf.astype(dtype) if leaf.ndim > 1 else leaf


def for_cpu(model: GPT) -> tuple[GPT, Callable[[Any], Any]]:
    """A model as a CPU decodes with it fastest, and what arranges trained parameters for it: adapters merged, layers
    one by one (a scan would copy each layer's weights for every token), matrices with their outputs first."""
    config, flips = model.config, not model.config.fp8
    how = replace(model.parallelism, merge_qkv=True, outputs_first=flips)

    def arrange(params: Any) -> Any:
        plain = apart(merge(params, model.lora) if model.lora else params, config)
        return jax.tree_util.tree_map_with_path(_outputs_first, plain, is_leaf=_is_int8) if flips else plain

    return model.clone(config=unrolled(config), parallelism=how, lora=None), jax.jit(arrange)


def _is_int8(leaf: Any) -> bool:
    return isinstance(leaf, Int8)


def _outputs_first(path: Any, leaf: Any) -> Any:
    """[*in, *out] as [*out, *in], where it is a layer's matrix."""
    words = leaf_name(path).split("/")
    if words[-1] != "kernel":
        return leaf
    ins = range(INPUTS[words[-2]])
    return jax.tree.map(lambda part: jnp.moveaxis(part, ins, range(-len(ins), 0)), leaf)
