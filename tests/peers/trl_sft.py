"""Supervised fine-tuning with `trl`: a peer of tests/test_sft_peer.py, which starts it with the Python of TRL_PYTHON.

    python3.11 -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt torch transformers trl
    TRL_PYTHON=.venv-trl/bin/python pytest tests/test_sft_peer.py -k trl

Reads the job from standard input, with the conversations of each row in order, and answers with one line of JSON: the
loss of each step. One conversation a row: trl makes ids and mask from the messages (assistant_only_loss). Packed rows:
trl gets them as they are, for it would pack others, and lays them end to end with positions that begin again
(padding_free).
"""

import json
import sys
import tempfile
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset


def packed(tokenizer: Any, row: list[Any]) -> dict[str, list[int]]:
    """The conversations of a row one after the other."""
    ids, labels, lengths = [], [], []
    for messages in row:
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids += made["input_ids"]
        labels += [i if said else -100 for i, said in zip(made["input_ids"], made["assistant_masks"], strict=True)]
        lengths.append(len(made["input_ids"]))
    return {"input_ids": ids, "labels": labels, "seq_lengths": lengths}


def run(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    if job["packing"]:
        data = Dataset.from_list([packed(tokenizer, row) for row in job["rows"]])
        how: dict[str, Any] = {
            "padding_free": True,
            "max_length": None,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
    else:
        data = Dataset.from_list([{"messages": messages} for row in job["rows"] for messages in row])
        how = {"assistant_only_loss": True, "max_length": job["length"]}
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            folder,
            per_device_train_batch_size=job["micro_batch_size"],
            gradient_accumulation_steps=job["batch_size"] // job["micro_batch_size"],
            max_steps=job["steps"],
            lr_scheduler_type="cosine",
            warmup_steps=job["warmup"],
            learning_rate=job["learning_rate"],
            weight_decay=job["weight_decay"],
            adam_beta1=job["b1"],
            adam_beta2=job["b2"],
            adam_epsilon=job["eps"],
            max_grad_norm=job["clip_norm"],
            train_sampling_strategy="sequential",
            activation_checkpointing=False,
            bf16=False,
            logging_steps=1,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **how,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        trainer = trl.SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses} | {each.__name__: each.__version__ for each in (trl, transformers, torch)}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.stdin.read()))))
