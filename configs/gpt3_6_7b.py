"""GPT-3 6.7B: 32 layers of width 4096. Hardware: 64 x TPU v5p.

    gptjax train configs/gpt3_6_7b.py --data.source 'text/*.jsonl' --data.tokenizer gpt2:DIR

The ramp starts at 128 sequences, two for each chip, where the paper starts at 16. 56% of the peak by
`gptjax plan`; one sequence, all weights over 64 chips and remat full: 34%. Over three axes of a torus this
compiler gathers by sums, twice the bytes; 16 chips lie on two.

Compiled for v5p-128: 29.3 GB a device.
"""

from dataclasses import replace

from gpt3_125m import config as base_config

from gptjax.config import Config, LayoutConfig


def config() -> Config:
    base = base_config()
    return replace(
        base,
        name="gpt3_6_7b",
        model=replace(base.model, num_layers=32, num_heads=32, embed_dim=4096, remat="none"),
        data=replace(base.data, lanes=64),
        optimizer=replace(base.optimizer, learning_rate=1.2e-4),
        train=replace(base.train, batch_size=1024, micro_batch_size=128, ramp_start=128, ramp_tokens=12_000_000_000),
        layout=LayoutConfig(data=4, fsdp=16, tensor=1),
    )
