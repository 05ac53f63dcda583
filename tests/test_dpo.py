"""DPO: the loss against PyTorch, what it starts from and where it may go, a task that is learned, resume, layouts.
Run: pytest tests/test_dpo.py"""

import math
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_file
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ranked import MODEL, K, T, alone, batch, decoder, write_base, write_rankings
from toy import records

from gptjax import cli
from gptjax.config import (
    Config,
    DPOConfig,
    LayoutConfig,
    OptimizerConfig,
    PreferenceConfig,
    RankingConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
    from_json,
    to_json,
)
from gptjax.data.rankings import parse
from gptjax.data.rows import PADDING
from gptjax.data.sources import build
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.model.accounting import mean_keys, train_flops_per_token
from gptjax.model.scalar import is_better
from gptjax.planner.chips import topology
from gptjax.planner.place import place
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import Preference, stage_class
from gptjax.stages.preference import _said
from gptjax.stages.weights import on_device, open_weights
from gptjax.train import loop
from gptjax.train.checkpoint import restore_params
from gptjax.train.parts import join, split
from gptjax.train.run import fill_run
from gptjax.train.step import abstract_state, init_state, make_step

LOG_2 = math.log(2)


@pytest.fixture(scope="session")
def base(tuned: SFTConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tuned)


@pytest.fixture(scope="session")
def small(base: Path, tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> PreferenceConfig:
    return PreferenceConfig(
        name="dpo",
        model=MODEL,
        init_from=str(base),
        data=RankingConfig(
            source=str(write_rankings(tmp_path_factory.mktemp("rankings"))),
            max_replies=K,
            cache_dir=tiny.data.cache_dir,
            train_split="train[:80%]",
            eval_split="train[80%:]",
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_tokens=0, decay_tokens=0, weight_decay=0.0),
        train=TrainConfig(
            batch_size=16,
            epochs=2,
            log_interval=1,
            eval_interval=0,
            eval_batches=-1,
            save_interval=0,
            sample_prompt="say 1",
            tensorboard=False,
            compile_cache=tiny.train.compile_cache,
        ),
    )


@pytest.fixture(scope="session")
def stage(small: PreferenceConfig) -> Preference:
    """With smoothing, which the loss of a run here has not."""
    config = replace(small, dpo=DPOConfig(beta=0.2, label_smoothing=0.1))
    return Preference(
        config, "cpu", None, Preference.fit_tokenizer(config, load_tokenizer("bytes")), build(config.data)
    )


@pytest.fixture(scope="session")
def params(stage: Preference) -> Any:
    """Policy and reference as they start, equal."""
    return nn.unbox(jax.jit(stage.init)(jax.random.key(0)))


@pytest.fixture(scope="session")
def answer(stage: Preference) -> Any:
    """jit of (policy, reference, rows) -> loss and the policy's gradients, compiled once."""

    def loss(policy: Any, reference: Any, rows: Any) -> jax.Array:
        return stage.loss(policy | {"reference": reference}, rows, stage.counts(rows), None)

    return jax.jit(jax.value_and_grad(loss))


def apart(params: Any, scale: float) -> tuple[Any, Any]:
    """A policy of a size at which attention is far from even, and a reference that differs from it."""
    policy, reference = split(params, lambda name: name.startswith("reference/"))
    return jax.tree.map(lambda p: scale * p, policy), reference["reference"]


# The loss


def torch_log_prob(given: Any, tokens: np.ndarray, first: int, last: int) -> Any:
    """Of one reply after its prompt, in float64, token by token."""
    import torch

    hidden = decoder(given, torch.tensor(tokens[None]).long(), MODEL.window)[0]
    said = (hidden @ given["embedding"][: MODEL.vocab_size].T).log_softmax(-1)
    return sum((said[at - 1, tokens[at]] for at in range(max(first, 1), last + 1)), torch.zeros((), dtype=hidden.dtype))


def test_loss_and_gradients_are_those_of_pytorch_in_float64(
    stage: Preference, params: Any, answer: Any, one_torch_thread: None
) -> None:
    import torch
    from torch.nn.functional import logsigmoid

    rows, (policy, reference) = batch(), apart(params, 3.0)

    def in_torch(tree: Any, learns: bool) -> dict[str, Any]:
        flat = flatten_dict(tree, sep="/")
        return {k: torch.tensor(np.asarray(v, np.float64), requires_grad=learns) for k, v in flat.items()}

    ours, theirs = in_torch(policy, True), in_torch(reference, False)
    losses = []
    for *replies, ranks in zip(*rows, strict=True):
        there = [k for k in range(K) if ranks[k] > 0]
        reward = {}
        for k in there:
            reply = [leaf[k] for leaf in replies]
            reward[k] = 0.2 * (torch_log_prob(ours, *reply) - torch_log_prob(theirs, *reply))
        gaps = [reward[i] - reward[j] for i in there for j in there if ranks[i] < ranks[j]]
        losses += [-0.9 * logsigmoid(gap) - 0.1 * logsigmoid(-gap) for gap in gaps]
    assert len(losses) == float(stage.counts(rows)) == 1 + 2 + 6 + 5
    wanted = sum(losses) / len(losses)
    wanted.backward()
    loss, grads = answer(policy, reference, rows)
    assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(wanted.item(), rel=1e-5)
    found, scale = flatten_dict(grads, sep="/"), max(float(g.grad.abs().max()) for g in ours.values())
    assert found.keys() == ours.keys() and scale > 1e-2
    for name, value in ours.items():
        np.testing.assert_allclose(found[name], value.grad, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def test_a_policy_starts_at_log_2_and_its_reference_is_itself(params: Any, answer: Any) -> None:
    policy, reference = apart(params, 1.0)
    jax.tree.map(np.testing.assert_array_equal, policy, reference)
    assert float(answer(policy, reference, batch())[0]) == pytest.approx(LOG_2, abs=1e-6)


def test_a_reply_and_its_end_are_asked_for_and_nothing_else(stage: Preference, params: Any, answer: Any) -> None:
    """Prompts, what is behind the end, and replies that are not there have no part; the end token has."""
    rows, chat = stage.training.row([0]), stage.chat
    ranked, targets = parse(stage.training.source[int(stage.training.numbers[0])].text), np.asarray(_said(rows))
    prompt = len(chat.prompt(ranked.prompt))
    for k, reply in enumerate(ranked.replies):
        said = chat.reply(reply)
        assert targets[k, prompt - 1 :][: len(said)].tolist() == said.tolist() and said[-1] == chat.end
        assert (targets[k] != PADDING).sum() == len(said)
    assert (targets[len(ranked.replies) :] == PADDING).all() and (_said(stage.training.row([])) == PADDING).all()

    policy, reference = apart(params, 3.0)
    rows = jax.tree.map(lambda leaf: np.repeat(leaf[None], 6, axis=0), rows)
    loss, grads = answer(policy, reference, rows)
    behind = np.arange(T) > rows.last[..., None]
    other = answer(policy, reference, rows._replace(tokens=np.where(behind, 7, rows.tokens).astype(np.int32)))
    assert float(other[0]) == float(loss)
    jax.tree.map(np.testing.assert_array_equal, other[1], grads)
    without = answer(policy, reference, rows._replace(last=rows.last - 1))[1]["embedding"][chat.end]
    assert float(jnp.abs(grads["embedding"][chat.end] - without).max()) > 1e-4


def test_a_reply_that_has_lost_its_beginning_is_asked_for_from_its_second_token(stage: Preference) -> None:
    tokens = np.arange(T, dtype=np.int32)[None]
    rows = stage.row._replace(tokens=tokens, first=np.array([0]), last=np.array([3]), ranks=np.array([1]))
    assert np.asarray(_said(rows))[0, :5].tolist() == [1, 2, 3, PADDING, PADDING]


def test_figures_are_those_counted_pair_by_pair(stage: Preference, params: Any) -> None:
    policy, reference = apart(params, 1.5)
    found = stage.evaluate(policy | {"reference": reference}, lambda rows: jax.tree.map(jnp.asarray, rows), range(16))
    rows = [stage.evaluation.row([index]) for index in range(len(stage.evaluation))]
    rows = type(rows[0])(*(np.stack(leaves) for leaves in zip(*rows, strict=True)))
    judge = jax.jit(lambda tree, rows: stage.log_probs(tree, rows, None))
    ours, theirs = (np.asarray(judge(tree, rows), float) for tree in (policy, reference))
    n, i, j = np.nonzero(is_better(rows.ranks))
    gaps = 0.2 * ((ours - theirs)[n, i] - (ours - theirs)[n, j])
    nats = np.logaddexp(0, -gaps) * 0.9 + np.logaddexp(0, gaps) * 0.1
    wanted = {
        "loss": nats.mean(),
        "margin": gaps.mean(),
        "accuracy": (gaps > 0).mean(),
        "chosen_logprob": ours[n, i].mean(),
        "rejected_logprob": ours[n, j].mean(),
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


# A run


@pytest.fixture(scope="session")
def run(small: PreferenceConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To its end, evaluated and sampled on the way."""
    folder = tmp_path_factory.mktemp("dpo")
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        train = replace(small.train, eval_interval=20, sample_interval=40, keep_best=True)
        assert cli.run(["train", as_file(replace(small, train=train), folder), "--run", str(folder / "run")]) == 0
    return folder / "run"


def test_preferences_are_learned_by_what_is_a_plain_decoder_to_all_else(
    run: Path, small: PreferenceConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test, since processes that share the tests out would each train the run."""
    before, *_, after = records(run, "eval")
    assert before["step"] == 0 and before["loss"] == pytest.approx(LOG_2, abs=1e-6)
    assert abs(before["margin"]) < 1e-6 and after["margin"] > 0.5
    assert after["accuracy"] > 0.9 and after["accuracy_low"] < after["accuracy"] <= after["accuracy_high"]
    assert after["loss"] < 0.5 and records(run, "train")[-1]["loss"] < 0.5
    assert before["chosen_logprob"] < 0 and after["chosen_logprob"] > after["rejected_logprob"]
    assert records(run, "sample")[-1]["text"].startswith("say 1\n")

    weights = open_weights(str(run))
    params = weights.load(weights.config.model, on_device(weights.config, jax.devices()[0]))
    assert set(params) == {"embedding", "positions", "units", "norm_final"}
    again = as_file(replace(small, init_from=str(run)), tmp_path)
    assert cli.run(["train", again, "--dry-run", "--layout.fsdp", "8"]) == 0
    assert "a run would start" in capsys.readouterr().out


@pytest.mark.slow
def test_the_run_is_sampled_evaluated_and_gone_on_from(
    run: Path, small: PreferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its policy is the next one's reference."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("say 1 and say 2\n" * 20)
    assert cli.run(["sample", str(run), "--prompt", "say 5", "--tokens", "8"]) in (0, None)
    words = ["--text", "text.txt", "--cache-dir", small.data.cache_dir, "--out", "out"]
    assert cli.run(["eval", str(run), *words]) in (0, None)
    with pytest.raises(UserError, match="Hugging Face has local attention in GPT-Neo alone"):
        cli.run(["convert", str(run), "exported"])
    alone(monkeypatch)
    train = replace(small.train, epochs=0, total_steps=1, eval_interval=10)
    assert cli.run(["train", as_file(replace(small, init_from=str(run), train=train), tmp_path), "--run", "next"]) == 0
    before = records(Path("next"), "eval")[0]
    assert before["loss"] == pytest.approx(LOG_2, abs=1e-6)
    best = min(records(run, "eval"), key=lambda record: record["loss"])
    assert before["chosen_logprob"] == pytest.approx(best["chosen_logprob"], rel=1e-4)


@pytest.mark.whole  # runs of sft and ppo are stopped in every run of the tests
def test_a_run_that_is_stopped_ends_where_it_would_have(
    small: PreferenceConfig, tuned: SFTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mid-epoch, with dropout and accumulation: the same bits beside the same reference, and beside no other."""
    alone(monkeypatch)
    few = replace(small.train, micro_batch_size=8, epochs=0, total_steps=4, eval_batches=0)
    config = replace(small, model=replace(small.model, dropout=0.1), train=few)
    file = as_file(config, tmp_path)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.run(["train", file, "--run", str(whole)]) == 0
    plain, left = loop.learning_rate, [True]

    def rate(optimizer: Any, tokens: int) -> float:
        if tokens == 16 * K * T and left:
            left.clear()
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)
        return plain(optimizer, tokens)

    monkeypatch.setattr(loop, "learning_rate", rate)
    assert cli.run(["train", file, "--run", str(cut)]) == 128 + 15
    assert records(cut, "train")[-1]["step"] < 4
    saved = (cut / "config.json").read_bytes()
    other = replace(from_json(saved), init_from=str(write_base(tmp_path / "other", tuned, seed=1)))
    (cut / "config.json").write_text(to_json(other))
    with pytest.raises(UserError, match=r"not the weights that .* was started from"):
        cli.run(["train", "--resume", str(cut)])
    (cut / "config.json").write_bytes(saved)
    assert cli.run(["train", "--resume", str(cut)]) == 0
    ours, theirs = (_saved(config, each) for each in (cut, whole))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    losses = [r["loss"] for r in records(whole, "train")]
    assert [r["loss"] for r in records(cut, "train")] == losses and losses[-1] < losses[0]


def _saved(config: PreferenceConfig, run: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restore_params(run, on_device(config, jax.devices()[0])))]


# Layouts


def steps(config: PreferenceConfig, devices: int) -> tuple[list[float], Any]:
    """Losses of 3 steps on random rankings, and the policy after; the reference keeps its bits."""
    layout = Layout(make_mesh(config, jax.devices()[:devices]), rule_table(config.layout))
    stage = Preference(config, "cpu", layout)
    shardings = layout.shardings(abstract_state(config, stage))
    state = init_state(config, stage, shardings)
    reference = jax.device_get(state.frozen["reference"])
    jax.tree.map(np.testing.assert_array_equal, reference, jax.device_get(state.params))
    step = make_step(config, stage, shardings, layout)
    rows, losses = stage.random_rows(0, (2, 8)), []
    for i in range(3):
        state, metrics = step(state, rows, np.float32(1e-2), np.int32(2), np.int32(i))
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, reference, jax.device_get(state.frozen["reference"]))
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="session")
def steady(small: PreferenceConfig) -> PreferenceConfig:
    """An epsilon that keeps Adam from blowing the rounding of a vanishing gradient up; pairs; dropout."""
    model = replace(small.model, seq_len=16, attention_pattern=("dense",), dropout=0.1)
    train = replace(small.train, batch_size=16, micro_batch_size=8)
    data = replace(small.data, max_replies=2)
    return replace(small, model=model, train=train, data=data, optimizer=replace(small.optimizer, eps=1e-4))


@pytest.fixture(scope="session")
def single(steady: PreferenceConfig) -> tuple[list[float], Any]:
    return steps(steady, 1)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(LayoutConfig(fsdp=8), marks=pytest.mark.whole),
        LayoutConfig(data=2, fsdp=2, tensor=2),
        pytest.param(LayoutConfig(fsdp=2, context=4), marks=pytest.mark.whole),
        pytest.param(LayoutConfig(pipeline=2, fsdp=2, tensor=2, sequence_sharding=True), marks=pytest.mark.whole),
    ],
    ids=["fsdp8", "data2_fsdp2_tensor2", "fsdp2_context4", "pipeline2_fsdp2_tensor2_sequence"],
)
def test_a_layout_learns_what_one_device_does(
    layout: LayoutConfig, steady: PreferenceConfig, single: tuple[list[float], Any]
) -> None:
    losses, params = steps(replace(steady, layout=layout), 8)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    assert single[0][2] < single[0][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, single[1])


# Before a run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init_from", ""], "init_from: empty, and a policy starts from the run that it is to improve"),
        (["--init_from", "REWARD"], "a reward model, which scores replies and writes none"),
        (["--data.max_replies", "3"], "data.max_replies = 3: a prompt has 4 replies; nearest 4"),
        (["--data.tokenizer", "bytes"], "--data.tokenizer: no such field in stage preference"),
        (["--dpo.beta", "0"], "dpo.beta = 0.0: must be positive"),
        (["--dpo.label_smoothing", "0.5"], "dpo.label_smoothing = 0.5: must"),
        (["--train.sample_interval", "5", "--train.sample_prompt", " "], "train.sample_prompt: has no text"),
        (["--model.embed_dim", "64"], "its model.embed_dim is 32, not 64"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    words: list[str], message: str, small: PreferenceConfig, tmp_path: Path
) -> None:
    reward = RewardConfig(name="reward", model=MODEL, data=small.data, init_from=small.init_from)
    fill_run(tmp_path / "scores", reward, load_tokenizer("bytes"))
    words = [str(tmp_path / "scores") if word == "REWARD" else word for word in words]
    with pytest.raises(UserError) as error:
        cli.run(["train", as_file(small, tmp_path), "--run", str(tmp_path / "run"), *words])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_and_a_plan_count_the_reference(
    small: PreferenceConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage_class(small) is Preference
    file, pod = as_file(small, tmp_path), topology("v5e-8")
    assert cli.run(["train", file, "--dry-run", "--layout.fsdp", "8"]) == 0
    text = capsys.readouterr().out
    assert f"batch: 16 x {K} x {T} = {16 * K * T:,} tokens" in text and "training prompts with" in text
    assert re.search(r"reference/embedding .* frozen", text) and "beside a frozen reference of as many" in text
    assert f"{train_flops_per_token(small.model) * 4 / 3:.3e} FLOPs per token" in text
    assert cli.run(["plan", file, "--topology", "v5e-8", "--analytic", "--out", str(tmp_path / "plan")]) in (0, 1)
    there = place(replace(small, layout=LayoutConfig(fsdp=8)), pod)
    assert there.local_frozen == pytest.approx(2 * there.local_trained, rel=0.1)  # bfloat16, but for biases and norms


def test_flops_are_the_compilers(small: PreferenceConfig) -> None:
    """Unrolled, no remat, and reference attention, which computes all T keys: within 5%. The loss makes its logits once
    more going back."""
    model = replace(MODEL, embed_dim=128, seq_len=64, vocab_size=256, attention_pattern=("dense",), scan_layers=False)
    config = replace(small, model=replace(model, attention="reference"), data=replace(small.data, max_replies=2))
    stage = Preference(config, "cpu")
    trained, frozen = split(nn.unbox(jax.eval_shape(stage.init, jax.random.key(0))), stage.is_frozen)
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((4, *leaf.shape), leaf.dtype), stage.row)

    def loss(trained: Any, frozen: Any, rows: Any) -> jax.Array:
        return stage.loss(join(trained, frozen), rows, stage.counts(rows), None)

    cost: Any = jax.jit(jax.grad(loss)).lower(trained, frozen, rows).compile().cost_analysis()
    more = 2 * 256 * 128 + 16 * 2 * 128 * (64 - mean_keys("dense", 64, 64))  # and keys that the mask hides
    wanted = train_flops_per_token(model) * 4 / 3 + more
    assert cost["flops"] / (4 * 2 * 64) == pytest.approx(wanted, rel=0.05)
