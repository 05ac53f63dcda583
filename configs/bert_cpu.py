"""BERT in small, hidden words and next sentences (arXiv 1810.04805): 2 CPU cores, minutes.

    gptjax train configs/bert_cpu.py --data.source PATH/wikitext2-valid.txt
    gptjax tell runs/bert_cpu --text 'It was released in the United [MASK] .'
Any text will do. --masking.next_sentence false is RoBERTa's form, --masking.unit words hides whole words.
Compiled for cpu-1: 0.198 GB a device.
"""

from gptjax.config import MaskedConfig, ModelConfig, OptimizerConfig, TrainConfig, WindowConfig

STEPS, BATCH, CONTEXT = 1500, 64, 64


def config() -> MaskedConfig:
    block = ModelConfig(
        num_layers=3,
        num_heads=4,
        embed_dim=128,
        seq_len=CONTEXT,
        vocab_size=2048,
        norm_place="after",
        norm_embedding=True,
        norm_eps=1e-12,
        activation="gelu",
        causal=False,
        token_types=2,
        head_bias=True,
        scan_layers=False,
    )
    return MaskedConfig(
        name="bert_cpu",
        model=block,
        data=WindowConfig(source="stdlib", tokenizer="sentencepiece:2000", max_chars=2048, split_by="position"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, decay="linear", final_ratio=0.0, warmup_tokens=150 * BATCH * CONTEXT, decay_tokens=0
        ),
        train=TrainConfig(batch_size=BATCH, total_steps=STEPS, log_interval=100, eval_interval=500, eval_batches=-1),
    )
