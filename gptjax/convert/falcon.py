"""Falcon in `transformers`: one kernel [out, in] has queries, keys and values, group by group; rotary positions, no
biases, and the MLP beside attention, behind one norm (7B) or two (40B)."""

from typing import Any, Literal

from gptjax.config import ModelConfig
from gptjax.convert.architecture import (
    Architecture,
    Box,
    above_zero,
    dense,
    expect,
    heads_of,
    linear,
    norm,
    of_rotary,
    own_head,
    rate,
    rotary_base,
    whole,
)

Beside = Literal["no", "one_norm", "two_norms"]
BOTH = (False, True)


def _read(values: dict[str, Any], where: str) -> ModelConfig:
    heads, width = whole(values, "num_attention_heads", where), whole(values, "hidden_size", where)
    expect(values, where, alibi=(False,), bias=BOTH, multi_query=(True, False), parallel_attn=(True, False))
    expect(values, where, new_decoder_architecture=BOTH, tie_word_embeddings=(True, False), activation=("gelu",))
    later = bool(values.get("new_decoder_architecture"))
    if later:
        norms = values.get("num_ln_in_parallel_attn") or 2
        expect({"num_ln_in_parallel_attn": norms}, where, num_ln_in_parallel_attn=(2, 1))
        expect(values, where, parallel_attn=(True,))
        shared = whole({"num_kv_heads": heads} | values, "num_kv_heads", where)
    else:
        norms, shared = 1, 1 if values.get("multi_query", True) else heads
    beside: Beside = "no" if not values.get("parallel_attn", True) else "two_norms" if norms == 2 else "one_norm"
    mlp = whole(values, "ffn_hidden_size", where) if values.get("ffn_hidden_size") else 4 * width
    biases = bool(values.get("bias"))
    return ModelConfig(
        num_layers=whole(values, "num_hidden_layers", where),
        num_heads=heads,
        embed_dim=width,
        seq_len=whole({"max_position_embeddings": 2048} | values, "max_position_embeddings", where),
        vocab_size=whole(values, "vocab_size", where),
        num_kv_heads=0 if shared == heads else shared,
        mlp_size=0 if mlp == 4 * width else mlp,
        dropout=rate(values, "hidden_dropout", where),
        norm_eps=above_zero({"layer_norm_epsilon": 1e-5} | values, "layer_norm_epsilon", where),
        positions="rotary",
        rotary_base=rotary_base(values, where),
        activation="gelu",
        qkv_bias=biases,
        biases=biases,
        parallel_mlp=beside,
        tied_head=bool(values.get("tie_word_embeddings", True)),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    later = config.parallel_mlp != "no" and config.kv_heads > 1
    return {
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.kv_heads,
        "hidden_size": config.embed_dim,
        "ffn_hidden_size": config.mlp_dim,
        "max_position_embeddings": config.seq_len,
        "activation": "gelu",
        "layer_norm_epsilon": config.norm_eps,
        **of_rotary(config),
        "alibi": False,
        "bias": config.biases,
        "new_decoder_architecture": later or config.parallel_mlp == "two_norms",
        "num_ln_in_parallel_attn": 2 if config.parallel_mlp == "two_norms" else 1,
        "multi_query": config.kv_heads == 1,
        "parallel_attn": config.parallel_mlp != "no",
        "hidden_dropout": config.dropout,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_head,
    }


def _fixed(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    some = {"num_kv_heads": (0, 1, config.num_heads)} if config.parallel_mlp == "no" else {}
    fixed = {"activation": ("gelu",), "scale_scores": (True,), "biases": (config.qkv_bias,), "positions": ("rotary",)}
    return dense(config) | some | fixed | {"head_size": (0, config.embed_dim // config.num_heads)}


def _outside(config: ModelConfig) -> list[Box]:
    vocab, dim = config.vocab_size, config.embed_dim
    return [
        Box("word_embeddings.weight", (vocab, dim), "embedding", (vocab, dim)),
        *norm("ln_f", "norm_final", dim),
        *own_head(config),
    ]


def _block(config: ModelConfig) -> list[Box]:
    dim, mlp, heads, size = config.embed_dim, config.mlp_dim, config.num_heads, config.head_dim
    parts = heads // config.kv_heads + 2
    norms = {
        "no": {"input_layernorm": "norm_attention", "post_attention_layernorm": "norm_mlp"},
        "one_norm": {"input_layernorm": "norm_attention"},
        "two_norms": {"ln_attn": "norm_attention", "ln_mlp": "norm_mlp"},
    }[config.parallel_mlp]
    return [
        *(box for tensor, leaf in norms.items() for box in norm(tensor, leaf, dim)),
        *heads_of("self_attention.query_key_value", config, 0, parts),
        *linear("self_attention.dense", "projection", (heads, size, dim), heads * size, dim, config.biases),
        *linear("mlp.dense_h_to_4h", "mlp_up", (dim, mlp), dim, mlp, config.biases),
        *linear("mlp.dense_4h_to_h", "mlp_down", (mlp, dim), mlp, dim, config.biases),
    ]


FALCON = Architecture("falcon", ("FalconForCausalLM", "FalconModel"), _read, _write, _block, _fixed, _outside)
