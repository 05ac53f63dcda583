"""Supervised fine-tuning on conversations, from the run of the quickstart or whatever else: 2 CPU cores, minutes.

gptjax train configs/sft.py --init_from runs/quickstart --data.source dialogues.jsonl

The assistant's words alone are learned. A residual dropout of 0.2, a cosine to 10% and no warm-up are InstructGPT's
(arXiv 2203.02155, appendix C); its learning rate is for models a thousand times as large.

Compiled for cpu-1: 0.106 GB a device.
"""

from dataclasses import replace

from gptjax.config import DialogueConfig, OptimizerConfig, SFTConfig, TrainConfig
from gptjax.stages.weights import chat_model


def config(init_from: str = "runs/quickstart") -> SFTConfig:
    return SFTConfig(
        name="sft",
        model=replace(chat_model(init_from), dropout=0.2),
        init_from=init_from,
        data=DialogueConfig(source="dialogues/*.jsonl"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_tokens=0, decay_tokens=0, weight_decay=0.0),
        train=TrainConfig(
            batch_size=8,
            epochs=2,
            log_interval=20,
            eval_interval=100,
            save_interval=100,
            keep_best=True,
            sample_prompt="What is 2 + 3?",
        ),
    )
