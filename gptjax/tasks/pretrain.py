"""Pretraining: next-token prediction on packed rows. What a stage supplies, and nothing more."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import Config
from gptjax.data.sources import open_source
from gptjax.data.stream import TokenStream, eval_batches
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.infer.sampling import Sampling, generate
from gptjax.model.attention import choose_backend
from gptjax.model.gpt import GPT, Constrain, compute_dtype, forward, unconstrained
from gptjax.model.loss import IGNORED, cross_entropy

SAMPLE_TOKENS = 200


def build_model(config: Config, platform: str, constrain: Constrain = unconstrained) -> GPT:
    """The decoder of a config on a platform (cpu, gpu, tpu)."""
    backend, _ = choose_backend(config.model.attention, platform)
    return GPT(config.model, compute_dtype(config.model, platform), backend, constrain)


@dataclass(frozen=True)
class Pretrain:
    """Loss, batches and evaluation of a decoder on rows of T+1 tokens."""

    config: Config
    model: GPT
    tokenizer: Tokenizer | None = None
    """None where only shapes and the loss are wanted."""

    def init(self, key: Array) -> Any:
        """Parameters boxed with their logical axes; the shape of the dummy batch does not matter."""
        return self.model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def loss(self, params: Any, tokens: Array, key: Array | None) -> tuple[Array, Array]:
        """tokens [b, T+1] -> summed nats, number of targets; a key of None switches dropout off."""
        c = self.config.model
        inputs, targets = jnp.maximum(tokens[:, :-1], 0), tokens[:, 1:]
        rngs = {} if key is None else {"dropout": key}
        off = key is None or c.dropout == 0
        hidden, embedding, _ = forward(self.model, params, inputs, deterministic=off, rngs=rngs)
        nats = cross_entropy(hidden, embedding, targets, c.vocab_size, c.loss_chunk)
        return nats, jnp.sum(targets != IGNORED, dtype=jnp.int32)

    def stream(self, positions: tuple[int, ...] | None, share: tuple[int, int]) -> TokenStream:
        """The training rows from a position on."""
        data = self.config.data
        return TokenStream(
            open_source(data, data.train_split),
            self._tokenizer,
            self.config.model.seq_len,
            lanes=data.lanes,
            seed=data.seed,
            threads=data.threads,
            share=share,
            positions=positions,
        )

    def evaluate(self, params: Any, place: Callable[[np.ndarray], Array], share: tuple[int, int]) -> dict[str, float]:
        """Loss in nats per token and bits per byte over the evaluation split, in order."""
        data, limit = self.config.data, self.config.train.eval_batches
        source = open_source(data, data.eval_split)
        size = self.config.micro_batch_size
        rows = eval_batches(source, self._tokenizer, self.config.model.seq_len, size, limit=limit, share=share)
        sums = [self._evaluate_batch(params, place(batch)) for batch in rows]
        nats, targets, size_bytes = (math.fsum(column) for column in zip(*jax.device_get(sums), strict=True))
        return {"loss": nats / targets, "bits_per_byte": nats / math.log(2) / size_bytes}

    @cached_property
    def _evaluate_batch(self) -> Callable[[Any, Array], tuple[Array, Array, Array]]:
        """jit of (params, tokens [b, T+1]) -> nats, targets, and the UTF-8 bytes that the targets stand for."""
        token_bytes = self._tokenizer.token_bytes()

        def sums(params: Any, tokens: Array) -> tuple[Array, Array, Array]:
            nats, count = self.loss(params, tokens, None)
            targets = tokens[:, 1:]
            size = jnp.where(targets == IGNORED, 0, jnp.asarray(token_bytes)[jnp.maximum(targets, 0)])
            return nats, count, jnp.sum(size)

        return jax.jit(sums)

    def sample(self, params: Any) -> str:
        """One continuation of train.sample_prompt, the same seed each time so that samples compare."""
        prompt = self.config.train.sample_prompt
        ids = self._tokenizer.encode(prompt)
        how = Sampling(temperature=0.8, top_k=50)
        made = generate(self.model, params, ids, num_samples=1, num_tokens=SAMPLE_TOKENS, how=how, seed=0)
        return prompt + self._tokenizer.decode(made[0].tolist())

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this task was built without a tokenizer")
        return self.tokenizer


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError if text can yield an id that the model does not have. The reserved chat ids may lie in
    the padding: pretraining never meets them."""
    chat = set(tokenizer.special.values()) - {tokenizer.eot}
    needed = 1 + max(i for i in range(tokenizer.vocab_size) if i not in chat)
    if config.model.vocab_size < needed:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}: the tokenizer {config.data.tokenizer} needs {needed}; "
            f"nearest {needed}"
        )
