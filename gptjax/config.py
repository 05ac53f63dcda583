"""What a run is: frozen dataclasses, validated. Every field carries its docstring, which `--help` prints.

Nothing here imports JAX, so a wrong config fails before anything is compiled.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from gptjax.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The GPT-3 paper's decoder (arXiv 2005.14165, section 2.1)."""

    num_layers: int
    """Number of blocks L."""
    num_heads: int
    """Attention heads H per layer; must divide embed_dim."""
    embed_dim: int
    """Width D of the residual stream; the MLP is 4 D wide."""
    seq_len: int = 2048
    """Context T in tokens."""
    vocab_size: int = 50257
    """Vocabulary V before padding; at least the tokenizer's size."""
    attention_pattern: tuple[Literal["dense", "banded"], ...] = ("dense",)
    """The unit that repeats over the layers, such as dense,banded; its length divides num_layers."""
    window: int = 256
    """Keys W that a query of a banded layer sees, itself included."""
    dropout: float = 0.0
    """Dropout rate on embeddings and residual branches; 0 for pretraining."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 on GPU and TPU, float32 on CPU. Weights are float32."""
    fp8: bool = False
    """Products of the layers in float8, one scale a tensor from the tensor itself (arXiv 2209.05433): e4m3 forward,
    e5m2 gradients. Embedding, head and attention stay in the compute dtype; CPUs emulate it."""
    separate_documents: bool = False
    """A token attends only within its own document; GPT-3 lets it see the whole packed row."""
    attention: Literal["auto", "blockwise", "cudnn", "splash", "reference"] = "auto"
    """Attention backend; auto picks by device and prints its choice."""
    scale_scores: bool = True
    """Divide attention scores by sqrt(head_dim); GPT-Neo does not."""
    qkv_bias: bool = True
    """Biases on queries, keys and values; GPT-Neo has none."""
    scan_layers: bool = True
    """Scan over the pattern units (compile time independent of depth) or unroll them."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but the matrix products, or whole units."""
    loss_chunk: int = 256
    """Positions per sequence whose logits are in memory at once."""

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return 4 * self.embed_dim

    @property
    def padded_vocab_size(self) -> int:
        """V rounded up to a multiple of 128, the lane width of TPUs and a tile of tensor cores."""
        return -(-self.vocab_size // 128) * 128

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The attention kind of each of the L layers."""
        return self.attention_pattern * (self.num_layers // len(self.attention_pattern))


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    source: str = "stdlib"
    """stdlib (Python's own source), a file or glob of .txt .jsonl .parquet, or tfds:NAME."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and TFDS records."""
    max_chars: int = 65536
    """Longer documents are stored as consecutive records of this many characters."""
    train_split: str = "train[:95%]"
    """TFDS split to train on."""
    eval_split: str = "train[95%:]"
    """TFDS split to evaluate on."""
    cache_dir: str = "~/.cache/gptjax"
    """Where built datasets live."""
    tokenizer: str = "bytes"
    """bytes, gpt2:DIR (vocab.json and merges.txt, or GPT-2's encoder.json and vocab.bpe), or a SentencePiece .model."""
    seed: int = 0
    """Seed of the global shuffle."""
    lanes: int = 1
    """Independent packed streams that fill a batch side by side; divides the micro-batch. A
    process reads only the lanes of its rows."""
    threads: int = 2
    """Reading and tokenising threads per process."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the layers, and the schedule in tokens (GPT-3 paper, appendix B)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the momentum of the layers' matrices; embeddings, positions, biases and LayerNorms stay with
    Adam. Its updates have the size of Adam's (arXiv 2502.16982), so that one learning rate serves both."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    final_ratio: float = 0.1
    """Learning rate after the decay, as a share of the peak."""
    warmup_tokens: int = 375_000_000
    """Linear warm-up from 0 over these tokens."""
    decay_tokens: int = 260_000_000_000
    """The cosine ends at this token; constant afterwards."""
    b1: float = 0.9
    """Adam's first-moment decay."""
    b2: float = 0.95
    """Adam's second-moment decay."""
    eps: float = 1e-8
    """Adam's denominator offset."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; biases and LayerNorm parameters have none."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    skip_nonfinite: bool = True
    """Leave the state as it is when the loss or the gradient is not finite; counted and shown."""
    skip_spike_sigma: float = 0.0
    """Skip a step whose loss lies this many standard deviations above its running mean; 0 is off."""
    max_bad_steps: int = 50
    """Steps in a row without a finite loss and gradient, or left out as spikes, that end the run with an error; 0 is
    no limit. With skip_nonfinite off the first that is not finite ends it."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and what happens along the way."""

    batch_size: int = 256
    """Sequences per optimizer step after the ramp, over all devices."""
    micro_batch_size: int = 0
    """Sequences per gradient-accumulation step, over all devices; 0 means batch_size."""
    total_tokens: int = 300_000_000_000
    """Training ends at this many tokens."""
    ramp_start: int = 0
    """Sequences per step at the start of the linear batch ramp; 0 means batch_size (no ramp)."""
    ramp_tokens: int = 0
    """Tokens over which the batch ramps."""
    seed: int = 0
    """Seed of initialisation and dropout."""
    log_interval: int = 10
    """Steps between log records."""
    eval_interval: int = 1000
    """Steps between evaluations; 0 is off (the last step evaluates unless eval_batches is 0)."""
    eval_batches: int = 50
    """Micro-batches per evaluation; -1 is the whole split, 0 is off."""
    sample_interval: int = 0
    """Steps between printed samples; 0 is off."""
    sample_prompt: str = "\n"
    """Text that samples continue."""
    save_interval: int = 1000
    """Steps between checkpoints; 0 saves only at the end and on a signal."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 is off."""
    profile_steps: tuple[int, ...] = ()
    """First and last step of a profiler trace, such as 10,13; empty is off."""
    deterministic: bool = False
    """On a GPU only kernels that always give the same bits, so that a resumed run is bit-identical there, too."""
    tensorboard: bool = True
    """Write TensorBoard event files beside the JSON-lines log."""
    compile_cache: str = "~/.cache/gptjax/xla"
    """Persistent compilation cache; empty is off."""


@dataclass(frozen=True)
class LayoutConfig:
    """Degrees of the mesh axes; at most one is -1, which takes the devices that are left."""

    replica: int = 1
    """Copies of everything on the slow network between slices (TPU) or nodes, each with its part of the batch."""
    pipeline: int = 1
    """Stages that the layers are dealt to; needs model.scan_layers."""
    pipeline_rounds: int = 1
    """Times that the batch goes round the stages: more rounds, a smaller bubble, more traffic."""
    pipeline_chunks: int = 0
    """Parts that a micro-batch is cut into on its way through the stages; 0 means one row a device at a time."""
    data: int = 1
    """Replicas of the parameters, each with its part of the batch."""
    fsdp: int = -1
    """Ways that parameters, gradients and optimizer state are sharded, with the batch."""
    tensor: int = 1
    """Ways that heads, MLP and vocabulary are split; must divide num_heads."""
    context: int = 1
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


@dataclass(frozen=True)
class Config:
    """Everything that defines one run."""

    name: str
    """Names the run folder, runs/NAME unless `run` is given."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    init_from: str = ""
    """A Hugging Face directory (GPT-2, GPT-Neo) or a run folder whose weights a new run starts from."""
    run: str = ""
    """Run folder; empty means the first free of runs/NAME, runs/NAME-2, ..."""

    @property
    def micro_batch_size(self) -> int:
        return self.train.micro_batch_size or self.train.batch_size

    @property
    def max_accumulation(self) -> int:
        """Micro-batches per step after the ramp."""
        return self.train.batch_size // self.micro_batch_size


def get(config: Config, dotted: str) -> Any:
    """The value of a leaf field by its dotted name."""
    node: Any = config
    for part in dotted.split("."):
        node = getattr(node, part)
    return node


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """The inverse of `to_json`; raises UserError where the fields are not this version's."""

    def build(cls: type, values: dict[str, Any], prefix: str) -> Any:
        hints = typing.get_type_hints(cls)
        if unknown := values.keys() - hints.keys():
            raise UserError(f"saved config: unknown field {prefix}{sorted(unknown)[0]}; written by another version")
        built = {
            name: build(hints[name], value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else tuple(value)
            if isinstance(value, list)
            else value
            for name, value in values.items()
        }
        return cls(**built)

    return build(Config, json.loads(text), "")


def nearest_divisor(total: int, wanted: int) -> int:
    """The divisor of `total` closest to `wanted`."""
    return min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - wanted))


def validate(config: Config) -> Config:
    """Return the config, or raise UserError that names field, value and the nearest right one."""
    model, train = config.model, config.train
    positive = "model.num_layers model.num_heads model.embed_dim model.seq_len model.vocab_size model.loss_chunk"
    positive += " layout.pipeline_rounds"
    positive += " data.lanes data.max_chars data.threads train.batch_size train.total_tokens train.log_interval"
    positive += " train.keep_last optimizer.learning_rate optimizer.clip_norm"
    for name in positive.split():
        if get(config, name) <= 0:
            raise UserError(f"{name} = {get(config, name)}: must be positive; nearest 1")
    at_least_zero = "optimizer.warmup_tokens optimizer.decay_tokens optimizer.weight_decay train.micro_batch_size"
    at_least_zero += " train.ramp_start train.ramp_tokens train.eval_interval train.save_interval train.keep_every"
    at_least_zero += " train.sample_interval optimizer.skip_spike_sigma optimizer.max_bad_steps layout.pipeline_chunks"
    for name in at_least_zero.split():
        if get(config, name) < 0:
            raise UserError(f"{name} = {get(config, name)}: must not be negative; nearest 0")
    for name in ("data.seed", "train.seed"):
        if not 0 <= get(config, name) < 2**32:
            raise UserError(f"{name} = {get(config, name)}: must lie in 0..4294967295; nearest 0")
    if not 0 <= model.dropout < 1:
        raise UserError(
            f"model.dropout = {model.dropout}: must lie in [0, 1); nearest {max(0, min(model.dropout, 0.9))}"
        )
    if model.embed_dim % model.num_heads:
        near = nearest_divisor(model.embed_dim, model.num_heads)
        raise UserError(
            f"model.num_heads = {model.num_heads}: does not divide model.embed_dim = {model.embed_dim}; nearest {near}"
        )
    if not model.attention_pattern:
        raise UserError("model.attention_pattern is empty; nearest dense")
    unit = len(model.attention_pattern)
    if model.num_layers % unit:
        near = max(unit, round(model.num_layers / unit) * unit)
        pattern = ",".join(model.attention_pattern)
        raise UserError(
            f"model.num_layers = {model.num_layers}: not a multiple of the pattern {pattern} ({unit}); nearest {near}"
        )
    if not 1 <= model.window <= model.seq_len and "banded" in model.attention_pattern:
        near = min(max(model.window, 1), model.seq_len)
        raise UserError(
            f"model.window = {model.window}: must lie in 1..model.seq_len = {model.seq_len}; nearest {near}"
        )
    micro = config.micro_batch_size
    if train.batch_size % micro:
        near = nearest_divisor(train.batch_size, micro)
        raise UserError(
            f"train.micro_batch_size = {micro}: does not divide train.batch_size = {train.batch_size}; nearest {near}"
        )
    if train.ramp_start and (train.ramp_start % micro or train.ramp_start > train.batch_size):
        near = min(max(micro, round(train.ramp_start / micro) * micro), train.batch_size)
        raise UserError(
            f"train.ramp_start = {train.ramp_start}: must be a multiple of the micro-batch {micro}, at most "
            f"train.batch_size = {train.batch_size}; nearest {near}"
        )
    if micro % config.data.lanes:
        near = nearest_divisor(micro, config.data.lanes)
        raise UserError(
            f"data.lanes = {config.data.lanes}: does not divide the micro-batch of {micro} sequences; nearest {near}"
        )
    if len(train.profile_steps) not in (0, 2):
        raise UserError(f"train.profile_steps = {train.profile_steps}: give first and last step, such as 10,13")
    return config
