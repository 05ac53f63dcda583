"""PPO-ptx with InstructGPT's numbers (arXiv 2203.02155, appendix C), on any fine-tuned run with its reward model.

gptjax train configs/ppo_instructgpt.py --init_from runs/sft --reward runs/reward --data.source prompts.jsonl
    --ptx.source text.jsonl

256,000 replies, 512 an iteration, learned from once in batches of 64, with 8 rows of pretraining text for each. The
paper prints no learning rate of the policies it released; above 8.05e-6 runs without the text diverged. It warms up
over 10 iterations from a tenth, here from 0.

Compiled for cpu-1: 0.801 GB a device with a function; a reward model comes on top.
"""

from dataclasses import replace

from gptjax.config import OptimizerConfig, PolicyConfig, PPOConfig, PromptConfig, RolloutConfig, TrainConfig
from gptjax.stages.weights import chat_model


def config(init_from: str = "runs/sft") -> PolicyConfig:
    model = replace(chat_model(init_from), dropout=0.0)
    warmup = 10 * 512 * model.seq_len
    adam = OptimizerConfig(learning_rate=8e-6, final_ratio=1.0, warmup_tokens=warmup, decay_tokens=0, weight_decay=0.0)
    return PolicyConfig(
        name="ppo_instructgpt",
        model=model,
        init_from=init_from,
        reward="runs/reward",
        data=PromptConfig(source="prompts/*.jsonl"),
        ppo=PPOConfig(kl_coef=0.02, ptx_coef=27.8, ptx_rows=8, value_learning_rate=9e-6, ema_decay=0.992),
        rollout=RolloutConfig(episodes=512, max_tokens=model.seq_len // 2),
        optimizer=adam,
        train=TrainConfig(batch_size=64, micro_batch_size=8, total_steps=500, log_interval=1, eval_interval=50),
    )
