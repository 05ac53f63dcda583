"""What stands on an encoder: what scores the words that were hidden, and what tells of a text by its first token.

Their parameters stand beside the encoder's, each under its own name, and the encoder's forward pass does not know them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from gptjax.config import ModelConfig
from gptjax.model.block import ACTIVATIONS, named, norm

TRANSFORM, POOLER, NEXT_SENTENCE, CLASSIFIER = HEADS = ("transform", "pooler", "next_sentence", "classifier")


class Dense(nn.Module):
    """x W + b over the last axis, in the dtype of x."""

    num_out: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape[-1], self.num_out
        kernel: Any = self.param("kernel", named(nn.initializers.normal(0.02), ("embed", None)), shape)
        bias: Any = self.param("bias", named(nn.initializers.zeros, (None,)), shape[1:])
        return jnp.matmul(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


class Transform(nn.Module):
    """[..., D] -> what the head over the vocabulary scores: a product, the MLP's activation and a norm (BERT)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        h = Dense(self.config.embed_dim, name="dense")(hidden)
        return norm(self.config, "norm")(ACTIVATIONS[self.config.activation](h))


def heads(config: ModelConfig, classes: int = 0) -> dict[str, nn.Module]:
    """The modules by name; classes: numbers that the classifier gives, 1 for regression."""
    dim = config.embed_dim
    return {TRANSFORM: Transform(config), POOLER: Dense(dim), NEXT_SENTENCE: Dense(2), CLASSIFIER: Dense(classes)}


def init_heads(config: ModelConfig, names: tuple[str, ...], key: Array, classes: int = 0) -> dict[str, Any]:
    """Parameters boxed with their logical axes, by name."""
    modules, x = heads(config, classes), jnp.zeros((1, config.embed_dim))
    return {name: modules[name].init(jax.random.fold_in(key, HEADS.index(name)), x)["params"] for name in names}


def transformed(config: ModelConfig, params: Any, hidden: Array) -> Array:
    """hidden [..., D] -> [..., D] by `transform` among the parameters."""
    return Transform(config).apply({"params": params[TRANSFORM]}, hidden)  # type: ignore[return-value]


def pooled(params: Any, hidden: Array) -> Array:
    """hidden [B, T, D] -> [B, D] of the first token, float32, by `pooler` among the parameters."""
    dense = Dense(hidden.shape[-1])
    return jnp.tanh(dense.apply({"params": params[POOLER]}, hidden[:, 0]).astype(jnp.float32))  # type: ignore[union-attr]


def told(params: Any, name: str, pooled: Array) -> Array:
    """[B, D] -> float32 [B, classes] by one of the heads on it."""
    kernel, bias = params[name]["kernel"], params[name]["bias"]
    return jnp.matmul(pooled, kernel.astype(jnp.float32), precision="highest") + bias.astype(jnp.float32)


def is_head(name: str) -> bool:
    """Whether a parameter, such as transform/dense/kernel, is one of theirs."""
    return name.split("/")[0] in HEADS
