"""Do the fields of a config agree with each other? What one field alone can have wrong stands on the field."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from gptjax import bucket
from gptjax.config.fields import every_leaf, typed
from gptjax.config.mixture import later_weights, weighted
from gptjax.config.model import ModelConfig
from gptjax.config.schema import Config
from gptjax.config.stages import (
    EncoderConfig,
    EncoderDecoderConfig,
    GroupPolicyConfig,
    PolicyConfig,
    PreferenceConfig,
    RankedConfig,
    RewardConfig,
    RewardedConfig,
    SFTConfig,
)
from gptjax.errors import UserError


def nearest_divisor(total: int, wanted: int) -> int:
    """The divisor of `total` closest to `wanted`."""
    return min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - wanted))


def validate(config: Config) -> Config:
    """Return the config, or raise UserError that names field, value and the nearest right one."""
    _unused(config)
    _paths(config)
    _local(config)
    for section, model in config.models.items():
        with in_section(section):
            _model(model)
    _side(config)
    _batch(config)
    _vocabulary(config)
    _mixture(config)
    if isinstance(config, SFTConfig):
        _fine_tuning(config)
    if isinstance(config, RankedConfig):
        _from_rankings(config)
    if isinstance(config, RewardedConfig):
        _rewarded(config)
    if isinstance(config, SFTConfig | PreferenceConfig | RewardedConfig):
        _sampling(config)
    optimizer = config.optimizer
    if optimizer.decay_tokens and optimizer.warmup_tokens > optimizer.decay_tokens:
        raise UserError(
            f"optimizer.warmup_tokens = {optimizer.warmup_tokens}: longer than optimizer.decay_tokens = "
            f"{optimizer.decay_tokens}, at which the decay ends; nearest {optimizer.decay_tokens}"
        )
    return config


def _unused(config: Config) -> None:
    for leaf in every_leaf(type(config)):
        section, _, name = leaf.name.partition(".")
        value = getattr(getattr(config, section), name) if leaf.name in config.unused else leaf.default
        if value != leaf.default:
            raise UserError(f"{leaf.name} = {value}: stage {config.stage} has no use for it; leave it out")


def _paths(config: Config) -> None:
    """A cache is renamed and mapped, so it lies in a file system; Orbax writes to those and to one kind of bucket."""
    for name, value, remedy in (
        ("data.cache_dir", config.data.cache_dir, "name a folder that the hosts share, or let each build its own"),
        ("train.local_dir", config.train.local_dir, "name a folder on each host's own disk"),
    ):
        if bucket.is_address(value):
            raise UserError(f"{name} = {value}: an address, and no path; {remedy}")
    for name, value in (("run", config.run), ("init_from", config.init_from)):
        bucket.require_known(value, f"{name} = {value}")


def _local(config: Config) -> None:
    train = config.train
    if train.local_dir and not train.local_interval:
        raise UserError(
            f"train.local_dir = {train.local_dir}: give train.local_interval, too, the steps between saves there"
        )
    if train.local_interval and not train.local_dir:
        raise UserError(
            f"train.local_interval = {train.local_interval}: there is no train.local_dir; name a folder on each host's "
            "own disk"
        )


def _mixture(config: Config) -> None:
    parts = weighted(config.data.source)
    if parts and config.stage != Config.stage:
        raise UserError(
            f"data.source = {config.data.source}: stage {config.stage} reads one source, and weights are of those that "
            "pretraining mixes; leave them out"
        )
    for section in ("data", "ptx") if isinstance(config, PolicyConfig) else ("data",):
        data = getattr(config, section)
        if getattr(data, "cache_tokens", False) and data.fim_rate:
            raise UserError(
                f"{section}.cache_tokens = true: documents are rearranged before they are tokenised "
                f"({section}.fim_rate = {data.fim_rate:g}); leave one of them out"
            )
    later_weights(config.data.later_weights if config.stage == Config.stage else "", len(parts))
    if isinstance(config, PolicyConfig):
        with in_section("ptx", "data"):
            weighted(config.ptx.source)


@contextmanager
def in_section(name: str, like: str = "model") -> Iterator[None]:
    """Says of another section what is said of `like`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"{like}.", f"{name}.")) from None


def _model(model: ModelConfig) -> None:
    _shape(model)
    _agreeing(model)


def _agreeing(model: ModelConfig) -> None:
    """What no family has together, and the block does not compute."""
    relative, band = model.positions == "relative", "banded" in model.attention_pattern
    exact = model.position_buckets // (2 if model.causal else 4)
    for wrong, name, why, remedy in (
        (not model.causal and band, "attention_pattern", "a band sees the past alone, an encoder all", "dense"),
        (model.norm_place == "after" and model.parallel_mlp != "no", "parallel_mlp", "its norm comes before", "no"),
        (model.norm == "rms" and not model.norm_bias, "norm_bias", "an RMSNorm has none to leave out", "true"),
        (model.positions != "learned" and model.position_offset, "position_offset", "is of learned positions", "0"),
        (relative and model.kv_heads < model.num_heads, "num_kv_heads", "relative positions are of each head", "0"),
        (relative and model.position_reach <= exact, "position_reach", f"{exact} distances are exact", str(exact + 1)),
    ):
        if wrong:
            raise UserError(f"model.{name} = {typed(getattr(model, name))}: {why}; nearest {remedy}")


def _side(config: Config) -> None:
    """Encoders where a stage has one, decoders elsewhere, and two that fit each other."""
    if isinstance(config, EncoderConfig):
        wanted: dict[str, dict[str, bool]] = {"model": {"causal": False, "cross_attention": False}}
    elif isinstance(config, EncoderDecoderConfig):
        encoder = {"causal": False, "cross_attention": False, "tied_head": True, "head_bias": False}
        wanted = {"model": {"causal": True, "cross_attention": True}, "encoder": encoder | {"scale_head": False}}
    else:
        wanted = {"model": {"causal": True, "cross_attention": False}}
    for section, values in wanted.items():
        for name, value in values.items():
            given = getattr(config.models[section], name)
            if given != value:
                raise UserError(f"{section}.{name} = {typed(given)}: stage {config.stage} has {typed(value)} there")
    if isinstance(config, EncoderDecoderConfig):
        for name in ("embed_dim", "vocab_size", "dtype"):
            ours, theirs = getattr(config.model, name), getattr(config.encoder, name)
            if ours != theirs:
                raise UserError(f"encoder.{name} = {theirs}: the decoder's, which shares its embedding, is {ours}")


def _shape(model: ModelConfig) -> None:
    if model.num_heads % model.kv_heads:
        near = nearest_divisor(model.num_heads, model.kv_heads)
        raise UserError(
            f"model.num_kv_heads = {model.num_kv_heads}: does not divide model.num_heads = {model.num_heads}; nearest "
            f"{near}"
        )
    if model.positions == "rotary" and model.head_dim % 2:
        raise UserError(
            f"model.head_size = {model.head_dim}: rotary positions turn pairs; nearest {model.head_dim + 1}"
        )
    if not model.head_size and model.embed_dim % model.num_heads:
        near = nearest_divisor(model.embed_dim, model.num_heads)
        raise UserError(
            f"model.num_heads = {model.num_heads}: does not divide model.embed_dim = {model.embed_dim}; nearest {near}"
        )
    unit = len(model.attention_pattern)
    if model.num_layers % unit:
        near = max(unit, round(model.num_layers / unit) * unit)
        pattern = ",".join(model.attention_pattern)
        raise UserError(
            f"model.num_layers = {model.num_layers}: not a multiple of the pattern {pattern} ({unit}); nearest {near}"
        )
    if model.window > model.seq_len and "banded" in model.attention_pattern:
        raise UserError(
            f"model.window = {model.window}: must lie in 1..model.seq_len = {model.seq_len}; nearest {model.seq_len}"
        )


def _batch(config: Config) -> None:
    train, micro, multiple = config.train, config.micro_batch_size, config.ramp_multiple
    if train.batch_size % micro:
        near = nearest_divisor(train.batch_size, micro)
        raise UserError(
            f"train.micro_batch_size = {micro}: does not divide train.batch_size = {train.batch_size}; nearest {near}"
        )
    if multiple % micro or train.batch_size % multiple:
        raise UserError(
            f"train.ramp_multiple = {multiple}: must be a multiple of the micro-batch {micro} that divides "
            f"train.batch_size = {train.batch_size}; nearest {micro}"
        )
    if train.ramp_start and (train.ramp_start % multiple or train.ramp_start > train.batch_size):
        near = min(max(multiple, round(train.ramp_start / multiple) * multiple), train.batch_size)
        raise UserError(
            f"train.ramp_start = {train.ramp_start}: must be a multiple of the micro-batch {multiple}, at most "
            f"train.batch_size = {train.batch_size}; nearest {near}"
        )
    if micro % config.data.lanes:
        near = nearest_divisor(micro, config.data.lanes)
        raise UserError(
            f"data.lanes = {config.data.lanes}: does not divide the micro-batch of {micro} sequences; nearest {near}"
        )


def _vocabulary(config: Config) -> None:
    spec, size = config.data.tokenizer, config.model.vocab_size
    if not spec.startswith("sentencepiece:"):
        return
    if not re.fullmatch(r"sentencepiece:[1-9][0-9]{0,6}", spec):
        raise UserError(
            f"data.tokenizer = {spec}: must be sentencepiece:N with a number of pieces; nearest sentencepiece:{size}"
        )
    if config.data.made_pieces > size:
        raise UserError(f"data.tokenizer = {spec}: model.vocab_size is {size}; nearest sentencepiece:{size}")


def _fine_tuning(config: SFTConfig) -> None:
    if config.data.made_pieces:
        raise UserError(
            f"data.tokenizer = {config.data.tokenizer}: is made of a text, not of conversations; leave it out: that "
            "of init_from is taken"
        )
    if config.adapter and not config.init_from:
        raise UserError(
            f"lora.rank = {config.lora.rank}: adapters stand beside trained weights; name them with init_from, or take "
            "0, which trains all parameters"
        )


def _from_rankings(config: RankedConfig) -> None:
    if config.init_from:
        return
    why = "a policy starts from the run that it is to improve, which stays its reference"
    if isinstance(config, RewardConfig):
        why = "a reward model starts from the run whose replies it is to score"
    raise UserError(f"init_from: empty, and {why}, fine-tuned (stage sft) or pretrained; name it")


def _rewarded(config: RewardedConfig) -> None:
    if not config.init_from:
        raise UserError(
            "init_from: empty, and a policy starts from the run that it is to improve, which stays its reference, "
            "fine-tuned (stage sft); name it"
        )
    if not config.reward:
        raise UserError("reward: empty; name the run of a reward model, or a Python function, FILE.py:NAME")
    rollout, size = config.rollout, config.train.batch_size
    if rollout.episodes % size:
        near = max(size, round(rollout.episodes / size) * size)
        raise UserError(
            f"rollout.episodes = {rollout.episodes}: not a multiple of train.batch_size = {size}; nearest {near}"
        )
    if rollout.max_tokens >= config.model.seq_len:
        raise UserError(
            f"rollout.max_tokens = {rollout.max_tokens}: leaves a prompt no room in model.seq_len = "
            f"{config.model.seq_len}; nearest {max(1, config.model.seq_len // 2)}"
        )
    if rollout.top_k > config.model.vocab_size:
        raise UserError(f"rollout.top_k = {rollout.top_k}: model.vocab_size is {config.model.vocab_size}; 0 keeps all")
    if isinstance(config, GroupPolicyConfig) and rollout.episodes % config.grpo.group:
        near = max(1, round(rollout.episodes / config.grpo.group)) * config.grpo.group
        raise UserError(
            f"rollout.episodes = {rollout.episodes}: not a multiple of grpo.group = {config.grpo.group}; nearest {near}"
        )
    if isinstance(config, PolicyConfig) and config.ppo.kl_target and config.ppo.kl_horizon <= 0.2 * rollout.episodes:
        raise UserError(
            f"ppo.kl_horizon = {config.ppo.kl_horizon}: one iteration of {rollout.episodes} episodes could turn the "
            f"sign of the coefficient; more than {0.2 * rollout.episodes:g}"
        )


def _sampling(config: Config) -> None:
    if config.train.sample_interval and not config.train.sample_prompt.strip():
        raise UserError("train.sample_prompt: has no text, and the assistant is to answer it; write a question")
