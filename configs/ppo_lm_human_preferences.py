"""PPO with the numbers of "Fine-Tuning Language Models from Human Preferences" (arXiv 1909.08593) for sentiment.

gptjax train configs/ppo_lm_human_preferences.py --init_from runs/sft --reward runs/reward
    --data.source prompts.jsonl

A million replies of 24 tokens at temperature 0.7, 512 an iteration, learned from four times at once; rewards are
divided by their deviation, and the coefficient of the KL, 0.15 at first, is steered to 6 nats a reply over 10,000 of
them. There the values are a head on the policy with a tenth of the loss, here a model of their own.

Compiled for cpu-1: 0.605 GB a device with a function; a reward model comes on top.
"""

from dataclasses import replace

from gptjax.config import OptimizerConfig, PolicyConfig, PPOConfig, PromptConfig, RolloutConfig, TrainConfig
from gptjax.stages.weights import chat_model


def config(init_from: str = "runs/sft") -> PolicyConfig:
    return PolicyConfig(
        name="ppo_lm_human_preferences",
        model=replace(chat_model(init_from), dropout=0.0),
        init_from=init_from,
        reward="runs/reward",
        data=PromptConfig(source="prompts/*.jsonl", max_prompt_tokens=64),
        ppo=PPOConfig(kl_coef=0.15, kl_target=6.0, kl_horizon=10_000.0, whiten_rewards=True, value_learning_rate=1e-5),
        rollout=RolloutConfig(episodes=512, epochs=4, max_tokens=24, temperature=0.7),
        optimizer=OptimizerConfig(
            learning_rate=1e-5, final_ratio=0.0, warmup_tokens=0, decay_tokens=0, weight_decay=0.0, eps=1e-5
        ),
        train=TrainConfig(batch_size=512, micro_batch_size=32, total_steps=2000, log_interval=1, eval_interval=100),
    )
