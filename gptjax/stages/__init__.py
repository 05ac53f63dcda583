"""What each stage supplies and the one train loop does not know: how its parameters start, the loss of a batch, where
batches come from, evaluation and samples, in one file a stage. `launch` puts a stage together with devices, tokenizer
and text and starts it; `weights` opens what it starts from."""

from typing import TypeAlias

from gptjax.config import Config
from gptjax.stages.base import Base
from gptjax.stages.classify import Classify
from gptjax.stages.denoise import Denoise
from gptjax.stages.grpo import GRPO
from gptjax.stages.masked import Masked
from gptjax.stages.ppo import PPO
from gptjax.stages.preference import Preference
from gptjax.stages.pretrain import Pretrain
from gptjax.stages.reward import Reward
from gptjax.stages.seq2seq import Seq2Seq
from gptjax.stages.sft import SFT

AnyStage: TypeAlias = Pretrain | SFT | Reward | Preference | PPO | GRPO | Masked | Classify | Denoise | Seq2Seq
CLASSES: dict[str, type[AnyStage]] = {
    "pretrain": Pretrain,
    "sft": SFT,
    "reward": Reward,
    "preference": Preference,
    "ppo": PPO,
    "grpo": GRPO,
    "masked": Masked,
    "classify": Classify,
    "denoise": Denoise,
    "seq2seq": Seq2Seq,
}


def stage_class(config: Config) -> type[AnyStage]:
    """What runs the stage of a config."""
    return CLASSES[config.stage]


__all__ = [
    "CLASSES",
    "GRPO",
    "PPO",
    "SFT",
    "AnyStage",
    "Base",
    "Classify",
    "Denoise",
    "Masked",
    "Preference",
    "Pretrain",
    "Reward",
    "Seq2Seq",
    "stage_class",
]
