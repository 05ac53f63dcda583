"""Encoders that tell classes, or numbers: losses, figures, runs. Run: pytest tests/test_classify.py"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoded import labels_config, made, masked_config, params_of, refusal, train, write_labels, write_texts
from toy import records

from gptjax.config import ClassifyConfig, LabelsConfig
from gptjax.data.classed import LabelledRows
from gptjax.stages import launch
from gptjax.stages.classify import Classify
from gptjax.stages.weights import first_weights, open_weights, places


@pytest.fixture(scope="module")
def labels(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> ClassifyConfig:
    return labels_config(tiny, write_labels(tmp_path_factory.mktemp("labels")))


@pytest.fixture(scope="module")
def numbers(labels: ClassifyConfig) -> ClassifyConfig:
    return replace(labels, data=replace(labels.data, fields=("text", "many")), labels=LabelsConfig(names=()))


@pytest.fixture(scope="module")
def masked_run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    config = masked_config(tiny, write_texts(folder))
    return train(replace(config, train=replace(config.train, total_steps=2)), folder)


def _larger(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + 0.3 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape) ** 2), params)


def _rows(stage: Classify, indices: list[tuple[int, ...]], split: str = "training") -> LabelledRows:
    found = getattr(stage, split)
    return LabelledRows(*map(np.stack, zip(*(found.row(each) for each in indices), strict=True)))


def _plain(stage: Classify, params: Any, rows: LabelledRows) -> tuple[np.ndarray, np.ndarray]:
    """Scores and losses by numpy in float64 from the encoder's states on."""
    from gptjax.data.rows import Rows

    own = Rows(rows.tokens, None, rows.segments, types=rows.types)
    first = np.asarray(stage.network.hidden(params, own, None)[0][:, 0], np.float64)
    of = jax.tree.map(lambda x: np.asarray(x, np.float64), {k: params[k] for k in ("pooler", "classifier")})
    pooled = np.tanh(first @ of["pooler"]["kernel"] + of["pooler"]["bias"])
    scores = pooled @ of["classifier"]["kernel"] + of["classifier"]["bias"]
    if not stage.config.labels.names:
        return scores, (scores[:, 0] - rows.label) ** 2
    return scores, np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(scores)), rows.label]


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_the_loss_is_the_mean_over_texts_however_they_lie(kind: str, request: pytest.FixtureRequest) -> None:
    """In micro-batches of one and of all, with and without empty rows; and so are the figures of an evaluation."""
    config = request.getfixturevalue(kind)
    stage = made(replace(config, train=replace(config.train, eval_batches=-1)))
    params = _larger(params_of(stage))
    rows = _rows(stage, [(0,), (1,), (2,), (), ()])
    scores, losses = _plain(stage, params, rows)

    @jax.jit
    def graded(params: Any, rows: LabelledRows, counts: Any) -> Any:
        return jax.value_and_grad(lambda p: stage.loss(p, rows, counts, None))(params)

    counts = stage.counts(rows)
    loss, grads = graded(params, rows, counts)
    assert float(loss) == pytest.approx(losses[:3].mean(), rel=1e-5)
    each = [graded(params, jax.tree.map(lambda x, i=i: x[i : i + 1], rows), counts) for i in range(5)]
    summed, summed_grads = jax.tree.map(lambda *parts: sum(parts), *each)
    assert float(summed) == pytest.approx(float(loss), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), grads, summed_grads)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(each[-1]))

    assert stage.evaluation.num_rows % 8
    rows = _rows(stage, [(i,) for i in range(len(stage.evaluation))], "evaluation")
    scores, losses = _plain(stage, params, rows)
    figures = stage.evaluate(params, lambda batch: batch, range(8))
    assert figures["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    if kind == "labels":
        assert figures["accuracy"] == pytest.approx((scores.argmax(-1) == rows.label).mean())
    else:
        assert figures["mse"] == pytest.approx(losses.mean(), rel=1e-5)
        assert figures["pearson"] == pytest.approx(np.corrcoef(scores[:, 0], rows.label)[0, 1], rel=1e-4)


def test_a_classifier_begins_with_a_masked_runs_weights(labels: ClassifyConfig, masked_run: Path) -> None:
    """Its pooler among them, without what scores words; what tells the classes is drawn."""
    config = replace(labels, init_from=str(masked_run))
    stage, weights = made(config), first_weights(config)
    load = lambda at: weights.start(config.model, at)  # noqa: E731
    found = jax.device_get(launch.first_params(stage, load, places(stage.init), weights.heads))
    source = open_weights(str(masked_run))
    names = [name for name in found if name != "classifier"]
    whole = places(made(source.config).init)
    theirs = jax.device_get(source.load(source.config.model, {name: whole[name] for name in names}))
    assert "pooler" in theirs and not {"transform", "next_sentence"} & set(found)
    jax.tree.map(np.testing.assert_array_equal, {name: found[name] for name in names}, theirs)
    assert found["classifier"]["kernel"].shape == (16, 2) and found["classifier"]["kernel"].std() > 0.005
    assert np.any(found["pooler"]["bias"])  # trained, and not drawn


def test_runs_learn_classes_and_numbers(
    labels: ClassifyConfig, numbers: ClassifyConfig, masked_run: Path, tmp_path: Path
) -> None:
    more = ("--init_from", str(masked_run), "--train.epochs")
    first, *_, last = records(run := train(labels, tmp_path / "labels", *more, "3"), "train")
    assert last["loss"] < first["loss"]
    assert records(run, "eval")[-1].keys() >= {"accuracy", "f1", "matthews"}
    first, *_, last = records(run := train(numbers, tmp_path / "numbers", *more, "6"), "train")
    assert last["loss"] < 0.7 * first["loss"]
    assert records(run, "eval")[-1].keys() >= {"mse", "pearson", "spearman"}


def test_wrong_inputs_are_one_line(labels: ClassifyConfig, tmp_path: Path) -> None:
    def said(*words: str) -> str:
        return refusal(labels, tmp_path, *words)

    assert '"less"' in (other := said("--labels.names", "more,neither")) and "labels.names = more,neither" in other
    assert "model.causal = true: stage classify has false there" in said("--model.causal", "true")
    assert "model.seq_len = 5: no room" in said("--model.seq_len", "5")
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"text": "", "label": "less"}) + "\n")
    assert "text is empty" in said("--data.source", str(empty))
