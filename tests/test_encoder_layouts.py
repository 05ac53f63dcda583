"""Encoders and encoder-decoders on many layouts equal themselves on one device, as decoders do in test_layouts. Run:
pytest tests/test_encoder_layouts.py"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from encoded import BART, LONG_AGO, T5, masked_config, pairs_config
from test_layouts import LAYOUTS

from gptjax.config import Config, LayoutConfig
from gptjax.data.masked import MaskedRows
from gptjax.data.rows import PairRows
from gptjax.errors import UserError
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import stage_class
from gptjax.train.step import abstract_state, init_state, make_step

STEPS, LENGTH = 20, 16
WIDE: dict[str, Any] = {"num_heads": 8, "embed_dim": 32, "seq_len": LENGTH, "dropout": 0.1}


def _texts(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """[*shape, T] ids that count in threes from anywhere: something to learn."""
    return ((rng.integers(0, 50, (*shape, 1)) + 3 * np.arange(LENGTH)) % 50).astype(np.int32)


def _masked(step: int) -> MaskedRows:
    """Four hidden words a row, the last third of which is padding in some; the second text follows in odd rows."""
    rng = np.random.default_rng(step)
    texts = _texts(rng, (2, 8))
    places = np.argsort(rng.random((2, 8, 10)), axis=-1)[..., :4].astype(np.int32)
    targets = np.take_along_axis(texts, places, axis=-1)
    targets[:, ::3, 3] = -1
    tokens = texts.copy()
    np.put_along_axis(tokens, places, 260, axis=-1)
    segments = np.zeros_like(tokens)
    segments[:, ::2, 10:] = 1
    types = np.broadcast_to(np.arange(LENGTH) > 5, tokens.shape).astype(np.int32)
    foreign = np.broadcast_to(np.arange(8) % 2, (2, 8)).astype(np.int32)
    return MaskedRows(tokens, segments, types, places, targets, foreign)


def _paired(step: int) -> PairRows:
    """A text and the same again, of which the padding differs."""
    rng = np.random.default_rng(step)
    source = _texts(rng, (2, 8))
    source_segments, segments = np.zeros((2, *source.shape), np.int32)
    source_segments[:, ::2, 12:] = 1
    segments[:, ::3, 10:] = 1
    tokens = np.concatenate([np.full((2, 8, 1), 60, np.int32), source[..., :-1]], axis=-1)
    return PairRows(source, source_segments, tokens, np.where(segments == 1, -1, source), segments)


def run(config: Config, devices: int) -> tuple[np.ndarray, Any]:
    """Losses of 20 steps, and the parameters after."""
    layout = Layout(make_mesh(config, jax.devices()[:devices]), rule_table(config.layout))
    stage = stage_class(config)(config, "cpu", layout)
    shardings = layout.shardings(abstract_state(config, stage))
    state = init_state(config, stage, shardings)
    step = make_step(config, stage, shardings, layout)
    losses = []
    for i in range(STEPS):
        rows = _masked(i) if config.stage == "masked" else _paired(i)
        state, metrics = step(state, rows, np.float32(3e-3), np.int32(2), np.int32(i))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "a step compiled again"
    return np.array(losses), jax.device_get(state.params)


def config_of(name: str, tiny: Config) -> Config:
    if name == "bert":
        made: Config = masked_config(tiny, Path("none"), **WIDE)
    else:
        made = pairs_config(tiny, Path("none"), {"t5": T5, "2017": LONG_AGO, "bart": BART}[name], **WIDE)
    return replace(made, train=replace(made.train, batch_size=16))


@pytest.fixture(scope="module")
def single(tiny: Config) -> Callable[[str], tuple[Config, np.ndarray, Any]]:
    """Of a model by name its config, and losses and parameters on one device."""

    @cache
    def run_single(name: str) -> tuple[Config, np.ndarray, Any]:
        config = config_of(name, tiny)
        return config, *run(config, 1)

    return run_single


HERE = LAYOUTS | {"pipeline2_dp4": LayoutConfig(pipeline=2, data=4, fsdp=1)}
SPREAD = {
    "bert": (
        "dp8",
        "fsdp8",
        "tp8",
        "fsdp2_tp4_sequence",
        "pipeline2_dp4",
        "dp2_fsdp2_tp2",
        "pipeline2_fsdp2_tp2_sequence",
    ),
    "t5": ("dp8", "fsdp8", "tp8", "dp2_fsdp2_tp2"),
    "2017": ("dp8", "fsdp8", "tp8", "dp2_fsdp2_tp2"),
    "bart": ("dp8", "fsdp2_tp4_sequence", "dp2_fsdp2_tp2"),
}
CASES = [
    pytest.param("t5", "fsdp2_tp4", marks=pytest.mark.slow),
    *(pytest.param(model, name, marks=pytest.mark.whole) for model, names in SPREAD.items() for name in names),
]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_on_a_layout_equals_a_single_device(
    model: str, name: str, single: Callable[[str], tuple[Config, np.ndarray, Any]]
) -> None:
    config, losses, params = single(model)
    spread, spread_params = run(replace(config, layout=HERE[name]), 8)
    assert losses[-1] < losses[0] - 0.5
    np.testing.assert_allclose(spread, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), spread_params, params)


@pytest.mark.parametrize(
    ("model", "layout", "what"),
    [
        ("bert", {"context": 2}, "layout.context = 2: an encoder cannot be split so; nearest 1"),
        ("2017", {"context": 2}, "layout.context = 2: cross-attention cannot be split so; nearest 1"),
        ("t5", {"pipeline": 2}, "layout.pipeline = 2: relative positions cannot be split so; nearest 1"),
        ("2017", {"pipeline": 2}, "layout.pipeline = 2: cross-attention cannot be split so; nearest 1"),
    ],
)
def test_what_cannot_be_split_is_refused(model: str, layout: dict[str, int], what: str, tiny: Config) -> None:
    config = replace(config_of(model, tiny), layout=LayoutConfig(**layout))
    with pytest.raises(UserError) as caught:
        make_mesh(config)
    assert str(caught.value) == what
