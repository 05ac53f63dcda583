"""GRPO with a Python reward, from a fine-tuned run: no value model and no reward model. 2 CPU cores, an hour.

gptjax train configs/grpo.py --init_from runs/sft --reward exact.py:reward --data.source prompts.jsonl

The function is given prompt, reply and, where it takes a third argument, the record's answer. Eight replies a prompt
and the KL in the loss are DeepSeekMath's recipe in small (arXiv 2402.03300: 64, 0.04, a learning rate of 1e-6).

Compiled for cpu-1: 0.103 GB a device.
"""

from dataclasses import replace

from gptjax.config import GroupPolicyConfig, GRPOConfig, OptimizerConfig, PromptConfig, RolloutConfig, TrainConfig
from gptjax.stages.weights import chat_model


def config(init_from: str = "runs/sft") -> GroupPolicyConfig:
    return GroupPolicyConfig(
        name="grpo",
        model=replace(chat_model(init_from), dropout=0.0),
        init_from=init_from,
        reward="reward.py:reward",
        data=PromptConfig(source="prompts/*.jsonl"),
        grpo=GRPOConfig(group=8, kl_coef=0.04),
        rollout=RolloutConfig(episodes=128, max_tokens=64),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_tokens=0, decay_tokens=0, weight_decay=0.0),
        train=TrainConfig(
            batch_size=128,
            micro_batch_size=8,
            total_steps=100,
            log_interval=1,
            eval_interval=20,
            save_interval=20,
            eval_batches=8,
            sample_interval=20,
            sample_prompt="What is 2 + 3?",
        ),
    )
