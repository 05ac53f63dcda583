"""BERT, RoBERTa and DistilBERT in `transformers`: kernels are [out, in], with biases; a norm after every part and after
the embeddings, learned positions, the exact GELU, and heads beside the encoder. What they differ in are names, the rows
before the first position (RoBERTa has two) and the types of tokens (BERT has two, DistilBERT none)."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptjax.config import ModelConfig
from gptjax.convert.architecture import (
    Architecture,
    Box,
    above_zero,
    defaults,
    dense,
    expect,
    linear,
    norm,
    rate,
    self_attention,
    whole,
)
from gptjax.model.heads import CLASSIFIER, NEXT_SENTENCE, POOLER, TRANSFORM


@dataclass(frozen=True)
class Names:
    """What a family calls its parts."""

    sizes: Mapping[str, str]
    """Field of our config -> name in config.json."""
    embeddings: Mapping[str, str]
    """Leaf -> tensor of a table."""
    embedding_norm: str
    attention: tuple[str, ...]
    """Queries, keys, values, and what goes on from them."""
    parts: Mapping[str, str]
    """Leaf of a layer -> tensor."""
    transform: tuple[str, str]
    """Product and norm before the words are scored."""
    bias: str
    """Of that score."""
    offset: int = 0
    eps: float = 1e-12


BERT_SIZES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "embed_dim": "hidden_size",
    "mlp_size": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation": "hidden_act",
}
BERT_PARTS = {
    "norm_attention": "attention.output.LayerNorm",
    "mlp_up": "intermediate.dense",
    "mlp_down": "output.dense",
    "norm_mlp": "output.LayerNorm",
}
BERT_NAMES = Names(
    BERT_SIZES,
    {
        "embedding": "embeddings.word_embeddings.weight",
        "positions": "embeddings.position_embeddings.weight",
        "token_types": "embeddings.token_type_embeddings.weight",
    },
    "embeddings.LayerNorm",
    (*(f"attention.self.{part}" for part in ("query", "key", "value")), "attention.output.dense"),
    BERT_PARTS,
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    "cls.predictions.bias",
)
ROBERTA_NAMES = Names(
    BERT_SIZES,
    BERT_NAMES.embeddings,
    BERT_NAMES.embedding_norm,
    BERT_NAMES.attention,
    BERT_PARTS,
    ("lm_head.dense", "lm_head.layer_norm"),
    "lm_head.bias",
    offset=2,
    eps=1e-5,
)
DISTILBERT_NAMES = Names(
    {
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "embed_dim": "dim",
        "mlp_size": "hidden_dim",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "activation": "activation",
    },
    {
        "embedding": "embeddings.word_embeddings.weight",
        "positions": "embeddings.position_embeddings.weight",
    },
    "embeddings.LayerNorm",
    tuple(f"attention.{part}_lin" for part in ("q", "k", "v", "out")),
    {"norm_attention": "sa_layer_norm", "mlp_up": "ffn.lin1", "mlp_down": "ffn.lin2", "norm_mlp": "output_layer_norm"},
    ("vocab_transform", "vocab_layer_norm"),
    "vocab_projector.bias",
)


def _reader(names: Names) -> Callable[[dict[str, Any], str], ModelConfig]:
    def read(values: dict[str, Any], where: str) -> ModelConfig:
        wanted = "num_layers", "num_heads", "embed_dim"
        sizes: dict[str, Any] = {field: whole(values, names.sizes[field], where) for field in wanted}
        mlp, typed = whole(values, names.sizes["mlp_size"], where), "token_types" in names.embeddings
        expect(values, where, **{names.sizes["activation"]: ("gelu",)})
        expect(values, where, position_embedding_type=("absolute",), is_decoder=(False,), add_cross_attention=(False,))
        expect(values, where, tie_word_embeddings=(True,), sinusoidal_pos_embds=(False,))
        expect(values, where, problem_type=(None, "single_label_classification", "regression"))
        if names.offset:  # the first position is the one behind padding's
            expect(values, where, pad_token_id=(names.offset - 1,))
        eps = names.eps
        if typed:
            eps = above_zero({"layer_norm_eps": 1e-12} | values, "layer_norm_eps", where)
        classes = values.get("architectures") or ()
        return ModelConfig(
            **sizes,
            seq_len=whole(values, "max_position_embeddings", where) - names.offset,
            vocab_size=whole(values, "vocab_size", where),
            dropout=rate(values, names.sizes["dropout"], where),
            mlp_size=0 if mlp == 4 * sizes["embed_dim"] else mlp,
            norm_eps=eps,
            norm_place="after",
            norm_embedding=True,
            position_offset=names.offset,
            activation="gelu",
            causal=False,
            token_types=whole(values, "type_vocab_size", where) if typed else 0,
            head_bias=any(part in name for name in classes for part in ("ForMaskedLM", "ForPreTraining")),
        )

    return read


def _writer(names: Names) -> Callable[[ModelConfig], dict[str, Any]]:
    def write(config: ModelConfig) -> dict[str, Any]:
        values = {theirs: getattr(config, ours) for ours, theirs in names.sizes.items() if ours != "attention_dropout"}
        values |= {
            names.sizes["mlp_size"]: config.mlp_dim,
            names.sizes["attention_dropout"]: 0.0,
            "max_position_embeddings": config.seq_len + names.offset,
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
            "pad_token_id": names.offset - 1 if names.offset else 0,
        }
        if "token_types" in names.embeddings:
            return values | {"type_vocab_size": config.token_types, "layer_norm_eps": config.norm_eps}
        return values | {"sinusoidal_pos_embds": False}

    return write


def _block_of(names: Names) -> Callable[[ModelConfig], list[Box]]:
    def block(config: ModelConfig) -> list[Box]:
        dim, mlp, parts = config.embed_dim, config.mlp_dim, names.parts
        return [
            *self_attention(names.attention, config),
            *norm(parts["norm_attention"], "norm_attention", dim),
            *linear(parts["mlp_up"], "mlp_up", (dim, mlp), dim, mlp),
            *linear(parts["mlp_down"], "mlp_down", (mlp, dim), mlp, dim),
            *norm(parts["norm_mlp"], "norm_mlp", dim),
        ]

    return block


def _outside_of(names: Names) -> Callable[[ModelConfig], list[Box]]:
    def outside(config: ModelConfig) -> list[Box]:
        rows = {"embedding": config.vocab_size, "positions": config.seq_len + names.offset}
        shapes = {leaf: (rows.get(leaf, config.token_types), config.embed_dim) for leaf in names.embeddings}
        size = (config.vocab_size,)
        return [
            *(Box(names.embeddings[leaf], shape, leaf, shape) for leaf, shape in shapes.items()),
            *norm(names.embedding_norm, "norm_embedding", config.embed_dim),
            *([Box(names.bias, size, "head_bias", size)] if config.head_bias else []),
        ]

    return outside


def _fixed_of(names: Names) -> Callable[[ModelConfig], dict[str, tuple[Any, ...]]]:
    def fixed(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
        plain = ("norm", "norm_bias", "scale_scores", "qkv_bias", "biases", "parallel_mlp", "positions", "tied_head")
        return dense(config) | {
            **defaults(config, *plain, "scale_head", "scale_embedding", "cross_attention"),
            "causal": (False,),
            "norm_place": ("after",),
            "norm_embedding": (True,),
            "norm_eps": (config.norm_eps if "token_types" in names.embeddings else names.eps,),
            "position_offset": (names.offset,),
            "token_types": (config.token_types or 1,) if "token_types" in names.embeddings else (0,),
            "activation": ("gelu",),
            "num_kv_heads": (0, config.num_heads),
            "head_size": (0, config.embed_dim // config.num_heads),
        }

    return fixed


def _transform_of(names: Names) -> Callable[[ModelConfig, int], list[Box]]:
    def transform(config: ModelConfig, classes: int) -> list[Box]:
        dim, (product, last) = config.embed_dim, names.transform
        return [
            *linear(product, "transform/dense", (dim, dim), dim, dim),
            *norm(last, "transform/norm", dim),
        ]

    return transform


def _product(tensor: str, leaf: str, num_out: int = 0) -> Callable[[ModelConfig, int], list[Box]]:
    """A product of the width; num_out: -1 is the classes', 0 the width again."""

    def boxes(config: ModelConfig, classes: int) -> list[Box]:
        dim, out = config.embed_dim, {0: config.embed_dim, -1: classes}.get(num_out, num_out)
        return linear(tensor, leaf, (dim, out), dim, out)

    return boxes


def _pooler_of_roberta(config: ModelConfig, classes: int) -> list[Box]:
    """Its classes are told by a product of their own in that place."""
    return _product("classifier.dense" if classes else "pooler.dense", "pooler")(config, classes)


def _family(
    model_type: str,
    name: str,
    names: Names,
    classes: Mapping[frozenset[str], str],
    heads: Mapping[str, Callable[[ModelConfig, int], list[Box]]],
    **how: Any,
) -> Architecture:
    return Architecture(
        model_type,
        tuple(f"{name}{each}" for each in classes.values()),
        _reader(names),
        _writer(names),
        _block_of(names),
        _fixed_of(names),
        _outside_of(names),
        prefix=f"{model_type}.",
        constants=re.compile(r"embeddings\.position_ids"),
        heads={TRANSFORM: _transform_of(names), **heads},
        class_of={parts: f"{name}{each}" for parts, each in classes.items()},
        **how,
    )


WORDS = frozenset([TRANSFORM])
BERT = _family(
    "bert",
    "Bert",
    BERT_NAMES,
    {
        frozenset([POOLER]): "Model",
        WORDS: "ForMaskedLM",
        WORDS | {POOLER, NEXT_SENTENCE}: "ForPreTraining",
        frozenset([POOLER, CLASSIFIER]): "ForSequenceClassification",
    },
    {
        POOLER: _product("pooler.dense", "pooler"),
        NEXT_SENTENCE: _product("cls.seq_relationship", "next_sentence", 2),
        CLASSIFIER: _product("classifier", "classifier", -1),
    },
    layers="encoder.layer",
    copies=("cls.predictions.decoder.weight",),
    twins={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    beside=re.compile(r"cls\..*|classifier\..*"),
)
ROBERTA = _family(
    "roberta",
    "Roberta",
    ROBERTA_NAMES,
    {
        frozenset([POOLER]): "Model",
        WORDS: "ForMaskedLM",
        frozenset([POOLER, CLASSIFIER]): "ForSequenceClassification",
    },
    {
        POOLER: _pooler_of_roberta,
        CLASSIFIER: _product("classifier.out_proj", "classifier", -1),
    },
    layers="encoder.layer",
    copies=("lm_head.decoder.weight",),
    twins={"lm_head.decoder.bias": "lm_head.bias"},
    beside=re.compile(r"lm_head\..*|classifier\..*"),
    replaced={f"pooler.dense.{part}": f"classifier.dense.{part}" for part in ("weight", "bias")},
)
DISTILBERT = _family(
    "distilbert",
    "DistilBert",
    DISTILBERT_NAMES,
    {frozenset(): "Model", WORDS: "ForMaskedLM"},
    {},
    layers="transformer.layer",
    copies=("vocab_projector.weight",),
    beside=re.compile(r"vocab_.*"),
)
