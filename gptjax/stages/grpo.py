"""GRPO: a policy that learns which of its own replies to a prompt are better than the others (DeepSeekMath, arXiv
2402.03300). There is no value model, and the KL to the reference is a term of the loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import GroupPolicyConfig
from gptjax.data.rows import PADDING
from gptjax.rl.losses import clip_fraction, grpo_loss, ratio_error
from gptjax.rl.returns import group_advantages, penalised
from gptjax.stages.on_policy import Judged, OnPolicy
from gptjax.stages.rollout import Rollout


class Compared(NamedTuple):
    """Replies to learn from, in rows of T places."""

    tokens: Any
    targets: Any
    """int32 [..., T]; see rollout.Drawn."""
    logprobs: Any
    ref_logprobs: Any
    """float32 [..., T]: of each target when it was drawn, and by the reference."""
    advantages: Any
    """float32 [...], one a reply."""


class GRPO(OnPolicy):
    """A policy alone."""

    config: GroupPolicyConfig

    @property
    def group(self) -> int:  # type: ignore[override]
        return self.config.grpo.group

    @property
    def row(self) -> Compared:
        """The shapes of one row."""
        length = (self.config.model.seq_len,)
        ids, each = jax.ShapeDtypeStruct(length, np.int32), jax.ShapeDtypeStruct(length, np.float32)
        return Compared(ids, ids, each, each, jax.ShapeDtypeStruct((), np.float32))

    def random_rows(self, seed: int, lead: tuple[int, ...]) -> Compared:
        """Rows [*lead, T] of `random_replies`."""
        rng = np.random.default_rng(seed)
        tokens, targets = self.random_replies(rng, lead)
        a, b = ((rng.normal(size=(2, *tokens.shape)) - 5) * (targets != PADDING)).astype(np.float32)
        return Compared(tokens, targets, a, b, rng.normal(size=lead).astype(np.float32))

    def rows(
        self, params: Any, made: Rollout, found: Judged, scores: np.ndarray, iteration: int
    ) -> tuple[Compared, dict[str, float]]:
        c = self.config.grpo
        rewards = penalised(scores=jnp.asarray(scores), ended=jnp.asarray(made.ended), penalty=c.missing_end)
        groups = rewards.reshape(-1, c.group)
        advantages = np.asarray(group_advantages(scores=groups, scale_by_std=c.scale_by_std)).ravel()
        rows = Compared(
            made.drawn.tokens, made.drawn.targets, found.logprobs, np.asarray(found.ref_logprobs), advantages
        )
        equal = jnp.mean(groups.max(-1) == groups.min(-1))
        return rows, {"reward": float(rewards.mean()), "equal_groups": float(equal)}

    def loss_and_figures(
        self, params: Any, rows: Compared, counts: Any, key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """rows [b, ...] -> their part in the loss, a mean over `counts` tokens."""
        c, mask = self.config.grpo, rows.targets != PADDING
        logprobs, entropy = self.log_probs(params, rows)
        about = {"logprobs": logprobs, "old_logprobs": rows.logprobs, "mask": mask}
        loss = grpo_loss(
            **about,
            ref_logprobs=rows.ref_logprobs if c.kl_coef else None,
            response_advantages=rows.advantages,
            clip=c.clip,
            beta=c.kl_coef,
            count=counts,
        )
        clipped = clip_fraction(**about, advantages=rows.advantages[..., None], clip=c.clip, count=counts)
        figures = {
            "clip_fraction": clipped,
            "entropy": jnp.sum(entropy) / counts,
            "ratio_error": ratio_error(**about),
        }
        return loss, figures
