"""Masked words and next sentences: rows, losses, a teacher, runs. Run: pytest tests/test_masked.py"""

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoded import T, file_of, made, masked_config, params_of, refusal, train, write_texts
from toy import records

from gptjax import cli
from gptjax.config import DistillConfig, MaskedConfig, MaskingConfig, OptimizerConfig
from gptjax.data.masked import FOLLOWS, FOREIGN, MaskedRows
from gptjax.data.rows import PADDING
from gptjax.data.tokenizers.marks import Marks, marks
from gptjax.errors import UserError
from gptjax.model.gpt import layers_of
from gptjax.model.loss import Head, logits
from gptjax.stages import Base
from gptjax.stages.masked import TEACHER, Masked
from gptjax.stages.weights import open_weights
from gptjax.train import loop
from gptjax.train.schedule import learning_rate


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def bert(tiny: Any, texts: Path) -> MaskedConfig:
    return masked_config(tiny, texts)


@pytest.fixture(scope="module")
def roberta(bert: MaskedConfig) -> MaskedConfig:
    model = replace(bert.model, token_types=1, position_offset=2)
    return replace(bert, model=model, masking=MaskingConfig(next_sentence=False))


@pytest.fixture(scope="module")
def stage(bert: MaskedConfig) -> Masked:
    return made(bert)


@pytest.fixture(scope="module")
def params(stage: Masked) -> Any:
    """Random ones, larger than a run's: what is compared is then not zero."""
    return _larger(params_of(stage))


def _larger(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + 0.3 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape) ** 2), params)


def _marks(stage: Base) -> Marks:
    assert stage.tokenizer
    return marks(stage.tokenizer)


def _restored(row: MaskedRows) -> np.ndarray:
    """The ids of a row as they were before words were hidden."""
    ids, asked = row.tokens.copy(), row.targets != PADDING
    ids[row.places[asked]] = row.targets[asked]
    return ids[row.segments == 0]


def _rows(stage: Any, count: int, epoch: int = 0) -> list[tuple[int, MaskedRows]]:
    """The first rows of an epoch, and the window that each begins with."""
    found = stage.training
    of_epoch = found.epoch(stage.config.data.seed, epoch)
    indices = [of_epoch.row(place) for place in range(min(count, found.num_rows))]
    return [(each[0], found.training_row(each, epoch * found.num_rows + i)) for i, each in enumerate(indices)]


# Rows


def test_a_row_is_two_texts_of_which_the_second_follows_or_is_foreign(stage: Masked) -> None:
    about, found = _marks(stage), stage.training
    kinds, rows = [], [row for epoch in range(8) for row in _rows(stage, 1000, epoch)]
    assert len(rows) > 300
    for index, row in rows:
        ids = _restored(row)
        assert ids[0] == about.cls and ids[-1] == about.sep and (ids == about.sep).sum() == 2
        assert row.tokens.shape == (T,) and (row.tokens[row.segments == 1] == about.pad).all()
        end = int(np.flatnonzero(ids == about.sep)[0])
        assert not row.types[: end + 1].any() and (row.types[end + 1 : len(ids)] == 1).all()
        assert not row.types[len(ids) :].any()
        first, second = ids[1:end], ids[end + 1 : -1]
        assert len(first) and len(second)
        np.testing.assert_array_equal(first, found.window(index)[: len(first)])
        kinds.append(int(row.foreign))
        if row.foreign == FOLLOWS:
            np.testing.assert_array_equal(np.concatenate([first, second]), found.window(index))
        elif len(second) > 5:  # fewer may be of any record
            record = found.numbers[index]
            theirs = {found.numbers[i] for i in range(len(found)) if second.tobytes() in found.window(i).tobytes()}
            assert theirs and record not in theirs  # each record has a letter that no other has
    assert abs(np.mean(kinds) - 0.5) < 4 * 0.5 / len(kinds) ** 0.5 and set(kinds) == {FOLLOWS, FOREIGN}


def test_hidden_places_are_as_many_as_asked_and_other_ones_each_epoch(stage: Masked) -> None:
    about = _marks(stage)
    for _, row in _rows(stage, 30):
        asked = row.targets != PADDING
        ids = _restored(row)
        assert asked.sum() == max(1, round(0.15 * (len(ids) - 3)))
        assert not np.isin(ids[row.places[asked]], [about.cls, about.sep]).any()
        assert not row.places[~asked].any()
        changed = np.flatnonzero(row.tokens[: len(ids)] != ids)
        assert np.isin(changed, row.places[asked]).all()
        assert not np.isin(row.tokens[changed], [about.cls, about.sep, about.pad]).any()
    (index, _), *_ = _rows(stage, 1)
    hidden = {tuple(stage.training.training_row((index,), n * stage.training.num_rows).places) for n in range(6)}
    assert len(hidden) > 3


def test_a_full_row_has_as_many_texts_as_it_takes(roberta: MaskedConfig) -> None:
    stage = made(roberta)
    about, found = _marks(stage), stage.training
    of_epoch = found.epoch(0, 0)
    fill = []
    for place in range(found.num_rows):
        indices = of_epoch.row(place)
        row = found.training_row(indices, place)
        ids = _restored(row)
        wanted = np.concatenate([[about.cls], *(np.append(found.window(i), about.sep) for i in indices)])
        np.testing.assert_array_equal(ids, wanted)
        assert row.foreign == PADDING and not row.types.any() and len(ids) <= T
        fill.append(len(ids) / T)
    assert sorted(i for place in range(found.num_rows) for i in of_epoch.row(place)) == list(range(len(found)))
    assert max(fill) == 1 and np.mean(fill) > 0.9


def test_rows_are_the_same_however_they_are_read(stage: Masked) -> None:
    """By one process or two, from the beginning or from the middle."""
    size = stage.config.micro_batch_size
    one = stage.feed(None, range(size))
    whole = [one.batch(1) for _ in range(6)]
    parts = [stage.feed(None, rows) for rows in (range(size // 2), range(size // 2, size))]
    for batch in whole:
        halves = [feed.batch(1) for feed in parts]
        both = jax.tree.map(lambda a, b: np.concatenate([a, b], axis=1), *halves)
        jax.tree.map(np.testing.assert_array_equal, both, batch)
    later = stage.feed([3 * size], range(size))
    jax.tree.map(np.testing.assert_array_equal, later.batch(2), jax.tree.map(lambda *x: np.concatenate(x), *whole[3:5]))
    assert not np.array_equal(whole[0].tokens, whole[1].tokens)


# Losses


def _nats(scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    top = scores.max(-1, keepdims=True)
    log_z = np.log(np.exp(scores - top).sum(-1)) + top[..., 0]
    return log_z - np.take_along_axis(scores, np.maximum(answers, 0)[..., None], -1)[..., 0]


def _batch(stage: Any, count: int, empty: int = 0) -> MaskedRows:
    rows = [row for _, row in _rows(stage, count)] + [stage.training.training_row((), 10**6)] * empty
    return MaskedRows(*map(np.stack, zip(*rows, strict=True)))


def _plain_scores(stage: Any, params: Any, rows: MaskedRows) -> tuple[np.ndarray, np.ndarray]:
    """Of hidden words [b, M, V] and of pairs [b, 2], by numpy in float64 from the encoder's states on."""
    from scipy.special import erf

    _, _, hidden = stage.heard(params, rows, None)
    of = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    states = np.asarray(hidden, np.float64)
    x = states[np.arange(len(states))[:, None], rows.places] @ of["transform"]["dense"]["kernel"]
    x = x + of["transform"]["dense"]["bias"]
    x = x * 0.5 * (1 + erf(x / 2**0.5))
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + stage.config.model.norm_eps)
    x = x * of["transform"]["norm"]["scale"] + of["transform"]["norm"]["bias"]
    size = stage.config.model.vocab_size
    words = x @ of["embedding"][:size].T + of["head_bias"][:size]
    pooled = np.tanh(states[:, 0] @ of["pooler"]["kernel"] + of["pooler"]["bias"])
    return words, pooled @ of["next_sentence"]["kernel"] + of["next_sentence"]["bias"]


def test_the_loss_is_the_mean_over_hidden_words_and_over_pairs(stage: Masked, params: Any) -> None:
    rows = _batch(stage, 6)
    words, pairs = _plain_scores(stage, params, rows)
    of_words = _nats(words, rows.targets)[rows.targets != PADDING].mean()
    of_pairs = _nats(pairs, rows.foreign).mean()
    loss, figures = jax.jit(lambda p: stage.loss_and_figures(p, rows, stage.counts(rows), None))(params)
    assert float(figures["masked_loss"]) == pytest.approx(of_words, rel=1e-5)
    assert float(figures["next_loss"]) == pytest.approx(of_pairs, rel=1e-5)
    assert float(loss) == pytest.approx(of_words + of_pairs, rel=1e-5)


def _whole_and_in_parts(stage: Any, params: Any, rows: Any) -> tuple[Any, Any]:
    """Loss and gradient of all rows at once, and summed over rows one by one."""
    counts = stage.counts(rows)
    graded = jax.jit(jax.value_and_grad(lambda p, part: stage.loss(p, part, counts, None)))
    each = [graded(params, jax.tree.map(lambda x, i=i: x[i : i + 1], rows)) for i in range(len(rows[0]))]
    return graded(params, rows), jax.tree.map(lambda *parts: sum(parts), *each)


@pytest.mark.slow
def test_micro_batches_of_one_and_of_all_learn_the_same(stage: Masked, params: Any) -> None:
    """And empty rows, as at the end of an epoch, nothing."""
    rows = _batch(stage, 5, empty=2)
    assert (rows.foreign[-2:] == PADDING).all() and (rows.targets[-2:] == PADDING).all()
    (loss, grads), (summed, summed_grads) = _whole_and_in_parts(stage, params, rows)
    assert float(loss) == pytest.approx(float(summed), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), grads, summed_grads)
    full = jax.tree.map(lambda x: x[:5], rows)
    less, less_grads = jax.jit(jax.value_and_grad(lambda p: stage.loss(p, full, stage.counts(full), None)))(params)
    assert float(less) == pytest.approx(float(loss), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), grads, less_grads)


def test_an_evaluation_is_over_all_words_and_pairs(stage: Masked, params: Any) -> None:
    """The last batch of which is not full: against one computation of all rows at once."""
    config = replace(stage.config, train=replace(stage.config.train, eval_batches=-1))
    stage = replace(stage, config=config)
    found, size = stage.evaluation, config.micro_batch_size
    assert found.num_rows % size
    rows = MaskedRows(*map(np.stack, zip(*(found.row((i,)) for i in range(len(found))), strict=True)))
    words, pairs = _plain_scores(stage, params, rows)
    asked = rows.targets != PADDING
    figures = stage.evaluate(params, lambda batch: batch, range(size))
    masked, following = _nats(words, rows.targets)[asked].mean(), _nats(pairs, rows.foreign).mean()
    wanted = {"loss": masked + following, "masked_loss": masked, "next_loss": following}
    wanted |= {"masked_accuracy": (words.argmax(-1) == rows.targets)[asked].mean()}
    wanted |= {"next_accuracy": (pairs.argmax(-1) == rows.foreign).mean()}
    assert figures == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("decay", ["linear", "root"])
def test_the_rate_falls_by_a_line_or_a_root(decay: Any) -> None:
    config = OptimizerConfig(learning_rate=2.0, decay=decay, final_ratio=0.25, warmup_tokens=100, decay_tokens=900)
    assert [learning_rate(config, t) for t in (0, 50, 100)] == [0, 1, 2]
    wanted = {"linear": [2 - 1.5 / 2, 0.5, 0.5], "root": [2 * (100 / 500) ** 0.5, 2 / 3, 2 * 0.1**0.5]}
    assert [learning_rate(config, t) for t in (500, 900, 1000)] == pytest.approx(wanted[decay])


# Runs


@pytest.fixture(scope="module")
def whole_run(bert: MaskedConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four layers, an epoch."""
    config = replace(bert, model=replace(bert.model, num_layers=4, dropout=0.1))
    return train(config, tmp_path_factory.mktemp("teacher"))


def _saved(run: Path) -> dict[str, Any]:
    """All that a run has learned."""
    from gptjax.stages.weights import places

    weights = open_weights(str(run))
    stage = Masked(weights.config, "cpu")  # type: ignore[arg-type]
    shapes = places(lambda key: {k: v for k, v in stage.init(key).items() if k != TEACHER})
    return jax.device_get(weights.load(weights.config.model, shapes))


@pytest.mark.whole  # runs of sft and ppo are stopped in every run of the tests
def test_a_run_that_is_stopped_ends_where_it_would_have(
    bert: MaskedConfig, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal in step 2: the same bits."""
    config = replace(bert, model=replace(bert.model, num_layers=4, dropout=0.1))
    plain, left = loop.learning_rate, [True]

    def rate(optimizer: Any, tokens: int) -> float:
        if tokens == 8 * T and left:
            left.clear()
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)
        return plain(optimizer, tokens)

    monkeypatch.setattr(loop, "learning_rate", rate)
    run = tmp_path / "run"
    assert cli.run(["train", file_of(config, tmp_path), "--run", str(run)]) == 128 + 15
    assert records(run, "train")[-1]["step"] < records(whole_run, "train")[-1]["step"]
    assert cli.run(["train", "--resume", str(run)]) == 0
    jax.tree.map(np.testing.assert_array_equal, _saved(run), _saved(whole_run))
    assert [r["loss"] for r in records(run, "train")] == [r["loss"] for r in records(whole_run, "train")]
    assert records(run, "eval")[-1]["masked_loss"] == records(whole_run, "eval")[-1]["masked_loss"]


# A teacher


@pytest.fixture(scope="module")
def taught(bert: MaskedConfig, whole_run: Path) -> MaskedConfig:
    return replace(
        bert,
        name="taught",
        model=replace(bert.model, num_layers=2, token_types=0),
        data=replace(bert.data, tokenizer=""),
        masking=MaskingConfig(next_sentence=False),
        distill=DistillConfig(teacher=str(whole_run)),
        train=replace(bert.train, total_steps=2),
    )


@pytest.fixture(scope="module")
def student(taught: MaskedConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(taught, tmp_path_factory.mktemp("student"))


def _first(config: MaskedConfig) -> tuple[Masked, dict[str, Any]]:
    """A stage, and what its run begins with, as the launch has it."""
    from gptjax.stages.launch import first_params
    from gptjax.stages.weights import first_weights, places

    stage = replace(made(replace(config, data=replace(config.data, tokenizer="bytes"))), config=config)
    stage.agree()
    weights = first_weights(config)
    found = first_params(stage, lambda at: weights.start(config.model, at), places(stage.init), weights.heads)
    return stage, jax.device_get(found)


@pytest.mark.slow
def test_a_student_begins_with_every_other_layer_of_its_teacher(taught: MaskedConfig, whole_run: Path) -> None:
    stage, found = _first(taught)
    teacher = _saved(whole_run)
    theirs = layers_of(teacher, stage.teacher.config.model)
    for own, given in zip(layers_of(found, taught.model), theirs[::2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, own, given)
    np.testing.assert_array_equal(found["embedding"], teacher["embedding"])
    np.testing.assert_array_equal(found["positions"], teacher["positions"] + teacher["token_types"][0])
    jax.tree.map(np.testing.assert_array_equal, found["transform"], teacher["transform"])
    assert "token_types" not in found and "pooler" not in found
    jax.tree.map(np.testing.assert_array_equal, found[TEACHER], {k: teacher[k] for k in found[TEACHER]})


@pytest.mark.slow
def test_a_student_that_equals_its_teacher_has_nothing_to_learn_of_it(taught: MaskedConfig) -> None:
    """And one that does not learns by the cross-entropy of both, in float64."""
    stage, found = _first(replace(taught, model=replace(taught.model, num_layers=4)))
    rows = _batch(stage, 4)

    @jax.jit
    def figures(params: Any) -> Any:
        return stage.loss_and_figures(params, rows, stage.counts(rows), None)

    same = figures(found)[1]
    assert abs(float(same["soft_loss"])) < 1e-6 and abs(float(same["cosine_loss"])) < 1e-5
    other = _larger({k: v for k, v in found.items() if k != TEACHER}) | {TEACHER: found[TEACHER]}
    loss, parts = figures(other)
    size, heat = stage.config.model.vocab_size, stage.config.distill.temperature
    read, head, hidden = stage.heard(other, rows, None)
    from gptjax.stages.masked import _heard

    their_read, their_head, their_hidden = _heard(stage.teacher, found[TEACHER], rows, None)

    def scores(x: Any, by: Head) -> np.ndarray:
        return np.asarray(logits(x, by, size), np.float64)[..., :size] / heat

    own, theirs = scores(read, head), scores(their_read, their_head)
    ours, given = (s - np.log(np.exp(s - s.max(-1, keepdims=True)).sum(-1, keepdims=True)) for s in (own, theirs))
    ours, given = ours - own.max(-1, keepdims=True), given - theirs.max(-1, keepdims=True)
    asked = rows.targets != PADDING
    soft = (np.exp(given) * (given - ours)).sum(-1)[asked].mean()
    a, b = np.asarray(hidden, np.float64), np.asarray(their_hidden, np.float64)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    apart = (1 - cosine)[rows.segments == 0].mean()
    assert soft > 0.01 and apart > 0.01
    assert float(parts["soft_loss"]) == pytest.approx(soft, rel=1e-4)
    assert float(parts["cosine_loss"]) == pytest.approx(apart, rel=1e-4)
    assert float(loss) == pytest.approx(2 * float(parts["masked_loss"]) + 5 * heat**2 * soft + apart, rel=1e-4)
    grads = jax.jit(jax.grad(lambda p: stage.loss(p, rows, stage.counts(rows), None)))(other)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads[TEACHER]))


@pytest.mark.slow
def test_a_teacher_is_in_no_checkpoint_and_pinned(
    taught: MaskedConfig, student: Path, whole_run: Path, tmp_path: Path
) -> None:
    last = records(student, "train")[-1]["step"]
    held = json.loads((student / "checkpoints" / str(last) / "meta" / "metadata").read_text())["arrays"]
    assert held and not any(TEACHER in name for name in held)
    assert json.loads((student / "teacher.json").read_text())["source"] == str(whole_run)
    before = _saved(student)
    again = ["train", "--resume", str(student), "--train.total_steps", "3"]
    other = tmp_path / "other"
    moved = whole_run.rename(tmp_path / "kept")
    try:
        shutil.copytree(moved, other)
        assert cli.run(["train", "--resume", str(other), "--train.epochs", "1.2"]) == 0
        other.rename(whole_run)
        with pytest.raises(UserError, match=r"distill\.teacher = .*: not the weights that"):
            cli.run(again)
    finally:
        shutil.rmtree(whole_run, ignore_errors=True)
        moved.rename(whole_run)
    assert cli.run(again) == 0
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, _saved(student))), strict=True))


# What a user may get wrong


def test_wrong_inputs_are_one_line(bert: MaskedConfig, taught: MaskedConfig, whole_run: Path, tmp_path: Path) -> None:
    def said(config: MaskedConfig, *words: str) -> str:
        return refusal(config, tmp_path, *words)

    assert "model.causal = true: stage masked has false there" in said(bert, "--model.causal", "true")
    assert "model.vocab_size = 250" in said(bert, "--model.vocab_size", "250")
    assert "[MASK]" in (room := said(bert, "--model.vocab_size", "264")) and "model.vocab_size >= " in room
    assert "model.parallel_mlp" in said(bert, "--model.parallel_mlp", "one_norm")
    band = said(bert, "--model.attention_pattern", "dense,banded", "--model.window", "8")
    assert "model.attention_pattern = dense,banded: a band sees the past alone" in band
    moved = said(bert, "--model.position_offset", "2", "--model.positions", "rotary")
    assert "model.position_offset = 2: is of learned positions; nearest 0" in moved
    assert "model.seq_len = 4" in said(bert, "--model.seq_len", "4")
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"text": "ab."}) + "\n")
    assert "empty, as" in said(bert, "--data.source", str(few))
    assert "its model.embed_dim is 16, not 32" in said(taught, "--model.embed_dim", "32")
    assert "its model.activation is gelu, not relu" in said(taught, "--model.activation", "relu")
    assert "nearest" in said(taught, "--model.num_layers", "3")
    assert "data.lanes" in said(bert, "--data.lanes", "2")
    assert "model.cross_attention = true" in said(bert, "--model.cross_attention", "true")
