"""`gptjax train --dry-run`: all that a run would check and say before its first step, on attached hardware or on a pod
that is not there. Nothing is written, nothing compiled; what is wrong is said, and the rest is checked all the same.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax

from gptjax import bucket
from gptjax.config import Config
from gptjax.data import vocabulary
from gptjax.data.sources import Corpus
from gptjax.data.texts import look
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.errors import UserError
from gptjax.hardware import peak_flops, require_float8
from gptjax.planner.chips import Chip, Topology, topology
from gptjax.planner.compile import ENVIRONMENT, available, devices_of
from gptjax.planner.memory import memory
from gptjax.planner.place import place
from gptjax.planner.plan import EXTRAS, for_compiler
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rows import rows_by_process, spans
from gptjax.sharding.rules import Layout, rule_table
from gptjax.stages import AnyStage, stage_class
from gptjax.stages.launch import Resumed
from gptjax.stages.weights import first_weights, given_tokenizer
from gptjax.train import run as folders
from gptjax.train.checkpoint import folder_of, saved_steps
from gptjax.train.loop import plain_facts
from gptjax.train.schedule import known_tokens, total_steps, with_length
from gptjax.train.step import abstract_state

ATTACHED = "attached"


def rehearse(config: Config, resumed: Resumed | None, name: str, slices: int, overwrite: bool = False) -> int:
    """Check and say all; returns 1 if something is wrong. `name` is a topology, or empty for what is attached."""
    run = Rehearsal(config, resumed, *_hardware(name, slices), overwrite)
    wrong = set()
    for title, check, needs_layout in run.checks():
        if needs_layout and "layout" in wrong:
            continue
        try:
            lines = [*check()]
        except UserError as error:
            lines = [f"WRONG: {error}"]
            wrong.add(title)
        for i, line in enumerate(lines):
            print(f"{title if i == 0 else '':<11}{line}")
    print(f"{'':11}{'a run would not start' if wrong else 'a run would start'}; nothing was written")
    return int(bool(wrong))


def _hardware(name: str, slices: int) -> tuple[Topology, Sequence[Any]]:
    if not name:
        return _attached(), jax.devices()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave an accelerator to who does
    os.environ.update(ENVIRONMENT)
    there = topology(name, slices)
    if not available(there.chip.platform):
        raise UserError(f"--topology {name}: needs the extra {EXTRAS[there.chip.platform]}, which knows its devices")
    return there, devices_of(there)


def _attached() -> Topology:
    """The devices of this machine; of their rates nothing is known here, and nothing is asked."""
    device, count = jax.devices()[0], jax.device_count()
    if device.platform == "cpu":
        hbm = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    else:
        hbm = float((device.memory_stats() or {}).get("bytes_limit", 0))
    chip = Chip(device.device_kind, peak_flops(device.device_kind) or 0.0, hbm, 0, 1.0, 1.0, 1.0, device.platform)
    return Topology(ATTACHED, ATTACHED, chip, (count,))


@dataclass(frozen=True)
class Rehearsal:
    """A run that does not take place. Each check gives the lines that it has to say, or raises UserError."""

    config: Config
    resumed: Resumed | None
    hardware: Topology
    devices: Sequence[Any]
    overwrite: bool = False
    """Whether a new run takes the place of one that is there."""

    def checks(self) -> Iterator[tuple[str, Callable[[], Iterable[str]], bool]]:
        """(name, check, whether it needs a layout), in the order in which a run does them."""
        yield "run", self.run, False
        yield "layout", self.facts, False
        yield "attention", self.attention, True
        yield "rows", self.rows, True
        yield "arrays", self.arrays, True
        yield "memory", self.memory, True
        yield "tokenizer", self.tokenizer_lines, False
        yield "data", self.data, False
        if self.config.init_from and not self.resumed:
            yield "weights", self.weights, False

    @cached_property
    def layout(self) -> Layout:
        return Layout(make_mesh(self.config, self.devices), rule_table(self.config.layout))

    @cached_property
    def stage(self) -> AnyStage:
        """Without tokenizer and text, which are checked apart."""
        config = for_compiler(self.config, self.hardware)
        return stage_class(config)(config, self.hardware.chip.platform, self.layout)

    @cached_property
    def text(self) -> tuple[str, Corpus | None]:
        """What the run would read, in words, and the data set if it is built."""
        return look(self.config.data)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None for one that is still to be made of the text."""
        data = self.config.data
        if self.resumed:
            return folders.saved_tokenizer(self.resumed.folder)
        if not data.made_pieces:
            return given_tokenizer(self.config)
        _, corpus = self.text
        model = vocabulary.model_file(data, corpus) if corpus else None
        return load_tokenizer(str(model)) if model and model.is_file() else None

    def run(self) -> Iterator[str]:
        if self.resumed is None:
            yield self._new_run()
            return
        folder = self.resumed.folder
        saved = saved_steps(folder_of(folder))
        yield f"{bucket.named(folder)}, from " + (f"step {saved[0]:,}" if saved else "its start: no checkpoint yet")
        if self.config.train.local_dir:
            yield f"or from a newer one that its hosts hold in {self.config.train.local_dir}"
        yield from map(str, folders.going_on(self.resumed.saved, self.config, folder)[1])
        yield from filter(None, [folders.changed_code(folder, folders.provenance())])

    def _new_run(self) -> str:
        base = folders.base_folder(self.config)
        inside = {path.name for path in base.iterdir()} if base.is_dir() else set()
        if self.overwrite and folders.CONFIG in inside:
            return f"{base}, in the place of the run that is there"
        if self.config.run and inside - folders.UNFINISHED:
            raise UserError(f"run = {base}: exists and is not empty; name another, or --resume {base}")
        if bucket.is_remote(base):
            return f"{base}, new"
        parent = next(folder for folder in base.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK) or base.is_file():
            raise UserError(f"run {base}: cannot be made ({parent} is no folder that can be written); name another")
        return f"{base}, new" + (" (or the next free number)" if inside else "")

    def facts(self) -> Iterator[str]:
        if any(model.fp8 for model in self.config.models.values()):
            require_float8(self.devices[0] if self.hardware.name == ATTACHED else self.hardware.chip)
        processes, train = len({device.process_index for device in self.devices}), self.config.train
        known = replace(self.config, train=replace(train, total_tokens=known_tokens(self.config)))
        facts = plain_facts(known, self.stage, self.layout, len(self.devices), self.devices[0].device_kind, processes)
        if train.epochs:
            facts["length"] = f"{train.epochs:g} epochs of the training split, which data below counts if it is built"
        yield from (f"{name}: {text}" for name, text in facts.items())

    def attention(self) -> Iterator[str]:
        if self.hardware.name != ATTACHED and self.hardware.chip.platform == "gpu":
            yield "decided on the machine, where cuDNN's kernel must pass its self-test; else blockwise"
        else:
            yield ": ".join(self.stage.network.attention)

    def rows(self) -> Iterator[str]:
        """Which rows of a micro-batch each process reads; processes that read the same stand together."""
        held = rows_by_process(self.layout, self.config.micro_batch_size)
        together: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for process, rows in held.items():
            together[rows].append(process)
        yield (
            f"{len(held)} process(es) of {len(self.devices) // len(held)} device(s), each reads "
            f"{len(next(iter(together)))} of the {self.config.micro_batch_size} rows of a micro-batch"
        )
        if len(held) > 1:
            yield from (f"rows {spans(rows)}: process(es) {spans(each)}" for rows, each in together.items())

    def arrays(self) -> Iterator[str]:
        state = abstract_state(self.config, self.stage)
        self.layout.shardings(state)
        rows = Counter(  # unrolled units are alike
            (re.sub(r"^unit_\d+", "unit_*", name), "x".join(map(str, shape)), spec, size, note)
            for part, note in ((state.params, ""), (state.frozen, "  frozen"))
            for name, shape, spec, size in self.layout.table(part)
        )
        width = max(len(name) for name, *_ in rows)
        for (name, shape, spec, size, note), count in rows.items():
            times = f"{count} x " if count > 1 else ""
            yield f"{name:{width}}  {times + shape:>20}  {count * size / 1e6:>12,.2f} MB a device  {spec}{note}"
        total = sum(count * size for (*_, size, _), count in rows.items())
        yield f"{'together':{width}}  {'':20}  {total / 1e6:>12,.2f} MB a device"
        yield from (f"whole on every device: {name}" for name in self.layout.replicated(state.every_param))

    def memory(self) -> Iterator[str]:
        hbm = self.hardware.chip.hbm
        if self.hardware.name == ATTACHED and self.hardware.chip.platform == "tpu":
            yield "not estimated for attached TPUs; name them, such as --topology v5p-1024"
            return
        parts = memory(place(self.config, self.hardware))
        total, shown = sum(parts.values()), ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in parts.items())
        text = f"{total / 1e9:,.2f} GB a device by formula ({shown}) of {hbm / 1e9:,.1f} GB"
        if total > hbm:
            raise UserError(
                f"{text}; use a smaller train.micro_batch_size (now {self.config.micro_batch_size}), model.remat full "
                "or more devices, or ask gptjax plan"
            )
        yield text

    def tokenizer_lines(self) -> Iterator[str]:
        spec, size = self.config.data.tokenizer, self.config.model.vocab_size
        if self.tokenizer is None:
            yield f"{spec}: to be made of the text, a vocabulary of {size:,}"
            return
        fitted = stage_class(self.config).fit_tokenizer(self.config, self.tokenizer)
        yield f"{spec or self.config.init_from}: {self.tokenizer.vocab_size:,} ids, a vocabulary of {size:,}"
        yield from fitted.notes

    def data(self) -> Iterator[str]:
        text, corpus = self.text
        yield from text.splitlines()
        if corpus is None:
            return
        beside: dict[str, str] = {}
        if self.tokenizer:
            kind = stage_class(self.config)
            tokenizer = kind.fit_tokenizer(self.config, self.tokenizer)
            stage = kind(self.config, "cpu", tokenizer=tokenizer, corpus=corpus)
            stage.check()
            beside = stage.beside_text
            yield stage.facts()
            length = with_length(self.config, lambda: stage.epoch_tokens)
            if self.config.train.epochs:
                yield f"{length.train.total_tokens:,} tokens, {total_steps(length):,} steps"
        changed = folders.changed_data(self.resumed.folder, self.config, corpus, beside) if self.resumed else None
        if self.resumed and changed and not self.resumed.new_data:
            raise UserError(f"{changed}; {folders.NEW_DATA}")

    def weights(self) -> Iterator[str]:
        first_weights(self.config)
        yield self.config.init_from
