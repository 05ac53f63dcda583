"""GPT-2 774M: 36 layers of width 1280. Hardware: 1 x H100 or 8 x A100.

gptjax train configs/gpt2_774m.py --data.source 'text/*.jsonl' --data.tokenizer gpt2:DIR

Compiled for h100-1x1: 46.95 GB a device.
"""

from dataclasses import replace

from gpt2_124m import config as base_config

from gptjax.config import Config


def config() -> Config:
    base = base_config()
    return replace(
        base,
        name="gpt2_774m",
        model=replace(base.model, num_layers=36, num_heads=20, embed_dim=1280),
        optimizer=replace(base.optimizer, learning_rate=2.5e-4),
        train=replace(base.train, micro_batch_size=8),
    )
