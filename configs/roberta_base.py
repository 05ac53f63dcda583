"""RoBERTa base (arXiv 1907.11692): BERT base without pairs of sentences, in large batches. Hardware: 64 x TPU v5e.

    gptjax train configs/roberta_base.py --data.source 'text/*.jsonl' --data.tokenizer DIR

125M parameters; 500,000 steps of 8,192 rows full of sentences, warm-up over 24,000 of them, and linear to 0. The words
that are hidden are others each time, and gradients are not clipped. DIR is a folder with RoBERTa's tokenizer.json.

Compiled for v5e-64: 3.90 GB a device.
"""

from dataclasses import replace

from bert_base import config as base_config

from gptjax.config import LayoutConfig, MaskedConfig, MaskingConfig, TrainConfig


def config() -> MaskedConfig:
    base, step = base_config(), 8192 * 512
    block = replace(base.model, vocab_size=50265, norm_eps=1e-5, token_types=1, position_offset=2)
    adam = replace(base.optimizer, learning_rate=6e-4, warmup_tokens=24_000 * step, b2=0.98, clip_norm=1e9)
    return replace(
        base,
        name="roberta_base",
        model=block,
        masking=MaskingConfig(next_sentence=False),
        data=replace(base.data, tokenizer="roberta-tokenizer"),
        optimizer=adam,
        train=TrainConfig(batch_size=8192, micro_batch_size=1024, total_tokens=500_000 * step),
        layout=LayoutConfig(fsdp=64),
    )
