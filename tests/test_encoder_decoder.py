"""Damaged texts and pairs on the one loop: rows, losses, smoothing, runs. Run: pytest tests/test_encoder_decoder.py"""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoded import damaged_config, file_of, made, pairs_config, params_of, refusal, train, write_pairs, write_texts
from toy import records

import gptjax
from gptjax import cli
from gptjax.config import DenoiseConfig, NoiseConfig, Seq2SeqConfig, WritingConfig
from gptjax.data.rows import PADDING, PairRows
from gptjax.data.tokenizers.marks import sentinels
from gptjax.model.loss import Head, cross_entropy
from gptjax.stages.weights import open_weights, places
from gptjax.train import loop


@pytest.fixture(scope="module")
def pairs(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Seq2SeqConfig:
    return pairs_config(tiny, write_pairs(tmp_path_factory.mktemp("pairs")))


@pytest.fixture(scope="module")
def damaged(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> DenoiseConfig:
    return damaged_config(tiny, write_texts(tmp_path_factory.mktemp("texts")))


def _stacked(rows: list[Any]) -> PairRows:
    return PairRows(*map(np.stack, zip(*rows, strict=True)))


# Rows


def test_a_damaged_row_and_its_target_give_the_text_back(damaged: DenoiseConfig) -> None:
    """The spans put where their sentinels stand; other spans in another epoch."""
    stage = made(damaged)
    found, marks = stage.training, sentinels(stage.tokenizer).tolist()
    assert len(found) > 20
    for index in range(20):
        row = found.training_row((index,), index)
        assert row.tokens[0] == stage.start
        target = row.targets[row.targets != PADDING].tolist()
        np.testing.assert_array_equal(row.tokens[1 : len(target)], target[:-1])
        assert ((row.segments == 0) == (row.targets != PADDING)).all()
        spans: dict[int, list[int]] = {}
        for each in target[:-1]:
            if each in marks:
                spans[mark := each] = []
            else:
                spans[mark].append(each)
        source = row.source[row.source_segments == 0].tolist()
        assert source[-1] == target[-1] == stage.tokenizer.eot
        text = [i for each in source[:-1] for i in spans.get(each, [each])]
        assert spans and text == found.window(index).tolist()
    others = {found.training_row((0,), n * found.num_rows).source.tobytes() for n in range(5)}
    assert len(others) > 2


def test_infilling_has_masks_and_the_whole_text_as_its_target(damaged: DenoiseConfig) -> None:
    stage = made(replace(damaged, noise=NoiseConfig(kind="infill", rate=0.3)))
    found = stage.training
    row = found.training_row((0,), 0)
    target = row.targets[row.targets != PADDING]
    np.testing.assert_array_equal(target[:-1], found.window(0))
    assert stage.tokenizer.roles["mask"] in row.source


def test_rows_are_the_same_however_they_are_read(damaged: DenoiseConfig) -> None:
    stage = made(damaged)
    whole = stage.feed(None, range(8))
    batches = [whole.batch(1) for _ in range(4)]
    parts = [stage.feed([8], rows) for rows in (range(4), range(4, 8))]
    for batch in batches[1:]:
        both = jax.tree.map(lambda a, b: np.concatenate([a, b], axis=1), *(feed.batch(1) for feed in parts))
        jax.tree.map(np.testing.assert_array_equal, both, batch)


# Losses


def _larger(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + 0.2 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape) ** 2), params)


def _log_probs(stage: Any, params: Any, rows: PairRows) -> np.ndarray:
    """float64 [b, T, V] from the decoder's last states on."""
    hidden, head, _ = stage.network.before_head(params, rows, None)
    scores = np.asarray(hidden, np.float64) @ np.asarray(head.table, np.float64)[: stage.config.model.vocab_size].T
    scores -= scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@pytest.mark.slow
def test_the_loss_is_the_mean_over_targets_however_they_lie(pairs: Seq2SeqConfig) -> None:
    """Smoothed; in micro-batches of one and of all, with and without empty rows."""
    stage = made(replace(pairs, writing=WritingConfig(label_smoothing=0.1)))
    params, found = _larger(params_of(stage)), stage.training
    full = _stacked([found.row((i,)) for i in range(4)])
    rows = _stacked([found.row((i,)) for i in range(4)] + [found.row(())] * 2)
    log_p, asked = _log_probs(stage, params, full), full.targets != PADDING
    right = np.take_along_axis(log_p, np.maximum(full.targets, 0)[..., None], -1)[..., 0]
    wanted = -(0.9 * right + 0.1 * log_p.mean(-1))[asked].mean()

    @jax.jit
    def graded(params: Any, rows: PairRows, counts: Any) -> Any:
        return jax.value_and_grad(lambda p: stage.loss(p, rows, counts, None))(params)

    loss, grads = graded(params, rows, stage.counts(rows))
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    each = [graded(params, jax.tree.map(lambda x, i=i: x[i : i + 1], rows), stage.counts(rows)) for i in range(6)]
    summed, summed_grads = jax.tree.map(lambda *parts: sum(parts), *each)
    assert float(summed) == pytest.approx(float(loss), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), grads, summed_grads)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(each[-1]))


@pytest.mark.slow
def test_an_evaluation_is_over_all_targets_without_smoothing(pairs: Seq2SeqConfig) -> None:
    config = replace(pairs, train=replace(pairs.train, eval_batches=-1), writing=WritingConfig(label_smoothing=0.1))
    stage = made(config)
    params, found = _larger(params_of(stage)), stage.evaluation
    assert found.num_rows % 8
    rows = _stacked([found.row((i,)) for i in range(len(found))])
    log_p, asked = _log_probs(stage, params, rows), rows.targets != PADDING
    right = np.take_along_axis(log_p, np.maximum(rows.targets, 0)[..., None], -1)[..., 0]
    wanted = {"loss": -right[asked].mean(), "accuracy": (log_p.argmax(-1) == rows.targets)[asked].mean()}
    assert stage.evaluate(params, lambda batch: batch, range(8)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_smoothing_is_that_of_torch(biased: bool) -> None:
    """And its gradient, with ids beyond the vocabulary and places that do not count."""
    torch = pytest.importorskip("torch", reason="needs the peers extra")
    rng, size = np.random.default_rng(0), 50
    hidden, table = rng.normal(size=(2, 7, 8)), rng.normal(size=(64, 8))
    bias = rng.normal(size=64) if biased else None
    targets = rng.integers(0, size, (2, 7))
    targets[0, 2:4] = -1
    x, w = torch.tensor(hidden, requires_grad=True), torch.tensor(table, requires_grad=True)
    b = torch.tensor(bias if biased else np.zeros(64), requires_grad=True)
    scores = (x @ w.T + b)[..., :size].reshape(-1, size)
    theirs = torch.nn.functional.cross_entropy(
        scores, torch.tensor(targets).reshape(-1), ignore_index=-1, label_smoothing=0.1, reduction="sum"
    )
    theirs.backward()

    def loss(x: Any, head: Head) -> Any:
        return cross_entropy(x, head, jnp.asarray(targets), size, 3, 0.1)

    given = jnp.float32(hidden), Head(jnp.float32(table), None if bias is None else jnp.float32(bias))
    assert float(loss(*given)) == pytest.approx(theirs.item(), rel=1e-6)
    value, (of_x, of_head) = jax.value_and_grad(loss, argnums=(0, 1))(*given)
    assert float(value) == pytest.approx(theirs.item(), rel=1e-6)
    np.testing.assert_allclose(of_x, x.grad, atol=1e-5)
    np.testing.assert_allclose(of_head.table, w.grad, atol=1e-5)
    if biased:
        np.testing.assert_allclose(of_head.bias, b.grad, atol=1e-5)


# Runs


def _saved(run: Path) -> Any:
    weights = open_weights(str(run))
    stage = made(weights.config)
    return jax.device_get(weights.load(weights.config.model, places(stage.init)))


@pytest.mark.whole  # runs of sft and ppo are stopped in every run of the tests
def test_a_run_of_pairs_that_is_stopped_ends_where_it_would_have(
    pairs: Seq2SeqConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal in step 2: the same bits, and the same evaluation."""
    sides = {name: replace(getattr(pairs, name), dropout=0.1) for name in ("model", "encoder")}
    config = replace(pairs, **sides)
    whole = train(config, tmp_path / "whole")
    plain, left = loop.learning_rate, [True]

    def rate(optimizer: Any, tokens: int) -> float:
        if tokens == 8 * config.row_tokens and left:
            left.clear()
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)
        return plain(optimizer, tokens)

    monkeypatch.setattr(loop, "learning_rate", rate)
    run = tmp_path / "cut" / "run"
    assert cli.run(["train", file_of(config, tmp_path / "cut"), "--run", str(run)]) == 128 + 15
    assert records(run, "train")[-1]["step"] < records(whole, "train")[-1]["step"]
    assert cli.run(["train", "--resume", str(run)]) == 0
    assert [r["loss"] for r in records(run, "train")] == [r["loss"] for r in records(whole, "train")]
    figures = [{k: records(each, "eval")[-1][k] for k in ("loss", "accuracy")} for each in (run, whole)]
    assert figures[0] == figures[1]
    jax.tree.map(np.testing.assert_array_equal, _saved(run), _saved(whole))


@pytest.mark.slow
def test_a_damaged_text_is_learned(damaged: DenoiseConfig, tmp_path: Path) -> None:
    run = train(damaged, tmp_path, "--train.epochs", "3")
    first, *_, last = records(run, "train")
    assert last["loss"] < first["loss"] - 0.3
    assert records(run, "eval")[-1]["loss"] < first["loss"] - 0.3


@pytest.mark.slow
def test_texts_of_pairs_are_written_as_the_run_says_unless_asked(pairs: Seq2SeqConfig, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="needs the eval extra")
    run = train(
        replace(pairs, writing=WritingConfig(beams=2, length_penalty=0.5)), tmp_path, "--train.total_steps", "1"
    )
    asked = ["eval", str(run), "--pairs", pairs.data.source, "--limit", "3", "--cache-dir", pairs.data.cache_dir]

    def about(out: Path, *words: str) -> tuple[int, float]:
        assert cli.run([*asked, "--out", str(out), *words]) == 0
        (found,) = json.loads(next(out.glob("*.json")).read_text())["measures"].values()
        assert found["about"]["pairs"] == 3
        return found["about"]["beams"], found["about"]["length_penalty"]

    assert about(tmp_path / "own", "--length-penalty", "0.25") == (2, 0.25)
    model = gptjax.load(str(run))
    own = WritingConfig(beams=2, length_penalty=0.5)
    assert model.how() == own and model.how(3, 1.0) == WritingConfig(beams=3)


# What a user may get wrong


def test_wrong_inputs_are_one_line(pairs: Seq2SeqConfig, damaged: DenoiseConfig, tmp_path: Path) -> None:
    def said(config: Any, *words: str) -> str:
        return refusal(config, tmp_path, *words)

    width = said(pairs, "--encoder.embed_dim", "32")
    assert "encoder.embed_dim = 32: the decoder's, which shares its embedding, is 16" in width
    assert "model.causal = false" in said(pairs, "--model.causal", "false")
    assert "model.cross_attention = false" in said(pairs, "--model.cross_attention", "false")
    assert "encoder.causal = true" in said(pairs, "--encoder.causal", "true")
    assert "encoder.seq_len = 1:" in said(pairs, "--encoder.seq_len", "1")
    assert "model.seq_len = 1:" in said(pairs, "--model.seq_len", "1")
    both = ("--model.vocab_size", "261", "--encoder.vocab_size", "261")
    assert "<extra_id_0>" in (said(damaged, *both))
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"source": "ab", "target": ""}) + "\n")
    assert "target is empty" in said(pairs, "--data.source", str(empty))
    assert "no room for a damaged text" in said(damaged, "--encoder.seq_len", "2")


def test_a_decoder_alone_has_nothing_to_look_at(tiny: Any, tmp_path: Path) -> None:
    said = refusal(tiny, tmp_path, "--model.cross_attention", "true")
    assert "model.cross_attention = true: stage pretrain has false there" in said
