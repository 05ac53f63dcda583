"""What a run is: the sections that every stage shares, and the config of pretraining; `stages` has the others'. A
field carries its bounds, its docstring, which `--help` prints, and whether a run that goes on may change it.
"""

from dataclasses import field, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field

from gptjax.config.data import DataConfig
from gptjax.config.fields import FREE, ROUNDING, Count, Positive, Seed, frozen
from gptjax.config.model import LoRAConfig, ModelConfig


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


Degree = Annotated[int, AfterValidator(_degree)]


@frozen
class OptimizerConfig:
    """AdamW, or Muon for the layers, and the schedule in tokens (GPT-3 paper, appendix B)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the momentum of the layers' matrices; embeddings, positions, biases and LayerNorms stay with
    Adam. Its updates have the size of Adam's (arXiv 2502.16982), so that one learning rate serves both."""
    learning_rate: Annotated[float, Field(gt=0)] = 6e-4
    """Peak learning rate."""
    decay: Literal["cosine", "linear", "root"] = "cosine"
    """How the rate falls after the warm-up: to final_ratio of the peak at decay_tokens, or (root) with the square root
    of the tokens, warmup_tokens / tokens, without an end, as in the Transformer of 2017 and T5."""
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
    def models(self) -> dict[str, ModelConfig]:
        """Section -> the models that are trained together."""
        return {"model": self.model}

    def with_models(self, **values: Any) -> Self:
        """The config with other values of some fields in each of its models."""
        changed: dict[str, Any] = {section: replace(model, **values) for section, model in self.models.items()}
        return replace(self, **changed)

    @property
    def starts_from(self) -> str:
        """What the weights are made of that a new run starts with; empty for random ones."""
        return self.init_from

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
