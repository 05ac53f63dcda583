"""TinyLlama 1.1B, the shapes of LLaMA at a size that one pod slice trains (arXiv 2401.02385). Hardware: 16 x TPU v5p.

    gptjax train configs/llama_1b.py --data.source 'text/*.jsonl' --data.tokenizer DIR

22 layers of 2048, 32 heads of queries that share 4 of keys and values, a gated MLP of 5632, rotary positions; 3T tokens
in batches of 2M, cosine to a tenth. DIR is a folder with LLaMA's tokenizer.json or tokenizer.model.

Compiled for v5p-32: 67.39 GB a device.
"""

from gptjax.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimizerConfig, TrainConfig


def config() -> Config:
    block = ModelConfig(
        num_layers=22,
        num_heads=32,
        embed_dim=2048,
        vocab_size=32000,
        num_kv_heads=4,
        mlp_size=5632,
        norm="rms",
        positions="rotary",
        activation="swiglu",
        qkv_bias=False,
        biases=False,
        tied_head=False,
    )
    return Config(
        name="llama_1b",
        model=block,
        data=DataConfig(source="text/*.jsonl", tokenizer="llama-tokenizer", lanes=16),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_tokens=4_000_000_000, decay_tokens=0),
        train=TrainConfig(batch_size=1024, micro_batch_size=256, total_tokens=3_000_000_000_000),
        layout=LayoutConfig(fsdp=16),
    )
