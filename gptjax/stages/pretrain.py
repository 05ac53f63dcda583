"""Pretraining: next-token prediction on packed rows. What a stage supplies, and nothing more."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import Config
from gptjax.data.rows import Rows
from gptjax.data.sources import Corpus, TextSource
from gptjax.data.stream import TokenStream, eval_batches
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.infer.sampling import Sampling, generate
from gptjax.model.loss import IGNORED, cross_entropy, log_probs
from gptjax.parallel.network import Network
from gptjax.sharding.rules import Layout

SAMPLE_TOKENS = 200


@dataclass(frozen=True)
class Pretrain:
    """Loss, batches and evaluation of a decoder on rows of a text."""

    config: Config
    platform: str
    """Where it computes: cpu, gpu or tpu."""
    layout: Layout | None = None
    """None on a single device."""
    tokenizer: Tokenizer | None = None
    """None where only shapes and the loss are wanted."""
    corpus: Corpus | None = None
    """The text, opened once: what becomes of its files does not reach a run. None as for the tokenizer."""

    @cached_property
    def network(self) -> Network:
        return Network(self.config, self.platform, self.layout)

    on_policy = False

    def init(self, key: Array) -> Any:
        """Parameters boxed with their logical axes."""
        return self.network.init(key)

    def is_frozen(self, name: str) -> bool:
        return False

    @property
    def row(self) -> Rows:
        """The shapes of one row."""
        ids = jax.ShapeDtypeStruct((self.config.model.seq_len,), np.int32)
        return Rows(ids, ids, ids if self.config.model.separate_documents else None)

    def counts(self, rows: Rows) -> Array:
        """The number of targets."""
        return jnp.sum(rows.targets != IGNORED, dtype=jnp.float32)

    def loss(self, params: Any, rows: Rows, counts: Array, key: Array | None) -> Array:
        """rows [b, T] -> their part in the mean nats of `counts` targets; a key of None switches dropout off."""
        hidden, embedding, targets = self.network.before_head(params, rows, key)
        with jax.named_scope("loss"):
            c = self.config.model
            return cross_entropy(hidden, embedding, targets, c.vocab_size, c.loss_chunk) / counts

    def feed(self, positions: Sequence[int] | None, rows: Sequence[int]) -> TokenStream:
        data = self.config.data
        return TokenStream(
            self.training_text,
            self._tokenizer,
            self.config.model.seq_len,
            lanes=data.lanes,
            seed=data.seed,
            micro_batch=self.config.micro_batch_size,
            rows=rows,
            separate=self.config.model.separate_documents,
            threads=data.threads,
            positions=positions,
        )

    def evaluate(self, params: Any, place: Callable[[Rows], Rows], rows: Sequence[int]) -> dict[str, float]:
        """Loss in nats per token and bits per byte over the evaluation split, in order; `rows` of every batch are this
        process's to read and `place`."""
        c, text = self.config, self.evaluation_text
        shape = c.model.seq_len, c.micro_batch_size
        batches = eval_batches(
            text, self._tokenizer, *shape, rows=rows, separate=c.model.separate_documents, limit=c.train.eval_batches
        )
        sums = [self._evaluate_batch(params, place(batch)) for batch in batches]
        nats, targets, size_bytes = (math.fsum(column) for column in zip(*jax.device_get(sums), strict=True))
        return {"loss": nats / targets, "bits_per_byte": nats / math.log(2) / size_bytes}

    @cached_property
    def _evaluate_batch(self) -> Callable[[Any, Rows], tuple[Array, Array, Array]]:
        """jit of (params, rows [b, T]) -> nats, targets, and the UTF-8 bytes that the targets stand for."""
        c, token_bytes = self.config.model, self._tokenizer.token_bytes()

        def sums(params: Any, rows: Rows) -> tuple[Array, Array, Array]:
            hidden, embedding, targets = self.network.before_head(params, rows, None)
            nats = -jnp.sum(log_probs(hidden, embedding, targets, c.vocab_size, c.loss_chunk))
            size = jnp.where(targets == IGNORED, 0, jnp.asarray(token_bytes)[jnp.maximum(targets, 0)])
            return nats, jnp.sum(targets != IGNORED, dtype=jnp.int32), jnp.sum(size)

        return jax.jit(sums)

    def sample(self, params: Any) -> str:
        """One continuation of train.sample_prompt, the same seed each time so that samples compare."""
        prompt = self.config.train.sample_prompt
        how = Sampling(temperature=0.8, top_k=50)
        return prompt + self.continuations(params, prompt, how, num_samples=1, num_tokens=SAMPLE_TOKENS, seed=0)[0]

    def continuations(self, params: Any, prompt: str, how: Sampling, **size: int) -> list[str]:
        """What the model goes on with after a prompt; `size` as for `generate`."""
        tokenizer = self._tokenizer
        ids = tokenizer.prompt(prompt)
        made = generate(self.network.plain_model, params, ids, how=how, possible=tokenizer.possible, **size)
        return [tokenizer.decode(row, inside=True) for row in made]

    @cached_property
    def training_text(self) -> TextSource:
        return self._split(self.config.data.train_split)

    @cached_property
    def evaluation_text(self) -> TextSource:
        return self._split(self.config.data.eval_split)

    def _split(self, name: str) -> TextSource:
        if self.corpus is None:
            raise ValueError("this stage was built without a text")
        return self.corpus.split(name, self.config.data.split_by)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this stage was built without a tokenizer")
        return self.tokenizer


def fit_vocabulary(config: Config, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the model's vocabulary, for whoever joins the two: ids beyond the tokenizer's stand for
    nothing, and chat tokens beyond the model's are absent, for pretraining never meets them.

    Raises UserError if text can yield an id that the model does not have.
    """
    size, needed = config.model.vocab_size, tokenizer.least_vocab_size
    if size < needed:
        raise UserError(
            f"model.vocab_size = {size}: the tokenizer {config.data.tokenizer} needs {needed}; nearest {needed}"
        )
    return tokenizer.fit(size)
