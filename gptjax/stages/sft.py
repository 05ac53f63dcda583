"""Supervised fine-tuning: the assistant's words in conversations, by all parameters of a model or by adapters."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import SFTConfig
from gptjax.data.examples import Examples, eval_batches, open_examples
from gptjax.data.rows import CUT, PADDING, Rows
from gptjax.data.sources import TextSource
from gptjax.model.lora import is_adapter
from gptjax.model.loss import log_probs
from gptjax.stages.assistant import Assistant
from gptjax.stages.next_token import NextToken
from gptjax.train.parts import join, split
from gptjax.train.step import narrow

CONVERSATIONS = 4  # in a row of random ones, on average


class SFT(Assistant[Examples], NextToken):
    """Batches and evaluation of a decoder on conversations."""

    config: SFTConfig

    def init(self, key: Array) -> Any:
        """Frozen matrices are in the dtype in which every product takes them: that of float32 is the optimizer's."""
        trained, frozen = split(super().init(key), self.is_frozen)
        return join(trained, narrow(frozen, self.network.plain_model.dtype))

    def is_frozen(self, name: str) -> bool:
        return self.config.adapter is not None and not is_adapter(name)

    @property
    def row(self) -> Rows:
        """The shapes of one row."""
        ids = jax.ShapeDtypeStruct((self.config.model.seq_len,), np.int32)
        return Rows(ids, ids, ids, ids)

    def random_rows(self, seed: int, lead: tuple[int, ...]) -> Rows:
        """Rows [*lead, T] of random ids: conversations of random lengths, of which half the ids are trained."""
        rng, length = np.random.default_rng(seed), self.config.model.seq_len
        tokens, targets = rng.integers(0, self.config.model.vocab_size, (2, *lead, length), np.int32)
        begins = rng.random(tokens.shape) < (CONVERSATIONS / length if self.config.data.packing else 0)
        begins[..., 0] = True
        here = np.arange(length, dtype=np.int32)
        positions = here - np.maximum.accumulate(np.where(begins, here, 0), axis=-1)
        segments = np.cumsum(begins, axis=-1, dtype=np.int32) - 1
        return Rows(tokens, np.where(rng.random(tokens.shape) < 0.5, targets, PADDING), segments, positions)

    def facts(self) -> str:
        """What it learns, in words."""
        found = self.training
        share = found.packing.efficiency(self.config.model.seq_len)
        return f"{len(found):,} training conversations in {found.num_rows:,} rows, {share:.1%} full{found.losses}"

    def _examples(self, source: TextSource) -> Examples:
        return open_examples(self.config.data, source, self.chat, self.config.model.seq_len, self.report)

    def evaluate(self, params: Any, place: Callable[[Rows], Rows], rows: Sequence[int]) -> dict[str, float]:
        """Loss in nats per token of the assistant, and of the words that it answers, which are not trained."""
        c = self.config
        batches = eval_batches(self.evaluation, c.micro_batch_size, rows, c.train.eval_batches)
        sums = [self._evaluate_batch(params, place(batch)) for batch in batches]
        nats, count, prompt_nats, prompt_count = (math.fsum(c) for c in zip(*jax.device_get(sums), strict=True))
        return {"loss": nats / count, "prompt_loss": prompt_nats / prompt_count}

    @cached_property
    def _evaluate_batch(self) -> Callable[[Any, Rows], tuple[Array, ...]]:
        """jit of (params, rows [b, T]) -> nats and targets that are trained, and those of words that are not."""
        c, marks = self.config.model, np.array([*self.known_tokenizer.special.values()])

        def sums(params: Any, rows: Rows) -> tuple[Array, ...]:
            hidden, head, targets = self.network.before_head(params, rows, None)
            asked = jnp.where(targets <= CUT, CUT - targets, targets)
            nats = -log_probs(hidden, head, asked, c.vocab_size, c.loss_chunk)
            parts = targets > PADDING, (targets < PADDING) & ~jnp.isin(asked, marks)
            return tuple(jnp.sum(x) for part in parts for x in (jnp.where(part, nats, 0), part))

        return jax.jit(sums)
