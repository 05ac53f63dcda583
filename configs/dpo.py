"""A policy of ranked replies by DPO, without a reward model, from a fine-tuned run: 2 CPU cores, minutes.

gptjax train configs/dpo.py --init_from runs/sft --data.source rankings.jsonl

Pairs, or up to 9 replies a prompt with --data.max_replies 9. A beta of 0.1 and one pass are the paper's (arXiv
2305.18290, appendix B); its learning rate, 1e-6 in batches of 64, is for billions of parameters.

Compiled for cpu-1: 0.177 GB a device.
"""

from dataclasses import replace

from gptjax.config import DPOConfig, OptimizerConfig, PreferenceConfig, RankingConfig, TrainConfig
from gptjax.stages.weights import chat_model


def config(init_from: str = "runs/sft") -> PreferenceConfig:
    return PreferenceConfig(
        name="dpo",
        model=replace(chat_model(init_from), dropout=0.0),
        init_from=init_from,
        data=RankingConfig(source="rankings/*.jsonl"),
        dpo=DPOConfig(beta=0.1),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_tokens=0, decay_tokens=0, weight_decay=0.0),
        train=TrainConfig(
            batch_size=8,
            epochs=1,
            log_interval=20,
            eval_interval=100,
            save_interval=100,
            eval_batches=-1,
            keep_best=True,
            sample_prompt="What is 2 + 3?",
        ),
    )
