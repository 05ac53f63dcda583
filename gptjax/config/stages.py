"""What the stages after pretraining, and those of encoders, add to a config: a class each, whose sections are those
that it uses. `STAGES` has all by name.
"""

from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gptjax.config.data import (
    DataConfig,
    DialogueConfig,
    LabelledConfig,
    PairConfig,
    PromptConfig,
    RankingConfig,
    WindowConfig,
)
from gptjax.config.fields import FREE, Count, Positive, frozen
from gptjax.config.model import LoRAConfig, ModelConfig
from gptjax.config.schema import Config

ENCODER = "encoder"
"""The section of a second model, and where its parameters stand."""


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
        "ptx.later_weights",
        "ptx.max_epochs",
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


OF_TEXT = (
    "model.separate_documents",
    "data.lanes",
    "data.fim_rate",
    "data.later_weights",
    "data.max_epochs",
    "data.cache_tokens",
    "train.sample_interval",
    "train.sample_prompt",
)
OF_EXAMPLES = ("model.separate_documents", "data.packing", "train.sample_interval", "train.sample_prompt")


@frozen
class EncoderConfig(Config):
    """An encoder, whose stage asks of it what its own heads can tell."""

    @property
    def separates(self) -> bool:
        return True

    @property
    def predicts(self) -> bool:
        return False


@frozen
class MaskedConfig(EncoderConfig):
    """An encoder that learns the words which are hidden from it, and which sentences follow each other."""

    stage: ClassVar[str] = "masked"
    unused: ClassVar[tuple[str, ...]] = OF_TEXT

    data: WindowConfig = field(default_factory=WindowConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    @property
    def starts_from(self) -> str:
        return self.init_from or self.distill.teacher


@frozen
class LabelsConfig:
    """What is told of a text."""

    names: tuple[str, ...] = ("0", "1")
    """The values that the label field has, one a class; empty for a number (regression)."""


@frozen
class ClassifyConfig(EncoderConfig):
    """An encoder that tells classes of texts, or a number, by what it makes of the first token."""

    stage: ClassVar[str] = "classify"
    unused: ClassVar[tuple[str, ...]] = OF_EXAMPLES

    data: LabelledConfig  # type: ignore[assignment]
    labels: LabelsConfig = field(default_factory=LabelsConfig)


@frozen
class EncoderDecoderConfig(Config):
    """A decoder, the section model, that looks at what an encoder made of a text."""

    encoder: ModelConfig = field(kw_only=True)
    start_id: Annotated[int, Field(ge=-1)] = -1
    """The id that a text which is written begins with, and no part of it: T5's is its padding, 0, BART's its end, 2;
    -1 is the end of text."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        return {"model": self.model, ENCODER: self.encoder}

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
    beams: Annotated[Positive, FREE] = 4
    """Of the search that writes for `gptjax eval --pairs`; 1 takes the likeliest token each time."""
    length_penalty: Annotated[float, FREE] = 1.0
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
