"""The planner on policies that learn from their own replies: against the compiled step, and closed forms."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from shipped import CONFIGS, start_words

from gptjax import cli
from gptjax.config import (
    GroupPolicyConfig,
    LayoutConfig,
    ModelConfig,
    PolicyConfig,
    PPOConfig,
    PromptConfig,
    RankingConfig,
    RewardConfig,
    RewardedConfig,
    RolloutConfig,
    TrainConfig,
)
from gptjax.config.load import load_config
from gptjax.data.tokenizers import load_tokenizer
from gptjax.infer.programs import Programs
from gptjax.planner.bill import read
from gptjax.planner.check import SHARE
from gptjax.planner.chips import Chip, Topology, topology
from gptjax.planner.compile import lower
from gptjax.planner.memory import memory
from gptjax.planner.place import place
from gptjax.planner.rollout import drawing, rollout
from gptjax.planner.search import name, priced
from gptjax.planner.traffic import traffic
from gptjax.stages import stage_class
from gptjax.train.run import fill_run

CPU = Topology("cpu-8", "cpu", Chip("CPU", 1e11, 1e10, 1e10, 1e10, 1e9, 0.7, "cpu"), (8,))
MODEL = ModelConfig(2, num_heads=8, embed_dim=128, seq_len=64, vocab_size=512, attention_pattern=("dense",))
SHARED: dict[str, Any] = {
    "model": MODEL,
    "data": PromptConfig("prompts.jsonl"),
    "init_from": "base",
    "train": TrainConfig(batch_size=16, total_steps=1),
    "rollout": RolloutConfig(episodes=32, epochs=2, max_tokens=16, slots=31),
}
KINDS: dict[str, RewardedConfig] = {
    "ppo": PolicyConfig("ppo", reward="not/there", ppo=PPOConfig(ema_decay=0.9), **SHARED),
    "grpo": GroupPolicyConfig("grpo", reward="judge.py:judge", **SHARED),
}
LAYOUTS = {"fsdp": LayoutConfig(fsdp=8), "fsdp_tensor": LayoutConfig(fsdp=4, tensor=2)}


@pytest.fixture
def reward(tmp_path: Path) -> RewardConfig:
    """A run of a reward model that is wider than the policy and reads longer texts, without weights."""
    model = replace(MODEL, embed_dim=256, seq_len=128)
    config = RewardConfig("reward", model, RankingConfig("rankings.jsonl"), init_from="base")
    fill_run(tmp_path / "reward", config, load_tokenizer("bytes"))
    return config


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_formulas_are_the_compiled_iterations(kind: str, layout: str) -> None:
    """What a device holds between steps, exactly, and what all updates of a step send, axis by axis, within 5%."""
    config = replace(KINDS[kind], layout=LAYOUTS[layout])
    lowered, mesh = lower(config, CPU)
    compiled, here = lowered.compile(), place(config, CPU)
    row = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(here.stage.row))
    batch = 4 * row * 64 // here.ways("batch")
    held = sum(memory(here)[part] for part in ("parameters", "optimizer"))
    assert compiled.memory_analysis().argument_size_in_bytes - batch == pytest.approx(held, abs=256)
    sent, formula = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for c in read(compiled.as_text(), mesh, config.max_accumulation):
        sent[c.axes] += c.total
    for t in traffic(here):
        formula[t.axes] += t.bytes  # type: ignore[assignment]
    for axes in sent.keys() | formula.keys():
        if sent[axes] > SHARE * sent.total():
            assert formula[axes] == pytest.approx(sent[axes], rel=0.05), axes
    assert formula.total() == pytest.approx(sent.total(), rel=0.05)


def of_tokens(layers: int, dim: int, keys: float, vocab: int = 0) -> float:
    """FLOPs of a token forward: 24 L D² of products, 4 D a layer for each key, 2 V D of the head."""
    return layers * (24 * dim**2 + 4 * dim * keys) + 2 * vocab * dim


def test_flops_of_an_iteration(reward: RewardConfig, tmp_path: Path) -> None:
    """32 replies of 16 tokens to prompts of 32, judged in rows of 64, and learned from twice with 3 rows of text."""
    policy, judge = of_tokens(2, 128, 65 / 2, 512), of_tokens(2, 256, 65 / 2)
    drawn = 32 * (47 * of_tokens(2, 128, 48 / 2) + 16 * 2 * 512 * 128)
    ppo = replace(KINDS["ppo"], reward=str(tmp_path / "reward"), ppo=PPOConfig(ptx_coef=1.0, ptx_rows=3))
    parts = {
        "rollout": drawn,
        "judging": 32 * 64 * (2 * policy + 2 * judge),
        "updates": 64 * 64 * 3 * (policy + judge + 3 * policy),
    }
    assert stage_class(ppo)(ppo, "cpu").flops == pytest.approx(parts)
    assert stage_class(ppo)(ppo, "cpu").flops_per_token == pytest.approx(sum(parts.values()) / (64 * 64))
    grpo = KINDS["grpo"]
    parts |= {"judging": 32 * 64 * 2 * policy, "updates": 64 * 64 * 3 * policy}
    assert stage_class(grpo)(grpo, "cpu").flops == pytest.approx(parts)


def test_models_of_another_size_are_held_as_they_are(reward: RewardConfig, tmp_path: Path) -> None:
    """Of a model N = 12 L D² + 13 L D + (V + T) D + 2 D numbers; on TPUs frozen matrices have 2 bytes."""

    def numbers(model: ModelConfig) -> tuple[int, int]:
        """Of matrices and embeddings, and of vectors."""
        layers, dim = model.num_layers, model.embed_dim
        return layers * 12 * dim**2 + (512 + model.seq_len) * dim, 13 * layers * dim + 2 * dim

    config = replace(KINDS["ppo"], reward=str(tmp_path / "reward"), layout=LayoutConfig(fsdp=1, data=8))
    (wide, narrow), (wider, rest) = numbers(MODEL), numbers(reward.model)
    rest += 256 + 1  # the scalar head
    trained = wide + narrow + wider + rest
    here = place(config, topology("v5e-8"))
    assert (here.local_trained, here.local_moments) == (trained, 2 * trained)
    average = 4 * (wide + narrow) + 4  # and the coefficient of the KL
    reference, judge = 2 * wide + 4 * narrow, 4 * (wider + rest)  # a reward model is read as it was trained
    assert here.local_frozen == average + reference + judge


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cache_is_the_engines(layout: str) -> None:
    """31 slots and a row that keeps what prompts share; many of them are the highest moment of a step."""
    config = replace(KINDS["grpo"], layout=LAYOUTS[layout])
    here = place(config, CPU)
    slots = jax.eval_shape(Programs(here.stage.network.decoder, 32, 64).empty)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(slots.cache))
    kept = {what: size for _, what, size in drawing(here)}
    assert kept["keys and values of replies"] == whole / 8  # rows over fsdp, heads over tensor
    ids = slots.rows.bias, slots.rows.counts, slots.rows.seen
    assert kept["what sampling keeps of each id"] == sum(leaf.size * leaf.dtype.itemsize for leaf in ids)
    assert "cache" not in memory(here)
    crowded = memory(place(replace(config, rollout=replace(config.rollout, slots=4095)), CPU))
    assert crowded["cache"] == 128 * (whole / 8 + kept["what sampling keeps of each id"])
    assert "gradients" not in crowded


def test_time_of_a_rollout() -> None:
    """Two waves of 16 tokens, each step the policy's weights and the cache once from memory, and gathered before."""
    config, pod = replace(KINDS["grpo"], layout=LAYOUTS["fsdp"]), topology("v5e-8")
    drawn = rollout(place(config, pod))
    assert drawn and drawn.steps == 2 * 16
    weights = 2 * (12 * 2 * 128**2 + 512 * 128)
    kept = 2 * 2 * 8 * 128 * 4 * 2 * (32 + 8)  # 2 layers, 8 heads padded to 128, 4 rows, 32 of a prompt, half a reply
    assert drawn.parts["weights"] == pytest.approx(weights / pod.chip.hbm_rate)
    assert drawn.parts["keys and values"] == pytest.approx(kept / pod.chip.hbm_rate)
    assert drawn.parts["network"] > 0
    alone = rollout(place(replace(config, layout=LayoutConfig(fsdp=1, data=8)), pod))
    assert alone and alone.parts["network"] == 0
    assert alone.step_seconds == alone.parts["weights"] + alone.parts["keys and values"]
    found = priced(config, pod).estimate
    assert found.seconds["rollout"] == drawn.seconds
    assert found.update_seconds == pytest.approx(
        found.step_seconds - found.seconds["rollout"] - found.seconds["judging"]
    )


@pytest.mark.parametrize("config", ["ppo", "grpo", "ppo_instructgpt"])
def test_plan_says_what_an_iteration_takes(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rollout, judging and updates, a line each; what it takes for granted; flags that are read back."""
    words = start_words(config, tmp_path)
    words = words if config == "grpo" else [*words[:2], "--reward", "not/there"]
    file, pod = str(CONFIGS / f"{config}.py"), topology("v5e-1")
    assert cli.run(["plan", file, "--topology", pod.name, "--analytic", "--out", str(tmp_path), *words]) == 0
    said, facts = capsys.readouterr().out, json.loads((tmp_path / f"{config}-{pod.name}.json").read_text())
    judges = "policy, reference" if config == "grpo" else "policy, reference, reward, value"
    assert re.search(r"rollout +\d+ replies of 64 tokens to prompts of 64, 32 side by side: [\d,]+ steps of ", said)
    assert re.search(rf"judging +\d+ replies by {judges};", said)
    assert re.search(r"updates +\d+ of \d+ replies by policy" + ("" if config == "grpo" else ", value"), said)
    assert ("8 rows of text beside each" in said) == (config == "ppo_instructgpt")
    assert ("not/there is not there" in said) == (config != "grpo")
    best = facts["rows"][0]
    planned = load_config(file, [*words, *best["flags"].split()])
    assert name(planned, 1) == best["name"]
    flops = sum(stage_class(planned)(planned, "tpu").flops.values())
    assert best["mfu"] == pytest.approx(flops / best["step_seconds"] / pod.chip.flops)
    assert best["days"] == pytest.approx(planned.train.total_steps * best["step_seconds"] / 86400)
