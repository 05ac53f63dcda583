"""What a run is, and how a user's words become one: the sections (`schema`), how their fields are checked (`fields`)
and agree with each other (`check`), and the ways in: Python files and the command line (`load`), saved JSON (`saved`).
Nothing here imports JAX, so that a wrong config fails before anything is compiled.
"""

from gptjax.config.check import nearest_divisor, validate
from gptjax.config.saved import from_json, to_json
from gptjax.config.schema import (
    LAYOUT_PRESETS,
    STAGES,
    Config,
    DataConfig,
    DialogueConfig,
    DPOConfig,
    LayoutConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    PreferenceConfig,
    RankedConfig,
    RankingConfig,
    RewardConfig,
    SFTConfig,
    SourceConfig,
    TrainConfig,
)

__all__ = [
    "LAYOUT_PRESETS",
    "STAGES",
    "Config",
    "DPOConfig",
    "DataConfig",
    "DialogueConfig",
    "LayoutConfig",
    "LoRAConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreferenceConfig",
    "RankedConfig",
    "RankingConfig",
    "RewardConfig",
    "SFTConfig",
    "SourceConfig",
    "TrainConfig",
    "from_json",
    "nearest_divisor",
    "to_json",
    "validate",
]
