"""What a run is: the sections of a config. A field carries its bounds, its docstring, which `--help` prints, and
whether a run that goes on may change it.
"""

from dataclasses import field, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field

from gptjax.config.data import (
    DataConfig,
    DialogueConfig,
    LabelledConfig,
    PairConfig,
    PromptConfig,
    RankingConfig,
    WindowConfig,
)
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


@frozen
class MaskingConfig:
    """Which tokens of a text are hidden, and whether sentences are to be told apart (BERT, arXiv 1810.04805)."""

    rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are asked for. Of these 80% are replaced by [MASK], 10% by a random one, 10% stay."""
    unit: Literal["tokens", "words", "spans"] = "tokens"
    """What is hidden as one: tokens, whole words, or spans of words of about 4 words (SpanBERT, arXiv 1907.10529)."""
    next_sentence: bool = True
    """Rows of two texts, [CLS] A [SEP] B [SEP], and the question whether B follows A, as it does in half of them; else
    rows are filled with texts (RoBERTa, arXiv 1907.11692)."""


@frozen
class DistillConfig:
    """What a small model learns from a large one (DistilBERT, arXiv 1910.01108)."""

    teacher: str = ""
    """The run folder or Hugging Face directory of a masked model with the same vocabulary and width, every so many of
    whose layers a run begins with that has no init_from; empty is none."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Divides the scores of both before they are compared."""
    soft_weight: Annotated[float, Field(ge=0)] = 5.0
    """Of the cross-entropy to the teacher's probabilities, times temperature squared."""
    masked_weight: Annotated[float, Field(ge=0)] = 2.0
    """Of the masked tokens' own loss."""
    cosine_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of 1 - the cosine between the last hidden states of both."""


OF_TEXT = ("model.separate_documents", "data.lanes", "data.fim_rate", "train.sample_interval", "train.sample_prompt")
OF_EXAMPLES = ("model.separate_documents", "data.packing", "train.sample_interval", "train.sample_prompt")


@frozen
class MaskedConfig(Config):
    """An encoder that learns the words which are hidden from it, and which sentences follow each other."""

    stage: ClassVar[str] = "masked"
    unused: ClassVar[tuple[str, ...]] = OF_TEXT

    data: WindowConfig = field(default_factory=WindowConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    @property
    def separates(self) -> bool:
        return True

    @property
    def predicts(self) -> bool:
        """Its stage asks for hidden tokens alone, by a head of its own."""
        return False

    @property
    def starts_from(self) -> str:
        return self.init_from or self.distill.teacher


@frozen
class LabelsConfig:
    """What is told of a text."""

    names: tuple[str, ...] = ("0", "1")
    """The values that the label field has, one a class; empty for a number (regression)."""


@frozen
class ClassifyConfig(Config):
    """An encoder that tells classes of texts, or a number, by what it makes of the first token."""

    stage: ClassVar[str] = "classify"
    unused: ClassVar[tuple[str, ...]] = OF_EXAMPLES

    data: LabelledConfig  # type: ignore[assignment]
    labels: LabelsConfig = field(default_factory=LabelsConfig)

    @property
    def separates(self) -> bool:
        return True

    @property
    def predicts(self) -> bool:
        return False


@frozen
class EncoderDecoderConfig(Config):
    """A decoder, the section model, that looks at what an encoder made of a text."""

    encoder: ModelConfig = field(kw_only=True)
    start_id: Annotated[int, Field(ge=-1)] = -1
    """The id that a text which is written begins with, and no part of it: T5's is its padding, 0, BART's its end, 2;
    -1 is the end of text."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        return {"model": self.model, "encoder": self.encoder}

    @property
    def separates(self) -> bool:
        return True

    @property
    def row_tokens(self) -> int:
        return self.encoder.seq_len + self.model.seq_len


@frozen
class NoiseConfig:
    """What becomes of a text that is to be restored."""

    kind: Literal["spans", "ul2", "infill"] = "spans"
    """spans of tokens become sentinels (T5, arXiv 1910.10683); ul2 mixes short, long and many spans and the end of the
    text (arXiv 2205.05131); infill puts one mask for each span and shuffles sentences (BART, arXiv 1910.13461)."""
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that is taken out; of ul2 that of its short spans. BART has 0.3."""
    mean_span: Annotated[float, Field(ge=1)] = 3.0
    """Tokens of a span in the mean; of ul2 that of its short spans."""


@frozen
class DenoiseConfig(EncoderDecoderConfig):
    """An encoder-decoder that restores text."""

    stage: ClassVar[str] = "denoise"
    unused: ClassVar[tuple[str, ...]] = OF_TEXT

    data: WindowConfig = field(default_factory=WindowConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)


@frozen
class WritingConfig:
    """How the second text of a pair is learned, and written where it is compared."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a target's probability that is spread over the vocabulary; the Transformer of 2017 has 0.1."""
    beams: Positive = 1
    """Of the beam search that writes the texts of an evaluation; 1 takes the likeliest token each time."""
    length_penalty: float = 1.0
    """A text's log-probability is divided by its length to this power before texts are compared."""


@frozen
class Seq2SeqConfig(EncoderDecoderConfig):
    """An encoder-decoder that writes the second text of a pair for the first: translations, summaries."""

    stage: ClassVar[str] = "seq2seq"
    unused: ClassVar[tuple[str, ...]] = OF_EXAMPLES

    data: PairConfig  # type: ignore[assignment]
    writing: WritingConfig = field(default_factory=WritingConfig)


STAGES: dict[str, type[Config]] = {
    each.stage: each
    for each in (
        Config,
        SFTConfig,
        RewardConfig,
        PreferenceConfig,
        PolicyConfig,
        GroupPolicyConfig,
        MaskedConfig,
        ClassifyConfig,
        DenoiseConfig,
        Seq2SeqConfig,
    )
}
"""The class of each stage's config."""
