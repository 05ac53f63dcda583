"""A directory that `transformers` loads and writes: its config as ours, its tensors onto our mesh, and back."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import ValidationError

from gptjax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, validate
from gptjax.config.fields import explain
from gptjax.convert.architecture import Architecture, Box, assemble, boxes
from gptjax.convert.falcon import FALCON
from gptjax.convert.gpt2 import GPT2
from gptjax.convert.gpt_neo import GPT_NEO
from gptjax.convert.llama import LLAMA
from gptjax.convert.tensors import (
    AGAIN,
    DTYPES,
    SHARD_BYTES,
    Outgoing,
    Tensor,
    chunks,
    read_tensors,
    require_finite,
    write_tensors,
)
from gptjax.convert.tokenizer import tokenizer_spec
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.sharding.rules import leaf_name
from gptjax.train.run import CONFIG, META

ARCHITECTURES = {known.model_type: known for known in (GPT2, GPT_NEO, LLAMA, FALCON)}
HEAD = "lm_head.weight"  # which stands beside the model, not below its prefix
UNROLLED_LAYERS = 12  # as in configs/: unrolled is faster, but deeper models would compile for long


def is_huggingface(path: Path) -> bool:
    """Whether a folder has a config.json that is not a run's."""
    return (path / CONFIG).is_file() and not (path / META).is_file()


def read_model(folder: Path) -> tuple[Architecture, ModelConfig]:
    """The architecture and our config of a directory, from config.json alone.

    Raises UserError for an architecture or a setting that our model has not.
    """
    file = folder / CONFIG
    values = read_json(file, AGAIN)
    name = values.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{file}: model_type = {name!r}: gptjax converts {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    for given in values.get("architectures") or ():
        if given not in architecture.classes:
            raise UserError(f"{file}: architectures = {given!r}: of {name} gptjax converts {architecture.classes[0]}")
    try:
        model = architecture.read(values, str(file))
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error, Config)}") from None
    try:
        return architecture, validate(Config(name, model)).model
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


@dataclass(frozen=True)
class Directory:
    """A checked directory: every tensor that the model needs is there, whole and finite, and no other."""

    architecture: Architecture
    model: ModelConfig
    tensors: dict[str, Tensor]

    def load(self, model: ModelConfig, abstract: Any) -> Any:
        """The parameters of `model` (which may stack its layers or not) where the shardings of `abstract` put them.

        Each device's part of each leaf is read from the files by itself, so the host holds one leaf besides the model.
        """
        parts: dict[str, list[tuple[Box, Callable[[], np.ndarray]]]] = defaultdict(list)
        for box in boxes(self.architecture, model):
            parts[box.leaf].append((box, self.tensors[box.tensor].open))

        def load_leaf(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            read = partial(assemble, shape=leaf.shape, parts=parts[leaf_name(path)])
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)

        return jax.tree_util.tree_map_with_path(load_leaf, abstract)


def open_directory(folder: Path) -> Directory:
    """Check a directory and everything in it that will be read.

    Raises UserError for broken files, for missing, unexpected, misshapen or non-finite tensors, and for a head that
    is not the embedding.
    """
    architecture, model = read_model(folder)
    found = read_tensors(folder)
    prefix = architecture.prefix
    tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        twice = next(name for name in found if prefix + name in found)
        raise UserError(f"{folder}: both {twice} and {prefix}{twice}")
    tensors = {name: tensor for name, tensor in tensors.items() if not architecture.constants.fullmatch(name)}
    head = tensors.pop(HEAD, None) if model.tied_head else None
    if model.num_layers > len(tensors):  # before a table of so many layers is made
        raise UserError(f"{folder / CONFIG}: {model.num_layers} layers, and only {len(tensors)} tensors beside it")
    table = {box.tensor: box for box in boxes(architecture, model)}
    for name, box in table.items():
        if name not in tensors:
            raise UserError(f"{folder}: no tensor {name}, which {CONFIG} asks for")
        _check(tensors[name], box.shape)
    if unexpected := tensors.keys() - table.keys():
        raise UserError(f"{folder}: unexpected tensor {min(unexpected)}; {CONFIG} has no place for it")
    if head is not None:
        embedding = next(iter(table))
        _check(head, table[embedding].shape)
        pairs = zip(chunks(head.open()), chunks(tensors[embedding].open()), strict=True)
        if not all(np.array_equal(a, b) for a, b in pairs):
            raise UserError(f"{folder}: {HEAD} differs from {embedding}; {CONFIG} says that the embedding is the head")
    return Directory(architecture, model, tensors)


def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    what = f"{tensor.file}: {tensor.name}"
    if tensor.shape != shape:
        raise UserError(f"{what} is {list(tensor.shape)}, but {CONFIG} makes it {list(shape)}")
    if tensor.dtype not in DTYPES:
        raise UserError(f"{what} is {tensor.dtype}; weights are {', '.join(DTYPES)}")
    require_finite(what, tensor.open())


def counterpart(model: ModelConfig) -> Architecture:
    """The architecture that computes what a model computes. Raises UserError where there is none."""
    if model.positions == "learned":
        near = GPT2 if model.qkv_bias else GPT_NEO
        if near is GPT2 and "banded" in model.attention_pattern:
            raise UserError(
                f"model.attention_pattern = {','.join(model.attention_pattern)}: Hugging Face has local attention in "
                "GPT-Neo alone, without biases on q, k and v; train a model to export with --model.qkv_bias false"
            )
    else:
        near = LLAMA if model.norm == "rms" else FALCON
    for name, values in near.fixed(model).items():
        given = getattr(model, name)
        if given not in values:
            shown = " or ".join(map(_typed, values))
            raise UserError(
                f"model.{name} = {_typed(given)}: {near.classes[0]}, which is nearest of what gptjax writes for "
                f"Hugging Face, has {shown}; train a model to export with --model.{name} {_typed(values[0])}"
            )
    return near


def _typed(value: Any) -> str:
    """As it is typed on the command line."""
    return ",".join(value) if isinstance(value, tuple) else str(value).lower()


def write_directory(
    folder: Path, model: ModelConfig, params: Any, eot: int, dtype: str = "float32", shard_bytes: int = SHARD_BYTES
) -> int:
    """Write config.json and the weights, the padding of the vocabulary cut off; returns the bytes of tensors.

    Raises UserError where the architecture has no counterpart or a weight is not finite in `dtype`.
    """
    architecture = counterpart(model)
    values = {
        "architectures": [architecture.classes[0]],
        "model_type": architecture.model_type,
        "vocab_size": model.vocab_size,
        **architecture.write(model),
        "initializer_range": 0.02,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 5
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2))
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def outgoing(box: Box) -> Outgoing:
        name = box.tensor if box.tensor == HEAD else architecture.prefix + box.tensor
        return Outgoing(name, box.shape, lambda: box.tensor_of(np.asarray(leaves[box.leaf])))

    return write_tensors(folder, map(outgoing, boxes(architecture, model)), np.dtype(dtype), shard_bytes)


def finetune_config(folder: Path) -> Config:
    """A run that starts from a directory's weights: 4M tokens of `data.source` at a low learning rate."""
    _, model = read_model(folder)
    total_tokens = 4_000_000
    return Config(
        name=folder.resolve().name or "model",
        model=replace(model, scan_layers=model.num_layers > UNROLLED_LAYERS),
        data=DataConfig(tokenizer=tokenizer_spec(folder)),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_tokens=total_tokens // 50, decay_tokens=total_tokens),
        train=TrainConfig(
            batch_size=8, total_tokens=total_tokens, eval_interval=100, eval_batches=20, save_interval=100
        ),
        init_from=str(folder),
    )
