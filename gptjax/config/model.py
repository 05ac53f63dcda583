"""What a model is: its block as data, and the adapters beside it."""

from typing import Annotated, Literal

from pydantic import Field

from gptjax.config.fields import ROUNDING, Count, Positive, frozen


@frozen
class ModelConfig:
    """The GPT-3 paper's decoder (arXiv 2005.14165, section 2.1), as the defaults say; what others do otherwise, later
    decoders, encoders and the two sides of an encoder-decoder, is said from `num_kv_heads` on."""

    num_layers: Positive
    """Number of blocks L."""
    num_heads: Positive
    """Attention heads H per layer; must divide embed_dim unless head_size is given."""
    embed_dim: Positive
    """Width D of the residual stream."""
    seq_len: Positive = 2048
    """Context T in tokens."""
    vocab_size: Positive = 50257
    """Vocabulary V before padding; at least what the tokenizer can make of a text. Ids beyond it are never sampled."""
    attention_pattern: Annotated[tuple[Literal["dense", "banded"], ...], Field(min_length=1)] = ("dense",)
    """The unit that repeats over the layers, such as dense,banded; its length divides num_layers."""
    window: Positive = 256
    """Keys W that a query of a banded layer sees, itself included."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout rate on embeddings and residual branches; 0 for pretraining."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 on GPU and TPU, float32 on CPU. Weights are float32."""
    fp8: bool = False
    """Products of the layers in float8, one scale a tensor from the tensor itself (arXiv 2209.05433): e4m3 forward,
    e5m2 gradients. Embedding, head and attention stay in the compute dtype; CPUs emulate it."""
    separate_documents: bool = False
    """A token attends only within its own document; GPT-3 lets it see the whole packed row."""
    attention: Annotated[Literal["auto", "blockwise", "cudnn", "splash", "reference"], ROUNDING] = "auto"
    """Attention backend; auto picks by device and prints its choice."""
    scale_scores: bool = True
    """Divide attention scores by sqrt(head_dim); GPT-Neo does not."""
    qkv_bias: bool = True
    """Biases on queries, keys and values; GPT-Neo has none."""
    biases: bool = True
    """Biases on what attention and the MLP give; LLaMA has none."""
    num_kv_heads: Count = 0
    """Heads of keys and values, each shared by H / num_kv_heads heads of queries (arXiv 2305.13245); 0 is H."""
    head_size: Count = 0
    """Width K of a head; 0 is D / H."""
    mlp_size: Count = 0
    """Width F of the MLP; 0 is 4 D."""
    norm: Literal["layer", "rms"] = "layer"
    """layer has mean 0 and a bias (LayerNorm); rms divides by the root of the mean square alone (arXiv 1910.07467)."""
    norm_bias: bool = True
    """Whether a LayerNorm has its bias."""
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """What is added to a norm's variance."""
    norm_place: Literal["before", "after"] = "before"
    """before what attention and the MLP read, and once at the end (GPT-2); or after what they add, as in the
    Transformer of 2017 and in BERT."""
    norm_embedding: bool = False
    """Whether the sum of the embeddings goes through a norm, as in BERT and BART."""
    positions: Literal["learned", "sinusoidal", "rotary", "relative", "none"] = "learned"
    """learned embeddings of T positions; waves that are added in their place (arXiv 1706.03762, section 3.5); queries
    and keys turned by where they stand (rotary, arXiv 2104.09864); a number for each head and distance that is added to
    the scores (relative, T5, arXiv 1910.10683); or nothing that says where a token stands."""
    position_offset: Count = 0
    """Rows of the learned table before that of the first position; RoBERTa and BART have 2."""
    position_buckets: Annotated[int, Field(ge=4, multiple_of=2)] = 32
    """Kinds of distance that relative positions tell apart."""
    position_reach: Positive = 128
    """Distance from which on they tell none apart."""
    rotary_base: Annotated[float, Field(gt=1)] = 10_000.0
    """The slowest of rotary's turns takes about 2 pi times so many tokens."""
    activation: Literal["gelu_tanh", "gelu", "relu", "swiglu", "geglu"] = "gelu_tanh"
    """Of the MLP; swiglu and geglu multiply what is activated with a second product (arXiv 2002.05202)."""
    parallel_mlp: Literal["no", "one_norm", "two_norms"] = "no"
    """Whether the MLP reads what attention reads, and both are added at once: through the norm of attention, as in
    Falcon 7B, or one of its own, as in Falcon 40B (arXiv 2311.16867)."""
    causal: bool = True
    """Whether a token sees those before it alone; an encoder's sees all of its text."""
    cross_attention: bool = False
    """Whether each layer looks at what an encoder made of its text, too."""
    token_types: Count = 0
    """Embeddings of the part of a row that a token belongs to: BERT has 2, for a first and a second sentence."""
    scale_embedding: bool = False
    """Multiply the embeddings of tokens by sqrt(D), as in the Transformer of 2017."""
    tied_head: bool = True
    """Whether the embedding is what scores the vocabulary, too; else the head is a table of its own."""
    head_bias: bool = False
    """Whether the scores of the vocabulary have a bias, as in BERT and BART."""
    scale_head: bool = False
    """Multiply what scores the vocabulary by 1 / sqrt(D), as T5 does where the embedding is its head."""
    scan_layers: bool = True
    """Scan over the pattern units (compile time independent of depth) or unroll them."""
    remat: Annotated[Literal["none", "dots", "full"], ROUNDING] = "none"
    """What the backward pass recomputes: nothing, all but the matrix products, or whole units."""
    loss_chunk: Annotated[Positive, ROUNDING] = 256
    """Positions per sequence whose logits are in memory at once."""

    @property
    def head_dim(self) -> int:
        """Width K of a head."""
        return self.head_size or self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Width F of the MLP."""
        return self.mlp_size or 4 * self.embed_dim

    @property
    def gated(self) -> bool:
        """Whether two products go into the MLP's activation."""
        return self.activation in ("swiglu", "geglu")

    @property
    def padded_vocab_size(self) -> int:
        """V rounded up to a multiple of 128, the lane width of TPUs and a tile of tensor cores."""
        return -(-self.vocab_size // 128) * 128

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The attention kind of each of the L layers."""
        return self.attention_pattern * (self.num_layers // len(self.attention_pattern))


@frozen
class LoRAConfig:
    """Low-rank adapters beside the layers' matrices (LoRA, arXiv 2106.09685)."""

    rank: Count = 0
    """Rank of each adapter, which alone are trained then; 0 trains all parameters."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """What an adapter adds is scaled by alpha / rank."""
    matrices: Annotated[
        tuple[Literal["qkv", "projection", "mlp_up", "mlp_down", "embedding"], ...], Field(min_length=1)
    ] = ("qkv", "projection", "mlp_up", "mlp_down", "embedding")
    """Which matrices have one. Queries, keys and values are one; the embedding's is what chat tokens are learned by."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
