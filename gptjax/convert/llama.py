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
    heads_of,
    linear,
    of_rotary,
    own_head,
    rotary_base,
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
    dim, mlp, heads, size = config.embed_dim, config.mlp_dim, config.num_heads, config.head_dim

    group = heads // config.kv_heads

    def gate(name: str, number: int) -> list[Box]:
        """One of the two parts of what goes up."""
        tensor, leaf = f"mlp.{name}_proj", "mlp_gate_up"
        bias = Box(f"{tensor}.bias", (mlp,), f"{leaf}/bias", (1, mlp), (number, 0))
        extent, offset = (dim, 1, mlp), (0, number, 0)
        kernel = Box(f"{tensor}.weight", (mlp, dim), f"{leaf}/kernel", extent, offset, transposed=True)
        return [kernel, bias] if config.biases else [kernel]

    return [
        *(Box(f"{tensor}.weight", (dim,), f"{leaf}/scale", (dim,)) for tensor, leaf in NORMS.items()),
        *heads_of("self_attn.q_proj", config, 0, group),
        *heads_of("self_attn.k_proj", config, group, 1),
        *heads_of("self_attn.v_proj", config, group + 1, 1),
        *linear("self_attn.o_proj", "projection", (heads, size, dim), heads * size, dim, config.biases),
        *gate("gate", 0),
        *gate("up", 1),
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
