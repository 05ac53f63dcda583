"""What the stages that predict the next token share: pretraining and supervised fine-tuning differ in their rows."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.data.rows import Rows
from gptjax.model.loss import IGNORED, cross_entropy
from gptjax.stages.writer import Writer


class NextToken(Writer):
    """A decoder that learns the targets of rows [T]."""

    def counts(self, rows: Rows) -> Array:
        """The number of targets."""
        return jnp.sum(rows.targets != IGNORED, dtype=jnp.float32)

    def loss(self, params: Any, rows: Rows, counts: Array, key: Array | None) -> Array:
        """rows [b, T] -> their part in the mean nats of `counts` targets; a key of None switches dropout off."""
        hidden, head, targets = self.network.before_head(params, rows, key)
        with jax.named_scope("loss"):
            c = self.config.model
            return cross_entropy(hidden, head, targets, c.vocab_size, c.loss_chunk) / counts
