"""Supervised fine-tuning of GPT-2 on conversations, as InstructGPT did it (arXiv 2203.02155, appendix C): 16 epochs in
batches of 32, of which the one that evaluates best is kept, for the loss rises after the first. Hardware: 1 x H100.

gptjax train configs/sft_gpt2.py --init_from gpt2 --data.source dialogues.jsonl

`gpt2` is a Hugging Face directory with GPT-2's weights and tokenizer; the chat tokens go into the padding of its
vocabulary. Adapters in place of all parameters: --lora.rank 16 --optimizer.learning_rate 2e-4

Compiled for h100-1x1: 29.09 GB a device.
"""

from dataclasses import replace

from gptjax.config import DialogueConfig, OptimizerConfig, SFTConfig, TrainConfig
from gptjax.stages.weights import chat_model


def config(init_from: str = "gpt2") -> SFTConfig:
    return SFTConfig(
        name="sft_gpt2",
        model=replace(chat_model(init_from), dropout=0.2),
        init_from=init_from,
        data=DialogueConfig(source="dialogues/*.jsonl"),
        optimizer=OptimizerConfig(learning_rate=9.65e-6, warmup_tokens=0, decay_tokens=0, weight_decay=0.0),
        train=TrainConfig(batch_size=32, epochs=16, eval_interval=50, save_interval=200, keep_best=True),
    )
