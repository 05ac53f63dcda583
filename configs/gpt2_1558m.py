"""GPT-2 1558M: 48 layers of width 1600. Hardware: 1 x H200 or 8 x H100.

gptjax train configs/gpt2_1558m.py --data.source 'text/*.jsonl' --data.tokenizer gpt2:DIR

Compiled for h100-8x1: 13.72 GB a device.
"""

from dataclasses import replace

from gpt2_124m import config as base_config

from gptjax.config import Config


def config() -> Config:
    base = base_config()
    return replace(
        base,
        name="gpt2_1558m",
        model=replace(base.model, num_layers=48, num_heads=25, embed_dim=1600),
        optimizer=replace(base.optimizer, learning_rate=2e-4),
        train=replace(base.train, micro_batch_size=8),
    )
