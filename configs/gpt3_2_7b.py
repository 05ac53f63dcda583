"""GPT-3 2.7B: 32 layers of width 2560. Hardware: 32 x TPU v5p.

    gptjax train configs/gpt3_2_7b.py --data.source 'text/*.jsonl' --data.tokenizer gpt2:DIR

The ramp starts at 32 sequences, one for each chip, where the paper starts at 16.

Compiled for v5p-64: 3.29 GB a device.
"""

from dataclasses import replace

from gpt3_125m import config as base_config

from gptjax.config import Config, LayoutConfig


def config() -> Config:
    base = base_config()
    return replace(
        base,
        name="gpt3_2_7b",
        model=replace(base.model, num_layers=32, num_heads=32, embed_dim=2560, remat="full"),
        data=replace(base.data, lanes=32),
        optimizer=replace(base.optimizer, learning_rate=1.6e-4),
        train=replace(base.train, batch_size=512, micro_batch_size=32, ramp_start=32, ramp_tokens=4_000_000_000),
        layout=LayoutConfig(fsdp=32, tensor=1),
    )
