"""What the tests of conversion share: random models, and directories as another program would change them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from gptjax.config import Config, ModelConfig, PairConfig, Seq2SeqConfig
from gptjax.convert.tensors import read_tensors
from gptjax.stages.weights import on_device


def config_of(model: ModelConfig, encoder: ModelConfig | None = None) -> Config:
    """A run of a decoder, or of one beside an encoder."""
    return Config("x", model) if encoder is None else Seq2SeqConfig("x", model, PairConfig("x"), encoder=encoder)


def random_params(model: ModelConfig, encoder: ModelConfig | None = None, seed: int = 0) -> Any:
    """Parameters without a zero or a one in them, so that no mistake of place hides."""
    rng = np.random.default_rng(seed)
    abstract = on_device(config_of(model, encoder), jax.devices()[0])
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), abstract)
    for name in {"embedding", "head", "head_bias"} & params.keys():
        params[name][model.vocab_size :] = 0
    return params


def bytes_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(tensor.open()) for name, tensor in read_tensors(folder).items()}


def same_bytes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(ours[n].tobytes() == theirs[n].tobytes() for n in ours)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Change the tensors as another program would, without our checksums."""
    tensors = bytes_of(folder)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
