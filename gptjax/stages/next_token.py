"""What the stages that predict the next token share: pretraining and supervised fine-tuning differ in their rows."""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.data.rows import Rows
from gptjax.infer.engine import Engine, Request
from gptjax.infer.sampling import Sampling
from gptjax.model.loss import IGNORED, cross_entropy
from gptjax.stages.base import Base

SAMPLE_TOKENS = 200
SAMPLING = Sampling(temperature=0.8, top_k=50)


class NextToken(Base):
    """A decoder that learns the targets of rows [T]."""

    def counts(self, rows: Rows) -> Array:
        """The number of targets."""
        return jnp.sum(rows.targets != IGNORED, dtype=jnp.float32)

    def loss(self, params: Any, rows: Rows, counts: Array, key: Array | None) -> Array:
        """rows [b, T] -> their part in the mean nats of `counts` targets; a key of None switches dropout off."""
        hidden, embedding, targets = self.network.before_head(params, rows, key)
        with jax.named_scope("loss"):
            c = self.config.model
            return cross_entropy(hidden, embedding, targets, c.vocab_size, c.loss_chunk) / counts

    def sample(self, params: Any) -> str:
        """One text from train.sample_prompt on, the same seed each time so that samples compare."""
        prompt, engine = self.config.train.sample_prompt, self._engine
        ids = self.prompt(prompt)[-self.config.model.seq_len :].tolist()
        engine.params = params
        (reply,) = engine.run([Request(ids, SAMPLE_TOKENS, SAMPLING, stop_tokens=self.ends)])
        engine.clear()
        return self.shown(prompt, reply.text)

    def prompt(self, text: str) -> np.ndarray:
        """Ids that the model is to go on from, int32 [N]."""
        raise NotImplementedError

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end what it says."""
        return (self.known_tokenizer.eot,)

    def shown(self, prompt: str, reply: str) -> str:
        """What a user is shown of both."""
        return prompt + reply

    @cached_property
    def _engine(self) -> Engine:
        """One row, without parameters."""
        network, tokenizer = self.network, self.known_tokenizer
        return Engine(network.decoder, None, slots=1, prefixes=0, tokenizer=tokenizer, layout=self.layout)
