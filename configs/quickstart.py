"""The main job in small: learns Python from the standard library's own source, in a vocabulary made of it. 2 CPU
cores, under 3 minutes.

gptjax train configs/quickstart.py

Compiled for cpu-1: 0.0974 GB a device.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def config() -> Config:
    return Config(
        name="quickstart",
        model=ModelConfig(
            num_layers=4,
            num_heads=4,
            embed_dim=128,
            seq_len=128,
            vocab_size=2048,
            attention_pattern=("dense", "banded"),
            window=32,
            scan_layers=False,
        ),
        data=DataConfig(source="stdlib", tokenizer="sentencepiece:2048", max_chars=8192, lanes=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_tokens=100_000, final_ratio=0.03, decay_tokens=901_120),
        train=TrainConfig(
            batch_size=8,
            total_tokens=901_120,
            log_interval=50,
            eval_interval=440,
            sample_interval=440,
            sample_prompt="def ",
            save_interval=220,
        ),
    )
