"""ChatGPT's recipe in a small town, from text to a policy that rankings have taught: 24 minutes on 2 CPU cores.

gptjax recipe configs/recipe_tiny.py

The town and its people are made up (gptjax/recipe/town.py): they ask the way. Who shows how to answer makes detours,
and so does the fine-tuned model; rankings of its own replies teach it to go straight there. `unchecked` learns without
a price on leaving the fine-tuned model: what its reward model then likes is worth ever less.
"""

from dataclasses import replace
from pathlib import Path

from gptjax.config import (
    Config,
    DataConfig,
    DialogueConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    PPOConfig,
    PromptConfig,
    RankingConfig,
    RewardConfig,
    RolloutConfig,
    SFTConfig,
    TrainConfig,
)
from gptjax.data.tokenizers import train_sentencepiece
from gptjax.recipe import Comparison, Recipe
from gptjax.recipe.town import rankings, town
from gptjax.stages.weights import chat_model

GOLD = "gptjax.recipe.town:gold"
PLAIN = {"warmup_tokens": 0, "decay_tokens": 0, "weight_decay": 0.0}


def recipe() -> Recipe:
    steps = (town, tokenizer, pretrain, sft, rankings, reward, ppo, unchecked)
    asked = Comparison(("pretrain", "sft", "ppo"), "town/questions.jsonl", GOLD, "reward", max_tokens=56)
    return Recipe("recipe_tiny", steps, asked)


def tokenizer(folder: Path, town: Path) -> None:
    """512 pieces, of which a place is one: with 384 it was up to five, and the reward model, which compares places, was
    right in 81% of the pairs held out."""
    texts = ((town / name).read_text() for name in ("text.jsonl", "talks.jsonl"))
    train_sentencepiece((line for text in texts for line in text.splitlines()), 512, folder / "tokenizer.model")


def pretrain(town: Path, tokenizer: Path) -> Config:
    return Config(
        name="pretrain",
        model=ModelConfig(num_layers=3, num_heads=4, embed_dim=96, seq_len=128, vocab_size=512, scan_layers=False),
        data=DataConfig(source=str(town / "text.jsonl"), tokenizer=str(tokenizer / "tokenizer.model")),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_tokens=50_000, decay_tokens=0),
        train=TrainConfig(batch_size=32, total_steps=1000, log_interval=20, eval_interval=100, eval_batches=20),
    )


def sft(pretrain: Path, town: Path) -> SFTConfig:
    return SFTConfig(
        name="sft",
        model=chat_model(str(pretrain)),
        init_from=str(pretrain),
        data=DialogueConfig(source=str(town / "talks.jsonl")),
        optimizer=OptimizerConfig(learning_rate=1e-3, **PLAIN),
        train=TrainConfig(batch_size=8, epochs=4, log_interval=50, eval_interval=200, keep_best=True),
    )


def reward(sft: Path, rankings: Path) -> RewardConfig:
    return RewardConfig(
        name="reward",
        model=chat_model(str(sft)),
        init_from=str(sft),
        data=RankingConfig(source=str(rankings / "rankings.jsonl"), max_replies=9),
        optimizer=OptimizerConfig(learning_rate=5e-4, **PLAIN),
        train=TrainConfig(batch_size=4, epochs=2, log_interval=20, eval_interval=100, eval_batches=-1, keep_best=True),
    )


def ppo(sft: Path, reward: Path, town: Path) -> PolicyConfig:
    return policy(sft, reward, town, PPOConfig(kl_coef=0.1, kl_target=1.5, kl_horizon=1000))


def unchecked(sft: Path, reward: Path, town: Path) -> PolicyConfig:
    return policy(sft, reward, town, PPOConfig(kl_coef=0.0))


def policy(sft: Path, reward: Path, town: Path, ppo: PPOConfig) -> PolicyConfig:
    return PolicyConfig(
        name="ppo",
        model=chat_model(str(sft)),
        init_from=str(sft),
        reward=str(reward),
        gold=GOLD,
        data=PromptConfig(source=str(town / "prompts.jsonl"), train_split="train", eval_split="train"),
        ppo=replace(ppo, value_warmup=5, value_learning_rate=1e-3),
        rollout=RolloutConfig(episodes=128, epochs=4, max_tokens=56, slots=128),
        optimizer=OptimizerConfig(learning_rate=1e-4, final_ratio=1.0, b2=0.999, eps=1e-5, **PLAIN),
        train=TrainConfig(
            batch_size=64, micro_batch_size=32, total_steps=35, log_interval=1, eval_batches=0, save_interval=10
        ),
    )
