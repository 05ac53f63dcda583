"""Where weights come from: a run folder or a Hugging Face directory, behind one face."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gptjax import bucket
from gptjax.config import ClassifyConfig, Config, EncoderDecoderConfig, LoRAConfig, ModelConfig, RewardConfig, SFTConfig
from gptjax.config.fields import typed
from gptjax.convert.huggingface import finetune_config, is_huggingface, open_directory
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.errors import UserError
from gptjax.model.heads import HEADS, init_heads
from gptjax.model.lora import is_adapter, merge
from gptjax.parallel.network import EncoderDecoder, Network
from gptjax.sharding.rules import Layout
from gptjax.stages import stage_class
from gptjax.train.checkpoint import FOLDER, restore_params
from gptjax.train.fingerprint import fingerprint
from gptjax.train.parts import join, split
from gptjax.train.run import open_run, same_weights, saved_tokenizer
from gptjax.train.step import placed

SHAPE = ("num_layers", "num_heads", "embed_dim", "seq_len", "vocab_size")
BLOCK = (
    *("attention_pattern", "scale_scores", "qkv_bias", "biases", "num_kv_heads", "head_size", "mlp_size"),
    *("norm", "norm_bias", "norm_eps", "norm_place", "norm_embedding", "positions", "position_offset"),
    *("position_buckets", "position_reach", "rotary_base", "activation", "parallel_mlp", "causal", "cross_attention"),
    *("token_types", "scale_embedding", "tied_head", "head_bias", "scale_head"),
)
SAME = (*SHAPE, *BLOCK)
TABLES = ("embedding", "head", "head_bias")  # whose rows are ids; the head only where it is a table of its own


@dataclass(frozen=True)
class Weights:
    """A model that can be loaded."""

    path: str
    config: Config
    """Of the model as it is loaded: adapters are merged into it."""
    same: tuple[str, ...]
    """Fields of the model that whoever loads it must share."""
    tokenizer: Callable[[], Tokenizer]
    load: Callable[[ModelConfig, Any], Any]
    """(model, shapes with shardings) -> parameters that lie there."""
    heads: frozenset[str] = frozenset()
    """First parts of the names of what stands beside the model and may be loaded with it."""

    def require(self, models: Mapping[str, ModelConfig], *, grows: bool = False) -> None:
        """Raises UserError that names the first field in which a model differs, by section; one that `grows` may have
        more ids."""
        if (there := self.config.models).keys() != models.keys():
            theirs, ours = (" and ".join(sections) for sections in (there, models))
            raise UserError(f"init_from = {self.path}: it has the sections {theirs}, not {ours}; name another")
        for section, name in ((section, name) for section in models for name in self.same):
            theirs, ours = getattr(there[section], name), getattr(models[section], name)
            if theirs != ours and not (grows and name == "vocab_size" and ours > theirs):
                field = f"{section}.{name}"
                raise UserError(
                    f"init_from = {self.path}: its {field} is {typed(theirs)}, not {typed(ours)}; set --{field} "
                    f"{typed(theirs)}"
                )

    def start(self, model: ModelConfig, places: Any, see: Callable[[Any], None] = lambda params: None) -> Any:
        """Parameters of a model that may have more ids: each of those gets the mean row of each table, so that none is
        likelier than an id that says nothing. Laid out, and in the dtypes, as `places` says. `see` is shown what was
        loaded before anything is made of it."""
        size, theirs = self.config.model.vocab_size, replace(model, vocab_size=self.config.model.vocab_size)
        wide = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), places)
        if model.vocab_size > size:
            rows = theirs.padded_vocab_size
            narrow = {
                name: jax.ShapeDtypeStruct((rows, *wide[name].shape[1:]), jnp.float32, sharding=wide[name].sharding)
                for name in TABLES
                if name in wide
            }
            wide = wide | narrow

        def finish(params: Any) -> Any:
            if model.vocab_size > size:
                params = params | {name: _grown(params[name], size, model) for name in TABLES if name in params}
            return jax.tree.map(lambda p, place: p.astype(place.dtype), params, places)

        loaded = self.load(theirs, wide)
        see(loaded)
        return jax.jit(finish, out_shardings=jax.tree.map(lambda p: p.sharding, places), donate_argnums=0)(loaded)


def _grown(embedding: Array, size: int, model: ModelConfig) -> Array:
    """Rows [0, size) as they are, up to vocab_size their mean, zeros beyond."""
    known = embedding[:size]
    new = jnp.broadcast_to(known.mean(0), (model.vocab_size - size, *known.shape[1:]))
    padding = (0, model.padded_vocab_size - model.vocab_size), *[(0, 0)] * (known.ndim - 1)
    return jnp.pad(jnp.concatenate([known, new]), padding)


def about(path: str) -> tuple[Config, Callable[[], Tokenizer]]:
    """The config and the tokenizer of a run folder, a checkpoint in it (RUN/checkpoints/STEP) or a Hugging Face
    directory, whose weights are not looked at.

    Raises UserError for what is neither, or is broken, and for a reward model, which predicts nothing.
    """
    folder = Path(path)
    if is_huggingface(folder):
        config = finetune_config(folder)
        return config, partial(load_tokenizer, config.data.tokenizer)
    run, config = open_run(run_and_step(path)[0])
    if isinstance(config, RewardConfig):
        raise UserError(
            f"{path}: a reward model, which scores replies and writes none; take the run that it was started from, "
            f"{config.init_from}, or score with gptjax.stages.scorer.load_scorer"
        )
    return config, partial(saved_tokenizer, run)


def run_and_step(path: str) -> tuple[str, int | None]:
    """The run folder of a path, and the step where that is RUN/checkpoints/STEP; None for the checkpoint that the run
    itself stands for."""
    folder = bucket.at(path)
    if folder.parent.name == FOLDER and folder.name.isdigit():
        return str(folder.parents[1]), int(folder.name)
    return path, None


def open_weights(path: str) -> Weights:
    """The weights of a run folder or of a Hugging Face directory, which is checked whole. Raises as `about`."""
    folder, (config, tokenizer) = Path(path), about(path)
    if is_huggingface(folder):
        directory = open_directory(folder)
        return Weights(path, config, _same(config.model), tokenizer, directory.load, directory.heads)
    same = (*_same(config.model), "scan_layers")  # a checkpoint's arrays are stacked or not as they were trained
    run, step = run_and_step(path)
    load = partial(_load_adapted if config.adapter else _load_run, bucket.opened(run), config, step)
    return Weights(path, plain(config), same, tokenizer, load, stage_class(config).heads_of(config))


def first_weights(config: Config) -> Weights:
    """What a run of a config starts from. Raises UserError where that is another model."""
    weights = open_weights(config.starts_from)
    if not config.init_from:  # a teacher, which the stage asks whether it can be one
        return weights
    weights.require(config.models, grows=stage_class(config).grows)
    return weights


def plain(config: Config) -> Config:
    """The config of a run's model once its adapters, if it has any, are merged into it."""
    return replace(config, lora=LoRAConfig()) if isinstance(config, SFTConfig) else config


def _load_run(run: Path, config: Config, step: int | None, model: ModelConfig, places: Any) -> Any:
    kind = stage_class(config)
    where = {"at": kind.decoder_at(config), "apart": [name for name in kind.apart if name not in places]}
    return restore_params(run, places, best=config.train.keep_best, step=step, **where)


def _load_adapted(run: Path, config: Config, step: int | None, model: ModelConfig, places: Any) -> Any:
    """The base of a run, and what it has learned merged into it."""
    assert config.adapter
    one = jax.tree.leaves(places)[0].sharding
    platform = next(iter(one.device_set)).platform
    every = nn.unbox(jax.eval_shape(Network(config, platform).init, jax.random.key(0)))
    learned = split(every, is_adapter)[1]
    whole = one.update(spec=PartitionSpec()) if isinstance(one, NamedSharding) else one
    shapes = placed(learned, jax.tree.map(lambda _: whole, learned))
    adapters = restore_params(run, shapes, best=config.train.keep_best, step=step)
    base = load_base(run, config, first_weights(config), places)
    merged = jax.jit(partial(merge, config=config.adapter), out_shardings=jax.tree.map(lambda p: p.sharding, places))
    return merged(join(base, adapters))


def load_base(run: Path, config: Config, weights: Weights, places: Any) -> Any:
    """The parameters beside which a run trains its adapters or its policy, pinned by the first who asks. Raises
    UserError where they are not those that it was started from."""
    pin = partial(same_weights, run, "init_from", config.init_from)
    return weights.start(config.model, places, lambda params: pin(fingerprint(params)))


def given_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that a config names, or that of the weights it starts from. Raises UserError where there is
    none."""
    if config.data.tokenizer:
        return load_tokenizer(config.data.tokenizer)
    if not config.starts_from:
        raise UserError("data.tokenizer: empty, and no init_from whose tokenizer it could be; name one of them")
    return about(config.starts_from)[1]()


def chat_model(path: str) -> ModelConfig:
    """The model of a run folder or a Hugging Face directory, with room for the chat tokens. For config files.

    Raises UserError for what is neither, or is broken.
    """
    if not bucket.is_address(path) and not Path(path).is_dir():
        raise UserError(
            f"init_from = {path}: no such folder; name a run, or a Hugging Face directory: --init_from PATH"
        )
    config, tokenizer = about(path)
    size = max(config.model.vocab_size, tokenizer().chat_vocab_size)
    return replace(config.model, vocab_size=size, separate_documents=False)  # conversations are kept apart anyway


def _same(model: ModelConfig) -> tuple[str, ...]:
    """Only a learned table of positions has as many rows as the context."""
    banded = ("window",) if "banded" in model.attention_pattern else ()
    return (*(name for name in SAME if name != "seq_len" or model.positions == "learned"), *banded)


def places(init: Callable[[Array], Any], layout: Layout | None = None, device: jax.Device | None = None) -> Any:
    """The shapes of what `init` makes, on a layout or, without one, on a device, the first of this process unless
    given."""
    boxed = jax.eval_shape(lambda: init(jax.random.key(0)))
    plain, one = nn.unbox(boxed), SingleDeviceSharding(device or jax.local_devices()[0])
    return placed(plain, layout.shardings(boxed) if layout else jax.tree.map(lambda _: one, plain))


def on_device(config: Config, device: jax.Device, heads: Collection[str] = ()) -> Any:
    """The shapes of a model's parameters, all on one device, with those of an encoder's `heads` beside it."""
    if isinstance(config, EncoderDecoderConfig):
        return places(EncoderDecoder(config, device.platform).init, device=device)
    network, names = Network(config, device.platform), tuple(name for name in HEADS if name in heads)
    classes = len(config.labels.names) or 1 if isinstance(config, ClassifyConfig) else 0
    return places(lambda key: network.init(key) | init_heads(config.model, names, key, classes), device=device)
