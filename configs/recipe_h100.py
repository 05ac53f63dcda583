"""The whole recipe at GPT-2's size on your own files: 4B tokens of text, conversations, rankings, InstructGPT's PPO.
Hardware: 1 x H100. Not run; by `gptjax plan` pretraining takes 2.1 hours, 200 iterations of PPO 41 minutes in 38 GB.

gptjax recipe configs/recipe_h100.py   # text/, dialogues/, rankings/, prompts/ and questions.jsonl here
"""

from dataclasses import replace
from pathlib import Path

import gpt2_124m
import ppo_instructgpt
import reward as ranked
import sft_gpt2

from gptjax.config import Config, PretrainingConfig, RewardConfig, RolloutConfig, SFTConfig
from gptjax.recipe import Comparison, Recipe

TEXT = "text/*.jsonl"


def recipe() -> Recipe:
    asked = Comparison(
        ("pretrain", "sft", "ppo"), str(Path("questions.jsonl").absolute()), reward="reward", max_tokens=256
    )
    return Recipe("recipe_h100", (pretrain, sft, reward, ppo), asked)


def pretrain() -> Config:
    base = gpt2_124m.config()
    schedule = replace(base.optimizer, warmup_tokens=100_000_000, decay_tokens=0)
    return replace(base, optimizer=schedule, train=replace(base.train, total_tokens=4_000_000_000))


def sft(pretrain: Path) -> SFTConfig:
    base = sft_gpt2.config(str(pretrain))
    return replace(base, train=replace(base.train, micro_batch_size=16, epochs=4))


def reward(sft: Path) -> RewardConfig:
    base = ranked.config(str(sft))
    train = replace(base.train, batch_size=64, micro_batch_size=16, eval_interval=50)
    return replace(base, optimizer=replace(base.optimizer, learning_rate=1e-5), train=train)


def ppo(sft: Path, reward: Path) -> Config:
    base = ppo_instructgpt.config(str(sft))
    rollout = RolloutConfig(episodes=512, max_tokens=256, slots=128)
    train = replace(base.train, total_steps=200)
    return replace(base, reward=str(reward), rollout=rollout, ptx=PretrainingConfig(source=TEXT), train=train)
