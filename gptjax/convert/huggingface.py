"""A directory that `transformers` loads and writes: its config as ours, its tensors onto our mesh, and back."""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import ValidationError

from gptjax.config import (
    ENCODER,
    ClassifyConfig,
    Config,
    DataConfig,
    LabelledConfig,
    LabelsConfig,
    MaskedConfig,
    MaskingConfig,
    ModelConfig,
    OptimizerConfig,
    PairConfig,
    Seq2SeqConfig,
    TrainConfig,
    WindowConfig,
    validate,
)
from gptjax.config.fields import explain, typed
from gptjax.convert.architecture import Architecture, Box, assemble, every_box, head_boxes, usual, whole
from gptjax.convert.bart import BART
from gptjax.convert.bert import BERT, DISTILBERT, ROBERTA
from gptjax.convert.falcon import FALCON
from gptjax.convert.gpt2 import GPT2
from gptjax.convert.gpt_neo import GPT_NEO
from gptjax.convert.llama import LLAMA
from gptjax.convert.t5 import T5
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
from gptjax.model.heads import CLASSIFIER, TRANSFORM
from gptjax.sharding.rules import leaf_name
from gptjax.train.run import CONFIG, META

KNOWN = (GPT2, GPT_NEO, LLAMA, FALCON, BERT, ROBERTA, DISTILBERT, T5, BART)
ARCHITECTURES = {known.model_type: known for known in KNOWN}
HEAD = "lm_head.weight"
OLD = {".gamma": ".weight", ".beta": ".bias"}  # names of a norm's vectors in the first files of BERT
SIZES = {"head_size": "head_dim", "mlp_size": "mlp_dim"}  # a field that may be 0 -> what it stands for
UNROLLED_LAYERS = 12  # as in configs/: unrolled is faster, but deeper models would compile for long


def is_huggingface(path: Path) -> bool:
    """Whether a folder has a config.json that is not a run's."""
    return (path / CONFIG).is_file() and not (path / META).is_file()


def read_models(folder: Path) -> tuple[Architecture, dict[str, ModelConfig]]:
    """The architecture and our config of a directory, from config.json alone: the model, and the encoder beside it
    where there are two.

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
            can = ", ".join(architecture.classes if architecture.heads else architecture.classes[:1])
            raise UserError(f"{file}: architectures = {given!r}: of {name} gptjax converts {can}")
    try:
        models = {section: side.read(values, str(file)) for section, side in architecture.sides.items()}
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error, Config)}") from None
    config = _around(folder, name, models)
    try:
        return architecture, validate(config).models
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _around(folder: Path, name: str, models: Mapping[str, ModelConfig], **how: Any) -> Config:
    """A run of a directory's models."""
    if ENCODER in models:
        data, size = PairConfig(source="pairs.jsonl", tokenizer=tokenizer_spec(folder)), models["model"].vocab_size
        return Seq2SeqConfig(
            name, models["model"], data, encoder=models[ENCODER], start_id=_start_id(folder, size), **how
        )
    if models["model"].causal:
        return Config(name, models["model"], DataConfig(tokenizer=tokenizer_spec(folder)), **how)
    values = read_json(folder / CONFIG, AGAIN)
    classes = values.get("architectures") or ()
    if any("ForSequenceClassification" in each for each in classes):
        texts = LabelledConfig(source="labelled.jsonl", tokenizer=tokenizer_spec(folder))
        return ClassifyConfig(name, models["model"], texts, labels=LabelsConfig(_labels(folder, values)), **how)
    masking = MaskingConfig(next_sentence=any("ForPreTraining" in each for each in classes))
    return MaskedConfig(name, models["model"], WindowConfig(tokenizer=tokenizer_spec(folder)), masking=masking, **how)


def _labels(folder: Path, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes, in order; none for a number. Raises UserError where they are not told by their numbers."""
    where, named = str(folder / CONFIG), values.get("id2label")
    if not named:  # which transformers leaves out where it is this
        count = whole({"num_labels": 2, **values}, "num_labels", where)
        named = {str(i): f"LABEL_{i}" for i in range(count)}
    if not isinstance(named, dict) or {*named} != {*map(str, range(len(named)))}:
        raise UserError(f"{where}: id2label = {named!r}: expected a name for each class 0, 1, ...")
    names = tuple(str(named[str(i)]) for i in range(len(named)))
    return () if len(names) == 1 or values.get("problem_type") == "regression" else names


def _start_id(folder: Path, vocab_size: int) -> int:
    """What a decoder's text begins with; where config.json does not say it, transformers takes what begins a text.

    Raises UserError where it is no id of the vocabulary.
    """
    file = folder / CONFIG
    values = read_json(file, AGAIN)
    names = ("decoder_start_token_id", "bos_token_id")
    name = next((name for name in names if values.get(name) is not None), names[0])
    given = values.get(name)
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < vocab_size:
        raise UserError(f"{file}: {name} = {given!r}: expected the id that a text starts with, below {vocab_size}")
    return given


@dataclass(frozen=True)
class Directory:
    """A checked directory: every tensor that the model needs is there, whole and finite, and no other."""

    architecture: Architecture
    models: dict[str, ModelConfig]
    tensors: dict[str, Tensor]
    of_heads: tuple[Box, ...] = ()
    """The tensors of what stands beside the model."""

    @property
    def heads(self) -> frozenset[str]:
        """What stands beside the model; see model.heads."""
        return frozenset(box.leaf.split("/")[0] for box in self.of_heads)

    @property
    def model(self) -> ModelConfig:
        """It, or the decoder of two."""
        return self.models["model"]

    def load(self, model: ModelConfig, abstract: Any) -> Any:
        """The parameters of `model` (which may stack its layers or not), and of the encoder beside it, where the
        shardings of `abstract` put them.

        Each device's part of each leaf is read from the files by itself, so the host holds one leaf besides the model.
        """
        parts: dict[str, list[tuple[Box, Callable[[], np.ndarray]]]] = defaultdict(list)
        models = self.models | {"model": model}
        if ENCODER in models:
            models[ENCODER] = replace(models[ENCODER], scan_layers="units" in abstract[ENCODER])
        for box in [*every_box(self.architecture, models), *self.of_heads]:
            if box.tensor in self.tensors:  # else it is one that a file may lack
                parts[box.leaf].append((box, self.tensors[box.tensor].open))

        def load_leaf(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            read = partial(assemble, shape=leaf.shape, parts=parts[leaf_name(path)])
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)

        return jax.tree_util.tree_map_with_path(load_leaf, abstract)


def _of_heads(folder: Path, architecture: Architecture, model: ModelConfig, tensors: Collection[str]) -> list[Box]:
    """The tensors of the heads that the class of config.json has, and of others of which there is one. A base may lack
    its pooler, and no class but its own says how many classes a classifier has."""
    values = read_json(folder / CONFIG, AGAIN)
    named = {name for name in values.get("architectures") or () if not name.endswith("Model")}
    wanted = frozenset[str]().union(*(heads for heads, name in architecture.class_of.items() if name in named))
    classes = (len(_labels(folder, values)) or 1) if CLASSIFIER in wanted else 0
    groups = head_boxes(architecture, model, wanted | architecture.heads.keys() - {CLASSIFIER}, classes)
    there = (boxes for name, boxes in groups.items() if name in wanted or any(box.tensor in tensors for box in boxes))
    return [box for boxes in there for box in boxes]


def _named(name: str) -> str:
    """Of a tensor, as it is called today."""
    old = next((old for old in OLD if name.endswith(f"LayerNorm{old}")), "")
    return name.removesuffix(old) + OLD[old] if old else name


def open_directory(folder: Path) -> Directory:
    """Check a directory and everything in it that will be read.

    Raises UserError for broken files, for missing, unexpected, misshapen or non-finite tensors, and for a head that
    is not the embedding.
    """
    architecture, models = read_models(folder)
    found = read_tensors(folder)
    prefix = architecture.prefix
    tensors = {_named(name.removeprefix(prefix)): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        twice = next(name for name in found if prefix + name in found)
        raise UserError(f"{folder}: both {twice} and {prefix}{twice}")
    left_out = {name for name, other in architecture.replaced.items() if other in tensors}
    left_out |= {name for name in tensors if architecture.constants.fullmatch(name)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    depth = sum(model.num_layers for model in models.values())
    if depth > len(tensors):  # before a table of so many layers is made
        raise UserError(f"{folder / CONFIG}: {depth} layers, and only {len(tensors)} tensors beside it")
    of_heads = _of_heads(folder, architecture, models["model"], tensors)
    table = {box.tensor: box for box in [*every_box(architecture, models), *of_heads]}
    embedding = next(iter(table))
    twins = dict.fromkeys((*architecture.copies, *[HEAD] * models["model"].tied_head), embedding) | dict(
        architecture.twins
    )
    copies = [(tensors.pop(name), original) for name, original in twins.items() if name in tensors]
    for copy, original in copies:  # which of its names is saved is a version's choice
        if architecture.copies and original in table:
            tensors.setdefault(original, copy)
    for name, box in table.items():
        if name in tensors:
            _check(tensors[name], box.shape)
        elif name not in architecture.optional:
            raise UserError(f"{folder}: no tensor {name}, which {CONFIG} asks for")
    if unexpected := tensors.keys() - table.keys():
        raise UserError(f"{folder}: unexpected tensor {min(unexpected)}; {CONFIG} has no place for it")
    for copy, original in copies:
        if original not in table:
            raise UserError(f"{folder}: unexpected tensor {copy.name}; {CONFIG} has no place for it")
        _check(copy, table[original].shape)
        pairs = zip(chunks(copy.open()), chunks(tensors[original].open()), strict=True)
        if not all(np.array_equal(a, b) for a, b in pairs):
            what = "the embedding is the head" if copy.name == HEAD else f"there is one {_thing(original, embedding)}"
            raise UserError(f"{folder}: {copy.name} differs from {original}; {CONFIG} says that {what}")
    return Directory(architecture, models, tensors, tuple(of_heads))


def _thing(original: str, embedding: str) -> str:
    return "embedding" if original == embedding else "bias"


def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    what = f"{tensor.file}: {tensor.name}"
    if tensor.shape != shape:
        raise UserError(f"{what} is {list(tensor.shape)}, but {CONFIG} makes it {list(shape)}")
    if tensor.dtype not in DTYPES:
        raise UserError(f"{what} is {tensor.dtype}; weights are {', '.join(DTYPES)}")
    require_finite(what, tensor.open())


def counterpart(model: ModelConfig, encoder: ModelConfig | None = None) -> Architecture:
    """The architecture that computes what a model computes, or one beside an encoder. Raises UserError where there is
    none."""
    if encoder is not None:
        near = T5 if model.positions == "relative" else BART
        _require_fixed(near, near.fixed(model), "model", model)
        assert near.encoder
        alike = {name: (getattr(model, SIZES.get(name, name)),) for name in near.encoder.shared}
        _require_fixed(near, near.encoder.fixed(encoder) | alike, ENCODER, encoder)
        return near
    if not model.causal:
        near = ROBERTA if model.position_offset else BERT if model.token_types else DISTILBERT
        _require_fixed(near, near.fixed(model), "model", model)
        return near
    if model.positions == "learned":
        near = GPT2 if model.qkv_bias else GPT_NEO
        if near is GPT2 and "banded" in model.attention_pattern:
            raise UserError(
                f"model.attention_pattern = {','.join(model.attention_pattern)}: Hugging Face has local attention in "
                "GPT-Neo alone, without biases on q, k and v; train a model to export with --model.qkv_bias false"
            )
    else:
        near = LLAMA if model.norm == "rms" else FALCON
    _require_fixed(near, near.fixed(model) | usual(model), "model", model)
    return near


def _require_fixed(near: Architecture, fixed: Mapping[str, tuple[Any, ...]], section: str, model: ModelConfig) -> None:
    for name, values in fixed.items():
        given = getattr(model, name)
        if not {given, getattr(model, SIZES.get(name, name))} & {*values}:
            shown = " or ".join(map(typed, values))
            raise UserError(
                f"{section}.{name} = {typed(given)}: {near.classes[0]}, which is nearest of what gptjax writes for "
                f"Hugging Face, has {shown}; train a model to export with --{section}.{name} {typed(values[0])}"
            )


def write_directory(
    folder: Path,
    models: Mapping[str, ModelConfig],
    params: Any,
    eot: int,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    start: int | None = None,
    labels: tuple[str, ...] | None = None,
) -> int:
    """Write config.json and the weights, the padding of the vocabulary cut off; returns the bytes of tensors. start:
    the id that the decoder of two starts with; labels: of a classifier's classes, none for a number.

    Raises UserError where the architecture has no counterpart or a weight is not finite in `dtype`.
    """
    architecture, model = counterpart(**models), models["model"]
    heads = frozenset(name for name in architecture.heads if name in params)
    name = class_of(architecture, heads)
    if TRANSFORM in heads and not model.head_bias:
        raise UserError(
            f"model.head_bias = false: {name} scores words with a bias; train a model to export with "
            "--model.head_bias true"
        )
    values = {
        "architectures": [name],
        "model_type": architecture.model_type,
        "vocab_size": models["model"].vocab_size,
    }
    for section, side in architecture.sides.items():
        values |= side.write(models[section])
    values |= {
        "initializer_range": 0.02,
        "bos_token_id": eot,
        "eos_token_id": eot,
        **({} if start is None else {"decoder_start_token_id": start}),
        **({} if labels is None else _of_labels(labels)),
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 5
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2))
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def outgoing(box: Box) -> Outgoing:
        name = full_name(architecture, heads, box)
        return Outgoing(name, box.shape, lambda: box.tensor_of(np.asarray(leaves[box.leaf])))

    table = every_box(architecture, models)
    if architecture.heads and TRANSFORM not in heads:  # which alone scores words
        table = [box for box in table if box.leaf != "head_bias"]
    classes = len(labels or ()) or 1 if CLASSIFIER in heads else 0
    table += [box for group in head_boxes(architecture, model, heads, classes).values() for box in group]
    return write_tensors(folder, map(outgoing, table), np.dtype(dtype), shard_bytes)


def full_name(architecture: Architecture, heads: frozenset[str], box: Box) -> str:
    """Of a box's tensor in a file; an encoder alone has no prefix."""
    alone = architecture.class_of.get(heads, "").endswith("Model")
    return box.tensor if alone or architecture.beside.fullmatch(box.tensor) else architecture.prefix + box.tensor


def class_of(architecture: Architecture, heads: frozenset[str]) -> str:
    """The class of `transformers` that has these heads. Raises UserError where none has."""
    if not architecture.heads:
        return architecture.classes[0]
    if heads not in architecture.class_of:
        known = "; ".join(
            f"{' and '.join(sorted(parts)) or 'none'} ({name})" for parts, name in architecture.class_of.items()
        )
        raise UserError(f"heads {' and '.join(sorted(heads)) or 'none'}: {architecture.model_type} has {known}")
    return architecture.class_of[heads]


def _of_labels(labels: tuple[str, ...]) -> dict[str, Any]:
    if not labels:
        return {"problem_type": "regression", "id2label": {"0": "0"}, "label2id": {"0": 0}}
    named = {str(i): name for i, name in enumerate(labels)}
    return {"id2label": named, "label2id": {name: int(i) for i, name in named.items()}}


def finetune_config(folder: Path) -> Config:
    """A run that starts from a directory's weights: 4M tokens of `data.source` at a low learning rate. Of an
    encoder-decoder one that learns pairs, from pairs.jsonl unless another source is named."""
    _, models = read_models(folder)
    total_tokens = 4_000_000
    return _around(
        folder,
        folder.resolve().name or "model",
        {name: replace(model, scan_layers=model.num_layers > UNROLLED_LAYERS) for name, model in models.items()},
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_tokens=total_tokens // 50, decay_tokens=total_tokens),
        train=TrainConfig(
            batch_size=8, total_tokens=total_tokens, eval_interval=100, eval_batches=20, save_interval=100
        ),
        init_from=str(folder),
    )
