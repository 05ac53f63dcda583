"""GPT-3 760M: 24 layers of width 1536. Hardware: 16 x TPU v5e.

gptjax train configs/gpt3_760m.py --data.source 'text/*.jsonl' --data.tokenizer gpt2:DIR

Compiled for v5e-16: 3.23 GB a device.
"""

from dataclasses import replace

from gpt3_125m import config as base_config

from gptjax.config import Config, LayoutConfig


def config() -> Config:
    base = base_config()
    return replace(
        base,
        name="gpt3_760m",
        model=replace(base.model, num_layers=24, num_heads=16, embed_dim=1536, remat="dots"),
        data=replace(base.data, lanes=16),
        optimizer=replace(base.optimizer, learning_rate=2.5e-4),
        train=replace(base.train, batch_size=256, micro_batch_size=16, ramp_start=16, ramp_tokens=4_000_000_000),
        layout=LayoutConfig(fsdp=16, tensor=1),
    )
