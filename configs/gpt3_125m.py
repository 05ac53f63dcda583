"""GPT-3 125M, the smallest row of the paper's table 2.1 and the base of the other seven. Hardware: 8 x TPU v5e.

    gptjax train configs/gpt3_125m.py --data.source 'text/*.jsonl' --data.tokenizer gpt2:DIR

300B tokens in batches ramped from 32k, warm-up over 375M tokens, cosine to 10% at 260B, dense and banded
layers in turn. The paper names neither the window (256 is GPT-Neo's) nor the ramp of each size (4-12B).

Compiled for v5e-8: 1.59 GB a device.
"""

from gptjax.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimizerConfig, TrainConfig


def config() -> Config:
    return Config(
        name="gpt3_125m",
        model=ModelConfig(
            num_layers=12,
            num_heads=12,
            embed_dim=768,
            seq_len=2048,
            vocab_size=50257,
            attention_pattern=("dense", "banded"),
            window=256,
            remat="dots",
        ),
        data=DataConfig(
            source="text/*.jsonl",
            tokenizer="gpt2:gpt2-bpe",
            lanes=8,
            train_split="train[:99%]",
            eval_split="train[99%:]",
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4),  # the other defaults are the paper's
        train=TrainConfig(batch_size=256, micro_batch_size=16, ramp_start=16, ramp_tokens=4_000_000_000),
        layout=LayoutConfig(fsdp=8),
    )
