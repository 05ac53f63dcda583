"""PPO with a reward model, from a fine-tuned run: 2 CPU cores, an hour.

gptjax train configs/ppo.py --init_from runs/sft --reward runs/reward --data.source prompts.jsonl

--reward FILE.py:NAME takes a Python function of prompt and reply in its place. Coefficient, clipping and one epoch are
InstructGPT's (arXiv 2203.02155, appendix C), its 512 replies an iteration and its learning rates for 1.3B parameters
and more; the value model learns alone for 5 iterations. With --ppo.kl_target the coefficient follows the KL; with
--ppo.ptx_coef 27.8 pretraining text (--ptx.source) is learned beside the replies.

Compiled for cpu-1: 0.176 GB a device with a function; a reward model comes on top.
"""

from dataclasses import replace

from gptjax.config import OptimizerConfig, PolicyConfig, PPOConfig, PromptConfig, RolloutConfig, TrainConfig
from gptjax.stages.weights import chat_model


def config(init_from: str = "runs/sft") -> PolicyConfig:
    return PolicyConfig(
        name="ppo",
        model=replace(chat_model(init_from), dropout=0.0),
        init_from=init_from,
        reward="runs/reward",
        data=PromptConfig(source="prompts/*.jsonl"),
        ppo=PPOConfig(kl_coef=0.02, value_learning_rate=1e-4, value_warmup=5),
        rollout=RolloutConfig(episodes=128, max_tokens=64),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_tokens=0, decay_tokens=0, weight_decay=0.0, eps=1e-5),
        train=TrainConfig(
            batch_size=32,
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
