"""GPT-2 in `transformers`: kernels are [in, out], and one matrix holds queries, keys and values."""

import re
from typing import Any

from gptjax.config import ModelConfig
from gptjax.convert.architecture import COMMON, Architecture, Box, common, expect, norm, of_gpt, plain, rate, whole


def _read(values: dict[str, Any], where: str) -> ModelConfig:
    width, context = whole(values, "n_embd", where), whole(values, "n_positions", where)
    expect(
        values,
        where,
        **COMMON,
        n_inner=(None, 4 * width),
        n_ctx=(context,),
        scale_attn_weights=(True, False),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    return ModelConfig(
        num_layers=whole(values, "n_layer", where),
        num_heads=whole(values, "n_head", where),
        embed_dim=width,
        seq_len=context,
        vocab_size=whole(values, "vocab_size", where),
        dropout=rate(values, "resid_pdrop", where),
        scale_scores=bool(values.get("scale_attn_weights", True)),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.embed_dim,
        "n_positions": config.seq_len,
        "n_ctx": config.seq_len,
        "n_inner": None,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "scale_attn_weights": config.scale_scores,
        **common(),
    }


def _block(config: ModelConfig) -> list[Box]:
    dim, mlp, heads = config.embed_dim, config.mlp_dim, (config.num_heads, config.head_dim)
    return [
        *norm("ln_1", "norm_attention", dim),
        Box("attn.c_attn.weight", (dim, 3 * dim), "qkv/kernel", (dim, 3, *heads)),
        Box("attn.c_attn.bias", (3 * dim,), "qkv/bias", (3, *heads)),
        Box("attn.c_proj.weight", (dim, dim), "projection/kernel", (*heads, dim)),
        Box("attn.c_proj.bias", (dim,), "projection/bias", (dim,)),
        *norm("ln_2", "norm_mlp", dim),
        Box("mlp.c_fc.weight", (dim, mlp), "mlp_up/kernel", (dim, mlp)),
        Box("mlp.c_fc.bias", (mlp,), "mlp_up/bias", (mlp,)),
        Box("mlp.c_proj.weight", (mlp, dim), "mlp_down/kernel", (mlp, dim)),
        Box("mlp.c_proj.bias", (dim,), "mlp_down/bias", (dim,)),
    ]


GPT2 = Architecture(
    "gpt2",
    ("GPT2LMHeadModel", "GPT2Model"),
    _read,
    _write,
    _block,
    plain,
    of_gpt,
    constants=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
)
