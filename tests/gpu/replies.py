"""A chain of stages on this accelerator: pretraining, fine-tuning on sums, PPO with a function as its reward, and what
an iteration of PPO spends its time on.

    python tests/gpu/replies.py --text tinyshakespeare.txt --tokenizer gpt2:gpt2-bpe --out replies

GPT-2 124M's shape. It learns too little to be judged: what counts is that the chain runs, how far log-probabilities of
a rollout lie from those of training in bfloat16, and seconds. Writes OUT/replies.json and OUT/ppo.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
REWARD = '''"""Digits are good, length is not."""


def digits(prompt: str, reply: str) -> float:
    return sum(letter.isdigit() for letter in reply) / 8 - len(reply) / 400
'''
SMALL = ["--model.num_layers", "2", "--model.num_heads", "2", "--model.embed_dim", "32", "--model.seq_len", "128"]
COUNT = 2000


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a model and numbers of steps for a CPU")
    known = parser.parse_args()
    out, tiny = known.out, known.tiny
    out.mkdir(parents=True, exist_ok=True)
    sums = [(a * 7919 % 89, a * 104729 % 97) for a in range(COUNT)]
    (out / "sums.jsonl").write_text("".join(conversation(a, b) for a, b in sums))
    (out / "reward.py").write_text(REWARD)
    pretrained, tuned, policy = (out / name for name in ("pretrained", "tuned", "policy"))
    batch = ["--train.batch_size", "8" if tiny else "64"]
    micro = ["--train.micro_batch_size", "4" if tiny else "32"]
    quiet = ["--train.eval_batches", "0", "--train.sample_interval", "0", "--train.log_interval", "1"]

    text = ["--data.source", known.text, "--data.tokenizer", "bytes" if tiny else known.tokenizer, "--data.lanes", "1"]
    text += ["--data.train_split", "train", "--data.eval_split", "train"]
    text += ["--optimizer.warmup_tokens", "0", "--optimizer.decay_tokens", "0", *(SMALL if tiny else [])]
    text += ["--train.total_tokens", str(40 * 8 * 128 if tiny else 40 * 64 * 1024)]
    gptjax("train", "configs/gpt2_124m.py", "--run", pretrained, "--overwrite", *text, *batch, *micro, *quiet)

    talk = ["--init_from", pretrained, "--data.source", out / "sums.jsonl", "--optimizer.learning_rate", "3e-4"]
    talk += ["--train.epochs", "0", "--train.total_steps", "30", "--train.keep_best", "false"]
    gptjax("train", "configs/sft_gpt2.py", "--run", tuned, "--overwrite", *talk, *batch, *micro, *quiet)

    learn = ["--init_from", tuned, "--reward", f"{out / 'reward.py'}:digits", "--data.source", out / "sums.jsonl"]
    learn += ["--rollout.episodes", "16" if tiny else "256", "--rollout.max_tokens", "8" if tiny else "64"]
    learn += [*batch, *micro]
    gptjax("train", "configs/ppo.py", "--run", policy, "--overwrite", "--train.total_steps", "6", *learn, *quiet)
    rows = [json.loads(line) for line in (policy / "log.jsonl").read_text().splitlines()]
    (out / "replies.json").write_text(json.dumps(rows, indent=1) + "\n")
    gptjax("bench", "ppo", "configs/ppo.py", "--iterations", "6", "--out", out, *learn)
    return 0


def gptjax(*arguments: object) -> None:
    print("gptjax", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "gptjax", *map(str, arguments)], cwd=ROOT, check=True)


def conversation(a: int, b: int) -> str:
    turns = [{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": f"It is {a + b}."}]
    return json.dumps({"messages": turns}) + "\n"


if __name__ == "__main__":
    sys.exit(main())
