"""Direct preference optimisation: a policy learns from ranked replies without a reward model.

The weights that a run starts from stay beside the policy as its reference: `reference` in the tree of parameters, which
is frozen. Checkpoints hold the rest, a plain decoder, and whoever loads the run sees the policy alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.config import PreferenceConfig
from gptjax.data.ranked import RankedRows, Rankings
from gptjax.data.rows import PADDING, Rows
from gptjax.model.accounting import Reading
from gptjax.model.loss import IGNORED, log_probs
from gptjax.model.scalar import is_better
from gptjax.rl.losses import dpo_loss, dpo_margin, implicit_rewards
from gptjax.rl.responses import masked_mean, row_sums
from gptjax.stages.assistant import Assistant
from gptjax.stages.from_rankings import FromRankings
from gptjax.stages.pairs import figures
from gptjax.train.parts import join, split
from gptjax.train.step import narrow

REFERENCE = "reference"


class Preference(FromRankings, Assistant[Rankings]):
    """Batches and evaluation of a policy on ranked replies, of which every two that are not tied are a pair."""

    config: PreferenceConfig

    def init(self, key: Array) -> Any:
        """Policy and reference, equal; the reference in the dtype in which every product takes it."""
        policy = super().init(key)
        return policy | {REFERENCE: narrow(policy, self.network.plain_model.dtype)}

    @property
    def beside(self) -> tuple[str, ...]:
        return (REFERENCE,)

    @property
    def learning(self) -> tuple[Reading, ...]:
        policy = super().learning
        return *policy, Reading(self.config.model, REFERENCE, self.config.row_sequences, trained=False)

    def is_frozen(self, name: str) -> bool:
        return name.split("/")[0] == REFERENCE

    def of_weights(self, load: Callable[[Any], Any], places: Any) -> Any:
        """Policy and reference are loaded each for itself: a run that goes on asks for the reference alone."""
        policy, reference = split(places, self.is_frozen)
        return join(load(policy) if policy else {}, {REFERENCE: load(reference[REFERENCE])})

    def counts(self, rows: RankedRows) -> Array:
        """The number of pairs."""
        return jnp.sum(is_better(rows.ranks), dtype=jnp.float32)

    def loss(self, params: Any, rows: RankedRows, counts: Array, key: Array | None) -> Array:
        """rows [b, ...] -> their part in the mean nats of `counts` pairs; a key of None switches dropout off."""
        rewards = self._rewards(self.log_probs(params, rows, key), self.log_probs(params[REFERENCE], rows, None))
        with jax.named_scope("loss"):
            smoothing = self.config.dpo.label_smoothing
            return dpo_loss(**_pairs(rewards, rows.ranks), label_smoothing=smoothing, count=counts)

    def log_probs(self, params: Any, rows: RankedRows, key: Array | None) -> Array:
        """float32 [b, K] of rows [b, ...]: each reply's log-probability given its prompt, in nats, its end token's
        among it; 0 where there is no reply."""
        length, c = rows.tokens.shape[-1], self.config.model
        tokens, targets = (ids.reshape(-1, length) for ids in (rows.tokens, _said(rows)))
        hidden, head, targets = self.network.before_head(params, Rows(tokens, targets), key)
        with jax.named_scope("loss"):
            each = log_probs(hidden, head, targets, c.vocab_size, c.loss_chunk)
            each, mask = (x.reshape(len(x), -1) for x in (each, targets != IGNORED))
            return row_sums(each, mask=mask).reshape(rows.ranks.shape)

    def _rewards(self, policy: Any, reference: Any) -> Any:
        """Of log-probabilities [..., K]."""
        return implicit_rewards(logprobs=policy, ref_logprobs=reference, beta=self.config.dpo.beta)

    def evaluate(self, params: Any, place: Callable[[RankedRows], RankedRows], rows: Sequence[int]) -> dict[str, Any]:
        """`pairs.figures`, whose scores are implicit rewards, with the loss that is trained; margin: mean reward of the
        better reply of a pair less that of the worse; chosen_logprob, rejected_logprob: their mean log-probabilities
        in nats. Both of these fall where a policy unlearns to speak."""
        policy, reference, ranks = self._over_evaluation(params, place, rows)
        rewards, better = self._rewards(policy, reference), is_better(ranks)
        pairs = _pairs(rewards, ranks) | {"count": better.sum()}
        found = {
            "loss": dpo_loss(**pairs, label_smoothing=self.config.dpo.label_smoothing),
            "margin": dpo_margin(**pairs),
            "chosen_logprob": masked_mean(jnp.asarray(policy)[..., :, None], mask=better),
            "rejected_logprob": masked_mean(jnp.asarray(policy)[..., None, :], mask=better),
        }
        return figures(rewards, ranks) | {name: float(value) for name, value in found.items()}

    def _judged(self, params: Any, rows: RankedRows) -> tuple[Array, Array, Array]:
        """Log-probabilities by policy and reference, and ranks."""
        return self.log_probs(params, rows, None), self.log_probs(params[REFERENCE], rows, None), rows.ranks


def _said(rows: RankedRows) -> Array:
    """int32 [..., K, T]: the id after each token where that is the reply's, its end token among them; else PADDING."""
    here = jnp.arange(rows.tokens.shape[-1])
    is_said = (rows.first[..., None] <= here + 1) & (here < rows.last[..., None])
    return jnp.where(is_said, jnp.roll(rows.tokens, -1, axis=-1), PADDING)


def _pairs(rewards: Any, ranks: Any) -> dict[str, Any]:
    """What the losses take, of rewards and ranks [..., K]: [..., K, K], the first reply the better one in the mask."""
    return {
        "chosen_rewards": rewards[..., :, None],
        "rejected_rewards": rewards[..., None, :],
        "mask": is_better(ranks),
    }
