"""T5 in `transformers`, v1.0 and v1.1: kernels are [out, in], without biases; RMSNorm before every part, and a table of
relative positions in the first layer of each side, which the other layers share. v1.0 has ReLU and scores with the
embedding over sqrt(D); v1.1 a gated GELU (tanh) and a head of its own."""

from typing import Any, Literal

from gptjax.config import ModelConfig
from gptjax.convert.architecture import (
    Architecture,
    Box,
    above_zero,
    cross_attention,
    defaults,
    dense,
    expect,
    gated,
    linear,
    own_head,
    rate,
    self_attention,
    whole,
)

Activation = Literal["relu", "geglu", "swiglu"]
FORWARD: dict[str, tuple[Activation, str]] = {
    "relu": ("relu", "relu"),
    "gated-gelu": ("geglu", "gelu_new"),
    "gated-silu": ("swiglu", "silu"),
}
"""feed_forward_proj -> our activation, and the name that transformers derives for its function."""
USUAL = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "n_positions": 512}
"""What older files leave out, the last also those of transformers 5: relative positions know no end, and T5 was trained
on 512 tokens."""


def _side(values: dict[str, Any], where: str, layers: str) -> dict[str, Any]:
    """What both sides have, read alike."""
    heads, width = whole(values, "num_heads", where), whole(values, "d_model", where)
    expect(values, where, feed_forward_proj=tuple(FORWARD))
    activation, function = FORWARD[values.get("feed_forward_proj", "relu")]
    expect(values, where, dense_act_fn=(function,), is_gated_act=(activation != "relu",))
    size, mlp, known = whole(values, "d_kv", where), whole(values, "d_ff", where), USUAL | values
    return {
        "num_layers": whole(values, layers, where),
        "num_heads": heads,
        "embed_dim": width,
        "seq_len": whole(known, "n_positions", where),
        "vocab_size": whole(values, "vocab_size", where),
        "dropout": rate(values, "dropout_rate", where),
        "scale_scores": False,
        "qkv_bias": False,
        "biases": False,
        "head_size": 0 if size * heads == width else size,
        "mlp_size": 0 if mlp == 4 * width else mlp,
        "norm": "rms",
        "norm_eps": above_zero({"layer_norm_epsilon": 1e-6} | values, "layer_norm_epsilon", where),
        "positions": "relative",
        "position_buckets": whole(known, "relative_attention_num_buckets", where),
        "position_reach": whole(known, "relative_attention_max_distance", where),
        "activation": activation,
    }


def _read(values: dict[str, Any], where: str) -> ModelConfig:
    both = (True, False)
    expect(values, where, tie_word_embeddings=both, scale_decoder_outputs=both)
    # transformers 5 writes true for the first whatever the head is, and puts what it was into the second.
    scaled = values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True))
    layers = "num_layers" if values.get("num_decoder_layers") is None else "num_decoder_layers"
    side = _side(values, where, layers)
    return ModelConfig(**side, cross_attention=True, tied_head=scaled, scale_head=scaled)


def _read_encoder(values: dict[str, Any], where: str) -> ModelConfig:
    return ModelConfig(**_side(values, where, "num_layers"), causal=False)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_decoder_layers": config.num_layers,
        "tie_word_embeddings": config.tied_head,
        "scale_decoder_outputs": config.scale_head,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
    }


def _write_encoder(config: ModelConfig) -> dict[str, Any]:
    known: dict[str, str] = {activation: name for name, (activation, _) in FORWARD.items()}
    return {
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "d_model": config.embed_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "feed_forward_proj": known[config.activation],
        "n_positions": config.seq_len,
        "relative_attention_num_buckets": config.position_buckets,
        "relative_attention_max_distance": config.position_reach,
        "layer_norm_epsilon": config.norm_eps,
        "dropout_rate": config.dropout,
    }


def _fixed(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """Of either side."""
    return dense(config) | {
        **defaults(config, "norm_bias", "norm_place", "norm_embedding", "scale_embedding", "token_types", "head_bias"),
        "positions": ("relative",),
        "norm": ("rms",),
        "activation": tuple(activation for activation, _ in FORWARD.values()),
        "num_kv_heads": (0, config.num_heads),
        "parallel_mlp": ("no",),
        **dict.fromkeys(("scale_scores", "qkv_bias", "biases"), (False,)),
    }


def _fixed_decoder(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    return _fixed(config) | {"scale_head": (config.tied_head,)}


def _around(side: str, config: ModelConfig) -> list[Box]:
    """The tensors of a side beside its layers."""
    table = config.position_buckets, config.num_heads
    return [
        Box(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", table, "distances", table),
        Box(f"{side}.final_layer_norm.weight", (config.embed_dim,), "norm_final/scale", (config.embed_dim,)),
    ]


def _outside(config: ModelConfig) -> list[Box]:
    shape = config.vocab_size, config.embed_dim
    return [Box("shared.weight", shape, "embedding", shape), *_around("decoder", config), *own_head(config)]


def _outside_encoder(config: ModelConfig) -> list[Box]:
    return _around("encoder", config)


def _block(config: ModelConfig) -> list[Box]:
    """Of either side: a layer is a row of parts, the last of them the MLP."""
    dim, width = config.embed_dim, config.mlp_dim
    names = ["norm_attention", *["norm_cross"] * config.cross_attention, "norm_mlp"]
    mlp = f"layer.{len(names) - 1}.DenseReluDense"
    boxes = [Box(f"layer.{i}.layer_norm.weight", (dim,), f"{name}/scale", (dim,)) for i, name in enumerate(names)]
    boxes += self_attention([f"layer.0.SelfAttention.{part}" for part in "qkvo"], config)
    if config.cross_attention:
        boxes += cross_attention([f"layer.1.EncDecAttention.{part}" for part in "qkvo"], config)
    if config.gated:
        boxes += gated([f"{mlp}.wi_0", f"{mlp}.wi_1"], config)
    else:
        boxes += linear(f"{mlp}.wi", "mlp_up", (dim, width), dim, width, has_bias=False)
    return [*boxes, *linear(f"{mlp}.wo", "mlp_down", (width, dim), width, dim, has_bias=False)]


CLASSES = ("T5ForConditionalGeneration", "T5Model")
ONCE = (
    *("num_heads", "head_size", "mlp_size", "activation", "norm_eps", "position_buckets", "position_reach"),
    "dropout",
)
T5 = Architecture(
    "t5",
    CLASSES,
    _read,
    _write,
    _block,
    _fixed_decoder,
    _outside,
    prefix="",
    layers="decoder.block",
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    encoder=Architecture(
        "t5",
        CLASSES,
        _read_encoder,
        _write_encoder,
        _block,
        _fixed,
        _outside_encoder,
        prefix="",
        layers="encoder.block",
        shared=ONCE,
    ),
)
