"""A reward model of ranked replies, from a fine-tuned run: 2 CPU cores, minutes.

gptjax train configs/reward.py --init_from runs/sft --data.source rankings.jsonl

Pairs, or up to 9 replies a prompt with --data.max_replies 9. One epoch and a cosine to 10% are InstructGPT's (arXiv
2203.02155, appendix C: more epochs overfit); its learning rate, 9e-6 in batches of 64 prompts, is for 6B parameters.

Compiled for cpu-1: 0.127 GB a device.
"""

from dataclasses import replace

from gptjax.config import OptimizerConfig, RankingConfig, RewardConfig, TrainConfig
from gptjax.stages.weights import chat_model


def config(init_from: str = "runs/sft") -> RewardConfig:
    return RewardConfig(
        name="reward",
        model=replace(chat_model(init_from), dropout=0.0),
        init_from=init_from,
        data=RankingConfig(source="rankings/*.jsonl"),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_tokens=0, decay_tokens=0, weight_decay=0.0),
        train=TrainConfig(
            batch_size=8,
            epochs=1,
            log_interval=20,
            eval_interval=100,
            save_interval=100,
            eval_batches=-1,
            keep_best=True,
        ),
    )
