"""Where weights come from: a run folder or a Hugging Face directory, behind one face."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from gptjax.config import Config, ModelConfig
from gptjax.convert.huggingface import finetune_config, is_huggingface, open_directory
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.errors import UserError
from gptjax.parallel.network import Network
from gptjax.train.checkpoint import restore_params
from gptjax.train.run import open_run, saved_tokenizer
from gptjax.train.step import placed

SHAPE = ("num_layers", "num_heads", "embed_dim", "seq_len", "vocab_size")
SAME = (*SHAPE, "attention_pattern", "scale_scores", "qkv_bias")


@dataclass(frozen=True)
class Weights:
    """A model that can be loaded."""

    path: str
    config: Config
    same: tuple[str, ...]
    """Fields of the model that whoever loads it must share."""
    tokenizer: Callable[[], Tokenizer]
    load: Callable[[ModelConfig, Any], Any]
    """(model, shapes with shardings) -> parameters that lie there."""

    def require(self, model: ModelConfig) -> None:
        """Raises UserError that names the first field in which a model differs."""
        for name in self.same:
            theirs, ours = getattr(self.config.model, name), getattr(model, name)
            if theirs != ours:
                shown = ",".join(theirs) if isinstance(theirs, tuple) else str(theirs).lower()
                raise UserError(
                    f"init_from = {self.path}: its model.{name} is {theirs}, not {ours}; set --model.{name} {shown}"
                )


def open_weights(path: str) -> Weights:
    """The weights of a run folder or of a Hugging Face directory, which is checked whole.

    Raises UserError for what is neither, or is broken.
    """
    folder = Path(path)
    if is_huggingface(folder):
        directory, config = open_directory(folder), finetune_config(folder)
        tokenizer = partial(load_tokenizer, config.data.tokenizer)
        return Weights(path, config, _same(config.model), tokenizer, directory.load)
    run, config = open_run(path)
    same = (*_same(config.model), "scan_layers")  # a checkpoint's arrays are stacked or not as they were trained
    return Weights(
        path, config, same, partial(saved_tokenizer, run), lambda model, abstract: restore_params(run, abstract)
    )


def _same(model: ModelConfig) -> tuple[str, ...]:
    return (*SAME, "window") if "banded" in model.attention_pattern else SAME


def on_device(config: Config, device: jax.Device) -> Any:
    """The shapes of a model's parameters, all on one device."""
    network = Network(config, device.platform)
    abstract = nn.unbox(jax.eval_shape(network.init, jax.random.key(0)))
    return placed(abstract, jax.tree.map(lambda _: SingleDeviceSharding(device), abstract))
