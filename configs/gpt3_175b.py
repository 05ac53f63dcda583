"""GPT-3 175B: 96 layers of width 12288. Hardware: 512 x TPU v5p (8x8x8).

    gptjax train configs/gpt3_175b.py --data.source 'text/*.jsonl' --data.tokenizer gpt2:DIR

3.1M tokens a step: the paper's 3.2M to a power of two. The ramp starts at half of it, where the paper
starts at 16 sequences: smaller micro-batches would leave 512 chips waiting for weights. Planned at 61% of
the peak (`gptjax plan`); of 256 sequences (fsdp=64, tensor=8, remat full) at 41%.

Compiled for v5p-1024: 82.59 GB a device.
"""

from dataclasses import replace

from gpt3_125m import config as base_config

from gptjax.config import Config, LayoutConfig


def config() -> Config:
    base = base_config()
    return replace(
        base,
        name="gpt3_175b",
        model=replace(base.model, num_layers=96, num_heads=96, embed_dim=12288, remat="dots"),
        data=replace(base.data, lanes=64),
        optimizer=replace(base.optimizer, learning_rate=0.6e-4),
        train=replace(base.train, batch_size=1536, micro_batch_size=768, ramp_start=768, ramp_tokens=12_000_000_000),
        layout=LayoutConfig(fsdp=256, tensor=2, sequence_sharding=True),
    )
