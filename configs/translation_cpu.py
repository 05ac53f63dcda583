"""The Transformer of 2017 in small (arXiv 1706.03762), between two made-up languages: 2 CPU cores, minutes.

    python -m gptjax.recipe.languages languages
    gptjax train configs/translation_cpu.py
    gptjax sample runs/translation_cpu --beams 4 --prompt 'the old miller gives the bread to a small dog today'
The second language moves words about; see gptjax/recipe/languages.py.
Compiled for cpu-1: 0.231 GB a device.
"""

from dataclasses import replace

from gptjax.config import ModelConfig, OptimizerConfig, PairConfig, Seq2SeqConfig, TrainConfig, WritingConfig

STEPS, BATCH, LENGTH = 1200, 64, 56


def config() -> Seq2SeqConfig:
    block = ModelConfig(
        num_layers=2,
        num_heads=4,
        embed_dim=128,
        seq_len=LENGTH,
        vocab_size=300,
        norm_place="after",
        positions="sinusoidal",
        scale_embedding=True,
        activation="relu",
        scan_layers=False,
    )
    return Seq2SeqConfig(
        name="translation_cpu",
        model=replace(block, cross_attention=True),
        encoder=replace(block, causal=False),
        data=PairConfig(source="languages/pairs.jsonl", tokenizer="languages/tokenizer.model"),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_tokens=100 * BATCH * 2 * LENGTH, decay_tokens=0, b2=0.98, weight_decay=0.0
        ),
        train=TrainConfig(batch_size=BATCH, total_steps=STEPS, log_interval=100, eval_interval=400, eval_batches=-1),
        writing=WritingConfig(label_smoothing=0.1, beams=4),
    )
