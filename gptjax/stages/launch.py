"""From a config or a run folder to a running stage: devices, mesh, tokenizer, text and stage put together, all of it
checked, on all processes, before there is a run folder."""

import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache

from gptjax import bucket
from gptjax.config import Config
from gptjax.config.fields import walk
from gptjax.config.saved import get
from gptjax.data import vocabulary
from gptjax.data.chat import other_format
from gptjax.data.sources import Corpus
from gptjax.data.texts import build, left_out, reopen
from gptjax.data.tokenizers import Tokenizer, load_model
from gptjax.errors import UserError
from gptjax.files import code_digest
from gptjax.hardware import compiler_options, require_float8
from gptjax.model.gpt import compute_dtype
from gptjax.model.heads import CLASSIFIER
from gptjax.parallel import pipeline
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rows import rows_by_process
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import AnyStage, Base, Pretrain, stage_class
from gptjax.stages.weights import Weights, first_weights, given_tokenizer, load_base
from gptjax.terminal import Progress
from gptjax.train import goodput
from gptjax.train import run as folders
from gptjax.train.lock import RunLock
from gptjax.train.loop import fit
from gptjax.train.metrics import LOG, read_log
from gptjax.train.parts import join, split
from gptjax.train.processes import compare, first, is_first, together, warn
from gptjax.train.schedule import with_length
from gptjax.train.step import abstract_state

PATIENCE = 10.0  # seconds until a folder counts as not shared


@dataclass(frozen=True)
class Resumed:
    """A run that is to go on."""

    folder: Path
    saved: Config
    new_data: bool = False
    """Whether its user has said that another text is meant."""


def train(config: Config, resumed: Resumed | None, *, named: bool = False, overwrite: bool = False) -> int:
    """Run pretraining, from random weights or those of `init_from`, to its end; returns the exit status (128 + the
    signal that stopped it, or 0).

    `named` starts a new run in exactly the config's folder, `overwrite` there in the place of another. Several
    processes have joined each other before.
    """
    began = time.monotonic()
    prepare(config)
    config = folders.located(config) if resumed else folders.pinned(config)
    _same_everywhere(config)
    layout = together(lambda: _layout(config))
    weights = together(lambda: first_weights(config)) if config.starts_from and not resumed else None
    tokenizer, corpus = _text(config, resumed)
    stage = _stage(config, layout, tokenizer, corpus)
    compare({"attention backend": stage.network.attention[0]})
    with _folder(replace(stage, config=_pinned_decay(config, stage.config)), resumed, named, overwrite) as run:
        known = facts(stage) | {"run": bucket.named(run)} | ({"weights": config.starts_from} if weights else {})
        load = partial(_first_params, stage, weights, run) if config.starts_from else None
        number = fit(stage.config, stage, layout, run, resumed is not None, known, load, began=began)
        if is_first():
            print(
                f"\n{'stopped' if number else 'done'}: run folder {bucket.named(run)}\n"
                f"time, over all starts, {goodput.in_words(read_log(run / LOG))}\n"
                f"{next_commands(run, stage, number != 0)}",
                flush=True,
            )
    return 128 + number if number else 0


def _pinned_decay(config: Config, known: Config) -> Config:
    """A decay that ends with the training as it is known now does so whatever becomes of that."""
    return replace(config, optimizer=replace(config.optimizer, decay_tokens=known.optimizer.decay_tokens))


def _first_params(stage: AnyStage, weights: Weights | None, run: Path, places: Any) -> Any:
    """What `fit` asks for: all parameters, or those that are frozen. Also for a run that was stopped before its first
    checkpoint."""
    config = stage.config
    weights = weights or first_weights(config)
    stays = config.adapter or config.has_reference  # what no checkpoint holds must be the same at every start
    load = partial(load_base, run, config, weights) if stays else partial(weights.start, config.model)
    params = first_params(stage, load, places, weights.heads - {CLASSIFIER})  # of other labels
    for field, (source, prints) in stage.pins(params).items():
        folders.same_weights(run, field, source, prints)
    return params


def first_params(stage: AnyStage, load: Callable[[Any], Any], places: Any, heads: Collection[str] = frozenset()) -> Any:
    """Those that a run begins with, or a part of them, where `places` says; `load` gives those of a model, its `heads`
    among them. Adapters and other heads are born here."""

    def is_born(name: str) -> bool:
        return stage.is_born(name) and name.split("/")[0] not in heads

    base, born = split(places, is_born)
    params = stage.of_weights(load, base)
    if born:
        shardings = jax.tree.map(lambda place: place.sharding, born)
        make = jax.jit(lambda key: split(nn.unbox(stage.init(key)), is_born)[1], out_shardings=shardings)
        params = join(params, make(jax.random.key(stage.config.train.seed)))
    return params


def _same_everywhere(config: Config) -> None:
    """Raises UserError that names the process whose code, versions or config differ."""
    fields = {leaf.name: str(get(config, leaf.name)) for leaf in walk(type(config))}
    compare({"code": code_digest()} | folders.versions() | fields)


def _layout(config: Config) -> Layout:
    if config.model.fp8:
        require_float8(jax.devices()[0])
    return Layout(make_mesh(config), rule_table(config.layout))


def _stage(config: Config, layout: Layout, tokenizer: Tokenizer, corpus: Corpus) -> AnyStage:
    """The stage, checked against its layout, vocabulary and text, with the length of its training."""
    kind = stage_class(config)
    if kind is not Pretrain and (other := other_format(tokenizer)):
        warn(f"the tokenizer's chat template is written for {other}; this run has one of its own")
    tokenizer = together(lambda: kind.fit_tokenizer(config, tokenizer))
    with Progress() as progress:
        made = kind(config, jax.default_backend(), layout, tokenizer, corpus, progress)
        made.agree()
        first(lambda: made.check() or "")  # what it measures of a text it keeps, for those that share the cache
        made = together(lambda: _checked(made))
    return replace(made, report=Base.report)


def _checked(stage: AnyStage) -> AnyStage:
    config, layout = stage.config, stage.layout
    assert layout
    stage.check()
    rows_by_process(layout, config.micro_batch_size)
    layout.shardings(abstract_state(config, stage))
    assert stage.network.attention  # chosen here: a backend that cannot serve is refused before there is a run folder
    return replace(stage, config=with_length(config, lambda: stage.epoch_tokens))


def _text(config: Config, resumed: Resumed | None) -> tuple[Tokenizer, Corpus]:
    """Tokenizer and text: that first, unless it is made of the text, for a text may take hours to build."""
    spec = config.data.tokenizer
    if not config.data.made_pieces:
        return together(lambda: _tokenizer(config, resumed, lambda: given_tokenizer(config))), _corpus(config)
    corpus, model = _corpus(config), ""
    if resumed is None or spec != resumed.saved.data.tokenizer:  # made by one, and sent: hosts may share no cache
        model = first(lambda: vocabulary.make(config.data, corpus).read_bytes().hex())
    return together(lambda: _tokenizer(config, resumed, lambda: load_model(spec, bytes.fromhex(model)))), corpus


def with_text(stage: AnyStage) -> AnyStage:
    """A stage that was built without tokenizer and text, with those that its config names."""
    tokenizer, corpus = _text(stage.config, None)
    return replace(stage, tokenizer=type(stage).fit_tokenizer(stage.config, tokenizer), corpus=corpus)


def _tokenizer(config: Config, resumed: Resumed | None, load: Callable[[], Tokenizer]) -> Tokenizer:
    """The run's own copy for a run that goes on; another name for it must name the same."""
    if resumed is None:
        return load()
    saved = folders.saved_tokenizer(resumed.folder)
    if config.data.tokenizer != resumed.saved.data.tokenizer:
        given = stage_class(config).own_tokenizer(load())
        if given.pieces != saved.pieces or given.files != saved.files:
            raise UserError(
                f"data.tokenizer = {config.data.tokenizer}: not the tokenizer of {bucket.named(resumed.folder)}; leave "
                "it out, the run has its own"
            )
    return saved


def _corpus(config: Config) -> Corpus:
    """The text, built by the first process alone; the others open what it has built."""
    with Progress() as progress:
        place = first(lambda: build(config.data, progress).place)
    corpus = together(lambda: reopen(config.data, place))
    compare({"data digest": corpus.digest})
    return corpus


@contextmanager
def _folder(stage: AnyStage, resumed: Resumed | None, named: bool, overwrite: bool) -> Iterator[Path]:
    """The run's folder, this run's alone while it lasts. A new one goes again if no step was made in it."""
    config, held, folder = stage.config, [], resumed.folder if resumed else None
    own = [folder] if folder else []

    def take() -> str:
        if resumed:
            held.append(RunLock(resumed.folder, warn))
            bucket.fetch(resumed.folder)
            _take_over(stage, resumed)
        else:
            made, lock = folders.claim(config, named, warn, overwrite)
            held.append(lock)
            own.append(made)
            assert stage.tokenizer
            pinned = replace(config, run=bucket.named(made))
            folders.fill_run(made, pinned, stage.tokenizer, stage.corpus, stage.beside_text)
        bucket.send(own[0])
        return bucket.named(own[0])

    try:
        told = first(take)
        folder = own[0] if own else bucket.opened(told)
        if not is_first():
            bucket.fetch(folder)
        mark = first(lambda: folders.mark(folder))
        together(lambda: _shared(folder, mark))
        yield folder
    except BaseException:
        if is_first() and resumed is None and folder is not None:
            folders.abandon(folder)
        raise
    finally:
        try:
            if held:
                bucket.send(own[0])
        finally:
            for lock in held:
                lock.release()


def _shared(folder: Path, mark: str) -> None:
    """Raises UserError where this host does not see the first one's run folder: what is not shared cannot be read
    again. A network file system may take seconds to show it."""
    end = time.monotonic() + PATIENCE
    while folders.mark(folder) != mark:
        if time.monotonic() > end:
            raise UserError(
                f"run {bucket.named(folder)}: {socket.gethostname()} does not see what the first process wrote "
                "there; name a folder on storage that all hosts share, with --run"
            )
        time.sleep(0.2)


def _take_over(stage: AnyStage, resumed: Resumed) -> None:
    """Put what this start changes in force, unless it changes what makes the run."""
    config, corpus = stage.config, stage.corpus
    assert corpus
    started = folders.provenance()
    if text := folders.changed_code(resumed.folder, started):
        warn(text)
    if text := folders.changed_data(resumed.folder, config, corpus, stage.beside_text):
        if not resumed.new_data:
            raise UserError(f"--resume {bucket.named(resumed.folder)}: {text}; {folders.NEW_DATA}")
        warn(f"{text}: going on with it as --new-data says")
    if bucket.is_remote(home := bucket.home(resumed.folder)):
        bucket.clear(home / "tensorboard")  # which is written anew
    folders.pin_data(resumed.folder, config, corpus, stage.beside_text)
    folders.go_on(resumed.folder, resumed.saved, config, started)


def next_commands(run: Path, stage: AnyStage, stopped: bool) -> str:
    """What a user would type next, ready to paste."""
    folder = shlex.quote(bucket.named(run))
    more = "" if stopped else " --train.epochs N" if stage.config.train.epochs else " --train.total_tokens N"
    lines = [f"  resume  gptjax train --resume {folder}{more}"]
    if stage.example_prompt:
        lines.append(f"  sample  gptjax sample {folder} --prompt {shlex.quote(stage.example_prompt)}")
    return "\n".join([*lines, f"  plot    gptjax report {folder}"])


def prepare(config: Config) -> None:
    """Process-wide settings of JAX."""
    for name in ("absl", "asyncio"):  # Orbax logs every save, and failures that it also raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_late_errors
    if config.train.compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.train.compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        compilation_cache.reset_cache()  # JAX looks once for a cache, at the first program of the process


LATE = ("Event loop is closed", "Encountered error while reading array index")


def _without_late_errors(unraisable: Any) -> None:
    """After a save or a restore that failed, the other arrays' writes and reads still report to Orbax's closed event
    loop: the one line that names the failure is enough. Everything else is shown as ever."""
    if not str(unraisable.exc_value).startswith(LATE):
        sys.__unraisablehook__(unraisable)


def facts(stage: AnyStage) -> dict[str, Any]:
    """What a run is, beside what the loop says of every stage."""
    config, platform, tokenizer = stage.config, stage.platform, stage.tokenizer
    assert stage.layout and tokenizer and stage.corpus
    rest = left_out(config.data)
    options = compiler_options(stage.layout.mesh.devices.flat[0], config.train.deterministic)
    return _pipeline(config, stage.layout) | {
        "attention": ": ".join(stage.network.attention),
        "compiler": " ".join(f"{k}={v}" for k, v in options.items()) or "default options",
        "layers": ("scanned" if config.model.scan_layers else "unrolled") + f", remat {config.model.remat}",
        "compute": f"{compute_dtype(config.model, platform)} with float32 weights ({config.model.dtype} on {platform})"
        + ("; the layers' products in float8" if config.model.fp8 else ""),
        "data": f"{stage.corpus.name}, {rest + ', ' if rest else ''}{stage.facts()}, "
        f"{config.data.tokenizer or config.init_from} tokenizer of {tokenizer.possible.sum():,} in a vocabulary of "
        f"{config.model.vocab_size:,} (padded to {config.model.padded_vocab_size:,})"
        + "".join(f"; {note}" for note in tokenizer.notes),
    }


def _pipeline(config: Config, layout: Layout) -> dict[str, Any]:
    """The pipeline, if there is one, and the share of its time in which a stage waits."""
    stages, rounds = layout.mesh.shape[pipeline.AXIS], config.layout.pipeline_rounds
    if stages == 1:
        return {}
    chunks = pipeline.num_chunks(config, layout.ways(layout.rules["batch"]))
    idle = pipeline.bubble(stages, rounds, chunks)
    return {"pipeline": f"{stages} stages, {rounds} round(s) of {chunks} chunks, bubble {idle:.0%}"}
