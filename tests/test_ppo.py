"""PPO and GRPO: what is drawn is what is learned from, rewards and advantages against float64, updates against plain
optax, runs that are stopped and go on, layouts, and a world in which the best reply is known. Run: pytest
tests/test_ppo.py"""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from conftest import as_file
from devices import environment
from flax.traverse_util import flatten_dict
from joined import together
from ranked import MODEL, K, T, alone, decoder, one_device, write_base, write_rankings
from rewarded import MEAN, STD, write_functions, write_prompts, write_reward
from toy import records
from walks_reward import LETTERS, WORLD, gold, text

import gptjax
from gptjax import cli
from gptjax.config import (
    Config,
    DataConfig,
    DialogueConfig,
    DPOConfig,
    GroupPolicyConfig,
    GRPOConfig,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    PPOConfig,
    PreferenceConfig,
    PretrainingConfig,
    PromptConfig,
    RankingConfig,
    RewardConfig,
    RolloutConfig,
    SFTConfig,
    TrainConfig,
    from_json,
    to_json,
)
from gptjax.config.fields import explained
from gptjax.config.load import override
from gptjax.data.rows import PADDING
from gptjax.data.sources import build
from gptjax.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from gptjax.errors import UserError
from gptjax.model.loss import Head, drawn_log_probs, log_probs
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import PPO, SFT, stage_class
from gptjax.stages.on_policy import Judged
from gptjax.stages.rollout import Drawn, Rollout, Rollouts
from gptjax.stages.scorer import load_scorer
from gptjax.stages.weights import on_device, open_weights
from gptjax.train import loop
from gptjax.train.checkpoint import Checkpoints
from gptjax.train.run import fill_run, located
from gptjax.train.step import abstract_state, init_state, make_step, placed


@pytest.fixture(scope="session")
def base(tuned: SFTConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tuned)


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_functions(tmp_path_factory.mktemp("judges"))


@pytest.fixture(scope="session")
def small(base: Path, judges: Path, tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> PolicyConfig:
    """Iterations of 16 replies, learned from twice, by halves."""
    return PolicyConfig(
        name="ppo",
        model=MODEL,
        init_from=str(base),
        reward=f"{judges}:fraction",
        data=PromptConfig(
            source=str(write_prompts(tmp_path_factory.mktemp("prompts"))),
            cache_dir=tiny.data.cache_dir,
            train_split="train[:80%]",
            eval_split="train[80%:]",
        ),
        ppo=PPOConfig(kl_coef=0.05, kl_target=0.1, kl_horizon=100.0, value_learning_rate=1e-3, ema_decay=0.5),
        rollout=RolloutConfig(episodes=16, epochs=2, max_tokens=8, slots=16),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, final_ratio=1.0, warmup_tokens=0, decay_tokens=0, weight_decay=0.0, eps=1e-5
        ),
        train=TrainConfig(
            batch_size=8,
            total_steps=2,
            log_interval=1,
            eval_interval=0,
            eval_batches=0,
            save_interval=0,
            tensorboard=False,
            compile_cache=tiny.train.compile_cache,
        ),
    )


@pytest.fixture(scope="session")
def shallow(small: PolicyConfig, tuned: SFTConfig, tmp_path_factory: pytest.TempPathFactory) -> PolicyConfig:
    """Of one layer, which is half as much to trace and compile: for what every model has in common."""
    model = replace(MODEL, num_layers=1, attention_pattern=("dense",))
    return replace(small, model=model, init_from=str(write_base(tmp_path_factory.mktemp("shallow"), tuned, model)))


@pytest.fixture(scope="session")
def scorer(base: Path, tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> RewardConfig:
    """Of a reward model."""
    source = str(write_rankings(tmp_path_factory.mktemp("rankings")))
    data = RankingConfig(source=source, max_replies=K, cache_dir=tiny.data.cache_dir)
    return RewardConfig(name="reward", model=MODEL, init_from=str(base), data=data)


@pytest.fixture(scope="session")
def reward(scorer: RewardConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward(tmp_path_factory.mktemp("reward"), scorer)


@pytest.fixture(scope="session")
def grouped(small: PolicyConfig) -> GroupPolicyConfig:
    shared = {name: getattr(small, name) for name in ("model", "init_from", "reward", "data", "optimizer", "train")}
    rollout = replace(small.rollout, epochs=1)
    return GroupPolicyConfig(name="grpo", rollout=rollout, grpo=GRPOConfig(group=4), **shared)


# Before a run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", ""], "reward: empty; name the run of a reward model, or a Python function"),
        (["--reward", "nowhere.py:judge"], "/nowhere.py; name one, FILE.py:NAME"),  # a path is made whole first
        (["--reward", "no.such.module:judge"], "no.such.module cannot be imported (ModuleNotFoundError"),
        (["--reward", "JUDGES:missing"], "judges.py has no function missing; give its name"),
        (["--reward", "JUDGES:number"], "judges.py has no function number; give its name"),
        (["--reward", "JUDGES:"], "judges.py has no function of no name; give its name"),
        (["--reward", "JUDGES:one"], "takes other arguments than (prompt, reply) or (prompt, reply, answer)"),
        (["--reward", "nowhere"], "nowhere"),
        (["--reward", "BASE"], "a run of stage sft, not of a reward model; train one: stage reward"),
        (["--reward", "OTHER"], "its tokenizer is not that of init_from"),
        (["--reward", "SHORT"], "model.seq_len = 32: the reward model"),
        (["--init_from", ""], "init_from: empty, and a policy starts from the run that it is to improve"),
        (["--init_from", "REWARD"], "a reward model, which scores replies and writes none"),
        (["--init_from", "UNFINISHED"], "no checkpoint yet; gptjax train --resume"),
        (["--rollout.episodes", "20"], "rollout.episodes = 20: not a multiple of train.batch_size = 8; nearest 16"),
        (["--rollout.episodes", "4"], "rollout.episodes = 4: not a multiple of train.batch_size = 8; nearest 8"),
        (["--rollout.max_tokens", "32"], "rollout.max_tokens = 32: leaves a prompt no room in model.seq_len = 32"),
        (["--rollout.top_k", "262"], "rollout.top_k = 262: model.vocab_size is 261; 0 keeps all"),
        (["--rollout.temperature", "0"], "rollout.temperature = 0.0: must be positive"),
        (["--ppo.kl_horizon", "3"], "ppo.kl_horizon = 3.0: one iteration of 16 episodes could turn the sign"),
        (["--train.epochs", "2"], "--train.epochs: no such field in stage ppo"),
        (["--data.tokenizer", "bytes"], "--data.tokenizer: no such field in stage ppo"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(
    words: list[str],
    message: str,
    small: PolicyConfig,
    scorer: RewardConfig,
    base: Path,
    judges: Path,
    tuned: SFTConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    made = {
        "JUDGES": lambda: judges,
        "BASE": lambda: base,
        "REWARD": lambda: write_reward(tmp_path, scorer),
        "OTHER": lambda: write_reward(tmp_path, replace(scorer, model=replace(MODEL, vocab_size=300)), other_pieces()),
        "SHORT": lambda: write_reward(tmp_path, replace(scorer, model=replace(MODEL, seq_len=24))),
        "UNFINISHED": lambda: unfinished(tmp_path / "unfinished", tuned),
    }

    def other_pieces() -> Tokenizer:
        train_sentencepiece(
            ["say this or that to them", "and then some more of it"] * 20, 280, tmp_path / "pieces.model"
        )
        return load_tokenizer(str(tmp_path / "pieces.model"))

    first, colon, rest = words[1].partition(":")
    given = [words[0], f"{made[first]() if first in made else first}{colon}{rest}"]
    refused(small, given, message, tmp_path)


def unfinished(run: Path, tuned: SFTConfig) -> Path:
    config = replace(tuned, model=MODEL)
    fill_run(run, config, SFT.fit_tokenizer(config, load_tokenizer("bytes")))
    return run


def refused(config: Any, words: list[str], message: str, folder: Path) -> None:
    with pytest.raises(UserError) as error:
        cli.run(["train", as_file(config, folder), "--run", str(folder / "run"), *words])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raised KeyError: 'no such word'; mend it and resume"),
        pytest.param("nothing", "gave nan; mend it and resume", marks=pytest.mark.slow),
        pytest.param("word", "gave 'good', no number; mend it and resume", marks=pytest.mark.slow),
    ],
)
def test_a_function_that_cannot_judge_ends_the_run(
    name: str, message: str, shallow: PolicyConfig, judges: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named with what it was asked. No step was made, and no folder stays."""
    alone(monkeypatch)
    refused(shallow, ["--reward", f"{judges}:{name}"], message, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rollout.episodes", "24", "--grpo.group", "5"], "rollout.episodes = 24: not a multiple of grpo.group = 5"),
        (["--grpo.group", "1"], "grpo.group = 1: must be at least 2"),
        (["--ppo.clip", "0.1"], "--ppo.clip: no such field in stage grpo"),
    ],
)
def test_mistakes_of_groups_are_one_line(
    words: list[str], message: str, grouped: GroupPolicyConfig, tmp_path: Path
) -> None:
    refused(grouped, words, message, tmp_path)


# How replies are scored


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5])
def test_log_probs_are_those_that_tokens_were_drawn_by(temperature: float, top_k: int) -> None:
    """In chunks that do not divide the row, with padded ids, and targets that are none of the likeliest."""
    rng, size = np.random.default_rng(0), 261
    hidden, embedding = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 7, 16), (384, 16)))
    targets = rng.integers(0, size, (2, 7)).astype(np.int32)
    scores = hidden.astype(float) @ embedding[:size].T.astype(float) / temperature
    order = np.argsort(-scores, axis=-1)
    targets[0, :3], targets[1, 4], targets[1, 5:] = order[0, :3, 0], order[1, 4, 3], -1
    wanted, entropies = np.zeros((2, 7)), np.zeros((2, 7))
    for i, t in np.ndindex(2, 7):
        if targets[i, t] >= 0:
            among = np.sort(scores[i, t])[-top_k:] if top_k else scores[i, t]
            log_z = among.max() + math.log(sum(math.exp(each - among.max()) for each in among))
            wanted[i, t] = scores[i, t, targets[i, t]] - log_z
            entropies[i, t] = -sum(math.exp(each - log_z) * (each - log_z) for each in among)

    head = Head(embedding)

    def asked(hidden: Any) -> Any:
        return drawn_log_probs(hidden, head, targets, size, 3, temperature, top_k)

    found, entropy = jax.jit(asked)(hidden)
    assert found.dtype == entropy.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(entropy, entropies, atol=1e-5)
    if temperature == 1 and top_k == 0:
        np.testing.assert_array_equal(found, jax.jit(log_probs, static_argnums=(3, 4))(hidden, head, targets, size, 3))
    slope = jax.jit(jax.grad(lambda hidden: asked(hidden)[0].sum()))(hidden)
    assert np.isfinite(slope).all() and (slope[1, 5:] == 0).all()
    outside = (wanted != 0) & (order[..., 0] != targets)  # also where the one likeliest token is all that is drawn
    assert (np.abs(slope[outside]).max(-1) > 0).all()
    assert (jax.grad(lambda hidden: asked(hidden)[1].sum())(hidden) == 0).all()  # a figure, and no part of a loss


# What is learned from


def made(config: Any, layout: Layout | None = None) -> Any:
    kind = stage_class(config)
    return kind(config, "cpu", layout, kind.fit_tokenizer(config, load_tokenizer("bytes")), build(config.data))


def reply_rows(count: int, seed: int = 0) -> tuple[Rollout, Judged, np.ndarray]:
    """Replies of 1 to 9 tokens after prompts of 2 to 20 in 32 places, judged at random, with fractions for scores.
    Every third has no end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (count, T)).astype(np.int32)
    targets, last = np.full((count, T), PADDING, np.int32), np.zeros(count, np.int32)
    for i, (prompt, size) in enumerate(zip(rng.integers(2, 20, count), rng.integers(1, 10, count), strict=True)):
        targets[i, prompt - 1 : prompt - 1 + size] = tokens[i, prompt : prompt + size]
        last[i] = prompt + size - 1
    drawn = Drawn(tokens, targets, last)
    noise = rng.normal(size=(5, count, T)).astype(np.float32)  # also where no target is, and nothing may come of it
    said = targets != PADDING
    logprobs, reference = (noise[0] - 3) * said, (noise[1] - 3) * said
    scores = np.array([0.73, -1.9, 0.31, 2.25, -0.004], np.float32)[np.arange(count) % 5]
    rollout = Rollout(drawn, np.arange(count) % 3 > 0, logprobs, [""] * count)
    return rollout, Judged(logprobs, logprobs, reference, noise[2], None), scores


@pytest.mark.parametrize(
    "how", [PPOConfig(kl_coef=0.05), PPOConfig(0.3, 0.5, 100, 0.97, 0.8, missing_end=-1.25, whiten_rewards=True)]
)
def test_rewards_and_advantages_are_those_of_loops_in_float64(how: PPOConfig, small: PolicyConfig) -> None:
    rollout, found, scores = reply_rows(16)
    beta = 0.17
    rows, told = made(replace(small, ppo=how)).rows({"kl_coef": np.float32(beta)}, rollout, found, scores, 0)
    each, kl = [], []
    for i in range(16):
        at = [t for t in range(T) if rollout.drawn.targets[i, t] != PADDING]
        gaps = [float(found.logprobs[i, t]) - float(found.ref_logprobs[i, t]) for t in at]
        rewards = [-beta * gap for gap in gaps]
        rewards[-1] += float(scores[i]) if rollout.ended[i] else how.missing_end
        each.append((at, rewards))
        kl.append(sum(gaps))
    if how.whiten_rewards:
        every = np.array([reward for _, rewards in each for reward in rewards])
        mean, scale = every.mean(), math.sqrt(every.var() + 1e-8)
        each = [(at, [(reward - mean) / scale + mean for reward in rewards]) for at, rewards in each]
    advantages, returns, values = (np.zeros((16, T)) for _ in range(3))
    for i, (at, rewards) in enumerate(each):
        after = value_after = 0.0
        for t, reward in reversed(list(zip(at, rewards, strict=True))):
            value = float(found.values[i, t])
            after = reward + how.gamma * value_after - value + how.gamma * how.gae_lambda * after
            advantages[i, t], returns[i, t], values[i, t] = after, after + value, value
            value_after = value
    said = rollout.drawn.targets != PADDING
    plain = advantages[said]
    white = np.where(said, (advantages - plain.mean()) / math.sqrt(plain.var() + 1e-8), 0)
    coef = beta
    if how.kl_target:
        error = min(max(sum(kl) / 16 / how.kl_target - 1, -0.2), 0.2)
        coef = beta * (1 + error * 16 / how.kl_horizon)
    wanted = {"logprobs": found.logprobs * said, "values": values, "advantages": white, "returns": returns}
    for name, value in wanted.items():
        ours = getattr(rows, name)
        assert ours.dtype == np.float32, name
        np.testing.assert_allclose(ours, value, atol=1e-6 * max(1, np.abs(value).max()), rtol=1e-6, err_msg=name)
    assert rows.next_kl_coef.dtype == np.float32 and rows.next_kl_coef.shape == (16,)
    np.testing.assert_allclose(rows.next_kl_coef, coef, rtol=1e-6)
    final = [float(score) if ended else how.missing_end for score, ended in zip(scores, rollout.ended, strict=True)]
    assert told["reward"] == pytest.approx(np.mean(final), rel=1e-6) and told["kl_coef"] == pytest.approx(beta)
    left = (returns - values)[said]
    assert told["explained_variance"] == pytest.approx(1 - left.var() / returns[said].var(), abs=1e-5)


def test_a_policy_waits_for_its_value_model(small: PolicyConfig) -> None:
    """No advantage, and so no gradient, before; the same as ever after."""
    warm = made(replace(small, ppo=replace(small.ppo, value_warmup=2)))
    about = {"kl_coef": np.float32(0.1)}, *reply_rows(16)
    plain, _ = made(small).rows(*about, 0)
    for iteration in range(4):
        rows, _ = warm.rows(*about, iteration)
        np.testing.assert_array_equal(rows.advantages, plain.advantages * (iteration >= 2))
        assert rows.advantages.dtype == np.float32
        np.testing.assert_array_equal(rows.returns, plain.returns)


# A run


@dataclass
class Seen:
    """What a run did, by iteration."""

    params: list[Any] = field(default_factory=list)
    """As they were when replies were drawn, and last at its end."""
    made: list[Rollout] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    alone(monkeypatch)

    def watch(owner: Any, name: str, see: Callable[..., None]) -> None:
        plain = getattr(owner, name)

        def watched(*given: Any) -> Any:
            answer = plain(*given)
            see(given, answer)
            return answer

        monkeypatch.setattr(owner, name, watched)

    watch(PPO, "replies", lambda given, answer: found.params.append(jax.device_get(given[1])))
    watch(PPO, "replies", lambda given, answer: found.made.append(answer))
    watch(PPO, "judge", lambda given, answer: found.judged.append(answer))
    watch(PPO, "rows", lambda given, answer: found.rows.append(answer[0]))
    watch(Rollouts, "batch", lambda given, answer: found.batches.append(answer))
    return found


def equal(ours: Any, theirs: Any) -> bool:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return jax.tree.structure(ours) == jax.tree.structure(theirs) and all(np.array_equal(*pair) for pair in pairs)


def policy_of(params: Any) -> Any:
    return {name: params[name] for name in ("embedding", "positions", "units", "norm_final")}


def in_torch(params: Any) -> dict[str, Any]:
    import torch

    return {k: torch.tensor(np.asarray(v, np.float64)) for k, v in flatten_dict(params, sep="/").items()}


def log_probs_in_float64(params: Any, drawn: Drawn, temperature: float) -> np.ndarray:
    """Of each target, by PyTorch; 0 where there is none."""
    import torch

    given = in_torch(policy_of(params))
    hidden = decoder(given, torch.tensor(drawn.tokens).long(), MODEL.window)
    every = (hidden @ given["embedding"][: MODEL.vocab_size].T / temperature).log_softmax(-1).numpy()
    found = np.take_along_axis(every, np.maximum(drawn.targets, 0)[..., None], -1)[..., 0]
    return np.where(drawn.targets == PADDING, 0, found)


def values_in_float64(params: Any, drawn: Drawn) -> np.ndarray:
    """Of a decoder with a scalar head at each place."""
    import torch

    given = in_torch(params)
    hidden = decoder(given, torch.tensor(drawn.tokens).long(), MODEL.window)
    return (hidden @ given["score/kernel"] + given["score/bias"]).numpy()


def test_a_run_draws_judges_and_learns(
    seen: Seen,
    small: PolicyConfig,
    reward: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    one_torch_thread: None,
) -> None:
    """One test, since processes that share the tests out would each train the run."""
    run, temperature = tmp_path / "run", 0.7
    judge = shutil.copytree(reward, tmp_path / "judge")
    config = replace(small, reward=str(judge), rollout=replace(small.rollout, temperature=temperature))
    config = replace(config, train=replace(small.train, total_steps=3, eval_batches=1))
    assert cli.run(["train", as_file(config, tmp_path), "--run", str(run)]) == 0
    start, *_, end = seen.params
    log, held_out = records(run, "train"), records(run, "eval")
    assert len(log) == 3 and [r["step"] for r in held_out] == [3] and len(seen.params) == 4

    # What learns is what spoke, at every iteration, and at first it is the reference.
    assert all(r["ratio_error"] <= 1.2e-7 and r["gap"] < 1e-4 for r in log) and abs(log[0]["kl"]) < 1e-6
    assert all(r["kl"] > -0.05 for r in log)
    assert any(r["clip_fraction"] > 0 for r in log)
    for params, rollout, judged in zip(seen.params, seen.made, seen.judged, strict=True):
        for ours, theirs, warmth in (
            (rollout.logprobs, params, 1.0),
            (judged.plain, params, 1.0),
            (judged.logprobs, params, temperature),
            (judged.ref_logprobs, start, temperature),
        ):
            np.testing.assert_allclose(ours, log_probs_in_float64(theirs, rollout.drawn, warmth), atol=1e-4)
        said = rollout.drawn.targets != PADDING
        values = values_in_float64(params["value"], rollout.drawn)
        np.testing.assert_allclose(judged.values[said], values[said], atol=1e-4)
        raw = values_in_float64(start["reward"], rollout.drawn)[np.arange(len(said)), rollout.drawn.last]
        assert judged.scores.dtype == np.float32
        np.testing.assert_allclose(judged.scores, (raw - MEAN) / STD, atol=1e-4)

    # Replies and orders are other ones each time; every reply is learned from once an epoch.
    texts = [tuple(rollout.texts) for rollout in seen.made[:3]]
    assert len(set(texts)) == 3 and len(set(texts[0])) > 8
    updates = config.rollout.episodes * config.rollout.epochs // config.train.batch_size
    orders = []
    for rows, batch in zip(seen.rows, seen.batches, strict=True):
        assert batch.tokens.shape == (updates, config.train.batch_size, T) and updates == 4
        known = {row.tobytes(): i for i, row in enumerate(rows.advantages)}
        assert len(known) == 16
        orders += [tuple(known[row.tobytes()] for row in half.reshape(16, T)) for half in np.split(batch.advantages, 2)]
    assert len(set(orders)) == 6 and all(sorted(order) == list(range(16)) for order in orders)

    # What is frozen stays to the bit, and what starts as something else starts as that.
    for name in ("reference", "reward"):
        assert equal(start[name], end[name])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(start["reward"]))
    assert equal(start["reference"], policy_of(start)) and equal(start["value"], start["reward"])
    assert not equal(policy_of(end), policy_of(start)) and not equal(end["value"], start["value"])
    assert equal(start["reward"], on_disk(reward)) and not equal(policy_of(start["reward"]), policy_of(start))

    # What a step carries.
    coef, average = config.ppo.kl_coef, policy_of(start)
    for record, after in zip(log, seen.params[1:], strict=True):
        assert record["kl_coef"] == pytest.approx(coef, rel=1e-6)
        coef *= 1 + min(max(record["kl"] / config.ppo.kl_target - 1, -0.2), 0.2) * 16 / config.ppo.kl_horizon
        assert float(after["kl_coef"]) == pytest.approx(coef, rel=1e-6)
        average = jax.tree.map(lambda old, new: old + 0.5 * (new - old), average, policy_of(after))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after["average"], average)

    # To all else it is a plain decoder.
    weights = open_weights(str(run))
    loaded = weights.load(weights.config.model, on_device(weights.config, jax.devices()[0]))
    assert equal(jax.device_get(loaded), end["average"])
    model = gptjax.load(str(run))
    assert isinstance(model.generate("say 1", max_tokens=4), str)
    again = as_file(replace(config, init_from=str(run)), tmp_path)
    capsys.readouterr()
    assert cli.run(["train", again, "--dry-run", "--layout.fsdp", "8"]) == 0
    assert "a run would start" in capsys.readouterr().out

    # Nothing goes on with another judge.
    (judge / "score.json").write_text('{"0": {"mean": 9.0, "std": 1.0}}')
    with pytest.raises(UserError, match=r"reward = .*judge: not the weights that .* was started from"):
        cli.run(["train", "--resume", str(run), "--train.total_steps", "4"])


def on_disk(reward: Path) -> Any:
    return jax.device_get(load_scorer(str(reward)).params)


@pytest.mark.parametrize(
    ("temperature", "top_k"),
    [(1.0, 0), (1.0, 5), (0.7, 5)],
)
@pytest.mark.slow
def test_what_is_drawn_in_another_way_is_learned_from_in_that_way(
    temperature: float, top_k: int, seen: Seen, shallow: PolicyConfig, tmp_path: Path
) -> None:
    words = ["--rollout.temperature", str(temperature), "--rollout.top_k", str(top_k), "--train.total_steps", "2"]
    assert cli.run(["train", as_file(shallow, tmp_path), "--run", str(tmp_path / "run"), *words]) == 0
    log = records(tmp_path / "run", "train")
    assert all(r["ratio_error"] <= 1.2e-7 and r["gap"] < 1e-4 for r in log) and abs(log[0]["kl"]) < 1e-6
    for rollout, judged in zip(seen.made, seen.judged, strict=True):
        said = rollout.drawn.targets != PADDING
        assert (np.abs(judged.logprobs - judged.plain)[said].mean() > 0.1) == (top_k > 0)
        np.testing.assert_allclose(judged.plain, rollout.logprobs, atol=1e-4)


KILLED = """
import os, signal, sys
from gptjax.infer.engine import Engine
step, rounds = Engine.step, []

def dies(engine):
    step(engine)
    rounds.append(engine.busy)
    if len(rounds) == 3 and engine.busy:  # the first half of the replies of the third step
        print("in a rollout", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

Engine.step = dies
"""


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_where_it_would_have(
    shallow: PolicyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal, and by signal 9 in the middle of a rollout: the same bits of all that a checkpoint holds."""
    alone(monkeypatch)
    config = replace(
        shallow, train=replace(shallow.train, total_steps=3, save_interval=1), rollout=replace(shallow.rollout, slots=8)
    )
    file = as_file(config, tmp_path)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.run(["train", file, "--run", str(whole)]) == 0
    with monkeypatch.context() as patch:
        plain = loop.learning_rate

        def rate(optimizer: Any, tokens: int) -> float:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)
            return plain(optimizer, tokens)

        patch.setattr(loop, "learning_rate", rate)
        assert cli.run(["train", file, "--run", str(cut)]) == 128 + 15
    assert [r["step"] for r in records(cut, "train")] == [1]
    code = f"{KILLED}import sys; from gptjax import cli; sys.exit(cli.run(['train', '--resume', {str(cut)!r}]))"
    killed = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL and killed.stderr.endswith("in a rollout\n"), killed.stderr
    assert [r["step"] for r in records(cut, "train")] == [1, 2]
    assert cli.run(["train", "--resume", str(cut)]) == 0
    ours, theirs = (kept(cut, shallow), kept(whole, shallow))
    assert equal(ours, theirs) and {"average", "kl_coef"} <= set(ours["carried"]) and "value" in ours["params"]
    told = "loss", "kl", "score", "kl_coef", "reward", "ratio_error"
    assert [[r[name] for name in told] for r in records(cut, "train")] == [
        [r[name] for name in told] for r in records(whole, "train")
    ]


def kept(run: Path, config: PolicyConfig) -> Any:
    """All that the newest checkpoint holds."""
    layout = one_device(config)
    abstract = abstract_state(config, PPO(config, "cpu", layout))
    checkpoints = Checkpoints(run, config)
    found = checkpoints.restore(placed(abstract, layout.shardings(abstract)).kept, print)
    checkpoints.close()
    assert found and found[1].step == 3
    return jax.device_get(found[0])


# Groups


def test_a_group_is_the_replies_to_one_prompt_and_is_judged_alone(grouped: GroupPolicyConfig) -> None:
    stage = made(replace(grouped, grpo=GRPOConfig(group=4, missing_end=-1.25)))
    prompts = [stage.prompt_of(i) for i in range(2 * 4 * len(stage.training))]
    groups = [{prompt.text for prompt in prompts[at : at + 4]} for at in range(0, len(prompts), 4)]
    assert all(len(group) == 1 for group in groups)
    once, again = ([text for (text,) in part] for part in (groups[: len(groups) // 2], groups[len(groups) // 2 :]))
    assert sorted(once) == sorted(again) and len(set(once)) == len(stage.training) and once != again

    rollout, found, scores = reply_rows(16)
    rollout.ended[8:12], scores[8:12] = True, 0.1
    for by_std in (True, False):
        stage = made(replace(grouped, grpo=GRPOConfig(group=4, missing_end=-1.25, scale_by_std=by_std)))
        rows, told = stage.rows({}, rollout, found, scores, 0)
        for at in range(0, 16, 4):
            worth = [float(scores[i]) if rollout.ended[i] else -1.25 for i in range(at, at + 4)]
            mean = sum(worth) / 4
            scale = math.sqrt(sum((each - mean) ** 2 for each in worth) / 3) + 1e-4 if by_std else 1.0
            wanted = [(each - mean) / scale for each in worth]
            np.testing.assert_allclose(rows.advantages[at : at + 4], wanted, rtol=1e-5, atol=1e-6)
        assert rows.advantages.dtype == np.float32 and (rows.advantages[8:12] == 0).all()
        assert told["equal_groups"] == pytest.approx(0.25)
        assert rows.ref_logprobs is not None and np.array_equal(rows.ref_logprobs, found.ref_logprobs)


def test_equal_rewards_teach_nothing(grouped: GroupPolicyConfig) -> None:
    """Not a bit of a parameter moves by what is worth the same; by the KL it does."""
    rollout, found, scores = reply_rows(16)
    model = replace(grouped.model, num_layers=1, attention_pattern=("dense",))
    for beta in (0.0, 0.5):
        config = replace(grouped, model=model, grpo=GRPOConfig(group=4, kl_coef=beta, missing_end=0.37))
        layout = one_device(config)
        stage = made(config, layout)
        rows, _ = stage.rows({}, rollout, found, np.full_like(scores, 0.37), 0)
        assert (rows.advantages == 0).all()
        shardings = layout.shardings(abstract_state(config, stage))
        state = init_state(config, stage, shardings)
        before = jax.device_get(state.params)
        step = make_step(config, stage, shardings, layout)
        batch = jax.tree.map(lambda leaf: leaf.reshape(2, 8, *leaf.shape[1:]), rows)
        state, metrics = step(state, batch, np.float32(0.1), np.int32(1), np.int32(0))
        assert equal(jax.device_get(state.params), before) == (beta == 0)
        assert (float(metrics["grad_norm"]) == 0) == (beta == 0) and int(metrics["skipped"]) == 0


@pytest.mark.slow
def test_groups_find_the_one_token_that_is_worth_more(
    grouped: GroupPolicyConfig,
    shallow: PolicyConfig,
    judges: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To end at once, which is 2 of 261 tokens at first."""
    alone(monkeypatch)
    config = replace(
        grouped,
        model=shallow.model,
        init_from=shallow.init_from,
        reward=f"{judges}:brief",
        rollout=RolloutConfig(episodes=128, max_tokens=1, slots=128),
        grpo=GRPOConfig(group=16, kl_coef=0.0),
        optimizer=replace(grouped.optimizer, learning_rate=1e-2),
        train=replace(grouped.train, batch_size=64, total_steps=24),
    )
    assert cli.run(["train", as_file(config, tmp_path), "--run", str(tmp_path / "run")]) == 0
    log = records(tmp_path / "run", "train")
    assert log[0]["ended"] < 0.1 and log[-1]["ended"] > 0.9 and log[-1]["reward"] > 0.8
    assert all(r["ratio_error"] <= 1.2e-7 and r["gap"] < 1e-4 for r in log)


# The step


@pytest.mark.slow
def test_updates_of_a_step_are_those_of_plain_optax_one_after_another(small: PolicyConfig) -> None:
    """Policy and value model each have an optimizer, clipped by their own norm, and a learning rate of their own."""
    optimizer = replace(small.optimizer, clip_norm=0.05, weight_decay=0.1)
    model = replace(small.model, num_layers=1, attention_pattern=("dense",))
    config = replace(small, model=model, optimizer=optimizer)
    layout, lr, ratio = one_device(config), 3e-3, config.ppo.value_learning_rate / optimizer.learning_rate
    stage = PPO(config, "cpu", layout)
    shardings = layout.shardings(abstract_state(config, stage))
    state = init_state(config, stage, shardings)
    every = jax.device_get(state.every_param)
    names = "embedding", "positions", "units", "norm_final", "value"
    trained, rest = ({n: p for n, p in every.items() if (n in names) == own} for own in (True, False))
    assert set(rest) == {"reference", "average", "kl_coef"}
    rows = stage.random_rows(0, (4, 8))
    step = make_step(config, stage, shardings, layout)
    state, metrics = step(state, rows, np.float32(lr), np.int32(1), np.int32(0))

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)

    def plain(rate: float) -> Any:
        adam = optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps)
        return optax.chain(
            optax.clip_by_global_norm(0.05), adam, optax.add_decayed_weights(0.1, decays), optax.scale(-rate)
        )

    def loss(trained: Any, part: Any) -> Any:
        return stage.loss(trained | rest, part, stage.counts(part), None)

    slope = jax.jit(jax.value_and_grad(loss))
    parts = {"policy": names[:-1], "value": names[-1:]}
    how = {"policy": plain(lr), "value": plain(lr * ratio)}
    memory = {who: how[who].init({n: trained[n] for n in parts[who]}) for who in parts}
    losses = []
    for i in range(4):
        found, grads = slope(trained, jax.tree.map(lambda leaf, i=i: leaf[i], rows))
        losses.append(float(found))
        for who, mine in parts.items():
            own, grad = ({n: tree[n] for n in mine} for tree in (trained, grads))
            assert float(optax.tree.norm(grad)) > 0.1  # each is clipped, and not by the other's
            update, memory[who] = how[who].update(grad, memory[who], own)
            trained = trained | optax.apply_updates(own, update)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), jax.device_get(state.params), trained)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics["loss"]) != pytest.approx(losses[0], rel=1e-3)
    moved = {n: float(optax.tree.norm(jax.tree.map(np.subtract, trained[n], every[n]))) for n in names}
    assert 0 < moved["value"] < moved["embedding"] + moved["units"]
    wanted = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, every["average"], policy_of(trained))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.carried["average"], wanted)
    assert float(state.carried["kl_coef"]) == np.float32(0.05) and equal(state.frozen["reference"], every["reference"])


# Layouts


@pytest.fixture(scope="session")
def steady(small: PolicyConfig) -> PolicyConfig:
    """An epsilon that keeps Adam from blowing the rounding of a vanishing gradient up."""
    model = replace(small.model, seq_len=16, attention_pattern=("dense",))
    return replace(small, model=model, optimizer=replace(small.optimizer, eps=1e-4))


def one_step(config: PolicyConfig, devices: int) -> tuple[dict[str, float], Any]:
    layout = Layout(make_mesh(config, jax.devices()[:devices]), rule_table(config.layout))
    stage = PPO(config, "cpu", layout)
    shardings = layout.shardings(abstract_state(config, stage))
    state = init_state(config, stage, shardings)
    step = make_step(config, stage, shardings, layout)
    state, metrics = step(state, stage.random_rows(0, (4, 8)), np.float32(1e-2), np.int32(1), np.int32(0))
    return jax.device_get((metrics, state.every_param))


@pytest.fixture(scope="session")
def single(steady: PolicyConfig) -> tuple[dict[str, float], Any]:
    return one_step(steady, 1)


LAYOUTS = pytest.mark.parametrize(
    "layout",
    [pytest.param(LayoutConfig(fsdp=8), marks=pytest.mark.whole), LayoutConfig(data=4, fsdp=1, tensor=2)],
    ids=["fsdp8", "data4_tensor2"],
)


@pytest.mark.slow
@LAYOUTS
def test_a_layout_learns_what_one_device_does(
    layout: LayoutConfig, steady: PolicyConfig, single: tuple[dict[str, float], Any]
) -> None:
    metrics, params = one_step(replace(steady, layout=layout), 8)
    for name, value in single[0].items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), params, single[1])


@pytest.fixture(scope="session")
def judged_alone(small: PolicyConfig, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        return judged_run(small, reward, tmp_path_factory.mktemp("judged"))


def judged_run(config: PolicyConfig, reward: Path, folder: Path) -> list[dict[str, Any]]:
    file = as_file(replace(config, reward=str(reward)), folder)
    assert cli.run(["train", file, "--run", str(folder / "run")]) == 0
    return records(folder / "run", "train")


@pytest.mark.whole  # engines draw on layouts in test_engine.py, a reward model judges on one below, and all learn so
@LAYOUTS
def test_a_layout_draws_and_judges_what_one_device_does(
    layout: LayoutConfig, small: PolicyConfig, reward: Path, judged_alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    for one, many in zip(judged_alone, judged_run(replace(small, layout=layout), reward, tmp_path), strict=True):
        assert many["gap"] < 1e-4 and many["ratio_error"] < 1e-5
        for figure in ("loss", "score", "kl", "length", "ended", "entropy", "value_loss"):
            assert many[figure] == pytest.approx(one[figure], rel=1e-3, abs=1e-4), figure


# A world in which the best reply is known


def write_lines(path: Path, lines: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


WALKER = ModelConfig(num_layers=2, num_heads=4, embed_dim=64, seq_len=16, vocab_size=261)
WALK_OPTIMIZER = OptimizerConfig(final_ratio=1.0, warmup_tokens=0, decay_tokens=0, weight_decay=0.0, b2=0.999, eps=1e-5)


@pytest.fixture(scope="session")
def walker(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to walk at random, as 1,000 walks do."""
    folder = tmp_path_factory.mktemp("walker")
    walks = [(LETTERS[ids[1]], text(ids[2:])) for ids in WORLD.walks(np.random.default_rng(0), 1000)]
    source = write_lines(folder / "walks.jsonl", [{"prompt": start, "response": said} for start, said in walks])
    data = DialogueConfig(source=source, tokenizer="bytes", packing=False, cache_dir=tiny.data.cache_dir)
    config = SFTConfig(
        name="walker",
        model=WALKER,
        data=replace(data, train_split="train[:98%]", eval_split="train[98%:]"),
        optimizer=replace(WALK_OPTIMIZER, learning_rate=3e-3, final_ratio=0.1, eps=1e-8),
        train=walk_train(tiny, 300, eval_batches=0),
    )
    return trained(config, folder)


def trained(config: Any, folder: Path, code: str = "") -> Path:
    """A run in a process of its own, whose programs are optimised, since its steps take longer than to compile them.
    `code` is what precedes it there."""
    folder.mkdir(exist_ok=True)
    words = ["train", as_file(config, folder), "--run", str(folder / "run")]
    start = [sys.executable, "-c", f"{code}import sys; from gptjax import cli; sys.exit(cli.run({words!r}))"]
    subprocess.run(start, env=environment(flags=""), cwd=Path(__file__).parent, check=True)  # where rewards import from
    return folder / "run"


def walk_train(tiny: Config, steps: int, **more: Any) -> TrainConfig:
    plain = {"log_interval": 1, "save_interval": 0, "eval_interval": 0, "tensorboard": False}
    return TrainConfig(batch_size=64, total_steps=steps, compile_cache=tiny.train.compile_cache, **(plain | more))


def walked(walker: Path, tiny: Config, folder: Path, steps: int, code: str = "", **more: Any) -> Path:
    """A run of PPO from it on all 20 starts, with `more` fields of its config."""
    folder.mkdir()
    source = write_lines(folder / "starts.jsonl", [{"prompt": start} for start in LETTERS[1:] for _ in range(20)])
    data = PromptConfig(source=source, cache_dir=tiny.data.cache_dir, train_split="train", eval_split="train")
    config = PolicyConfig(
        name="walks",
        model=WALKER,
        init_from=str(walker),
        reward=f"{Path(__file__).parent / 'walks_reward.py'}:fraction",
        data=data,
        ppo=PPOConfig(kl_coef=0.02, value_learning_rate=1e-3),
        rollout=RolloutConfig(episodes=256, epochs=4, max_tokens=11, slots=256),
        optimizer=replace(WALK_OPTIMIZER, learning_rate=3e-4),
        train=walk_train(tiny, steps, eval_interval=steps, eval_batches=-1),
    )
    return trained(replace(config, **more), folder, code)


WHOLE_NUMBERS = """
from gptjax.stages import ppo
plain = ppo.penalised
ppo.penalised = lambda *, scores, **rest: plain(scores=scores.astype("int32"), **rest)
"""


@pytest.mark.slow
def test_walks_become_the_shortest_ones_and_do_not_where_scores_are_whole_numbers(
    walker: Path, tiny: Config, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The control, with --whole: without the fractions of its scores the same run learns nothing of the world. One
    test, since the processes that share the tests out would each train the walker."""
    run = walked(walker, tiny, tmp_path / "fractions", 16)
    held_out, log = records(run, "eval"), records(run, "train")
    golds = [r["score"] / 0.99 for r in held_out]
    assert golds[0] < 0.85 and golds[-1] >= 0.95
    assert all(r["kl"] <= 1.2 for r in held_out)
    assert all(r["kl"] > -0.05 for r in log) and abs(log[0]["kl"]) < 1e-6
    assert all(r["ratio_error"] <= 1.2e-7 and r["gap"] < 1e-4 and r["skipped"] == 0 for r in log)
    assert log[-1]["ended"] > 0.95
    if request.config.getoption("--whole"):
        run = walked(walker, tiny, tmp_path / "whole", 5, WHOLE_NUMBERS)
        golds = [r["score"] / 0.99 for r in records(run, "eval")]
        assert abs(golds[-1] - golds[0]) < 0.02, golds


@pytest.mark.slow
def test_the_bench_tells_an_iteration_s_parts_and_later_ones_compile_nothing(
    shallow: PolicyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On all devices that there are."""
    assert cli.run(["bench", "ppo", as_file(shallow, tmp_path), "--iterations", "4", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "ppo.json").read_text())
    assert len(found["iterations"]) == 4 and found["late"] == 0 and found["iterations"][0]["compiled"] > 0
    assert min(found[name] for name in ("rollout_s", "judge_s", "update_s", "share", "engine_tokens_per_s")) > 0
    assert "0 programs compiled" in capsys.readouterr().out
    with pytest.raises(UserError, match="the first 2 warm up; nearest 3"):
        cli.run(["bench", "ppo", as_file(shallow, tmp_path), "--iterations", "2"])


# What may be switched off, and figures


def test_a_missing_end_may_cost_nothing(small: PolicyConfig, grouped: GroupPolicyConfig) -> None:
    """The score of a reply that was cut off is then its own, and all that else depends on it."""
    rollout, found, scores = reply_rows(16)
    ended = replace(rollout, ended=np.ones(16, bool))
    for config in (small, grouped):
        free = override(config, [f"--{'ppo' if config is small else 'grpo'}.missing_end", "none"])
        assert from_json(to_json(free)) == free
        rows, told = made(free).rows({"kl_coef": np.float32(0.1)}, rollout, found, scores, 0)
        wanted, _ = made(config).rows({"kl_coef": np.float32(0.1)}, ended, found, scores, 0)
        assert told["reward"] == pytest.approx(scores.mean(), rel=1e-6) and equal(rows, wanted)
        assert not equal(rows, made(config).rows({"kl_coef": np.float32(0.1)}, rollout, found, scores, 0)[0])


def test_the_way_to_switch_a_missing_end_off_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "--help", str(Path(__file__).parents[1] / "configs" / "ppo.py")]) == 0
    assert "--ppo.missing_end  float|none  (default -1.0)" in capsys.readouterr().out
    with (
        pytest.raises(UserError, match=r"ppo.missing_end = often: expected a number.*, or none"),
        explained(PolicyConfig),
    ):
        PPOConfig(missing_end="often")  # type: ignore[arg-type]


def test_the_ratio_s_error_is_the_largest_whatever_the_micro_batches(grouped: GroupPolicyConfig) -> None:
    """Of eight replies at once, and in parts of two. What PPO and GRPO log is told in one place."""
    model = replace(grouped.model, num_layers=1, seq_len=16, attention_pattern=("dense",))
    layout, found = one_device(grouped), {}
    for micro in (8, 2):
        config = replace(grouped, model=model, train=replace(grouped.train, batch_size=8, micro_batch_size=micro))
        config = replace(config, rollout=replace(config.rollout, episodes=8))
        stage = stage_class(config)(config, "cpu", layout)
        shardings = layout.shardings(abstract_state(config, stage))
        state, rows = init_state(config, stage, shardings), stage.random_rows(0, (8,))
        step = make_step(config, stage, shardings, layout)
        parts = [np.reshape(leaf, (-1, micro, *leaf.shape[1:])) for leaf in rows]
        state, found[micro] = step(state, type(rows)(*parts), np.float32(0), np.int32(8 // micro), np.int32(0))
    ours, _ = jax.jit(stage.log_probs)(state.every_param, rows)  # which a rate of 0 left as they were
    off = np.where(rows.targets == PADDING, 0, np.expm1(ours - rows.logprobs))
    assert float(found[8]["ratio_error"]) == pytest.approx(np.abs(off).max(), rel=1e-4)
    for name in ("ratio_error", "loss", "entropy", "clip_fraction"):
        assert float(found[2][name]) == pytest.approx(float(found[8][name]), rel=1e-4), name


@pytest.mark.slow
def test_another_function_or_pretraining_text_is_refused_unless_it_is_meant(
    shallow: PolicyConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the function its file. The same text may lie elsewhere, and gold, which is logged alone, be another."""
    alone(monkeypatch)
    monkeypatch.chdir(tmp_path)
    judge, gold = write_functions(tmp_path), tmp_path / "gold.py"
    gold.write_text("def gold(prompt, reply):\n    return 1.0\n")
    shutil.copytree(corpus, tmp_path / "text")
    text = PretrainingConfig(source="text/*.txt", cache_dir=shallow.data.cache_dir)
    config = replace(shallow, ptx=text, ppo=PPOConfig(ptx_coef=0.5, ptx_rows=1))
    config = replace(config, reward=f"{judge}:fraction", gold=f"{gold}:gold")
    config = replace(config, rollout=RolloutConfig(episodes=8, max_tokens=4, slots=8))
    config = replace(config, train=replace(config.train, total_steps=1))
    assert cli.run(["train", as_file(config, tmp_path), "--run", "run"]) == 0
    on = ["train", "--resume", "run", "--train.total_steps"]

    gold.write_text("def gold(prompt, reply):\n    return 2.0\n")
    monkeypatch.chdir(tmp_path / "text")  # from where the names of its files mean nothing
    (tmp_path / "text").rename(tmp_path / "moved")
    elsewhere = ["--ptx.source", str(tmp_path / "moved" / "*.txt")]
    on[2] = str(tmp_path / "run")
    assert cli.run([*on, "2", *elsewhere, "--dry-run"]) == 0

    judge.write_text(judge.read_text().replace("0.73", "0.74"))
    first = sorted((tmp_path / "moved").iterdir())[0]
    first.write_text(first.read_text()[::-1])
    with pytest.raises(UserError) as error:
        cli.run([*on, "2", *elsewhere])
    for name in (f"reward = {judge}:fraction", f"ptx.source = {elsewhere[1]}"):
        assert f"{name} is not what the run was trained with (digest " in str(error.value)
    assert str(error.value).endswith("give the old one, or --new-data to go on with this one")
    assert "\n" not in str(error.value) and cli.run([*on, "2", *elsewhere, "--dry-run"]) == 1
    assert cli.run([*on, "2", *elsewhere, "--new-data"]) == 0
    assert [r["gold"] for r in records(tmp_path / "run", "train")] == [1.0, 2.0]
    assert cli.run([*on, "3", "--dry-run"]) == 0  # they are the run's now


@pytest.mark.whole  # two processes train, and fine-tune, in every run of the tests
def test_two_processes_learn_what_one_does(
    small: PolicyConfig, reward: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reward model and pretraining text, of which each reads its own rows."""
    alone(monkeypatch)
    text = PretrainingConfig(source=str(corpus / "*.txt"), cache_dir=small.data.cache_dir)
    config = replace(small, reward=str(reward), ptx=text, ppo=replace(small.ppo, ptx_coef=0.5, ptx_rows=2))
    config = replace(config, rollout=RolloutConfig(episodes=8, max_tokens=4, slots=8))
    file = as_file(config, tmp_path)
    assert cli.run(["train", file, "--run", str(tmp_path / "one")]) == 0
    words = [file, "--run", str(tmp_path / "two")]
    done = together(words, words)
    assert [status for status, _, _ in done] == [0, 0], done[1][2]
    told = "loss", "grad_norm", "score", "reward", "kl", "kl_coef", "length", "entropy", "value_loss", "ptx_loss"
    for one, two in zip(*(records(tmp_path / name, "train") for name in ("one", "two")), strict=True):
        assert two["ratio_error"] <= 1e-6 and two["gap"] < 1e-4
        for figure in told:
            assert two[figure] == pytest.approx(one[figure], rel=1e-4, abs=1e-5), figure


@pytest.mark.parametrize(
    ("name", "kept"), [("judge.py:f", "{}/judge.py:f"), ("runs/reward", "{}/runs/reward"), ("module:f", "module:f")]
)
def test_what_judges_is_found_from_any_folder(
    name: str, kept: str, small: PolicyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = located(replace(small, reward=name, gold=name))
    assert config.reward == config.gold == kept.format(tmp_path)


# A reward model of another size


@pytest.fixture(scope="session")
def larger(scorer: RewardConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deeper, wider and with a longer context than the policy, from a run with another batch and pipeline."""
    model = replace(MODEL, num_layers=4, num_heads=4, embed_dim=48, seq_len=40, attention_pattern=("dense",))
    train = replace(scorer.train, batch_size=12, micro_batch_size=12)
    config = replace(scorer, model=model, train=train)
    run = write_reward(tmp_path_factory.mktemp("larger"), config)
    layout = LayoutConfig(pipeline=4, pipeline_chunks=12)
    (run / "config.json").write_text(to_json(replace(config, layout=layout)))
    return run


@pytest.mark.slow
def test_a_reward_model_of_another_size_judges_and_becomes_the_value_model(
    seen: Seen, small: PolicyConfig, larger: Path, tmp_path: Path, one_torch_thread: None
) -> None:
    config = replace(small, reward=str(larger), rollout=RolloutConfig(episodes=8, max_tokens=4, slots=8))
    assert cli.run(["train", as_file(config, tmp_path), "--run", str(tmp_path / "run")]) == 0
    start, end = seen.params[0], seen.params[-1]
    theirs = on_disk(larger)
    assert equal(start["reward"], theirs) and equal(start["value"], theirs) and not equal(end["value"], theirs)
    assert theirs["positions"].shape == (40, 48) and start["positions"].shape == (T, 32)
    alone, drawn, judged = load_scorer(str(larger), unit=True), seen.made[0].drawn, seen.judged[0]
    np.testing.assert_allclose(judged.scores, alone.score(alone.params, drawn.tokens, drawn.last), atol=1e-4)
    values = judged.values[np.arange(8), drawn.last]  # where a value model says at first what the reward model does
    np.testing.assert_allclose(values, judged.scores * STD + MEAN, atol=1e-4)


def test_a_reward_model_that_the_mesh_does_not_divide_is_refused(
    small: PolicyConfig, scorer: RewardConfig, tmp_path: Path
) -> None:
    odd = write_reward(tmp_path, replace(scorer, model=replace(MODEL, num_heads=3, embed_dim=48)))
    message = f"reward = {odd}: its model does not fit the mesh: layout.tensor = 2: does not divide model.num_heads = 3"
    refused(small, ["--reward", str(odd), "--layout.tensor", "2", "--layout.fsdp", "4"], message, tmp_path)


@pytest.mark.slow
def test_a_reward_model_lies_on_the_policy_s_layout(small: PolicyConfig, larger: Path) -> None:
    """Whatever that of its own run was: scores and values by the policy's micro-batches, stages and rounds."""
    model = replace(MODEL, attention_pattern=("dense",))
    config = replace(small, model=model, reward=str(larger))
    rows, found = reply_rows(8)[0].drawn, []
    for layout, devices in ((LayoutConfig(), 1), (LayoutConfig(pipeline=2, fsdp=4), 8)):
        config = replace(config, layout=layout)
        on = Layout(make_mesh(config, jax.devices()[:devices]), rule_table(layout))
        stage = PPO(config, "cpu", on)
        found.append(
            stage.judge(init_state(config, stage, on.shardings(abstract_state(config, stage))).every_param, rows)
        )
    one, many = found
    for name in ("logprobs", "values", "scores"):
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), atol=1e-4, err_msg=name)


# Walks by preferences: what is quick is in every run, the rest in those with --whole


@pytest.fixture(scope="session")
def preferences(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> RankingConfig:
    """Three replies to each of 3,000 starts, ranked by what they are worth."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("preferences")
    ranked = WORLD.rankings(rng, 3000, lambda prompts: [WORLD.stray(rng, prompt) for prompt in prompts])
    rows = [(LETTERS[each.prompt[1]], [text(ids) for ids in each.replies[:3]], each.ranks[:3]) for each in ranked]
    lines = [{"prompt": start, "replies": replies, "ranks": ranks} for start, replies, ranks in rows]
    path = folder / "walks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    splits = {"train_split": "train[:85%]", "eval_split": "train[85%:]"}
    return RankingConfig(source=str(path), max_replies=3, cache_dir=tiny.data.cache_dir, **splits)


@pytest.fixture(scope="session")
def judge(walker: Path, tiny: Config, preferences: RankingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a reward model of walks."""
    return judging(walker, tiny, preferences, tmp_path_factory.mktemp("judge"), 60)


def judging(walker: Path, tiny: Config, preferences: RankingConfig, folder: Path, steps: int) -> Path:
    optimizer = replace(WALK_OPTIMIZER, learning_rate=1e-3, final_ratio=0.1, eps=1e-8)
    about = {"model": WALKER, "init_from": str(walker), "data": preferences, "optimizer": optimizer}
    config = RewardConfig(name="judge", train=walk_train(tiny, steps, eval_batches=4), **about)
    return trained(config, folder)


@pytest.mark.whole
def test_a_reward_model_knows_shorter_walks_from_longer_ones(judge: Path) -> None:
    """Of about 750 held-out pairs; 0.932 when this was written."""
    assert records(judge, "eval")[-1]["accuracy"] >= 0.9


@pytest.mark.whole
def test_preferences_alone_make_walks_shorter(
    walker: Path, tiny: Config, preferences: RankingConfig, tmp_path: Path
) -> None:
    """By DPO, from 0.78 to 0.915 when this was written."""
    optimizer = replace(WALK_OPTIMIZER, learning_rate=7e-4, final_ratio=0.1, eps=1e-8)
    about = {"model": WALKER, "init_from": str(walker), "data": preferences, "optimizer": optimizer}
    how = {"dpo": DPOConfig(beta=0.5), "train": walk_train(tiny, 30, eval_batches=4)}
    run = trained(PreferenceConfig(name="dpo", **about, **how), tmp_path)
    (told,) = records(run, "eval")
    assert told["accuracy"] >= 0.85 and told["loss"] < 0.45 and told["margin"] > 0.8
    assert mean_gold(run) >= 0.87


def mean_gold(run: Path, each: int = 20) -> float:
    """Of so many replies to each start, drawn by whole passes over their rows: no engine has a part in it."""
    model = gptjax.load(str(run), layout=LayoutConfig(fsdp=1))
    rng, starts = np.random.default_rng(0), [start for start in LETTERS[1:] for _ in range(each)]
    before = np.array([model.stage.prompt(start) for start in starts])
    first, size = before.shape[1], WALKER.seq_len
    ids = np.pad(before, ((0, 0), (0, size - first)))
    for place in range(first, size):
        likely = model.logits(ids)[:, place - 1]
        ids[:, place] = (likely + rng.gumbel(size=likely.shape)).argmax(-1)

    def said(reply: list[int]) -> str:
        ends = [i for i, token in enumerate(reply) if token in model.stage.ends]
        return model.tokenizer.decode(reply[: ends[0]] if ends else reply, inside=True)

    return float(np.mean([gold(start, said(row[first:].tolist())) for start, row in zip(starts, ids, strict=True)]))


@pytest.mark.slow
@pytest.mark.whole
def test_a_learned_reward_makes_walks_shorter(
    walker: Path, preferences: RankingConfig, tiny: Config, tmp_path: Path
) -> None:
    """By their true worth, which the policy is never told: 0.92 in the last five iterations, and 0.938 of the held-out
    replies, when this was written, by a judge that is right on 97.8% of pairs. One of 93% is soon believed too much:
    0.87 to 0.94, from one machine's rounding to another's."""
    ppo = PPOConfig(kl_coef=0.2, kl_target=0.8, kl_horizon=1000, value_learning_rate=1e-3)
    function = f"{Path(__file__).parent / 'walks_reward.py'}:gold"
    judge = judging(walker, tiny, preferences, tmp_path / "judge", 240)
    run = walked(walker, tiny, tmp_path / "learned", 10, reward=str(judge), gold=function, ppo=ppo)
    before, after = records(run, "eval")
    assert before["gold"] < 0.8 and after["gold"] >= 0.85 and after["score"] > before["score"] + 0.2
    assert 0.2 <= after["kl"] <= 1.2
    log = records(run, "train")
    assert np.mean([r["gold"] for r in log[-5:]]) >= 0.9
    assert all(r["ratio_error"] <= 1.2e-7 and r["gap"] < 1e-4 for r in log)


@pytest.mark.slow
@pytest.mark.whole
def test_pretraining_text_beside_the_replies_is_not_forgotten(tiny: Config, tmp_path: Path) -> None:
    """Of a text of walks in capitals, which fine-tuning on those in small letters had taken from 1.4 nats a token to
    about 6: after ten iterations 6.2 without it, 0.80 with it (10.2 and 0.79 in another run), and walks shorter by
    either, when this was written."""
    walks = WORLD.walks(np.random.default_rng(5), 2000)
    source = write_lines(tmp_path / "text.jsonl", [{"text": text(ids[1:]).upper()} for ids in walks])
    shared = {"source": source, "cache_dir": tiny.data.cache_dir, "train_split": "train[:90%]"}
    optimizer = replace(WALK_OPTIMIZER, learning_rate=3e-3, final_ratio=0.1, eps=1e-8)
    about = {"model": WALKER, "optimizer": optimizer, "train": walk_train(tiny, 300, eval_batches=0)}
    pretrained = trained(Config("text", data=DataConfig(**shared), **about), tmp_path / "pretrained")
    said = [(LETTERS[ids[1]], text(ids[2:])) for ids in WORLD.walks(np.random.default_rng(0), 1000)]
    replies = write_lines(tmp_path / "walks.jsonl", [{"prompt": start, "response": reply} for start, reply in said])
    data = DialogueConfig(source=replies, packing=False, cache_dir=tiny.data.cache_dir)
    tuned = trained(SFTConfig("walks", data=data, init_from=str(pretrained), **about), tmp_path / "tuned")
    lost = {}
    for coef in (1e-6, 0.5):  # the first one tells the loss, and teaches nothing
        ppo = PPOConfig(kl_coef=0.0, value_learning_rate=1e-3, ptx_coef=coef, ptx_rows=1)
        run = walked(tuned, tiny, tmp_path / f"ptx {coef}", 10, ppo=ppo, ptx=PretrainingConfig(**shared))
        lost[coef] = [r["ptx_loss"] for r in records(run, "train")]
        before, after = (r["score"] / 0.99 for r in records(run, "eval"))
        assert before < 0.8 and after >= 0.85
    assert lost[1e-6][-1] > 3 and lost[0.5][-1] < 1.5
