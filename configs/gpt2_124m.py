"""GPT-2 124M (Radford et al. 2019) on 10B tokens of FineWeb-like text. Hardware: 1 x H100 or 8 x A100.

gptjax train configs/gpt2_124m.py --data.source 'text/*.jsonl' --data.tokenizer gpt2:DIR

Compiled for h100-1x1: 29.06 GB a device.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def config() -> Config:
    return Config(
        name="gpt2_124m",
        model=ModelConfig(
            num_layers=12, num_heads=12, embed_dim=768, seq_len=1024, vocab_size=50257, scan_layers=False
        ),
        data=DataConfig(
            source="text/*.jsonl", tokenizer="gpt2:gpt2-bpe", train_split="train[:99%]", eval_split="train[99%:]"
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_tokens=375_000_000, decay_tokens=10_000_000_000),
        train=TrainConfig(batch_size=512, micro_batch_size=32, total_tokens=10_000_000_000),
    )
