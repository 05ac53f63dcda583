"""Tiny Shakespeare, character by character, on 2 CPU cores: validation loss at most 1.88 nats in 2000 steps.

    gptjax train configs/shakespeare_cpu.py --data.source PATH/tinyshakespeare.txt
The text is ASCII, so a byte is a character. First 90% to train on, last 10% to evaluate, as nanoGPT does.
Compiled for cpu-1: 0.0613 GB a device.
"""

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

STEPS, BATCH, CONTEXT = 2000, 12, 64


def config() -> Config:
    return Config(
        name="shakespeare_cpu",
        model=ModelConfig(num_layers=4, num_heads=4, embed_dim=128, seq_len=CONTEXT, vocab_size=257, scan_layers=False),
        data=DataConfig(
            source="tinyshakespeare.txt",
            max_chars=1024,  # one file is one document: short records make the shuffle a shuffle
            train_split="train[:90%]",
            eval_split="train[90%:]",
            split_by="position",
            lanes=BATCH,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            final_ratio=0.03,
            warmup_tokens=100 * BATCH * CONTEXT,
            decay_tokens=STEPS * BATCH * CONTEXT,
            b2=0.99,  # few tokens per step: a longer average of the squared gradient
        ),
        train=TrainConfig(
            batch_size=BATCH,
            total_tokens=STEPS * BATCH * CONTEXT,
            log_interval=100,
            eval_interval=500,
            eval_batches=-1,
            save_interval=500,
        ),
    )
