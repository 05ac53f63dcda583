"""GPT-2 350M: 24 layers of width 1024. Hardware: 1 x H100 or 8 x A100.

gptjax train configs/gpt2_350m.py --data.source 'text/*.jsonl' --data.tokenizer gpt2:DIR

Compiled for h100-1x1: 41.44 GB a device.
"""

from dataclasses import replace

from gpt2_124m import config as base_config

from gptjax.config import Config


def config() -> Config:
    base = base_config()
    return replace(
        base,
        name="gpt2_350m",
        model=replace(base.model, num_layers=24, num_heads=16, embed_dim=1024),
        optimizer=replace(base.optimizer, learning_rate=3e-4),
        train=replace(base.train, micro_batch_size=16),
    )
