"""What the stages share that learn from ranked replies."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import Array

from gptjax.config import RankedConfig
from gptjax.data.examples import eval_batches
from gptjax.data.ranked import RankedRows, Rankings, open_rankings
from gptjax.data.sources import TextSource
from gptjax.stages.from_examples import FromChat


class FromRankings(FromChat[Rankings]):
    """A decoder that learns which of a prompt's replies people prefer."""

    config: RankedConfig

    @property
    def row(self) -> RankedRows:
        """The shapes of one row."""
        replies, length = self.config.data.max_replies, self.config.model.seq_len
        each = jax.ShapeDtypeStruct((replies,), np.int32)
        return RankedRows(jax.ShapeDtypeStruct((replies, length), np.int32), each, each, each)

    def random_rows(self, seed: int, lead: tuple[int, ...]) -> RankedRows:
        """Rows [*lead, K, T] of random ids: prompts and replies that fill the context by halves, in a random order."""
        rng, (replies, length) = np.random.default_rng(seed), self.row.tokens.shape
        tokens = rng.integers(0, self.config.model.vocab_size, (*lead, replies, length), np.int32)
        ranks = 1 + np.argsort(rng.random((*lead, replies)), axis=-1).astype(np.int32)
        return RankedRows(tokens, np.full_like(ranks, length // 2), np.full_like(ranks, length - 1), ranks)

    def _examples(self, source: TextSource) -> Rankings:
        return open_rankings(self.config.data, source, self.chat, self.config.model.seq_len, self.report)

    def facts(self) -> str:
        """What it learns, in words."""
        found = self.training
        share = found.num_replies / (len(found) * found.max_replies)
        return (
            f"{len(found):,} training prompts with {found.num_replies:,} ranked replies, {share:.1%} of "
            f"{found.max_replies} each{found.losses}"
        )

    def _over_evaluation(
        self, params: Any, place: Callable[[RankedRows], RankedRows], rows: Sequence[int]
    ) -> list[np.ndarray]:
        """What `_judged` gives of the evaluation split, or train.eval_batches of it, its N rows one after another."""
        c = self.config
        batches = eval_batches(self.evaluation, c.micro_batch_size, rows, c.train.eval_batches)
        found = jax.device_get([self._judged_whole(params, place(batch)) for batch in batches])
        return [np.concatenate(each) for each in zip(*found, strict=True)]

    @cached_property
    def _judged_whole(self) -> Callable[[Any, RankedRows], tuple[Array, ...]]:
        """jit of `_judged`, whole on every process."""

        def whole(params: Any, rows: RankedRows) -> tuple[Array, ...]:
            return self._judged(params, rows)

        return jax.jit(whole, out_shardings=self.layout.sharding(()) if self.layout else None)

    def _judged(self, params: Any, rows: RankedRows) -> tuple[Array, ...]:
        """What an evaluation reads of rows [b, ...], arrays [b, K] of which the last are the ranks."""
        raise NotImplementedError
