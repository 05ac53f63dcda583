"""PPO: a policy and a value model that learn from rewards token by token (InstructGPT, arXiv 2203.02155, section 3.5).

Beside the policy stand its `value` model, which starts as the reward model or, where a function judges, as the policy
with a new scalar head; and what a step carries: the coefficient of the KL and, if it is asked for, the `average` of the
policy's weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from gptjax.config import Config, PolicyConfig
from gptjax.data.rows import PADDING, Rows
from gptjax.data.sources import Corpus
from gptjax.data.stream import TokenStream, require_one_row
from gptjax.data.texts import build, stream
from gptjax.model.accounting import Reading
from gptjax.model.loss import cross_entropy
from gptjax.model.scalar import NAME, init_head, is_head, read_each
from gptjax.parallel.network import Network
from gptjax.rl.control import ema, next_beta
from gptjax.rl.losses import clip_fraction, explained_variance, policy_loss, ratio_error, value_loss
from gptjax.rl.responses import whiten
from gptjax.rl.returns import gae, penalised, token_rewards
from gptjax.stages.on_policy import Judged, OnPolicy
from gptjax.stages.rollout import Rollout

VALUE, AVERAGE, KL_COEF = "value", "average", "kl_coef"


class Episodes(NamedTuple):
    """Replies to learn from, in rows of T places."""

    tokens: Any
    targets: Any
    """int32 [..., T]; see rollout.Drawn."""
    logprobs: Any
    """float32 [..., T]: of each target when it was drawn."""
    values: Any
    advantages: Any
    returns: Any
    next_kl_coef: Any
    """float32 [...]: that of the next iteration, the same in every row."""
    ptx: Any = None
    """Rows [..., P, T] of pretraining text beside each reply, or None."""


class Worth(NamedTuple):
    """What an iteration's replies earned."""

    advantages: Any
    """float32 [E, T]: whitened over all of them."""
    returns: Any
    reward: Any
    """Mean score, that of a missing end among them."""
    explained: Any
    """Share of the returns' variance that values foretold."""


class PPO(OnPolicy):
    """A policy and its value model."""

    config: PolicyConfig
    apart = (VALUE,)

    @property
    def unit_reward(self) -> bool:  # type: ignore[override]
        return self.config.ppo.unit_reward

    @property
    def beside(self) -> tuple[str, ...]:
        return (*super().beside, VALUE, AVERAGE, KL_COEF)

    def init(self, key: Array) -> Any:
        every = super().init(key)
        every[VALUE] = self._first_value(key)
        every[KL_COEF] = nn.LogicallyPartitioned(jnp.float32(self.config.ppo.kl_coef), ())
        if self.config.ppo.ema_decay:
            every[AVERAGE] = self.network.init(key)
        return every

    def _first_value(self, key: Array) -> Any:
        if self.reward_model:
            return self.reward_model.init(key)
        return self.network.init(key) | {NAME: init_head(jax.random.fold_in(key, 1), self.config.model.embed_dim)}

    @staticmethod
    def decoder_at(config: Config) -> tuple[str, ...]:
        """The average, where there is one."""
        averaged = isinstance(config, PolicyConfig) and config.ppo.ema_decay
        return ("carried", AVERAGE) if averaged else ("params",)

    def is_carried(self, name: str) -> bool:
        return name.split("/")[0] in (AVERAGE, KL_COEF)

    def is_born(self, name: str) -> bool:
        value, _, rest = name.partition("/")
        return name == KL_COEF or (value == VALUE and is_head(rest) and self.reward_model is None)

    @property
    def rates(self) -> Mapping[str, float]:
        return {VALUE: self.config.ppo.value_learning_rate / self.config.optimizer.learning_rate}

    def weights_of(self, name: str, load: Callable[[Any], Any], places: Any) -> Any:
        return self.scorer.restore(places) if name == VALUE and self.scorer else super().weights_of(name, load, places)

    @cached_property
    def _value_network(self) -> Network:
        return self.reward_model.network if self.reward_model else self.network

    @property
    def _value_model(self) -> Reading:
        return Reading(self._as_read(self._value_network.config.model), VALUE, predicts=False)

    @property
    def learning(self) -> tuple[Reading, ...]:
        c = self.config
        text = (Reading(c.model, sequences=c.ppo.ptx_rows),) if c.ppo.ptx_coef else ()
        return *super().learning, self._value_model, *text

    @property
    def judging(self) -> tuple[Reading, ...]:
        return *super().judging, replace(self._value_model, trained=False)

    def values(self, params: Any, rows: Any) -> Array:
        network = self._value_network
        hidden, _, _ = network.before_head(params[VALUE], Rows(rows.tokens, rows.targets), None)
        return network.in_order(read_each(params[VALUE][NAME], hidden))

    # An iteration

    @property
    def row(self) -> Episodes:
        """The shapes of one row."""
        length = (self.config.model.seq_len,)
        ids, each = jax.ShapeDtypeStruct(length, np.int32), jax.ShapeDtypeStruct(length, np.float32)
        text = jax.ShapeDtypeStruct((self.config.ppo.ptx_rows, *length), np.int32)
        ptx = Rows(text, text) if self.config.ppo.ptx_coef else None
        return Episodes(ids, ids, each, each, each, each, jax.ShapeDtypeStruct((), np.float32), ptx)

    def random_rows(self, seed: int, lead: tuple[int, ...]) -> Episodes:
        """Rows [*lead, T] of `random_replies`."""
        rng, length = np.random.default_rng(seed), self.config.model.seq_len
        tokens, targets = self.random_replies(rng, lead)
        a, b, c, d = (rng.normal(size=(4, *tokens.shape)) * (targets != PADDING)).astype(np.float32)
        text = rng.integers(0, self.config.model.vocab_size, (*lead, self.config.ppo.ptx_rows, length), np.int32)
        ptx = Rows(text, np.roll(text, -1, -1)) if self.config.ppo.ptx_coef else None
        return Episodes(tokens, targets, a - 5, b, c, d, np.full(lead, self.config.ppo.kl_coef, np.float32), ptx)

    def rows(
        self, params: Any, made: Rollout, found: Judged, scores: np.ndarray, iteration: int
    ) -> tuple[Episodes, dict[str, float]]:
        c, beta, mask = self.config.ppo, float(params[KL_COEF]), made.drawn.targets != PADDING
        worth: Worth = jax.device_get(self._worth(found, scores, made.ended, mask, beta))
        kl, episodes = float(((found.logprobs - found.ref_logprobs) * mask).sum() / len(mask)), len(mask)
        coef = next_beta(beta=beta, kl=kl, episodes=episodes, target=c.kl_target or None, horizon=c.kl_horizon)
        rows = Episodes(
            made.drawn.tokens,
            made.drawn.targets,
            found.logprobs,
            found.values * mask,
            worth.advantages * (iteration >= c.value_warmup),  # no advantage, no gradient of the policy
            worth.returns,
            np.full(episodes, coef, np.float32),
        )
        more = {"kl_coef": beta, "reward": float(worth.reward), "explained_variance": float(worth.explained)}
        return rows, more

    @cached_property
    def _worth(self) -> Callable[..., Worth]:
        """jit of (Judged, scores [E], ended [E], mask [E, T], coefficient of the KL) -> Worth."""
        c = self.config.ppo

        def worth(found: Judged, scores: Array, ended: Array, mask: Array, beta: Array) -> Worth:
            final = penalised(scores=scores, ended=ended, penalty=c.missing_end)
            log = {"logprobs": found.logprobs, "ref_logprobs": found.ref_logprobs}
            rewards = token_rewards(**log, scores=final, mask=mask, beta=beta)
            if c.whiten_rewards:
                rewards = whiten(rewards, mask=mask, shift_mean=False)
            advantages, returns = gae(rewards=rewards, values=found.values, mask=mask, gamma=c.gamma, lam=c.gae_lambda)
            explained = explained_variance(values=found.values, returns=returns, mask=mask)
            return Worth(whiten(advantages, mask=mask, shift_mean=True), returns, jnp.mean(final), explained)

        return jax.jit(worth)

    def check(self) -> None:
        super().check()
        if self.config.ppo.ptx_coef:
            text = self._ptx_corpus.split(self.config.ptx.train_split, self.config.ptx.split_by)
            require_one_row(text, self.known_tokenizer, self.config.model.seq_len)

    @property
    def beside_text(self) -> dict[str, str]:
        return super().beside_text | ({"ptx.source": self._ptx_corpus.digest} if self.config.ppo.ptx_coef else {})

    @cached_property
    def _ptx_corpus(self) -> Corpus:
        """Built when the first process checks the stage; the others find it."""
        return build(self.config.ptx, self.report)

    def text(self, positions: Sequence[int] | None, rows: Sequence[int]) -> TokenStream | None:
        c, each = self.config, self.config.ppo.ptx_rows
        if not c.ppo.ptx_coef:
            return None
        return stream(
            c.ptx,
            self._ptx_corpus,
            self.known_tokenizer,
            c.model.seq_len,
            micro_batch=c.micro_batch_size * each,
            rows=[row * each + i for row in rows for i in range(each)],
            positions=positions,
        )

    # Learning

    def counts(self, rows: Episodes) -> Any:
        """The numbers of drawn tokens and of targets in the pretraining text."""
        text = 0.0 if rows.ptx is None else jnp.sum(rows.ptx.targets != PADDING, dtype=jnp.float32)
        return {"tokens": super().counts(rows), "ptx": jnp.float32(text)}

    def loss_and_figures(
        self, params: Any, rows: Episodes, counts: Any, key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """rows [b, ...] -> their part in the loss of policy and value, each a mean over tokens, and of the text."""
        c, mask, tokens = self.config.ppo, rows.targets != PADDING, counts["tokens"]
        logprobs, entropy = self.log_probs(params, rows)
        about = {"logprobs": logprobs, "old_logprobs": rows.logprobs, "mask": mask}
        clipped = about | {"advantages": rows.advantages, "clip": c.clip, "count": tokens}
        policy = policy_loss(**clipped)
        values, old, returns = self.values(params, rows), rows.values, rows.returns
        value = value_loss(values=values, old_values=old, returns=returns, mask=mask, clip=c.value_clip, count=tokens)
        figures = {
            "policy_loss": policy,
            "value_loss": value,
            "clip_fraction": clip_fraction(**clipped),
            "entropy": jnp.sum(entropy) / tokens,
            "ratio_error": ratio_error(**about),
        }
        if rows.ptx is None:
            return policy + value, figures
        nats = self._text_nats(params, rows.ptx) / counts["ptx"]
        return policy + value + c.ptx_coef * nats, figures | {"ptx_loss": nats}

    def _text_nats(self, params: Any, ptx: Rows) -> Array:
        c, flat = self.config.model, jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), ptx)
        hidden, head, targets = self.network.before_head(params, flat, None)
        return cross_entropy(hidden, head, targets, c.vocab_size, c.loss_chunk)

    def carry(self, carried: Any, params: Any, rows: Episodes) -> Any:
        new = {KL_COEF: rows.next_kl_coef.ravel()[0]}
        if AVERAGE in carried:
            average = carried[AVERAGE]
            new[AVERAGE] = ema(average=average, params=self.policy_of(params), decay=self.config.ppo.ema_decay)
        return new
