"""LLaMA in `transformers`: kernels are [out, in], apart for queries, keys and values; rotary positions turn halves of a
head, as ours do; RMSNorm, a gated MLP, no biases, and most often a head of its own."""

import re
from typing import Any

from gptjax.config import ModelConfig
from gptjax.convert.architecture import (
    Architecture,
    Box,
    above_zero,
    dense,
    expect,
    gated,
    linear,
    of_rotary,
    own_head,
    rotary_base,
    self_attention,
    whole,
)

NORMS = {"input_layernorm": "norm_attention", "post_attention_layernorm": "norm_mlp"}


def _read(values: dict[str, Any], where: str) -> ModelConfig:
    heads, width = whole(values, "num_attention_heads", where), whole(values, "hidden_size", where)
    both = (False, True)
    expect(values, where, hidden_act=("silu",), attention_bias=both, mlp_bias=both, tie_word_embeddings=both)
    expect(values, where, mlp_bias=(bool(values.get("attention_bias")),))
    shared = whole(values, "num_key_value_heads", where) if values.get("num_key_value_heads") else heads
    size = whole(values, "head_dim", where) if values.get("head_dim") else width // heads
    mlp = whole(values, "intermediate_size", where)
    return ModelConfig(
        num_layers=whole(values, "num_hidden_layers", where),
        num_heads=heads,
        embed_dim=width,
        seq_len=whole(values, "max_position_embeddings", where),
        vocab_size=whole(values, "vocab_size", where),
        num_kv_heads=0 if shared == heads else shared,
        head_size=0 if size * heads == width else size,
        mlp_size=0 if mlp == 4 * width else mlp,
        norm="rms",
        norm_eps=above_zero({"rms_norm_eps": 1e-6} | values, "rms_norm_eps", where),
        positions="rotary",
        rotary_base=rotary_base(values, where),
        activation="swiglu",
        qkv_bias=bool(values.get("attention_bias")),
        biases=bool(values.get("attention_bias")),
        tied_head=bool(values.get("tie_word_embeddings")),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        **of_rotary(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.biases,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_head,
    }


def _fixed(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    return dense(config) | {
        "positions": ("rotary",),
        "activation": ("swiglu",),
        "parallel_mlp": ("no",),
        "scale_scores": (True,),
        "biases": (config.qkv_bias,),
    }


def _outside(config: ModelConfig) -> list[Box]:
    vocab, dim = config.vocab_size, config.embed_dim
    return [
        Box("embed_tokens.weight", (vocab, dim), "embedding", (vocab, dim)),
        Box("norm.weight", (dim,), "norm_final/scale", (dim,)),
        *own_head(config),
    ]


def _block(config: ModelConfig) -> list[Box]:
    dim, mlp = config.embed_dim, config.mlp_dim
    return [
        *(Box(f"{tensor}.weight", (dim,), f"{leaf}/scale", (dim,)) for tensor, leaf in NORMS.items()),
        *self_attention([f"self_attn.{part}_proj" for part in "qkvo"], config),
        *gated(["mlp.gate_proj", "mlp.up_proj"], config),
        *linear("mlp.down_proj", "mlp_down", (mlp, dim), mlp, dim, config.biases),
    ]


LLAMA = Architecture(
    "llama",
    ("LlamaForCausalLM", "LlamaModel"),
    _read,
    _write,
    _block,
    _fixed,
    _outside,
    prefix="model.",
    layers="layers",
    constants=re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
)
