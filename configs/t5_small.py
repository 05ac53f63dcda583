"""T5 small (arXiv 1910.10683), which restores spans of a text. Hardware: 8 x TPU v5e.

    gptjax train configs/t5_small.py --data.source 'text/*.jsonl' --data.tokenizer DIR

60M parameters; 2^19 steps of 128 rows, 15% of whose tokens are taken out in spans of 3: 512 tokens to read, 114 to
write. The rate falls with the root of the steps after 10,000; its peak is for Adam, the paper has Adafactor. DIR is a
folder with T5's tokenizer.json; its vocabulary of 32,100 pieces is padded to 32,128.

Compiled for v5e-8: 1.85 GB a device.
"""

from dataclasses import replace

from gptjax.config import DenoiseConfig, LayoutConfig, ModelConfig, OptimizerConfig, TrainConfig, WindowConfig


def config() -> DenoiseConfig:
    sides = dict(num_layers=6, num_heads=8, embed_dim=512, head_size=64, mlp_size=2048, vocab_size=32128, dropout=0.1)
    plain = dict(norm="rms", norm_eps=1e-6, biases=False, qkv_bias=False, scale_scores=False, activation="relu")
    encoder = ModelConfig(**sides, **plain, seq_len=512, positions="relative", causal=False)
    step = 128 * (512 + 114)
    return DenoiseConfig(
        name="t5_small",
        model=replace(encoder, seq_len=114, causal=True, cross_attention=True, scale_head=True),
        encoder=encoder,
        start_id=0,
        data=WindowConfig(source="text/*.jsonl", tokenizer="t5-tokenizer"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_tokens=10_000 * step, decay="root", weight_decay=0),
        train=TrainConfig(batch_size=128, total_tokens=2**19 * step),
        layout=LayoutConfig(fsdp=8),
    )
