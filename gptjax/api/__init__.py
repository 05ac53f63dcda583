"""A trained model in Python: what `gptjax.load` gives, and what the terminal's verbs are made of. A decoder goes on or
answers (`decoder`), an encoder-decoder writes one text of another (`translator`), an encoder tells of texts
(`encoder`); what writes is alike in `writes`."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from gptjax.api.decoder import Model
from gptjax.api.encoder import Encoder
from gptjax.api.translator import Translator
from gptjax.config import Config, LayoutConfig, TrainConfig
from gptjax.data.chat import is_chat, require_no_other
from gptjax.errors import UserError
from gptjax.infer.prepare import DTYPES, held
from gptjax.model.heads import is_head
from gptjax.sharding.mesh import MESH_AXES, make_mesh
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import SFT, AnyStage, Classify, Denoise, Masked, Pretrain, Seq2Seq, stage_class
from gptjax.stages.encoder_decoder import ReadsAndWrites
from gptjax.stages.launch import prepare
from gptjax.stages.weights import Weights, open_weights, places

SLOTS = 8


def load(path: str, *, layout: LayoutConfig | None = None, weights: str = "auto", slots: int = SLOTS) -> "Model":
    """The decoder of a run folder, or of a Hugging Face directory with GPT-2, GPT-Neo, LLaMA or Falcon.

    layout: how it lies on the attached devices; None is the only one, or of several the heads over as many as divide
    them; one without a -1 takes the first so many, so that LayoutConfig(fsdp=1) is a single one. weights: auto (the
    type that it computes in), float32, bfloat16 or int8. slots: replies in progress at once.

    Raises gptjax.errors.UserError, in one line, for what is none or is broken.
    """
    found = load_any(path, layout=layout, weights=weights, slots=slots)
    if not isinstance(found, Model):
        raise UserError(f"{path}: {found.kind}, and this takes a decoder; {found.use}")
    return found


def load_any(
    path: str, *, layout: LayoutConfig | None = None, weights: str = "auto", slots: int = SLOTS
) -> "Model | Translator | Encoder":
    """The same of any model: also an encoder-decoder (T5, BART) or an encoder (BERT, RoBERTa, DistilBERT)."""
    if weights not in DTYPES:
        raise UserError(f"weights = {weights}: choose from {', '.join(DTYPES)}")
    source = open_weights(path)
    config, tokenizer = source.config, source.tokenizer()
    prepare(config)
    if config.stage == "sft":
        require_no_other(tokenizer)
    kind: Any = stage_class(config)
    if kind not in (Masked, Classify, Denoise, Seq2Seq):
        kind = SFT if is_chat(tokenizer) else Pretrain
    elif weights == "int8":
        raise UserError("weights = int8: for decoders alone; choose from auto, float32, bfloat16")
    place = _layout(config, layout)
    config = replace(config, layout=layout or config.layout)
    stage = kind(config, jax.default_backend(), place, kind.fit_tokenizer(config, tokenizer))
    params = source.load(config.model, places(partial(_own, stage, source), place))
    kept = held(params, weights, stage.network.plain_model.dtype)
    if isinstance(stage, ReadsAndWrites):
        return Translator(path, stage, kept, slots)
    return Encoder(path, stage, kept) if isinstance(stage, Masked | Classify) else Model(path, stage, kept, slots)


def _own(stage: AnyStage, source: Weights, key: Any) -> Any:
    """What is used of a stage's parameters: its model, and of the heads beside it those that the weights have."""
    if not isinstance(stage, Masked | Classify):
        return stage.network.init(key)
    every = stage.init(key)
    return {name: part for name, part in every.items() if not is_head(name) or name in source.heads}


def _layout(config: Config, layout: LayoutConfig | None) -> Layout | None:
    devices, heads = jax.devices(), config.model.kv_heads
    if layout is None:
        layout = LayoutConfig(data=-1, fsdp=1, tensor=math.gcd(len(devices), heads))
    degrees = [getattr(layout, name) for name in MESH_AXES]
    if -1 not in degrees:
        devices = devices[: math.prod(degrees)]
    train = TrainConfig(batch_size=len(devices))  # that of the training has no say here
    mesh = make_mesh(replace(config, layout=layout, train=train), devices)
    return Layout(mesh, rule_table(layout)) if len(devices) > 1 else None


__all__ = ["SLOTS", "Encoder", "Model", "Translator", "load", "load_any"]
