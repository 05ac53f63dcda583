"""What tests of ranked replies share: a toy task, a run to start from, a batch, and the decoder in PyTorch."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax.config import Config, ModelConfig, SFTConfig
from gptjax.data.ranked import RankedRows
from gptjax.data.tokenizers import load_tokenizer
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import SFT, launch
from gptjax.train.checkpoint import Checkpoints, Position
from gptjax.train.run import fill_run
from gptjax.train.step import TrainState, abstract_state, init_state

T, K = 32, 4
MODEL = ModelConfig(
    num_layers=2,
    num_heads=2,
    embed_dim=32,
    seq_len=T,
    vocab_size=261,
    attention_pattern=("dense", "banded"),
    window=8,
)
RANKS = [[1, 2, 0, 0], [1, 1, 2, 0], [3, 1, 2, 4], [2, 1, 2, 3], [0, 0, 0, 0], [1, 1, 1, 0]]
"""Two to four replies, ties, a prompt that is not there, and one that has no pair."""


def batch(length: int = T) -> RankedRows:
    rng, ranks = np.random.default_rng(0), np.array(RANKS, np.int32)
    tokens = rng.integers(0, 261, (*ranks.shape, length), np.int32)
    last = rng.integers(0, length, ranks.shape, np.int32)
    first = np.minimum(last, rng.integers(0, length, ranks.shape, np.int32))
    return RankedRows(tokens, first, last, ranks)


def write_rankings(folder: Path, most: int = K) -> Path:
    """400 prompts with two to `most` replies, of which more vowels are better, as many are tied."""
    rng = random.Random(0)
    path = folder / "all.jsonl"
    lines = []
    while len(lines) < 400:
        replies = ["".join(rng.choices("aebcd", k=4)) for _ in range(rng.randint(2, most))]
        ranks = [5 - sum(letter in "ae" for letter in reply) for reply in replies]
        if len(set(ranks)) > 1:
            lines.append(json.dumps({"prompt": f"say {len(lines)}", "replies": replies, "ranks": ranks}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_base(folder: Path, tuned: SFTConfig, model: ModelConfig = MODEL, seed: int = 0) -> Path:
    """A run of fine-tuning to start from, at its first step."""
    config = replace(tuned, model=model, train=replace(tuned.train, seed=seed))
    run, stage = folder / "run", SFT(config, "cpu")
    fill_run(run, config, SFT.fit_tokenizer(config, load_tokenizer("bytes")))
    checkpoints = Checkpoints(run, config)
    checkpoints.save(born(config, stage).kept, Position())
    checkpoints.close()
    return run


def born(config: Config, stage: Any) -> TrainState:
    """The first state of a run of one device."""
    return init_state(config, stage, one_device(config).shardings(abstract_state(config, stage)))


def one_device(config: Config) -> Layout:
    return Layout(make_mesh(config, jax.devices()[:1]), rule_table(config.layout))


def alone(patch: pytest.MonkeyPatch) -> None:
    """Runs take one of the devices."""
    patch.setattr(launch, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def decoder(params: Any, tokens: Any, window: int) -> Any:
    """hidden [B, T, D] of a two-layer model, dense and banded, in PyTorch's float64, from its description alone."""
    import torch
    from torch.nn import functional as F

    def norm(x: Any, name: str) -> Any:
        return F.layer_norm(x, x.shape[-1:], params[f"{name}/scale"], params[f"{name}/bias"], 1e-5)

    size = tokens.shape[1]
    x = params["embedding"][tokens] + params["positions"][:size]
    back = torch.arange(size)[:, None] - torch.arange(size)
    units = {name: value[0] for name, value in params.items() if name.startswith("units/")}
    params = params | units
    for i, reach in enumerate((size, window)):
        block = f"units/block_{i}"
        h = norm(x, f"{block}/norm_attention")
        qkv = torch.einsum("btd,dchk->cbhtk", h, params[f"{block}/qkv/kernel"])
        q, k, v = qkv + params[f"{block}/qkv/bias"][:, None, :, None]
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill((back < 0) | (back >= reach), -math.inf).softmax(-1)
        h = torch.einsum("bhtk,hkd->btd", weights @ v, params[f"{block}/projection/kernel"])
        x = x + h + params[f"{block}/projection/bias"]
        h = F.gelu(
            norm(x, f"{block}/norm_mlp") @ params[f"{block}/mlp_up/kernel"] + params[f"{block}/mlp_up/bias"],
            approximate="tanh",
        )
        x = x + h @ params[f"{block}/mlp_down/kernel"] + params[f"{block}/mlp_down/bias"]
    return norm(x, "norm_final")
