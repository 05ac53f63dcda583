"""What a run is: the sections of a config. A field carries its bounds, its docstring, which `--help` prints, and
whether a run that goes on may change it.
"""

from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from gptjax.config.fields import FREE, ROUNDING, SAME_CONTENT, Count, Positive, Seed, frozen


def _degree(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError("must be positive, or -1 for the rest; nearest 1")
    return value


def _window(steps: tuple[int, ...]) -> tuple[int, ...]:
    if len(steps) not in (0, 2) or list(steps) != sorted(steps):
        raise ValueError("give first and last step, such as 10,13")
    return steps


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if text and not (host and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError("give an address and a port, such as 0.0.0.0:9400")
    return text


def _conversation(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) > 3:
        raise ValueError("give one field of messages or a transcript, or prompt,reply, or instruction,input,reply")
    return names


Degree = Annotated[int, AfterValidator(_degree)]


@frozen
class ModelConfig:
    """The GPT-3 paper's decoder (arXiv 2005.14165, section 2.1), as the defaults say; what later decoders do otherwise
    is said from `num_kv_heads` on."""

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
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """What is added to a norm's variance."""
    positions: Literal["learned", "rotary"] = "learned"
    """learned embeddings of T positions, or queries and keys turned by where they stand (arXiv 2104.09864)."""
    rotary_base: Annotated[float, Field(gt=1)] = 10_000.0
    """The slowest of rotary's turns takes about 2 pi times so many tokens."""
    activation: Literal["gelu_tanh", "gelu", "relu", "swiglu", "geglu"] = "gelu_tanh"
    """Of the MLP; swiglu and geglu multiply what is activated with a second product (arXiv 2002.05202)."""
    parallel_mlp: Literal["no", "one_norm", "two_norms"] = "no"
    """Whether the MLP reads what attention reads, and both are added at once: through the norm of attention, as in
    Falcon 7B, or one of its own, as in Falcon 40B (arXiv 2311.16867)."""
    tied_head: bool = True
    """Whether the embedding is what scores the vocabulary, too; else the head is a table of its own."""
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
class SourceConfig:
    """Where records come from, whatever they hold."""

    source: Annotated[str, Field(min_length=1), SAME_CONTENT]
    """tfds:NAME, or files, folders and globs with commas between: .jsonl .ndjson .json .csv .tsv .parquet .arrow, each
    also .gz .zst .xz .bz2."""
    format: Annotated[Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"], SAME_CONTENT] = "auto"
    """How files are read; auto goes by their endings."""
    train_split: Annotated[str, Field(min_length=1)] = "train[:95%]"
    """Part to train on, such as train[:95%]; tfds:NAME has other splits, too."""
    eval_split: Annotated[str, Field(min_length=1)] = "train[95%:]"
    """Part to evaluate on."""
    cache_dir: Annotated[str, Field(min_length=1), FREE] = "~/.cache/gptjax"
    """Where built datasets live."""
    tokenizer: Annotated[str, Field(min_length=1), SAME_CONTENT] = "bytes"
    """bytes; sentencepiece:N, a vocabulary of N made of the training text and kept in cache_dir; DIR or gpt2:DIR, a
    folder with a Hugging Face tokenizer (tokenizer.json, or GPT-2's vocab.json and merges.txt, or encoder.json and
    vocab.bpe) or with tokenizer.model alone; or a SentencePiece .model file."""
    seed: Seed = 0
    """Seed of the global shuffle."""
    threads: Annotated[Positive, FREE] = 1
    """Reading and tokenising threads per process; more where the log's data_wait says that steps wait for text."""

    @property
    def made_pieces(self) -> int:
        """N of a tokenizer sentencepiece:N; 0 for one that is there already."""
        kind, _, size = self.tokenizer.partition(":")
        return int(size) if kind == "sentencepiece" else 0


@frozen
class DataConfig(SourceConfig):
    """Where text comes from and how it becomes rows of tokens."""

    source: Annotated[str, Field(min_length=1), SAME_CONTENT] = "stdlib"
    """stdlib (Python's own source), tfds:NAME, or files, folders and globs with commas between: .txt .md .jsonl .ndjson
    .json .csv .tsv .parquet .arrow, each also .gz .zst .xz .bz2."""
    text_field: Annotated[str, Field(min_length=1), SAME_CONTENT] = "text"
    """Field that holds the text in records; a dotted one, such as meta.body, reaches into nested records."""
    max_chars: Positive = 65536
    """Longer documents are stored as consecutive records of this many characters."""
    split_by: Literal["document", "position"] = "document"
    """What those parts hold: whole documents, by a hash of each one's text, or a stretch of every document by position,
    for a text of one document or a few."""
    lanes: Positive = 1
    """Independent packed streams that fill a batch side by side; divides the micro-batch. A
    process reads only the lanes of its rows."""
    fim_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of documents that are learned with their middle last, half of them in each of the orders PSM and SPM, so
    that the model can fill in between two texts (arXiv 2207.14255); three more ids of model.vocab_size. 0 is none."""


@frozen
class DialogueConfig(SourceConfig):
    """Where conversations come from, which fields of a record hold them, and how they become rows of tokens."""

    split_by: ClassVar[str] = "document"
    lanes: ClassVar[int] = 1

    format: Annotated[Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "arrow"], SAME_CONTENT] = "auto"
    """How files are read; auto goes by their endings."""
    tokenizer: Annotated[str, SAME_CONTENT] = ""
    """bytes; DIR or gpt2:DIR, a folder with a Hugging Face tokenizer; or a SentencePiece .model file; empty is that of
    init_from."""
    fields: Annotated[tuple[str, ...], AfterValidator(_conversation), SAME_CONTENT] = ()
    """Fields that hold the conversation: one of messages or of a transcript; prompt,reply; or instruction,input,reply.
    A dotted one, such as instances.0.output, reaches into nested records and lists. Empty takes the first form found:
    messages; conversations; instruction,input,output; prompt,completion; prompt,response; question,answer; chosen."""
    too_long: Literal["cut", "drop"] = "cut"
    """What becomes of a conversation that is longer than the context: its beginning is cut off, or it is left out."""
    packing: bool = True
    """Several conversations to a row, of which none sees another; else one a row, and the rest of it empty."""
    invalid: Literal["refuse", "drop"] = "refuse"
    """What becomes of a record that is no conversation to learn from: the build ends with its place and the reason, or
    the record is left out and counted by reason."""


@frozen
class RankingConfig(DialogueConfig):
    """Where ranked replies come from: prompt, replies, ranks (1 is best, equal ranks are ties), or chosen, rejected and
    perhaps a prompt of their own."""

    max_replies: Annotated[int, Field(ge=2, le=9)] = 2
    """Replies K that a prompt has at most; each of them takes a sequence of the batch, whether it is there or not."""
    too_long: Literal["cut", "drop"] = "cut"
    """What becomes of a prompt with a reply that together are longer than the context: the beginning is cut off, or the
    prompt is left out."""
    invalid: Literal["refuse", "drop"] = "drop"
    """What becomes of a record that is no ranking to learn from: the build ends with its place and the reason, or the
    record is left out and counted by reason."""


@frozen
class PromptConfig(DialogueConfig):
    """Where prompts come from that a policy is to answer, perhaps with an answer to compare its reply with. Of whole
    conversations and of ranked replies the prompt is taken, without what the assistant says at its end."""

    fields: Annotated[tuple[str, ...], AfterValidator(_conversation), SAME_CONTENT] = ()
    """Fields that hold the prompt, as messages, a transcript or text; prompt,answer; or instruction,input,answer. A
    dotted one, such as instances.0.output, reaches into nested records and lists. Empty takes the first form found that
    is not null: messages; conversations; instruction,input; prompt; question; chosen; and the field answer beside it,
    if there is one."""
    max_prompt_tokens: Count = 0
    """Tokens that a prompt has at most, those of the chat format included; 0 is half the context. What is left of the
    context is the reply's."""
    too_long: Literal["cut", "drop"] = "drop"
    """What becomes of a prompt that is longer: its beginning is cut off, or it is left out and counted."""
    invalid: Literal["refuse", "drop"] = "drop"
    """What becomes of a record that has no prompt to answer: the build ends with its place and the reason, or the
    record is left out and counted by reason."""


@frozen
class OptimizerConfig:
    """AdamW, or Muon for the layers, and the schedule in tokens (GPT-3 paper, appendix B)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the momentum of the layers' matrices; embeddings, positions, biases and LayerNorms stay with
    Adam. Its updates have the size of Adam's (arXiv 2502.16982), so that one learning rate serves both."""
    learning_rate: Annotated[float, Field(gt=0)] = 6e-4
    """Peak learning rate."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate after the decay, as a share of the peak."""
    warmup_tokens: Count = 375_000_000
    """Linear warm-up from 0 over these tokens."""
    decay_tokens: Count = 260_000_000_000
    """The cosine ends at this token; constant afterwards. 0 is the end of training, as it is known at the start."""
    b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's first-moment decay."""
    b2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Adam's second-moment decay."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's denominator offset."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay of matrices; biases and LayerNorm parameters have none."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""
    skip_nonfinite: bool = True
    """Leave the state as it is when the loss or the gradient is not finite; counted and shown."""
    skip_spike_sigma: Annotated[float, Field(ge=0)] = 0.0
    """Skip a step whose loss lies this many standard deviations above its running mean; 0 is off."""
    max_bad_steps: Annotated[Count, FREE] = 50
    """Steps in a row without a finite loss and gradient, or left out as spikes, after which the run goes back
    (train.rollbacks) or ends with an error; 0 is no limit. With skip_nonfinite off the first that is not finite counts
    as so many."""


@frozen
class TrainConfig:
    """How long, how much at once, and what happens along the way."""

    batch_size: Positive = 256
    """Sequences per optimizer step after the ramp, over all devices."""
    micro_batch_size: Annotated[Count, ROUNDING] = 0
    """Sequences per gradient-accumulation step, over all devices; 0 means batch_size."""
    total_tokens: Annotated[Positive, FREE] = 300_000_000_000
    """Training ends at this many tokens, if not before."""
    total_steps: Annotated[Count, FREE] = 0
    """It ends after this many steps, if not before; 0 is no limit."""
    epochs: Annotated[float, Field(ge=0), FREE] = 0.0
    """It ends after so many passes over the training split, if not before; 0 is no limit."""
    ramp_start: Count = 0
    """Sequences per step at the start of the linear batch ramp; 0 means batch_size (no ramp)."""
    ramp_tokens: Count = 0
    """Tokens over which the batch ramps."""
    ramp_multiple: Count = 0
    """The ramp grows in multiples of so many sequences; 0 means the micro-batch that the run starts with."""
    seed: Seed = 0
    """Seed of initialisation and dropout."""
    log_interval: Annotated[Positive, FREE] = 10
    """Steps between log records."""
    eval_interval: Annotated[Count, FREE] = 1000
    """Steps between evaluations; 0 is off (the last step evaluates unless eval_batches is 0)."""
    eval_batches: Annotated[int, Field(ge=-1), FREE] = 50
    """Micro-batches per evaluation; -1 is the whole split, 0 is off."""
    sample_interval: Annotated[Count, FREE] = 0
    """Steps between printed samples; 0 is off."""
    sample_prompt: Annotated[str, Field(min_length=1), FREE] = "\n"
    """Text that samples continue."""
    save_interval: Annotated[Count, FREE] = 1000
    """Steps between checkpoints; 0 saves only at the end and on a signal."""
    keep_last: Annotated[Positive, FREE] = 2
    """Newest checkpoints kept."""
    keep_best: Annotated[bool, FREE] = False
    """Save at every evaluation, too, and keep the checkpoint with the lowest loss there: what others take from the
    run."""
    keep_every: Annotated[Count, FREE] = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 is off."""
    local_dir: Annotated[str, FREE] = ""
    """A folder on each host's own disk for checkpoints beside those of the run folder, from which a run goes on where
    all hosts still have theirs; empty is none."""
    local_interval: Annotated[Count, FREE] = 0
    """Steps between saves there."""
    rollbacks: Annotated[Count, FREE] = 2
    """Times that optimizer.max_bad_steps bad steps in a row take a run back to its last checkpoint before them, to pass
    over the rows that led there; the next time they end it. 0 is off."""
    profile_steps: Annotated[tuple[Count, ...], AfterValidator(_window), FREE] = ()
    """First and last step of a profiler trace, such as 10,13; empty is off. A file profile.request in the run folder,
    with a number of steps, has so many traced after the next log record."""
    deterministic: Annotated[bool, ROUNDING] = False
    """On a GPU only kernels that always give the same bits, so that a resumed run is bit-identical there, too."""
    tensorboard: Annotated[bool, FREE] = True
    """Write TensorBoard event files beside the JSON-lines log."""
    prometheus: Annotated[str, AfterValidator(_address), FREE] = ""
    """Address at which the first process has the log's newest numbers for Prometheus, such as 0.0.0.0:9400; empty is
    none."""
    wandb: Annotated[str, FREE] = ""
    """Project of Weights & Biases that is told the log's numbers, too; empty is none."""
    compile_cache: Annotated[str, FREE] = "~/.cache/gptjax/xla"
    """Persistent compilation cache; empty is off."""


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


@frozen
class LayoutConfig:
    """Degrees of the mesh axes; at most one is -1, which takes the devices that are left."""

    replica: Degree = 1
    """Copies of everything on the slow network between slices (TPU) or nodes, each with its part of the batch."""
    pipeline: Degree = 1
    """Stages that the layers are dealt to; needs model.scan_layers."""
    pipeline_rounds: Positive = 1
    """Times that the batch goes round the stages: more rounds, a smaller bubble, more traffic."""
    pipeline_chunks: Count = 0
    """Parts that a micro-batch is cut into on its way through the stages; 0 means one row a device at a time."""
    data: Degree = 1
    """Replicas of the parameters, each with its part of the batch."""
    fsdp: Degree = -1
    """Ways that parameters, gradients and optimizer state are sharded, with the batch."""
    tensor: Degree = 1
    """Ways that heads, MLP and vocabulary are split; must divide num_heads."""
    context: Degree = 1
    """Ways that the sequence is split for attention: a ring for dense layers, a halo for banded ones."""
    sequence_sharding: bool = False
    """Shard the residual stream between blocks over the tensor axis along the sequence."""


LAYOUT_PRESETS = {
    "dp": LayoutConfig(data=-1, fsdp=1),
    "fsdp": LayoutConfig(),
    "tp": LayoutConfig(fsdp=1, tensor=-1),
    "tp_seq": LayoutConfig(fsdp=1, tensor=-1, sequence_sharding=True),
    "context": LayoutConfig(fsdp=1, context=-1),
    "pipeline": LayoutConfig(fsdp=1, pipeline=-1),
}
"""Whole layouts by name, for `--layout NAME`."""


@frozen
class Config:
    """Everything that defines one run: here of pretraining. Other stages have a class of their own, whose sections are
    those that they use."""

    stage: ClassVar[str] = "pretrain"
    unused: ClassVar[tuple[str, ...]] = ()
    """Fields of shared sections that the stage has no use for."""

    name: Annotated[str, Field(min_length=1), FREE]
    """Names the run folder, runs/NAME unless `run` is given."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    layout: Annotated[LayoutConfig, FREE] = field(default_factory=LayoutConfig)
    init_from: str = ""
    """A Hugging Face directory (GPT-2, GPT-Neo) or a run folder whose weights a new run starts from."""
    run: Annotated[str, FREE] = ""
    """Run folder; empty means the first free of runs/NAME, runs/NAME-2, ..."""

    @property
    def separates(self) -> bool:
        """Whether the documents of a row are kept apart."""
        return self.model.separate_documents

    @property
    def adapter(self) -> LoRAConfig | None:
        """The adapters that a model of this config has; None for none."""
        return None

    @property
    def predicts(self) -> bool:
        """Whether the model is asked for tokens; else the head over the vocabulary is not computed."""
        return True

    @property
    def has_reference(self) -> bool:
        """Whether the weights that a run starts from stay beside those that it trains, frozen."""
        return False

    @property
    def row_sequences(self) -> int:
        """Sequences of T tokens that one row of a batch has."""
        return 1

    @property
    def row_tokens(self) -> int:
        """Tokens of one row."""
        return self.row_sequences * self.model.seq_len

    @property
    def updates(self) -> int:
        """Of the parameters in a step, one after another, each of batch_size rows."""
        return 1

    @property
    def step_tokens(self) -> int:
        """Tokens of a step after the ramp."""
        return self.updates * self.train.batch_size * self.row_tokens

    @property
    def micro_batch_size(self) -> int:
        return self.train.micro_batch_size or self.train.batch_size

    @property
    def ramp_multiple(self) -> int:
        return self.train.ramp_multiple or self.micro_batch_size

    @property
    def max_accumulation(self) -> int:
        """Micro-batches per step after the ramp."""
        return self.train.batch_size // self.micro_batch_size


@frozen
class SFTConfig(Config):
    """Supervised fine-tuning on conversations (InstructGPT, arXiv 2203.02155, section 3.5)."""

    stage: ClassVar[str] = "sft"
    unused: ClassVar[tuple[str, ...]] = ("model.separate_documents",)

    data: DialogueConfig  # type: ignore[assignment]
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    @property
    def separates(self) -> bool:
        return True

    @property
    def adapter(self) -> LoRAConfig | None:
        return self.lora if self.lora.rank else None


@frozen
class RankedConfig(Config):
    """What learns from ranked replies. A row is a prompt with all of them."""

    unused: ClassVar[tuple[str, ...]] = (
        "model.separate_documents",
        "data.tokenizer",  # that of init_from: whose replies are ranked reads and writes by it, too
        "data.fields",
        "data.packing",
    )

    data: RankingConfig  # type: ignore[assignment]

    @property
    def row_sequences(self) -> int:
        return self.data.max_replies


@frozen
class RewardConfig(RankedConfig):
    """A reward model of ranked replies (InstructGPT, arXiv 2203.02155, section 3.5)."""

    stage: ClassVar[str] = "reward"
    unused: ClassVar[tuple[str, ...]] = (*RankedConfig.unused, "train.sample_interval", "train.sample_prompt")

    @property
    def predicts(self) -> bool:
        return False


@frozen
class DPOConfig:
    """How far preferences may take a policy from its reference."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Reward of a nat of the log ratio of policy to reference; the smaller, the further the policy goes."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that are taken to be the wrong way round."""


@frozen
class PreferenceConfig(RankedConfig):
    """A policy trained on ranked replies without a reward model (DPO, arXiv 2305.18290), from the weights of init_from,
    which stay beside it as its reference."""

    stage: ClassVar[str] = "preference"

    dpo: DPOConfig = field(default_factory=DPOConfig)

    @property
    def has_reference(self) -> bool:
        return True


@frozen
class RolloutConfig:
    """How a policy draws the replies that it learns from. A step is an iteration: the replies are drawn, judged, and
    learned from, train.batch_size of them at a time."""

    episodes: Positive = 512
    """Replies of an iteration."""
    epochs: Positive = 1
    """Times that each of them is learned from, in another order."""
    max_tokens: Positive = 128
    """Tokens of a reply at most, its end among them."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Divides the logits; what is learned is the policy at this temperature."""
    top_k: Count = 0
    """Draw from the k likeliest tokens alone; 0 is all."""
    slots: Annotated[Positive, FREE] = 32
    """Replies that are drawn side by side."""
    max_gap: Annotated[float, Field(gt=0), FREE] = 0.1
    """Nats by which a token's log-probability may differ, in the mean, between what draws and what learns; a run in
    which they differ by more ends."""


@frozen
class RewardedConfig(Config):
    """A policy that learns from what its own replies are worth, from the weights of init_from, which stay beside it
    as its reference. A row is a reply to a prompt."""

    unused: ClassVar[tuple[str, ...]] = (
        "model.separate_documents",
        "data.tokenizer",  # that of init_from
        "data.packing",
        "train.epochs",  # its length is in iterations: train.total_steps
        "train.ramp_start",
        "train.ramp_tokens",
        "train.ramp_multiple",
    )

    data: PromptConfig  # type: ignore[assignment]
    reward: str = ""
    """The run folder of a reward model, or FILE.py:NAME or MODULE:NAME, a Python function of prompt and reply, and of
    the record's answer if it takes a third argument, that gives a number."""
    gold: Annotated[str, FREE] = ""
    """Such a function whose values are logged as `gold` and not learned from: what a reward model stands for, where
    that can be computed."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    @property
    def has_reference(self) -> bool:
        return True

    @property
    def updates(self) -> int:
        return self.rollout.episodes * self.rollout.epochs // self.train.batch_size

    @property
    def text_tokens(self) -> tuple[int, int]:
        """Tokens of a prompt and of its reply, at most."""
        length = self.model.seq_len
        prompt = self.data.max_prompt_tokens or length // 2
        return prompt, min(self.rollout.max_tokens, length - prompt)


@frozen
class PPOConfig:
    """What rewards are made of, and how far an iteration may go (InstructGPT, arXiv 2203.02155, appendix C)."""

    kl_coef: Annotated[float, Field(ge=0)] = 0.02
    """Reward that a nat of the log ratio of policy to reference costs, at first."""
    kl_target: Annotated[float, Field(ge=0)] = 0.0
    """Nats per reply to which the coefficient is steered (arXiv 1909.08593, section 2.2); 0 leaves it as it is."""
    kl_horizon: Annotated[float, Field(gt=0)] = 10_000.0
    """Episodes over which it follows; scale it to the run."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of a later token's reward."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Weight of later rewards against later values in an advantage (arXiv 1506.02438)."""
    clip: Annotated[float, Field(gt=0)] = 0.2
    """How far from 1 the ratio of a token's probabilities still counts."""
    value_clip: Annotated[float, Field(gt=0)] = 0.2
    """How far from the old one a value still counts, in units of the score."""
    value_learning_rate: Annotated[float, Field(gt=0)] = 9e-6
    """Peak learning rate of the value model; its schedule is the policy's."""
    value_warmup: Count = 0
    """Iterations in which the value model alone learns: advantages by one that foretells nothing lead a policy astray
    (see explained_variance)."""
    missing_end: float | None = -1.0
    """Score of a reply that has no end token; none leaves it the one that it has."""
    unit_reward: bool = True
    """Divide a reward model's scores by their deviation on its held-out replies."""
    whiten_rewards: bool = False
    """Divide the rewards of an iteration by their deviation, around their mean, which stays (arXiv 1909.08593)."""
    ptx_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss on pretraining text (section `ptx`) in every update, PPO-ptx; 0 is none."""
    ptx_rows: Positive = 8
    """Rows of that text beside each reply."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the average of the policy's weights, by the iteration, which is what others load of the run; 0 is none."""


@frozen
class PretrainingConfig(DataConfig):
    """The text that a policy is not to forget, as the data of pretraining; see ppo.ptx_coef."""


@frozen
class PolicyConfig(RewardedConfig):
    """Proximal policy optimisation (PPO, arXiv 1707.06347) with a value model beside the policy."""

    stage: ClassVar[str] = "ppo"
    unused: ClassVar[tuple[str, ...]] = (
        *RewardedConfig.unused,
        "ptx.tokenizer",
        "ptx.eval_split",
        "ptx.lanes",
        "ptx.fim_rate",
    )

    ppo: PPOConfig = field(default_factory=PPOConfig)
    ptx: PretrainingConfig = field(default_factory=PretrainingConfig)


@frozen
class GRPOConfig:
    """Policy optimisation by groups of replies, without a value model (GRPO, arXiv 2402.03300)."""

    group: Annotated[int, Field(ge=2)] = 8
    """Replies to each prompt, which are compared with each other."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.04
    """Weight of the KL to the reference in the loss."""
    clip: Annotated[float, Field(gt=0)] = 0.2
    """How far from 1 the ratio of a token's probabilities still counts."""
    scale_by_std: bool = True
    """Divide a group's advantages by its deviation."""
    missing_end: float | None = -1.0
    """Score of a reply that has no end token; none leaves it the one that it has."""


@frozen
class GroupPolicyConfig(RewardedConfig):
    """A policy that learns which of its own replies to a prompt is better than the others."""

    stage: ClassVar[str] = "grpo"

    grpo: GRPOConfig = field(default_factory=GRPOConfig)


STAGES: dict[str, type[Config]] = {
    each.stage: each for each in (Config, SFTConfig, RewardConfig, PreferenceConfig, PolicyConfig, GroupPolicyConfig)
}
"""The class of each stage's config."""
