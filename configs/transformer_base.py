"""The Transformer of 2017, base (arXiv 1706.03762), for translations. Hardware: 8 x TPU v5e.

    gptjax train configs/transformer_base.py --data.source 'pairs/*.jsonl' --data.tokenizer DIR

63M parameters; 100,000 steps. A row has a pair of at most 128 + 128 tokens; 1,024 pairs of sentences, of some 25 tokens
a side, are the paper's 25,000 + 25,000. DIR is a folder with a tokenizer.json of 37,000 pieces for both languages.

Compiled for v5e-8: 9.08 GB a device.
"""

from dataclasses import replace

from gptjax.config import LayoutConfig, ModelConfig, OptimizerConfig, PairConfig, Seq2SeqConfig, TrainConfig
from gptjax.config import WritingConfig as Writing


def config() -> Seq2SeqConfig:
    sides = dict(num_layers=6, num_heads=8, embed_dim=512, seq_len=128, vocab_size=37000, dropout=0.1)
    like_2017 = dict(norm_place="after", positions="sinusoidal", scale_embedding=True, activation="relu")
    encoder = ModelConfig(**sides, **like_2017, causal=False)
    peak = 512**-0.5 * 4000**-0.5
    adam = dict(b2=0.98, eps=1e-9, weight_decay=0, clip_norm=1e9, decay="root")
    return Seq2SeqConfig(
        name="transformer_base",
        model=replace(encoder, causal=True, cross_attention=True),
        encoder=encoder,
        data=PairConfig(source="pairs/*.jsonl", tokenizer="shared-pieces", too_long="drop"),
        writing=Writing(label_smoothing=0.1, beams=4, length_penalty=0.6),
        optimizer=OptimizerConfig(learning_rate=peak, warmup_tokens=4_000 * 1024 * 256, **adam),
        train=TrainConfig(batch_size=1024, total_tokens=100_000 * 1024 * 256),
        layout=LayoutConfig(fsdp=8),
    )
