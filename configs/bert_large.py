"""BERT large (arXiv 1810.04805): 24 layers of 1024, 340M parameters. Hardware: 32 x TPU v5e.

    gptjax train configs/bert_large.py --data.source 'text/*.jsonl' --data.tokenizer DIR

All else is BERT base's; see bert_base.

Compiled for v5e-32: 2.77 GB a device.
"""

from dataclasses import replace

from bert_base import config as base_config

from gptjax.config import LayoutConfig, MaskedConfig


def config() -> MaskedConfig:
    base = base_config()
    return replace(
        base,
        name="bert_large",
        model=replace(base.model, num_layers=24, num_heads=16, embed_dim=1024, remat="dots"),
        layout=LayoutConfig(fsdp=32),
    )
