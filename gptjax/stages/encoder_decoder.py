"""What the stages share whose model reads one text and writes another."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import ENCODER, EncoderDecoderConfig, WritingConfig
from gptjax.data.examples import eval_batches
from gptjax.data.rows import PADDING, PairRows
from gptjax.infer.writing import Writing
from gptjax.model.accounting import Reading, num_params, stack_params
from gptjax.model.loss import IGNORED, cross_entropy, judged
from gptjax.parallel.network import EncoderDecoder
from gptjax.stages.from_examples import FromExamples, Kind


class ReadsAndWrites(FromExamples[Kind]):
    """An encoder-decoder that learns what to write for what it reads."""

    config: EncoderDecoderConfig
    grows = False
    example_prompt = ""

    @cached_property
    def network(self) -> EncoderDecoder:
        return EncoderDecoder(self.config, self.platform, self.layout)

    @property
    def beside(self) -> tuple[str, ...]:
        return (ENCODER,)

    @property
    def learning(self) -> tuple[Reading, ...]:
        c = self.config
        encoder = Reading(c.encoder, ENCODER, predicts=False, own_table=False)
        return Reading(c.model, memory_length=c.encoder.seq_len), encoder

    @property
    def num_params(self) -> int:
        return num_params(self.config.model) + stack_params(self.config.encoder)

    @property
    def how(self) -> WritingConfig:
        """How it learns to write, and writes where nothing else is asked."""
        return WritingConfig()

    # What it reads and writes

    def read(self, text: str) -> np.ndarray:
        """Ids of a text as the encoder reads it, int32 [N]."""
        raise NotImplementedError

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end what it writes."""
        return (self.known_tokenizer.eot,)

    def shown(self, prompt: str, reply: str) -> str:
        """What a user is shown of both."""
        return f"{prompt}\n{reply}"

    def writing(self, how: WritingConfig, max_tokens: int = 0) -> Writing:
        """What writes for many texts at once."""
        tokenizer = self.known_tokenizer
        about = self.start, tokenizer.eot, tokenizer.possible
        return Writing(self.network, *about, how.beams, how.length_penalty, max_tokens)

    # Rows

    @property
    def start(self) -> int:
        """The id before what is written."""
        return self.known_tokenizer.eot if self.config.start_id < 0 else self.config.start_id

    @property
    def row(self) -> PairRows:
        """The shapes of one row."""
        read, written = (jax.ShapeDtypeStruct((m.seq_len,), np.int32) for m in (self.config.encoder, self.config.model))
        return PairRows(read, read, written, written, written)

    def random_rows(self, seed: int, lead: tuple[int, ...]) -> PairRows:
        """Rows [*lead, ...] of random ids, full on both sides."""
        rng, c = np.random.default_rng(seed), self.config
        source = rng.integers(0, c.model.vocab_size, (*lead, c.encoder.seq_len), np.int32)
        tokens, targets = rng.integers(0, c.model.vocab_size, (2, *lead, c.model.seq_len), np.int32)
        return PairRows(source, np.zeros_like(source), tokens, targets, np.zeros_like(tokens))

    # Loss

    def counts(self, rows: PairRows) -> Array:
        """The number of targets."""
        return jnp.sum(rows.targets != IGNORED, dtype=jnp.float32)

    def loss(self, params: Any, rows: PairRows, counts: Array, key: Array | None) -> Array:
        """rows [b, ...] -> their part in the mean nats of `counts` targets; a key of None switches dropout off."""
        hidden, head, targets = self.network.before_head(params, rows, key)
        with jax.named_scope("loss"):
            c = self.config.model
            return cross_entropy(hidden, head, targets, c.vocab_size, c.loss_chunk, self.how.label_smoothing) / counts

    def evaluate(self, params: Any, place: Callable[[PairRows], PairRows], rows: Sequence[int]) -> dict[str, float]:
        """loss: nats of a target without smoothing, given those before it; accuracy: share of them that are the
        likeliest."""
        c = self.config
        batches = eval_batches(self.evaluation, c.micro_batch_size, rows, c.train.eval_batches)
        sums = [self._evaluate_batch(params, place(batch)) for batch in batches]
        nats, right, count = (math.fsum(each) for each in zip(*jax.device_get(sums), strict=True))
        return {"loss": nats / count, "accuracy": right / count}

    @cached_property
    def _evaluate_batch(self) -> Callable[[Any, PairRows], tuple[Array, Array, Array]]:
        """jit of (params, rows [b, ...]) -> nats, targets that are the likeliest, and targets."""
        c = self.config.model

        def sums(params: Any, rows: PairRows) -> tuple[Array, Array, Array]:
            hidden, head, targets = self.network.before_head(params, rows, None)
            values, right = judged(hidden, head, targets, c.vocab_size, c.loss_chunk)
            return -jnp.sum(values), jnp.sum(right), jnp.sum(targets != PADDING)

        return jax.jit(sums)
