"""GPT-3 13B: 40 layers of width 5120. Hardware: 128 x TPU v5p.

    gptjax train configs/gpt3_13b.py --data.source 'text/*.jsonl' --data.tokenizer gpt2:DIR

The paper prints a width of 5140; 40 heads of 128 make 5120. The ramp starts at two
sequences a chip. 57% of the peak by `gptjax plan`; see gpt3_6_7b for what the layout is about.

Compiled for v5p-256: 27.3 GB a device.
"""

from dataclasses import replace

from gpt3_125m import config as base_config

from gptjax.config import Config, LayoutConfig


def config() -> Config:
    base = base_config()
    return replace(
        base,
        name="gpt3_13b",
        model=replace(base.model, num_layers=40, num_heads=40, embed_dim=5120, remat="dots"),
        data=replace(base.data, lanes=128),
        optimizer=replace(base.optimizer, learning_rate=1e-4),
        train=replace(base.train, batch_size=1024, micro_batch_size=256, ramp_start=256, ramp_tokens=12_000_000_000),
        layout=LayoutConfig(data=4, fsdp=32, tensor=1),
    )
