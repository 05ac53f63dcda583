"""Low-rank adapters (LoRA, arXiv 2106.09685): beside a frozen kernel W a product A B of a small rank, of which B starts
at zero, so that a model begins as it was. They are parameters as any other, `lora/a` and `lora/b` beside `kernel`.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from gptjax.config import LoRAConfig

NAME = "lora"


class LowRank(nn.Module):
    """scale * x A B for a kernel of a shape [*in, *out], num_in axes of which are `in`."""

    config: LoRAConfig
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_in: int
    product: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ins, outs, rank = self.shape[: self.num_in], self.shape[self.num_in :], self.config.rank
        in_axes, out_axes = self.axes[: self.num_in], self.axes[self.num_in :]
        # Of A the paper says only that it is random; a variance of 1 / (3 in) is that of its code.
        normal = nn.initializers.normal((3 * math.prod(ins)) ** -0.5)
        a: Any = self.param("a", nn.with_logical_partitioning(normal, (*in_axes, None)), (*ins, rank))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None, *out_axes))
        b: Any = self.param("b", zeros, (rank, *outs))
        return self.config.scale * self.product(self.product(x, a.astype(x.dtype), self.num_in), b.astype(x.dtype), 1)


class LowRankTable(nn.Module):
    """scale * A B for a table of a shape [V', D], whose rows are looked up and scored against."""

    config: LoRAConfig
    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> Array:
        rows, dim = self.shape
        normal = nn.with_logical_partitioning(nn.initializers.normal(dim**-0.5), ("vocab", None))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None, "embed"))
        a: Any = self.param("a", normal, (rows, self.config.rank))
        b: Any = self.param("b", zeros, (self.config.rank, dim))
        return self.config.scale * jnp.matmul(a, b)


def is_adapter(name: str) -> bool:
    """Whether a parameter, such as units/block_0/qkv/lora/a, is a part of an adapter."""
    return NAME in name.split("/")


def merge(params: Any, config: LoRAConfig) -> Any:
    """The parameters of a model without adapters that is the same function: W + scale * A B."""
    flat = flatten_dict(params)
    plain = {path: leaf for path, leaf in flat.items() if NAME not in path}
    for path in flat:
        if path[-2:] == (NAME, "a"):
            kernel = next(each for name in ("kernel", "embedding") if (each := (*path[:-2], name)) in plain)
            plain[kernel] = _merged(plain[kernel], flat[path], flat[*path[:-1], "b"], config.scale)
    return unflatten_dict(plain)


def _merged(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """kernel [U?, *in, *out]; U where layers are stacked."""
    rank, lead = a.shape[-1], kernel.shape[: a.ndim + b.ndim - kernel.ndim - 2]
    product = jnp.matmul(a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1), precision="highest")
    return (kernel + scale * product.reshape(kernel.shape)).astype(kernel.dtype)
