"""Tiny Shakespeare, character by character, for one GPU: 6 layers of width 384, context 256, dropout 0.2.

gptjax train configs/shakespeare_gpu.py --data.source PATH/tinyshakespeare.txt

Compiled for h100-1x1: 2.14 GB a device.
"""

from dataclasses import replace

from shakespeare_cpu import config as cpu

from gptjax.config import Config

STEPS, BATCH, CONTEXT = 2000, 64, 256  # 5000, as nanoGPT has it, end at 2.1 nats: learned by heart


def config() -> Config:
    base = cpu()
    tokens = BATCH * CONTEXT
    return replace(
        base,
        name="shakespeare_gpu",
        model=replace(base.model, num_layers=6, num_heads=6, embed_dim=384, seq_len=CONTEXT, dropout=0.2),
        data=replace(base.data, lanes=BATCH),
        optimizer=replace(
            base.optimizer,
            learning_rate=1e-3,
            final_ratio=0.1,
            warmup_tokens=100 * tokens,
            decay_tokens=STEPS * tokens,
        ),
        train=replace(base.train, batch_size=BATCH, total_tokens=STEPS * tokens, eval_interval=250, save_interval=250),
    )
