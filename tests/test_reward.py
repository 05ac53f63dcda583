"""Reward models: ranked replies as rows, the loss against PyTorch, a task that is learned, what is kept of evaluations.
Run: pytest tests/test_reward.py"""

import json
import math
import re
import shutil
import signal
import time
from collections import Counter
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
from ranked import MODEL, RANKS, K, T, alone, batch, decoder, one_device, write_base, write_rankings
from toy import records

from gptjax import cli
from gptjax.config import (
    Config,
    LayoutConfig,
    OptimizerConfig,
    RankingConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
)
from gptjax.data.chat import Message
from gptjax.data.ranked import open_rankings
from gptjax.data.rankings import Ranking, parse
from gptjax.data.sources import build
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.model.accounting import train_flops_per_token
from gptjax.model.scalar import ranking_nats
from gptjax.rl.responses import extent
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import Base, Reward, stage_class
from gptjax.stages.pairs import figures
from gptjax.stages.scorer import load_scorer
from gptjax.train import loop
from gptjax.train.checkpoint import restore_params
from gptjax.train.parts import split
from gptjax.train.step import abstract_state, init_state, make_step, narrow


@pytest.fixture(scope="session")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rankings(tmp_path_factory.mktemp("rankings"))


@pytest.fixture(scope="session")
def base(tuned: SFTConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tuned)


@pytest.fixture(scope="session")
def small(base: Path, rankings: Path, tiny: Config) -> RewardConfig:
    return RewardConfig(
        name="reward",
        model=MODEL,
        init_from=str(base),
        data=RankingConfig(
            source=str(rankings),
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
            tensorboard=False,
            compile_cache=tiny.train.compile_cache,
        ),
    )


def made(config: RewardConfig) -> Reward:
    tokenizer = Reward.fit_tokenizer(config, load_tokenizer("bytes"))
    return Reward(config, "cpu", None, tokenizer, build(config.data))


@pytest.fixture(scope="session")
def stage(small: RewardConfig) -> Reward:
    return made(small)


@pytest.fixture(scope="session")
def params(stage: Reward) -> Any:
    """Of a size at which attention is far from even and scores are far apart."""
    drawn = jax.tree.map(lambda p: 4 * p, nn.unbox(jax.jit(stage.init)(jax.random.key(0))))
    return drawn | {"score": drawn["score"] | {"bias": jnp.float32(0.3)}}


@pytest.fixture(scope="session")
def answer(stage: Reward) -> Any:
    """jit of (params, rows) -> loss and gradients, compiled once."""
    return jax.jit(jax.value_and_grad(lambda p, rows: stage.loss(p, rows, stage.counts(rows), None)))


@pytest.fixture(scope="session")
def scored(stage: Reward) -> Any:
    return jax.jit(lambda p, tokens, last: stage.scores(p, tokens, last, None))


# The loss


def test_loss_and_gradients_are_those_of_pytorch_in_float64(
    stage: Reward, params: Any, answer: Any, one_torch_thread: None
) -> None:
    import torch

    rows = batch()
    given = {
        k: torch.tensor(np.asarray(v, np.float64), requires_grad=True) for k, v in flatten_dict(params, sep="/").items()
    }
    prompts = []
    for tokens, _, last, ranks in zip(*rows, strict=True):
        hidden = decoder(given, torch.tensor(tokens).long(), stage.config.model.window)
        score = [h[at] @ given["score/kernel"] + given["score/bias"] for h, at in zip(hidden, last, strict=True)]
        ordered = [(i, j) for i in range(K) for j in range(K) if 0 < ranks[i] < ranks[j]]
        if ordered:
            prompts.append(-sum(torch.sigmoid(score[i] - score[j]).log() for i, j in ordered) / len(ordered))
    assert len(prompts) == 4 == float(stage.counts(rows))
    wanted = sum(prompts) / len(prompts)
    wanted.backward()
    loss, grads = answer(params, rows)
    assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(wanted.item(), rel=1e-5)
    ours = flatten_dict(grads, sep="/")
    scale = max(float(g.grad.abs().max()) for g in given.values())
    for name, value in given.items():
        np.testing.assert_allclose(ours[name], value.grad, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
    assert float(jnp.abs(ours["embedding"]).max()) > 0 and abs(float(ours["score/bias"])) < 1e-6  # a bias moves no gap


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_prompts_loss_is_the_mean_over_its_pairs_whatever_their_number(count: int) -> None:
    rng = np.random.default_rng(count)
    scores = rng.normal(size=5).astype(np.float32)
    ranks = np.array([*rng.integers(1, 4, count), *[0] * (5 - count)])
    ranks[:2] = 1, 2
    found = [math.log1p(math.exp(scores[j] - scores[i])) for i in range(5) for j in range(5) if 0 < ranks[i] < ranks[j]]
    assert float(ranking_nats(scores, ranks)) == pytest.approx(sum(found) / len(found), rel=1e-6)
    order = rng.permutation(5)
    assert float(ranking_nats(scores[order], ranks[order])) == pytest.approx(sum(found) / len(found), rel=1e-6)


# Where a score is read


END, PAD = 7, 0


@pytest.mark.parametrize(
    ("reply", "place"),
    [([END, PAD, PAD, PAD], 0), ([4, END, PAD, PAD], 1), ([4, 5, 6, END], 3), ([4, 5, 6, 4], 3), ([4, 5, PAD, PAD], 1)],
)
@pytest.mark.parametrize("pad", [PAD, END])
def test_a_score_is_read_at_the_first_end_or_the_last_token(
    reply: list[int], place: int, pad: int, params: Any, scored: Any
) -> None:
    """Ends first, in the middle, last and absent, in the prompt and as padding: what a rollout calls a response's last
    token is where a ranked reply of the same tokens is read, and what is behind it changes no bit."""
    length = next((i for i, token in enumerate(reply) if token == PAD), 4)
    tokens = np.array([[3, END, *reply[:length], *[pad] * (4 - length)]], np.int32)
    drawn = (np.arange(6) >= 2) & (np.arange(6) < 2 + length)
    last = extent(tokens=jnp.asarray(tokens), drawn=jnp.asarray(drawn[None]), ends=(END,)).last
    assert last.tolist() == [2 + place] and last.dtype == jnp.int32
    cut = np.where(np.arange(6) > 2 + place, 9, tokens)
    assert np.array_equal(scored(params, tokens, last), scored(params, cut, last))


def test_what_stands_behind_the_last_token_changes_no_bit(params: Any, scored: Any) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 261, (4, T), np.int32)
    last = np.array([0, 5, 20, T - 1], np.int32)
    other = np.where(np.arange(T) > last[:, None], rng.integers(0, 261, tokens.shape), tokens).astype(np.int32)
    ours, theirs = (np.asarray(scored(params, each, last)) for each in (tokens, other))
    assert ours.dtype == np.float32 and np.array_equal(ours, theirs) and len(set(ours.tolist())) == 4
    changed = tokens.copy()
    changed[:, 0] += 1
    assert not np.isclose(scored(params, changed, last), ours).any()


def test_rows_hold_each_reply_in_the_chat_format_and_its_place(stage: Reward) -> None:
    found, chat = stage.training, stage.chat
    for index in range(5):
        ranked, row = parse(found.source[int(found.numbers[index])].text), found.row([index])
        for k in range(K):
            if k >= len(ranked.replies):
                assert (row.ranks[k], row.first[k], row.last[k], row.tokens[k].any()) == (0, 0, 0, False)
                continue
            whole = chat.render([*ranked.prompt, Message("assistant", ranked.replies[k])]).ids
            assert row.tokens[k, : row.last[k] + 1].tolist() == whole.tolist() and whole[-1] == chat.end
            said = chat.reply(ranked.replies[k])
            assert row.tokens[k, row.first[k] : row.last[k] + 1].tolist() == said.tolist()
            assert not row.tokens[k, row.last[k] + 1 :].any() and row.ranks[k] == ranked.ranks[k]
    assert not any(leaf.any() for leaf in found.row([]))


def test_what_is_too_long_loses_its_beginning_or_is_left_out(stage: Reward) -> None:
    source, chat, data = stage.training_text, stage.chat, stage.config.data
    cut = open_rankings(data, source, chat, 6)
    row = cut.row([0])
    assert cut.num_cut == len(cut) == len(source) and row.last[0] == 5 and row.tokens[0, 5] == chat.end
    assert bytes(row.tokens[0, 1:5].tolist()).decode() in (
        "".join(x) for x in parse(source[int(cut.numbers[0])].text).replies
    )
    with pytest.raises(UserError, match=r"no ranking to learn from in a split \(\d+ longer than the context\)"):
        open_rankings(replace(data, too_long="drop"), source, chat, 6)


# Records


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Well?\n\nAssistant: "
ASKED = [["user", "Hi"], ["assistant", "Hello"], ["user", "Well?"]]


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (
            {"prompt": "Hi", "replies": ["a", "b", "c"], "ranks": [5, 2, 5]},
            [[["user", "Hi"]], ["a", "b", "c"], [2, 1, 2]],
        ),
        (
            {"prompt": [{"role": r, "content": c} for r, c in ASKED], "replies": ["a", "b"], "ranks": [0, 1]},
            [ASKED, ["a", "b"], [1, 2]],
        ),
        ({"chosen": f"{HH}Yes", "rejected": f"{HH}No"}, [ASKED, ["Yes", "No"], [1, 2]]),
        ({"prompt": HH.rstrip(), "chosen": "Yes", "rejected": "No"}, [ASKED, ["Yes", "No"], [1, 2]]),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, [[["user", "Hi"]], ["Yes", "No"], [1, 2]]),
        (
            {
                "prompt": "Hi",
                "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
                "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}],
            },
            [[["user", "Hi"]], ["Yes", "No"], [1, 2]],
        ),
        ({"prompt": "Human: Hi", "chosen": "Yes", "rejected": "No"}, [[["user", "Human: Hi"]], ["Yes", "No"], [1, 2]]),
        ({"prompt": "Hi", "replies": ["a", "b"], "ranks": [1]}, "other numbers of replies and of ranks"),
        ({"prompt": "Hi", "replies": ["a"], "ranks": [1]}, "fewer than 2 replies"),
        ({"prompt": "Hi", "replies": [*"abcdefghij"], "ranks": [*range(10)]}, "more than 9 replies"),
        ({"prompt": "Hi", "replies": ["a", "b"], "ranks": [2, 2]}, "all replies tied"),
        ({"prompt": "Hi", "replies": ["a", "b"], "ranks": [1, 2.5]}, "ranks that are no integers"),
        ({"prompt": "Hi", "replies": ["a", "b"], "ranks": [True, False]}, "ranks that are no integers"),
        ({"prompt": "Hi", "replies": ["a", " "], "ranks": [1, 2]}, "empty reply"),
        ({"prompt": "Hi", "replies": ["a", "a", "b"], "ranks": [1, 2, 3]}, "equal replies of different ranks"),
        ({"prompt": "Hi", "replies": "ab", "ranks": [1, 2]}, "replies is str, not a list"),
        ({"prompt": "Hi", "replies": ["a", 3], "ranks": [1, 2]}, "a reply is int, not text"),
        ({"prompt": "Hi", "replies": ["a", "\ud800"], "ranks": [1, 2]}, "half a character (a lone surrogate)"),
        ({"prompt": " ", "replies": ["a", "b"], "ranks": [1, 2]}, "empty message"),
        ({"replies": ["a", "b"], "ranks": [1, 2]}, "no prompt"),
        (
            {"chosen": f"{HH}Yes", "rejected": f"{HH.replace('Hi', 'Ho')}No"},
            "chosen and rejected answer different prompts",
        ),
        ({"prompt": "Ho", "chosen": f"{HH}Yes", "rejected": f"{HH}No"}, "chosen and rejected answer different prompts"),
        (
            {"chosen": f"{HH}Yes", "rejected": f"{HH}No\n\nHuman: Why?"},
            "rejected does not end with the assistant's words",
        ),
        ({"chosen": f"{HH}Yes", "rejected": HH}, "empty reply"),
        ({"chosen": f"{HH}Yes", "rejected": None}, "rejected is null, not text"),
        ({"chosen": "Yes", "rejected": "No"}, "no prompt"),
        (
            {"chosen": "Yes", "text": "No"},
            "neither prompt, replies, ranks nor prompt, chosen, rejected among its fields chosen, text",
        ),
        ([1], "list, not an object with fields"),
    ],
)
def test_records_are_rankings_or_left_out_for_a_reason(row: Any, kept: Any) -> None:
    found = json.loads(Ranking("drop").document(row, "here:1"))
    assert found == kept
    if isinstance(kept, str):
        with pytest.raises(UserError, match=re.escape(f"here:1: {kept}; mend it")):
            Ranking("refuse").document(row, "here:1")


def test_what_is_left_out_is_counted_and_nothing_left_is_one_line(
    small: RewardConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [{"prompt": "Hi", "replies": ["a", "b"], "ranks": ranks} for ranks in ([1, 1], [1], [1, 2, 3])]
    good = [{"prompt": f"Hi {i}", "replies": ["a", "b"], "ranks": [1, 2]} for i in range(20)]
    path = tmp_path / "rankings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*bad, *good]))
    data = replace(small.data, source=str(path), train_split="train", eval_split="train")
    found = made(replace(small, data=data)).training
    assert len(found) == 20
    assert found.left_out == Counter({"all replies tied": 1, "other numbers of replies and of ranks": 2})
    cli.run(["data", as_file(replace(small, data=data), tmp_path)])
    out = capsys.readouterr().out
    assert "20 prompts with 40 ranked replies" in out and "[rank 1] a\n[rank 2] b" in out
    assert "2 left out: other numbers of replies and of ranks" in out
    path.write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(
        UserError, match=r"all of its 3 records are dropped, the first for: all replies tied; mend them$"
    ):
        build(data)


def test_published_pairs_are_read(small: RewardConfig, shared: Path) -> None:
    """HH's, of which few differ in more than the last turn."""
    path = shared / "hh-harmless.jsonl"
    corpus = build(replace(small.data, source=str(path)))
    texts = [corpus.store[i].text for i in range(len(corpus.store))]
    why = Counter(json.loads(text) for text in texts if text.startswith('"'))
    assert len(texts) > 1000 and why.total() < 0.05 * len(texts)
    first = json.loads(path.read_text().splitlines()[0])
    kept = parse(texts[0])
    assert first["chosen"].endswith(kept.replies[0]) and first["rejected"].endswith(kept.replies[1])
    assert kept.ranks == [1, 2] and kept.prompt[-1].role == "user"


# Evaluation


def test_figures_of_pairs_are_those_counted_one_by_one() -> None:
    rng = np.random.default_rng(3)
    ranks = np.array(RANKS * 20, np.int32)
    scores = (rng.normal(size=ranks.shape) - 0.5 * ranks).astype(np.float32)
    found = figures(scores, ranks)
    gaps, nats = [], []
    for s, r in zip(scores.astype(float), ranks, strict=True):
        own = [s[i] - s[j] for i in range(K) for j in range(K) if 0 < r[i] < r[j]]
        gaps += own
        nats += [sum(math.log1p(math.exp(-gap)) for gap in own) / len(own)] if own else []
    assert found["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-9)
    right, count = sum(gap > 0 for gap in gaps), len(gaps)
    share = right / count
    assert found["accuracy"] == pytest.approx(share)
    z = 1.959963984540054
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    ends = [(middle + sign * half) / (1 + z * z / count) for sign in (-1, 1)]
    assert [found["accuracy_low"], found["accuracy_high"]] == pytest.approx(ends, rel=1e-6)
    ordered = sorted(gaps, key=abs)
    third = count // 3
    assert found["accuracy_far"] == pytest.approx(np.mean([gap > 0 for gap in ordered[-third:]]))
    assert found["accuracy_near"] < found["accuracy_middle"] < found["accuracy_far"]
    bins = found["calibration"]
    assert sum(number for *_, number in bins) == count and all(0.5 <= said <= 1 for said, *_ in bins)
    assert sum(seen * number for _, seen, number in bins) == pytest.approx(right)
    assert found["calibration_error"] == pytest.approx(sum(n * abs(a - b) for a, b, n in bins) / count)
    here = scores[ranks > 0].astype(float)
    assert (found["score_mean"], found["score_std"]) == pytest.approx((here.mean(), here.std()))
    one = figures(np.array([[1.0, 0.0]]), np.array([[1, 2]]))
    assert one["accuracy"] == 1 and all(math.isfinite(v) for v in one.values() if isinstance(v, float))


# A run


@pytest.fixture(scope="session")
def run(small: RewardConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To its end, evaluated on the way."""
    folder = tmp_path_factory.mktemp("reward")
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        config = replace(small, train=replace(small.train, eval_interval=20))
        assert cli.run(["train", as_file(config, folder), "--run", str(folder / "run")]) == 0
    return folder / "run"


def test_a_ranked_task_is_learned_and_its_figures_logged(run: Path, stage: Reward, small: RewardConfig) -> None:
    before, *_, after = records(run, "eval")
    assert before["step"] == 0 and before["accuracy"] < 0.8
    assert after["accuracy"] > 0.95 and after["accuracy_low"] < after["accuracy"] <= after["accuracy_high"]
    assert after["loss"] < 0.3 < before["loss"] and after["calibration_error"] < 0.1
    assert records(run, "train")[-1]["tokens"] == 2 * len(stage.training) * K * T
    kept = json.loads((run / "score.json").read_text())
    assert list(kept) == [str(r["step"]) for r in records(run, "eval")]
    assert kept[str(after["step"])] == {"mean": after["score_mean"], "std": after["score_std"]}
    assert cli.run(["report", str(run)]) in (0, None)
    assert (run / "calibration.png").is_file() and (run / "report.html").read_text().count("<img") == 2


def test_a_scorer_gives_held_out_replies_mean_0_and_deviation_1(run: Path, stage: Reward) -> None:
    rows = [stage.evaluation.row([index]) for index in range(len(stage.evaluation))]
    tokens, _, last, ranks = (np.concatenate(leaves) for leaves in zip(*rows, strict=True))
    here = ranks > 0
    for unit in (False, True):
        found = load_scorer(str(run), unit=unit)
        scores = jax.jit(found.score)(found.params, tokens[here], last[here])
        assert scores.dtype == jnp.float32 and abs(float(scores.mean())) < 1e-4
        assert (float(scores.std()) == pytest.approx(1, abs=1e-4)) == unit
    assert found.tokenizer.pieces == stage.known_tokenizer.pieces
    fewer = tokens[here][:, :24]
    np.testing.assert_allclose(jax.jit(found.score)(found.params, fewer, last[here]), scores, atol=1e-5)


def test_a_scorer_wants_an_evaluated_reward_model(run: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a run of stage sft, not of a reward model"):
        load_scorer(str(base))
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "score.json").write_text('{"3": {"mean": 0.0, "std": 1.0}}')
    with pytest.raises(UserError, match=r"has no step \d+, the checkpoint that is taken, but 3; gptjax train --resume"):
        load_scorer(str(copy))


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "RUN"],
        ["chat", "RUN"],
        ["look", "RUN", "--text", "a"],
        ["eval", "RUN", "--text", "a.txt"],
        ["convert", "RUN", "out"],
        ["train", "CONFIG", "--init_from", "RUN", "--run", "other"],
    ],
    ids=lambda words: words[0],
)
def test_other_verbs_say_that_it_is_a_reward_model(
    words: list[str], run: Path, base: Path, small: RewardConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"RUN": str(run), "CONFIG": as_file(small, tmp_path)}
    with pytest.raises(UserError) as error:
        cli.run([names.get(word, word) for word in words])
    text = str(error.value)
    assert text.startswith(f"{run}: a reward model, which scores replies and writes none") and "\n" not in text
    assert str(base) in text and "load_scorer" in text and not (tmp_path / "out").exists()


@pytest.mark.whole  # runs of sft and ppo are stopped in every run of the tests
def test_a_run_that_is_stopped_ends_where_it_would_have(
    small: RewardConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mid-epoch, with dropout and accumulation: the same bits, and the same head to begin with."""
    alone(monkeypatch)
    few = replace(small.train, micro_batch_size=8, epochs=0, total_steps=4)
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
    assert cli.run(["train", "--resume", str(cut)]) == 0
    ours, theirs = (_saved(config, each) for each in (cut, whole))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [r["loss"] for r in records(cut, "train")] == [r["loss"] for r in records(whole, "train")]
    assert (cut / "score.json").read_text() == (whole / "score.json").read_text()


def _saved(config: RewardConfig, run: Path) -> list[np.ndarray]:
    stage, layout = Reward(config, "cpu"), one_device(config)
    abstract = abstract_state(config, stage)
    places = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.unbox(abstract.params),
        layout.shardings(abstract.params),
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restore_params(run, places))]


# Layouts


def steps(config: RewardConfig, devices: int) -> tuple[list[float], Any]:
    """Losses of 3 steps on random rankings, and the parameters after."""
    layout = Layout(make_mesh(config, jax.devices()[:devices]), rule_table(config.layout))
    stage = Reward(config, "cpu", layout)
    shardings = layout.shardings(abstract_state(config, stage))
    state = init_state(config, stage, shardings)
    step = make_step(config, stage, shardings, layout)
    rows, losses = stage.random_rows(0, (2, 8)), []
    for i in range(3):
        state, metrics = step(state, rows, np.float32(1e-2), np.int32(2), np.int32(i))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="session")
def steady(small: RewardConfig) -> RewardConfig:
    """An epsilon that keeps Adam from blowing the rounding of a vanishing gradient up; three replies; dropout."""
    model = replace(small.model, seq_len=16, attention_pattern=("dense",), dropout=0.1)
    train = replace(small.train, batch_size=16, micro_batch_size=8)
    data = replace(small.data, max_replies=3)
    return replace(small, model=model, train=train, data=data, optimizer=replace(small.optimizer, eps=1e-4))


@pytest.fixture(scope="session")
def single(steady: RewardConfig) -> tuple[list[float], Any]:
    return steps(steady, 1)


@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(fsdp=8),
        LayoutConfig(data=4, fsdp=1, tensor=2),
        pytest.param(LayoutConfig(fsdp=2, context=4), marks=pytest.mark.whole),
        pytest.param(LayoutConfig(pipeline=2, fsdp=2, tensor=2, sequence_sharding=True), marks=pytest.mark.slow),
    ],
    ids=["fsdp8", "data4_tensor2", "fsdp2_context4", "pipeline2_fsdp2_tensor2_sequence"],
)
def test_a_layout_learns_what_one_device_does(
    layout: LayoutConfig, steady: RewardConfig, single: tuple[list[float], Any]
) -> None:
    losses, params = steps(replace(steady, layout=layout), 8)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    assert single[0][2] < single[0][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, single[1])


def test_the_head_is_sharded_by_the_table_and_stays_in_float32(steady: RewardConfig) -> None:
    config = replace(steady, layout=LayoutConfig(fsdp=8))
    layout = Layout(make_mesh(config, jax.devices()), rule_table(config.layout))
    boxed = abstract_state(config, Reward(config, "cpu", layout)).params
    assert [*layout.shardings(boxed)["score"]["kernel"].spec] == ["fsdp"]
    shapes = jax.eval_shape(lambda p: narrow(p, jnp.dtype("bfloat16")), nn.unbox(boxed))
    assert shapes["score"]["kernel"].dtype == jnp.float32 and shapes["embedding"].dtype == jnp.bfloat16
    halved = Reward(replace(steady, model=replace(steady.model, dtype="bfloat16")), "cpu")
    assert halved.network.plain_model.dtype == jnp.bfloat16
    scores, loss = jax.eval_shape(
        lambda p, r: (halved._scores_of_rows(p, r, None), halved.loss(p, r, halved.counts(r), None)),
        nn.unbox(boxed),
        halved.random_rows(0, (2,)),
    )
    assert (scores.shape, scores.dtype, loss.dtype) == ((2, 3), jnp.float32, jnp.float32)


# Before a run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init_from", ""], "init_from: empty, and a reward model starts from the run whose replies it is to score"),
        (["--data.max_replies", "3"], "data.max_replies = 3: a prompt has 4 replies; nearest 4"),
        (["--data.max_replies", "10"], "data.max_replies = 10: must lie in 2..9; nearest 9"),
        (["--data.tokenizer", "bytes"], "--data.tokenizer: no such field in stage reward"),
        (["--train.sample_interval", "5"], "--train.sample_interval: no such field in stage reward"),
        (["--model.vocab_size", "300", "--model.embed_dim", "64"], "its model.embed_dim is 32, not 64"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    words: list[str], message: str, small: RewardConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        cli.run(["train", as_file(small, tmp_path), "--run", str(tmp_path / "run"), *words])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_and_a_plan_count_every_reply(
    small: RewardConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = as_file(small, tmp_path)
    assert cli.run(["train", file, "--dry-run", "--layout.fsdp", "8"]) == 0
    text = capsys.readouterr().out
    assert f"batch: 16 x {K} x {T} = {16 * K * T:,} tokens" in text and "score/kernel" in text
    flops = train_flops_per_token(small.model) - 6 * small.model.vocab_size * small.model.embed_dim
    assert f"{flops:.3e} FLOPs per token" in text and "training prompts with" in text
    assert cli.run(["plan", file, "--topology", "v5e-8", "--analytic", "--out", str(tmp_path / "plan")]) in (0, 1)
    assert cli.run(["plan", file, "--topology", "v5e-8", "--explain", "score"]) == 0
    assert "rule embed -> fsdp" in capsys.readouterr().out


def test_the_head_is_born_beside_what_is_loaded(small: RewardConfig, base: Path) -> None:
    assert stage_class(small) is Reward and issubclass(Reward, Base)
    stage = Reward(small, "cpu")
    _, born = split(nn.unbox(jax.eval_shape(stage.init, jax.random.key(0))), stage.is_born)
    assert jax.tree.map(lambda leaf: leaf.shape, born) == {"score": {"kernel": (32,), "bias": ()}}
