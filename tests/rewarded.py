"""What tests of policies that learn from rewards share: prompts, functions that judge replies, and a reward model."""

import json
from dataclasses import replace
from pathlib import Path

from ranked import born

from gptjax.config import RewardConfig
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.stages import Reward
from gptjax.train.checkpoint import Checkpoints, Position
from gptjax.train.run import fill_run

MEAN, STD = 0.4, 2.5
"""Of the scores of the reward model's held-out replies, as its run has them."""

FUNCTIONS = '''"""What replies are worth."""

def fraction(prompt, reply):
    """Of every sign, and no whole number."""
    return 0.73 * sum(letter in "aeiou" for letter in reply) - 0.019 * len(reply)


def answered(prompt, reply, answer):
    return 1.0 if answer in reply else -1.9


def brief(prompt, reply):
    return float(reply == "")


def one(prompt):
    return 1.0


def raises(prompt, reply):
    raise KeyError("no such word")


def nothing(prompt, reply):
    return float("nan")


def word(prompt, reply):
    return "good"


number = 3
'''


def write_functions(folder: Path) -> Path:
    path = folder / "judges.py"
    path.write_text(FUNCTIONS)
    return path


def write_prompts(folder: Path, count: int = 40) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": str(i)}) + "\n" for i in range(count)))
    return path


def write_reward(folder: Path, config: RewardConfig, tokenizer: Tokenizer | None = None) -> Path:
    """A run of a reward model, evaluated at its first step; of other weights than what it started from."""
    config = replace(config, train=replace(config.train, seed=3))
    run, stage = folder / "reward", Reward(config, "cpu")
    fill_run(run, config, Reward.fit_tokenizer(config, tokenizer or load_tokenizer("bytes")))
    checkpoints = Checkpoints(run, config)
    checkpoints.save(born(config, stage).kept, Position())
    checkpoints.close()
    stage.keep(run, 0, {"score_mean": MEAN, "score_std": STD})
    return run
