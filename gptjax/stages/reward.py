"""Reward model: a decoder with a scalar head that learns which of a prompt's replies people prefer."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.config import RewardConfig
from gptjax.data.ranked import RankedRows
from gptjax.data.rows import PADDING, Rows
from gptjax.errors import UserError
from gptjax.files import json_text, read_json, write_whole
from gptjax.model.scalar import NAME, init_head, is_better, is_head, ranking_nats, read
from gptjax.stages.from_rankings import FromRankings
from gptjax.stages.pairs import figures

SCORES = "score.json"
"""In the run folder: mean and deviation of the scores of held-out replies, by the step that was evaluated."""
HERE = 0  # a target: the place whose hidden state is read


class Reward(FromRankings):
    """Batches and evaluation of a scalar head on ranked replies."""

    config: RewardConfig
    example_prompt = ""

    def init(self, key: Array) -> Any:
        return super().init(key) | {NAME: init_head(jax.random.fold_in(key, 1), self.config.model.embed_dim)}

    def is_born(self, name: str) -> bool:
        return is_head(name)

    def scores(self, params: Any, tokens: Array, last: Array, key: Array | None) -> Array:
        """tokens [B, T], last [B], the place of each text's last token -> float32 [B]; a key of None switches dropout
        off. What stands behind that place is not seen from it."""
        here = jnp.where(jnp.arange(tokens.shape[1]) == last[:, None], HERE, PADDING)
        hidden, _, targets = self.network.before_head(params, Rows(tokens, here), key)
        return read(params[NAME], hidden, targets == HERE)

    def counts(self, rows: RankedRows) -> Array:
        """The number of prompts that have a pair."""
        return jnp.sum(is_better(rows.ranks).any((-1, -2)), dtype=jnp.float32)

    def loss(self, params: Any, rows: RankedRows, counts: Array, key: Array | None) -> Array:
        """rows [b, ...] -> their part in the mean, over `counts` prompts, of each one's mean nats over its pairs."""
        scores = self._scores_of_rows(params, rows, key)
        with jax.named_scope("loss"):
            return jnp.sum(ranking_nats(scores, rows.ranks)) / counts

    def _scores_of_rows(self, params: Any, rows: RankedRows, key: Array | None) -> Array:
        """float32 [b, K]; that of a reply that is not there means nothing."""
        tokens = rows.tokens.reshape(-1, rows.tokens.shape[-1])
        return self.scores(params, tokens, rows.last.reshape(-1), key).reshape(rows.ranks.shape)

    def evaluate(self, params: Any, place: Callable[[RankedRows], RankedRows], rows: Sequence[int]) -> dict[str, Any]:
        """See `pairs.figures`."""
        return figures(*self._over_evaluation(params, place, rows))

    def _judged(self, params: Any, rows: RankedRows) -> tuple[Array, Array]:
        """Scores and ranks."""
        return self._scores_of_rows(params, rows, None), rows.ranks

    def keep(self, run: Path, step: int, figures: dict[str, Any]) -> None:
        """Writes SCORES, whole, by which `scorer` shifts this step's scores."""
        path = run / SCORES
        if not math.isfinite(figures["score_mean"]):  # which ends the run
            return
        known = read_json(path, "remove it, and the next evaluation writes it anew") if path.exists() else {}
        known[str(step)] = {"mean": figures["score_mean"], "std": figures["score_std"]}
        try:
            write_whole(path, json_text(known, indent=1).encode())
        except OSError as error:
            raise UserError(f"{path}: cannot write ({error.strerror}); mend that and resume") from error
