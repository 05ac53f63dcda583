"""What each stage supplies and the one train loop does not know: how its parameters start, the loss of a batch, where
batches come from, evaluation and samples, in one file a stage. `launch` puts a stage together with devices, tokenizer
and text and starts it; `weights` opens what it starts from."""

from gptjax.config import Config
from gptjax.stages.next_token import NextToken
from gptjax.stages.pretrain import Pretrain
from gptjax.stages.sft import SFT

CLASSES: dict[str, type[Pretrain] | type[SFT]] = {"pretrain": Pretrain, "sft": SFT}


def stage_class(config: Config) -> type[Pretrain] | type[SFT]:
    """What runs the stage of a config."""
    return CLASSES[config.stage]


__all__ = ["CLASSES", "SFT", "NextToken", "Pretrain", "stage_class"]
