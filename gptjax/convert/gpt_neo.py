"""GPT-Neo in `transformers`: kernels are [out, in]; queries, keys and values are apart and have no biases; scores
are not scaled; layers are global (dense) or local (banded)."""

import re
from typing import Any, Literal

from gptjax.config import ModelConfig
from gptjax.convert.architecture import (
    COMMON,
    Architecture,
    Box,
    common,
    expect,
    linear,
    norm,
    of_gpt,
    plain,
    rate,
    whole,
)
from gptjax.errors import UserError

Kind = Literal["dense", "banded"]
KINDS: dict[str, Kind] = {"global": "dense", "local": "banded"}


def _read(values: dict[str, Any], where: str) -> ModelConfig:
    width, context = whole(values, "hidden_size", where), whole(values, "max_position_embeddings", where)
    expect(
        values,
        where,
        **COMMON,
        intermediate_size=(None, 4 * width),
    )
    layers = whole(values, "num_layers", where)
    return ModelConfig(
        num_layers=layers,
        num_heads=whole(values, "num_heads", where),
        embed_dim=width,
        seq_len=context,
        vocab_size=whole(values, "vocab_size", where),
        attention_pattern=_pattern(values, layers, where),
        window=min(whole(values, "window_size", where), context),  # a wider one sees no further
        dropout=rate(values, "resid_dropout", where),
        scale_scores=False,
        qkv_bias=False,
    )


def _pattern(values: dict[str, Any], layers: int, where: str) -> tuple[Kind, ...]:
    """The shortest unit whose repeats are the layers' kinds. Raises UserError where they are not one per layer."""
    types = values.get("attention_types")
    try:
        kinds = [KINDS[kind] for unit, count in types or [] for kind in [*unit] * min(count, layers + 1)]
    except (TypeError, ValueError, KeyError):
        kinds = []
    if len(kinds) != layers:
        raise UserError(
            f"{where}: attention_types = {types!r}: expected units of global and local with their repeats, "
            f"{layers} layers together, such as [[['global', 'local'], {layers // 2}]]"
        )
    sizes = [size for size in range(1, layers + 1) if layers % size == 0]
    shortest = next(size for size in sizes if kinds == kinds[:size] * (layers // size))
    return tuple(kinds[:shortest])


def _write(config: ModelConfig) -> dict[str, Any]:
    names = {kind: name for name, kind in KINDS.items()}
    unit = [names[kind] for kind in config.attention_pattern]
    return {
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "hidden_size": config.embed_dim,
        "max_position_embeddings": config.seq_len,
        "intermediate_size": None,
        "attention_types": [[unit, config.num_layers // len(unit)]],
        "window_size": config.window,
        "resid_dropout": config.dropout,
        "embed_dropout": config.dropout,
        "attention_dropout": 0.0,
        **common(),
    }


def _block(config: ModelConfig) -> list[Box]:
    dim, mlp, heads = config.embed_dim, config.mlp_dim, (config.num_heads, config.head_dim)
    # GPT-Neo divides nothing by sqrt(K), so our division goes into the queries.
    scales = (config.head_dim**-0.5 if config.scale_scores else 1.0, 1.0, 1.0)

    return [
        *norm("ln_1", "norm_attention", dim),
        *(
            Box(
                f"attn.attention.{name}_proj.weight",
                (dim, dim),
                "qkv/kernel",
                (dim, 1, *heads),
                offset=(0, i, 0, 0),
                transposed=True,
                scale=scale,
            )
            for i, (name, scale) in enumerate(zip("qkv", scales, strict=True))
        ),
        *linear("attn.attention.out_proj", "projection", (*heads, dim), dim, dim),
        *norm("ln_2", "norm_mlp", dim),
        *linear("mlp.c_fc", "mlp_up", (dim, mlp), dim, mlp),
        *linear("mlp.c_proj", "mlp_down", (mlp, dim), mlp, dim),
    ]


GPT_NEO = Architecture(
    "gpt_neo",
    ("GPTNeoForCausalLM", "GPTNeoModel"),
    _read,
    _write,
    _block,
    plain,
    of_gpt,
    constants=re.compile(r"h\.\d+\.attn\.attention\.(bias|masked_bias)"),
)
