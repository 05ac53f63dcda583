"""BART in `transformers`: kernels are [out, in], with biases; a norm after every part and after the embeddings, learned
positions on both sides, whose tables have two rows before the first, and the embedding as head, with a bias."""

import re
from typing import Any, Literal

from gptjax.config import ModelConfig
from gptjax.convert.architecture import (
    Architecture,
    Box,
    cross_attention,
    defaults,
    dense,
    expect,
    linear,
    norm,
    rate,
    self_attention,
    whole,
)

Activation = Literal["gelu", "gelu_tanh", "relu"]
ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
OFFSET = 2
NORMS = {
    "self_attn_layer_norm": "norm_attention",
    "encoder_attn_layer_norm": "norm_cross",
    "final_layer_norm": "norm_mlp",
}


def _side(values: dict[str, Any], where: str, side: str) -> dict[str, Any]:
    """What both sides have, read alike; `side` begins the names of what each has for itself."""
    width, mlp = whole(values, "d_model", where), whole(values, f"{side}_ffn_dim", where)
    expect(values, where, activation_function=tuple(ACTIVATIONS), scale_embedding=(False, True))
    # Older files say what is the same for all that are called BART.
    expect(values, where, normalize_before=(False,), add_final_layer_norm=(False,), normalize_embedding=(True,))
    expect(values, where, static_position_embeddings=(False,), tie_word_embeddings=(True,))
    return {
        "num_layers": whole(values, f"{side}_layers", where),
        "num_heads": whole(values, f"{side}_attention_heads", where),
        "embed_dim": width,
        "seq_len": whole(values, "max_position_embeddings", where),
        "vocab_size": whole(values, "vocab_size", where),
        "dropout": rate(values, "dropout", where),
        "mlp_size": 0 if mlp == 4 * width else mlp,
        "norm_place": "after",
        "norm_embedding": True,
        "position_offset": OFFSET,
        "activation": ACTIVATIONS[values.get("activation_function", "gelu")],
        "scale_embedding": bool(values.get("scale_embedding")),
    }


def _read(values: dict[str, Any], where: str) -> ModelConfig:
    return ModelConfig(**_side(values, where, "decoder"), cross_attention=True, head_bias=True)


def _read_encoder(values: dict[str, Any], where: str) -> ModelConfig:
    return ModelConfig(**_side(values, where, "encoder"), causal=False)


def _sizes(side: str, config: ModelConfig) -> dict[str, Any]:
    return {
        f"{side}_layers": config.num_layers,
        f"{side}_attention_heads": config.num_heads,
        f"{side}_ffn_dim": config.mlp_dim,
        f"{side}_layerdrop": 0.0,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    names: dict[str, str] = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return _sizes("decoder", config) | {
        "d_model": config.embed_dim,
        "max_position_embeddings": config.seq_len,
        "activation_function": names[config.activation],
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "scale_embedding": config.scale_embedding,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "pad_token_id": 1,
        "forced_eos_token_id": None,
    }


def _write_encoder(config: ModelConfig) -> dict[str, Any]:
    return _sizes("encoder", config)


def _fixed(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """Of either side."""
    names = ("norm", "norm_bias", "norm_eps", "scale_scores", "qkv_bias", "biases", "parallel_mlp", "token_types")
    return dense(config) | {
        **defaults(config, *names, "positions", "tied_head", "scale_head"),
        "norm_place": ("after",),
        "norm_embedding": (True,),
        "position_offset": (OFFSET,),
        "activation": tuple(ACTIVATIONS.values()),
        "num_kv_heads": (0, config.num_heads),
        "head_size": (0, config.embed_dim // config.num_heads),
    }


def _fixed_decoder(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    return _fixed(config) | {"head_bias": (True,)}


def _around(side: str, config: ModelConfig) -> list[Box]:
    """The tensors of a side beside its layers."""
    table = config.seq_len + OFFSET, config.embed_dim
    return [
        Box(f"{side}.embed_positions.weight", table, "positions", table),
        *norm(f"{side}.layernorm_embedding", "norm_embedding", config.embed_dim),
    ]


def _outside(config: ModelConfig) -> list[Box]:
    shape = config.vocab_size, config.embed_dim
    return [
        Box("shared.weight", shape, "embedding", shape),
        *_around("decoder", config),
        Box(BIAS, (1, config.vocab_size), "head_bias", (config.vocab_size,)),
    ]


def _outside_encoder(config: ModelConfig) -> list[Box]:
    return _around("encoder", config)


def _block(config: ModelConfig) -> list[Box]:
    """Of either side."""
    dim, mlp = config.embed_dim, config.mlp_dim
    norms = {tensor: leaf for tensor, leaf in NORMS.items() if config.cross_attention or leaf != "norm_cross"}
    parts = [f"{part}_proj" for part in ("q", "k", "v", "out")]
    boxes = [box for tensor, leaf in norms.items() for box in norm(tensor, leaf, dim)]
    boxes += self_attention([f"self_attn.{part}" for part in parts], config)
    if config.cross_attention:
        boxes += cross_attention([f"encoder_attn.{part}" for part in parts], config)
    return [
        *boxes,
        *linear("fc1", "mlp_up", (dim, mlp), dim, mlp),
        *linear("fc2", "mlp_down", (mlp, dim), mlp, dim),
    ]


BIAS = "final_logits_bias"
CLASSES = ("BartForConditionalGeneration", "BartModel")
BART = Architecture(
    "bart",
    CLASSES,
    _read,
    _write,
    _block,
    _fixed_decoder,
    _outside,
    prefix="model.",
    layers="decoder.layers",
    constants=re.compile(r"(encoder|decoder)\.version"),
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    optional=(BIAS,),
    encoder=Architecture(
        "bart",
        CLASSES,
        _read_encoder,
        _write_encoder,
        _block,
        _fixed,
        _outside_encoder,
        prefix="model.",
        layers="encoder.layers",
        shared=("seq_len", "activation", "dropout", "scale_embedding"),
    ),
)
