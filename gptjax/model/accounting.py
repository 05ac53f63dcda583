"""Exact parameter and FLOP counts, without the padding that the hardware likes."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from gptjax.config import LoRAConfig, ModelConfig

MATRICES = ("qkv", "projection", "mlp_up", "mlp_down")


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Width in and out of each of a layer's matrices; those that read the same (queries, keys and values; an MLP's
    gate and what it gates) are one. Of GPT-3 they have 12 D² numbers."""
    dim, heads, mlp = config.embed_dim, config.num_heads * config.head_dim, config.mlp_dim
    keys = config.kv_heads * config.head_dim
    sides = (dim, heads + 2 * keys), (heads, dim), (dim, (1 + config.gated) * mlp), (mlp, dim)
    found = dict(zip(MATRICES, sides, strict=True))
    return found | ({"cross_query": (dim, heads), "cross_projection": (heads, dim)} if config.cross_attention else {})


def memory_matrix(config: ModelConfig) -> tuple[int, int]:
    """Width in and out of what gives the keys and values of a text that a layer looks at, each of whose tokens goes
    through it once; (0, 0) without cross-attention."""
    return (config.embed_dim, 2 * config.num_heads * config.head_dim) if config.cross_attention else (0, 0)


def layer_weights(config: ModelConfig) -> int:
    """Numbers in a layer's matrices that every token of its own text goes through."""
    return sum(inner * outer for inner, outer in matrices(config).values())


def num_params(config: ModelConfig) -> int:
    """N, for GPT-3 12 L D² + 13 L D + (V + T) D + 2 D: weights, biases and two norms per layer, the tied embedding, the
    learned positions and the final norm; 174,604,259,328 for 175B. An RMSNorm has one vector, a LayerNorm two; rotary
    positions and waves have no numbers; a head of its own has V D."""
    tables = config.vocab_size * config.embed_dim * (1 if config.tied_head else 2)
    return stack_params(config) + tables + config.head_bias * config.vocab_size


def stack_params(config: ModelConfig) -> int:
    """Those of them that are of no vocabulary: all that an encoder has which reads by a decoder's embedding."""
    dim, sides, memory = config.embed_dim, matrices(config), memory_matrix(config)
    of_norm = dim * (2 if config.norm == "layer" and config.norm_bias else 1)
    from_x = ("qkv", "cross_query")
    vectors = sum(sides[name][1] for name in sides if name not in from_x) * config.biases
    vectors += (sum(sides[name][1] for name in sides if name in from_x) + memory[1]) * config.qkv_bias
    vectors += ((1 if config.parallel_mlp == "one_norm" else 2) + config.cross_attention) * of_norm
    once = ((config.norm_place == "before") + config.norm_embedding) * of_norm + config.token_types * dim
    if config.positions == "learned":
        once += (config.seq_len + config.position_offset) * dim
    if config.positions == "relative":
        once += config.position_buckets * config.num_heads
    return config.num_layers * (layer_weights(config) + memory[0] * memory[1] + vectors) + once


def adapter_params(config: ModelConfig, lora: LoRAConfig | None) -> dict[str, int]:
    """Matrix -> numbers in its adapters, r (in + out) in each layer, r (V + D) for the embedding; none without."""
    if lora is None:
        return {}
    layers = {name: config.num_layers * sum(sides) for name, sides in matrices(config).items()}
    sizes = layers | {"embedding": config.vocab_size + config.embed_dim}
    return {name: lora.rank * size for name, size in sizes.items() if name in lora.matrices}


def scalar_params(config: ModelConfig) -> int:
    """D + 1: the scalar head of a model that does not predict."""
    return config.embed_dim + 1


def head_params(config: ModelConfig, names: Collection[str], classes: int = 0) -> int:
    """Numbers in an encoder's heads (see `heads`): D² + D in a product of the width, a norm's in the transform, D + 1
    for each class."""
    dim = config.embed_dim
    of_norm = dim * (2 if config.norm == "layer" and config.norm_bias else 1)
    square = dim * dim + dim
    sizes = {"transform": square + of_norm, "pooler": square, "next_sentence": 2 * (dim + 1)}
    sizes["classifier"] = classes * (dim + 1)
    return sum(sizes[name] for name in names)


def mean_keys(kind: str, seq_len: int, window: int, causal: bool = True) -> float:
    """Keys that a query sees, averaged over positions: (T+1)/2 dense, W - W(W-1)/(2T) banded; T of an encoder's."""
    if not causal:
        return seq_len
    if kind == "dense" or window >= seq_len:
        return (seq_len + 1) / 2
    return window - window * (window - 1) / (2 * seq_len)


def cache_bytes(config: ModelConfig, rows: int, capacity: int, itemsize: int) -> int:
    """Of keys and values of so many texts of up to `capacity` tokens: 2 K for each of their heads and each token that a
    layer keeps, all of them where it is dense, the last W where it is banded."""
    kept = (min(config.window, capacity) if kind == "banded" else capacity for kind in config.layer_kinds)
    return 2 * rows * config.kv_heads * config.head_dim * sum(kept) * itemsize


def train_flops_per_token(config: ModelConfig, lora: LoRAConfig | None = None, predicts: bool = True) -> float:
    """Model FLOPs of forward and backward per token; see Reading."""
    return Reading(config, lora=lora, predicts=predicts).flops_per_token


@dataclass(frozen=True)
class Reading:
    """One model that reads rows."""

    model: ModelConfig
    name: str = ""
    """Where its parameters stand in the tree of a stage, such as reference; empty for the root."""
    sequences: int = 1
    """Of model.seq_len tokens, which it reads for each row."""
    trained: bool = True
    """Forward and backward; else forward alone."""
    lora: LoRAConfig | None = None
    predicts: bool = True
    """Whether it is asked for tokens; else the head over the vocabulary is not computed."""
    own_table: bool = True
    """Whether it reads by an embedding of its own; an encoder beside a decoder reads by the decoder's."""
    places: int = 0
    """M: hidden tokens of a sequence, which alone go through `transform` and are scored, where it does not predict."""
    pooled: bool = False
    """Whether the first token goes through `pooler`."""
    memory_length: int = 0
    """S: tokens of the text that each layer looks at by cross-attention."""

    @property
    def flops(self) -> float:
        """For a row."""
        return self.sequences * self.model.seq_len * self.flops_per_token

    @property
    def scored(self) -> int:
        """Tokens of a sequence that are scored against the vocabulary."""
        return self.model.seq_len if self.predicts else self.places

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs, counting causality and the band exactly.

        For GPT-3 6 (12 L D² + V D) + 12 D sum over layers of mean_keys; rematerialisation and padding do not count.
        Where adapters are trained, of P numbers in all layers, 4 (12 L D² + V D) + 6 P in place of the first term:
        frozen matrices are multiplied going forward and for the gradient of what went in, not for one of their own. 6 V
        D again with an adapter for the embedding, whose gradient is that of the whole table. Attention has no weights,
        and costs what it did. A model that does not predict, such as a reward model, has no term in V D. One that
        is asked for hidden tokens has V D and the D² of its transform M / T times, and D² of a pooler once a row; none
        of the last few numbers is counted. Forward alone is a third of what is trained whole.
        """
        c, (layer, head, adapter) = self.model, self.products_per_weight
        weights = layer * c.num_layers * layer_weights(c) + head * c.vocab_size * c.embed_dim * (
            self.scored / c.seq_len
        )
        weights += head * c.embed_dim**2 * (self.places + self.pooled) / c.seq_len
        keys = sum(mean_keys(kind, c.seq_len, c.window, c.causal) for kind in c.layer_kinds)
        keys += c.num_layers * self.memory_length * c.cross_attention
        memory = layer * c.num_layers * math.prod(memory_matrix(c)) * self.memory_length / c.seq_len
        adapters = sum(size for name, size in adapter_params(c, self.lora).items() if name in MATRICES)
        return weights + memory + adapter * adapters + self.products_per_key * c.num_heads * c.head_dim * keys

    @property
    def products_per_weight(self) -> tuple[int, int, int]:
        """FLOPs per token and number of a layer's matrix, of the head's and of an adapter's: 2 forward, 2 for the
        gradient of what goes in, 2 for its own where it has one; of the head where it is computed."""
        if not self.trained:
            return 2, 2, 2
        return *((4, 6 if "embedding" in self.lora.matrices else 4) if self.lora else (6, 6)), 6

    @property
    def products_per_key(self) -> int:
        """FLOPs per token, key that it sees, and channel."""
        return 12 if self.trained else 4


def train_flops_per_token_palm(config: ModelConfig) -> float:
    """The PaLM and Megatron convention, for comparison with older papers: every layer attends to all T keys."""
    weights = config.num_layers * layer_weights(config) + config.vocab_size * config.embed_dim
    return 6 * weights + 12 * config.num_heads * config.head_dim * config.num_layers * config.seq_len


def train_flops_per_token_6n(config: ModelConfig) -> float:
    """6 N + 12 L T D, which nanoGPT and llm.c count by (N with the embeddings; all T keys)."""
    return 6 * num_params(config) + 12 * config.num_layers * config.seq_len * config.num_heads * config.head_dim
