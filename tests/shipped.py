"""The configs that are shipped. Those that start from weights get a run folder that has all but the weights."""

import re
from pathlib import Path

from gptjax.config import Config
from gptjax.config.load import load_config
from gptjax.data.tokenizers import load_tokenizer
from gptjax.train.run import fill_run

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("recipe_*.py"))
PATHS = sorted({*CONFIGS.glob("*.py")} - {*RECIPES})
BASES = {
    "sft": "quickstart",
    "sft_gpt2": "gpt2_124m",
    "reward": "quickstart",
    "dpo": "quickstart",
    "classify_cpu": "bert_cpu",
    "ppo": "quickstart",
    "grpo": "quickstart",
    "ppo_instructgpt": "quickstart",
    "ppo_lm_human_preferences": "quickstart",
}
REWARDED = ("ppo", "grpo", "ppo_instructgpt", "ppo_lm_human_preferences")


def target(path: Path) -> tuple[str, float]:
    """The topology that a config's header names, and the peak in GB beside it, which a compiler gave."""
    found = re.search(r"Compiled for (\S+): ([\d.]+) GB a device", path.read_text())
    assert found, f"{path.name} names no topology"
    return found[1], float(found[2])


def start_words(name: str, folder: Path) -> list[str]:
    """What a command needs beside a config, to start where it says."""
    if name not in BASES:
        return []
    base = folder / "base"
    if not base.exists():
        fill_run(base, load_config(str(CONFIGS / f"{BASES[name]}.py"), []), load_tokenizer("bytes"))
    words = ["--init_from", str(base)]
    if name in REWARDED:
        function = folder / "reward.py"
        function.write_text("def reward(prompt, reply):\n    return float(len(reply))\n")
        words += ["--reward", f"{function}:reward"]
    return words


def shipped(name: str, folder: Path) -> Config:
    return load_config(str(CONFIGS / f"{name}.py"), start_words(name, folder))
