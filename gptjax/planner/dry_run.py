"""`gptjax train --dry-run`: all that a run would check and say before its first step, on attached hardware or on a pod
that is not there. Nothing is written, nothing compiled; what is wrong is said, and the rest is checked all the same.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from gptjax.config import Config
from gptjax.data.sources import look
from gptjax.data.stream import require_one_row
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.errors import UserError
from gptjax.hardware import peak_flops
from gptjax.planner.chips import Chip, Topology, topology
from gptjax.planner.compile import available, devices_of
from gptjax.planner.memory import memory
from gptjax.planner.place import place
from gptjax.planner.plan import EXTRAS, for_compiler
from gptjax.sharding.mesh import make_mesh
from gptjax.sharding.rows import rows_by_process, spans
from gptjax.sharding.rules import Layout, rule_table
from gptjax.tasks.launch import Resumed
from gptjax.tasks.pretrain import Pretrain, check_vocabulary
from gptjax.tasks.weights import open_weights
from gptjax.train import run as folders
from gptjax.train.checkpoint import FOLDER
from gptjax.train.loop import plain_facts
from gptjax.train.step import abstract_state


def rehearse(
    config: Config, resumed: Resumed | None, name: str, slices: int, say: Callable[[str], None] = print
) -> int:
    """Check and say all; returns 1 if something is wrong. `name` is a topology, or empty for what is attached."""
    hardware, devices = _hardware(name, slices)
    failed = False
    for title, check in _checks(config, resumed, hardware, devices):
        try:
            lines = [*check()]
        except UserError as error:
            lines, failed = [f"WRONG: {error}"], True
        for i, line in enumerate(lines):
            say(f"{title if i == 0 else '':<11}{line}")
    say(f"{'':11}{'a run would not start' if failed else 'a run would start'}; nothing was written")
    return int(failed)


def _hardware(name: str, slices: int) -> tuple[Topology, Sequence[Any]]:
    if not name:
        return _attached(), jax.devices()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave an accelerator to who does
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
    return Topology("attached", "attached", chip, (count,))


def _checks(
    config: Config, resumed: Resumed | None, hardware: Topology, devices: Sequence[Any]
) -> Iterator[tuple[str, Callable[[], Iterator[str]]]]:
    """What is checked, in the order in which a run does it."""
    yield "run", lambda: _run(config, resumed)
    try:
        layout = Layout(make_mesh(config, devices), rule_table(config.layout))
    except UserError as error:
        message = str(error)
        yield "layout", lambda: _wrong(message)
    else:
        task = Pretrain(for_compiler(config, hardware), hardware.chip.platform, layout)
        yield "facts", lambda: _facts(config, layout, hardware, devices)
        yield "attention", lambda: _attention(task, hardware)
        yield "rows", lambda: _rows(config, layout, devices)
        yield "arrays", lambda: _arrays(config, task, layout)
        yield "memory", lambda: _memory(config, hardware)
    yield "tokenizer", lambda: _tokenizer(config, resumed)
    yield "data", lambda: _data(config, resumed)
    if config.init_from and not resumed:
        yield "weights", lambda: _weights(config)


def _wrong(message: str) -> Iterator[str]:
    raise UserError(message)
    yield


def _run(config: Config, resumed: Resumed | None) -> Iterator[str]:
    if resumed is None:
        base = folders.base_folder(config)
        inside = {path.name for path in base.iterdir()} if base.is_dir() else set()
        if config.run and inside - folders.UNFINISHED:
            raise UserError(f"run = {base}: exists and is not empty; name another, or --resume {base}")
        parent = next(folder for folder in base.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"run = {base}: {parent} cannot be written")
        yield f"{base}, new" + (" (or the next free number)" if inside and not config.run else "")
        return
    saved = [int(path.name) for path in (resumed.folder / FOLDER).glob("*") if path.name.isdigit()]
    yield f"{resumed.folder}, from " + (f"step {max(saved):,}" if saved else "its start: no checkpoint yet")
    for change in folders.going_on(resumed.saved, config, resumed.folder)[1]:
        yield str(change)
    if text := folders.changed_code(resumed.folder):
        yield text


def _facts(config: Config, layout: Layout, hardware: Topology, devices: Sequence[Any]) -> Iterator[str]:
    yield from (
        f"{name}: {text}" for name, text in plain_facts(config, layout, len(devices), hardware.chip.name).items()
    )


def _attention(task: Pretrain, hardware: Topology) -> Iterator[str]:
    if hardware.name != "attached" and hardware.chip.platform == "gpu":
        yield "decided on the machine, where cuDNN's kernel must pass its self-test; else blockwise"
        return
    yield ": ".join(task.attention)


def _rows(config: Config, layout: Layout, devices: Sequence[Any]) -> Iterator[str]:
    """Which rows of a micro-batch each process reads; processes that read the same stand together."""
    by_rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    held = rows_by_process(layout, config.micro_batch_size)
    for process, rows in held.items():
        by_rows[rows].append(process)
    each = len(next(iter(by_rows)))
    yield (
        f"{len(held)} process(es) of {len(devices) // len(held)} device(s), each reads {each} of the "
        f"{config.micro_batch_size} rows of a micro-batch"
    )
    if len(held) > 1:
        for rows, processes in by_rows.items():
            yield f"  rows {spans(rows)}: process(es) {spans(processes)}"


def _arrays(config: Config, task: Pretrain, layout: Layout) -> Iterator[str]:
    params = abstract_state(config, task.init).params
    rows = [*layout.table(params)]
    layout.shardings(abstract_state(config, task.init))
    width = max(len(name) for name, *_ in rows)
    for name, shape, spec, size in rows:
        yield f"{name:{width}}  {'x'.join(map(str, shape)):>16}  {size / 1e6:>12,.2f} MB a device  {spec}"
    count = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(params)))
    yield f"{'together':{width}}  {count:>16,}  {sum(row[3] for row in rows) / 1e6:>12,.2f} MB a device"
    for name in layout.replicated(params):
        yield f"whole on every device: {name}"


def _memory(config: Config, hardware: Topology) -> Iterator[str]:
    if hardware.name == "attached" and hardware.chip.platform == "tpu":
        yield "not estimated for attached TPUs; name them, such as --topology v5p-1024"
        return
    parts = memory(place(config, hardware))
    yield (
        f"{sum(parts.values()) / 1e9:,.2f} GB a device by formula ("
        + ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in parts.items())
        + f") of {hardware.chip.hbm / 1e9:,.1f} GB"
    )
    if sum(parts.values()) > hardware.chip.hbm:
        raise UserError(
            f"the step needs more memory than a device has; see gptjax plan --topology {hardware.name}, or use a smaller "
            f"train.micro_batch_size (now {config.micro_batch_size}) or model.remat full"
        )


def _saved_tokenizer(config: Config, resumed: Resumed | None) -> Tokenizer:
    return folders.saved_tokenizer(resumed.folder) if resumed else load_tokenizer(config.data.tokenizer)


def _tokenizer(config: Config, resumed: Resumed | None) -> Iterator[str]:
    tokenizer = _saved_tokenizer(config, resumed)
    check_vocabulary(config, tokenizer)
    yield f"{config.data.tokenizer}: {tokenizer.vocab_size:,} ids in a vocabulary of {config.model.vocab_size:,}"


def _data(config: Config, resumed: Resumed | None) -> Iterator[str]:
    text, corpus = look(config.data)
    yield text
    if corpus is None:
        return
    tokenizer = _saved_tokenizer(config, resumed)
    for name in (config.data.train_split, config.data.eval_split):
        split = corpus.split(name)
        require_one_row(split, tokenizer, config.model.seq_len)
        yield f"{name}: {len(split):,} records"
    changed = folders.changed_data(resumed.folder, config, corpus) if resumed else None
    if resumed and changed and not resumed.new_data:
        raise UserError(f"{changed}; give the old text, or --new-data to go on with this one")


def _weights(config: Config) -> Iterator[str]:
    weights = open_weights(config.init_from)
    weights.require(config.model)
    yield f"{Path(config.init_from)}"
