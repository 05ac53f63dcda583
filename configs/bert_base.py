"""BERT base (arXiv 1810.04805), which learns hidden words and whether sentences follow. Hardware: 16 x TPU v5e.

    gptjax train configs/bert_base.py --data.source 'text/*.jsonl' --data.tokenizer DIR

110M parameters; 1M steps of 256 rows, warm-up over 10,000 of them, and linear to 0. All rows have 512 tokens; the
paper's have 128 in the first 90% of the steps. DIR is a folder with BERT's tokenizer.json, of 30,522 pieces.

Compiled for v5e-16: 3.85 GB a device.
"""

from gptjax.config import LayoutConfig, MaskedConfig, ModelConfig, OptimizerConfig, TrainConfig, WindowConfig


def config() -> MaskedConfig:
    block = ModelConfig(
        num_layers=12,
        num_heads=12,
        embed_dim=768,
        seq_len=512,
        vocab_size=30522,
        dropout=0.1,
        norm_eps=1e-12,
        norm_place="after",
        norm_embedding=True,
        activation="gelu",
        causal=False,
        token_types=2,
        head_bias=True,
    )
    adam = dict(b2=0.999, eps=1e-6, weight_decay=0.01, decay="linear", final_ratio=0, decay_tokens=0)
    return MaskedConfig(
        name="bert_base",
        model=block,
        data=WindowConfig(source="text/*.jsonl", tokenizer="bert-tokenizer"),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_tokens=10_000 * 256 * 512, **adam),
        train=TrainConfig(batch_size=256, total_tokens=1_000_000 * 256 * 512),
        layout=LayoutConfig(fsdp=16),
    )
