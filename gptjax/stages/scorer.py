"""A trained reward model as a function of token ids: what reinforcement learning is rewarded by."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
from jax import Array

from gptjax import bucket
from gptjax.config import LayoutConfig, RankingConfig, RewardConfig, RewardedConfig
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.sharding.rules import Layout
from gptjax.stages.reward import SCORES, Reward
from gptjax.stages.weights import places, run_and_step
from gptjax.train.checkpoint import chosen_step, restore_params
from gptjax.train.processes import together
from gptjax.train.run import open_run, saved_tokenizer

Score = Callable[[Any, Array, Array], Array]


@dataclass(frozen=True)
class Scorer:
    """A reward model; make one with `load_scorer`."""

    score: Score
    """(params, tokens int32 [B, T], last int32 [B]) -> float32 [B]: of texts in the chat format, from the left, each
    read at the place of its last token (of a reply that was drawn, `rl.responses.extent(...).last`). A pure function,
    to be part of a program."""
    stage: Reward
    restore: Callable[[Any], Any]
    """(shapes with shardings) -> parameters that lie there."""
    tokenizer: Tokenizer
    """Whoever is scored must have the same."""
    statistics: tuple[float, float]
    """Mean and deviation of its scores before they are shifted."""

    @property
    def config(self) -> RewardConfig:
        return self.stage.config

    @cached_property
    def params(self) -> Any:
        """On the first device, or laid out."""
        return self.restore(places(self.stage.init, self.stage.layout))


def load_scorer(
    path: str, layout: Layout | None = None, *, policy: RewardedConfig | None = None, unit: bool = False
) -> Scorer:
    """The reward model of a run folder, or of a checkpoint in it (RUN/checkpoints/STEP), on the first device or laid
    out, as a `policy` is whose replies it scores. Its scores are shifted so that those of held-out replies have mean 0,
    and with `unit` divided by their standard deviation.

    Raises UserError for what is no run of a reward model, and for a checkpoint at whose step nothing was evaluated. All
    processes call it at once.
    """
    step = run_and_step(path)[1]
    run, config = together(lambda: _opened(path))
    step = chosen_step(run, best=config.train.keep_best, step=step)
    mean, std = together(lambda: _statistics(run, step))
    if unit and not std:
        raise UserError(f"{run / SCORES}: all scores of step {step} are equal; nothing can be divided by that")
    if layout is None:
        config = replace(config, layout=LayoutConfig(fsdp=1))
    config = _beside(policy, config) if policy else config
    stage = Reward(config, jax.default_backend() if layout is None else _platform(layout), layout)

    def score(params: Any, tokens: Array, last: Array) -> Array:
        return (stage.scores(params, tokens, last, None) - mean) / (std if unit else 1.0)

    return Scorer(score, stage, partial(restore_params, run, step=step), saved_tokenizer(run), (mean, std))


def unscored(config: RewardedConfig, platform: str, layout: Layout | None) -> Reward:
    """The reward model of a policy's config without weights and scores; see OnPolicy.reward_model. Raises UserError as
    `load_scorer` for a folder that is there."""
    if is_there(config.reward):
        return Reward(_beside(config, _opened(config.reward)[1]), platform, layout)
    alike = RewardConfig("reward", config.model, RankingConfig(config.data.source), init_from=config.init_from)
    return Reward(_beside(config, alike), platform, layout)


def _beside(policy: RewardedConfig, config: RewardConfig) -> RewardConfig:
    """A reward model as it computes beside a policy: on the policy's mesh, of its micro-batches, by its kernels."""
    return replace(config, layout=policy.layout, train=policy.train)


def is_there(path: str) -> bool:
    """Whether there is a folder of that run, or of that checkpoint's run."""
    return bucket.is_address(path) or Path(run_and_step(path)[0]).is_dir()


def _opened(path: str) -> tuple[Path, RewardConfig]:
    """The folder and the config of a run of a reward model, or of a checkpoint in it."""
    run, config = open_run(run_and_step(path)[0])
    if not isinstance(config, RewardConfig):
        raise UserError(f"{path}: a run of stage {config.stage}, not of a reward model; train one: stage reward")
    return run, config


def _platform(layout: Layout) -> str:
    return str(layout.mesh.devices.flat[0].platform)


def _statistics(run: Path, step: int) -> tuple[float, float]:
    """Mean and deviation of the scores that a step gave. Raises UserError where it was not evaluated."""
    remedy = f"gptjax train --resume {bucket.named(run)} does what it still owes, with train.eval_batches above 0"
    known = read_json(run / SCORES, remedy)
    if str(step) not in known:
        raise UserError(
            f"{run / SCORES}: has no step {step}, the checkpoint that is taken, but {', '.join(known) or 'none'}; "
            f"{remedy}, or train with train.keep_best true, which saves at evaluations"
        )
    return float(known[str(step)]["mean"]), float(known[str(step)]["std"])
