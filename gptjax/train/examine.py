"""What the checkpoints of a run hold, for whoever looks at them: read by NumPy on any machine, whatever layout wrote
them, one device's part of one array at a time."""

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import bucket
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.terminal import size_words
from gptjax.train.checkpoint import evaluated, folder_of, lowest, position_of, read_meta, saved_steps
from gptjax.train.damage import Damaged, reading
from gptjax.train.described import misdescribed, tree
from gptjax.train.fingerprint import fingerprint_of_parts
from gptjax.train.metrics import LOG, read_log
from gptjax.train.run import open_run

AGES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


# ls


def listing(run: str) -> str:
    """A line for each checkpoint of a run, the newest first. Raises UserError where it has none."""
    path, config, steps = _opened(run)
    train, losses = _trained(path), evaluated(path)
    rows = [("step", "tokens", "loss", "size", "age", "kept as")]
    for step in steps:
        folder = _folder(path, step)
        loss = f"{losses[step]:.4f}" if step in losses else f"{train[step]:.4f} (training)" if step in train else "-"
        try:
            tokens = f"{read_meta(folder)['position']['tokens']:,}"
            kept = ", ".join(_reasons(config, steps, losses, step)) or "not yet removed"
        except Damaged as error:
            tokens, kept = "-", f"damaged: {error}"
        with suppress(FileNotFoundError):  # a run that is under way has just removed it
            rows.append((f"{step:,}", tokens, loss, size_words(_size(folder)), _age(folder), kept))
    aside = sorted(folder_of(path).glob("*.damaged*"))
    rows += [(folder.name, "-", "-", size_words(_size(folder)), _age(folder), "set aside") for folder in aside]
    return _columns(rows)


def _reasons(config: Config, steps: Sequence[int], losses: dict[int, float], step: int) -> Iterator[str]:
    """Why a checkpoint stays, as checkpoint.py has it; steps: the newest first."""
    train = config.train
    if step in steps[: train.keep_last]:
        yield f"newest {train.keep_last}" if train.keep_last > 1 else "newest"
    if train.keep_best and step == lowest(losses, steps):
        yield "best"
    if train.keep_every and step % train.keep_every == 0:
        yield f"every {train.keep_every:,}"


def _trained(run: Path) -> dict[int, float]:
    """The training loss of the steps that end a window, by step."""
    records = read_log(run / LOG) if (run / LOG).is_file() else []
    return {r["step"]: r["loss"] for r in records if r.get("kind") == "train" and isinstance(r.get("loss"), float)}


# verify


@dataclass(frozen=True)
class Verdict:
    """Of one checkpoint."""

    step: int
    arrays: int
    size: int
    """Bytes of the arrays that were read."""
    wrong: tuple[str, ...]
    """What is not as it was saved, with the file where one can be told."""

    def __str__(self) -> str:
        if not self.wrong:
            return f"step {self.step:,}: whole, {self.arrays} arrays, {size_words(self.size)}"
        more = f"; {len(self.wrong)} such things" if len(self.wrong) > 1 else ""
        return f"step {self.step:,}: damaged: {self.wrong[0]}{more}"


def verify(run: str, step: int | None = None) -> Iterator[Verdict]:
    """Every array of every checkpoint, or of one, read and compared with its fingerprint. Raises UserError for what
    keeps this process from reading, which is no damage."""
    path, _, steps = _opened(run, step)
    for folder in (_folder(path, each) for each in steps):
        verdict = _verdict(folder, int(folder.name))
        if not verdict.wrong or folder.is_dir():  # else a run that is under way has just removed it
            yield verdict


def _verdict(folder: Path, step: int) -> Verdict:
    try:
        arrays = read_meta(folder)["arrays"]
    except Damaged as error:
        return Verdict(step, 0, 0, (f"meta/metadata: {error}",))
    wrong = [f"{file}: not what was saved"] if (file := misdescribed(folder / "state", arrays)) else []
    zarr = "zarr"
    if not file:
        with reading(folder):
            zarr = "zarr3" if tree(folder / "state").get("use_zarr3") else "zarr"
    size = 0
    for name, (shape, dtype, mark) in arrays.items():
        try:
            with reading(folder):
                found = fingerprint_of_parts(_parts(folder / "state", name, shape, zarr))
            if found != mark:
                wrong.append(f"{name}: does not match the fingerprint taken when it was saved")
            size += num_bytes(shape, dtype)
        except Damaged as error:
            wrong.append(f"{_named_in(folder, error)}{name}: {error}")
    return Verdict(step, len(arrays), size, tuple(wrong))


def _parts(state: Path, name: str, shape: Sequence[int], zarr: str) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """The pieces in which an array was written, each with its place. Raises Damaged where it has another shape."""
    import tensorstore as ts  # here: it takes 0.2 s

    kvstore = {"driver": "ocdbt", "base": bucket.store(state), "path": f"{name.replace('/', '.')}/"}
    store = ts.open({"driver": zarr, "kvstore": kvstore}, open=True, read=True).result()
    if list(store.shape) != list(shape):
        raise Damaged(f"has the shape {list(store.shape)}, {list(shape)} was saved")
    piece: Sequence[Any] = store.chunk_layout.read_chunk.shape or shape
    for begin in itertools.product(*(range(0, size, length) for size, length in zip(shape, piece, strict=True))):
        place = tuple(slice(a, min(a + b, size)) for a, b, size in zip(begin, piece, shape, strict=True))
        yield begin, store[place].read().result()


def _named_in(folder: Path, error: BaseException) -> str:
    """The file of a checkpoint that an error is about, as `FILE: `; empty where it names none."""
    said = f"{error} {error.__cause__}"
    return next((f"{name}: " for name in bucket.sizes(folder) if str(folder / name) in said), "")


# inspect


def inspect(run: str, step: int | None = None) -> str:
    """Position, config and arrays of a checkpoint, the newest unless a step is named. Raises UserError where there is
    none, or it is damaged."""
    path, _, steps = _opened(run, step)
    folder = _folder(path, steps[0])
    try:
        meta = read_meta(folder)
    except Damaged as error:
        raise UserError(f"{folder}: damaged ({error}); gptjax checkpoint verify {run}") from None
    position, config = position_of(meta), json.loads(meta["config"])
    lanes = position.data or ()
    rows = [("array", "dtype", "shape", "size")]
    for name, (shape, dtype, _) in sorted(meta["arrays"].items()):
        rows.append((name, dtype, str(shape), size_words(num_bytes(shape, dtype))))
    total = sum(num_bytes(shape, dtype) for shape, dtype, _ in meta["arrays"].values())
    numbers = sum(math.prod(shape) for name, (shape, *_) in meta["arrays"].items() if name.startswith("params/"))
    lines = [
        f"{folder}: step {position.step:,}, {position.tokens:,} tokens",
        *(f"  gone back  to step {there:,}, over the rows up to step {end:,}" for there, end in position.passed),
        f"  data       {len(lanes)} lanes at {', '.join(map(str, lanes[:8]))}{', ...' if len(lanes) > 8 else ''}",
        f"  arrays     {len(meta['arrays'])} of {size_words(total)}, {numbers:,} trained parameters",
        f"  on disk    {size_words(_size(folder))}",
    ]
    sections = {name: value for name, value in config.items() if isinstance(value, dict)}
    lines.append(f"  config     {_facts({k: v for k, v in config.items() if k not in sections})}")
    lines += [f"  {name:<11}{_facts(values)}" for name, values in sections.items()]
    return "\n".join([*lines, "", _columns(rows)])


def _facts(values: dict[str, Any]) -> str:
    shown = {name: value if str(value).isprintable() else repr(value) for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value not in ("", None))


# What they share


def _opened(run: str, step: int | None = None) -> tuple[Path, Config, list[int]]:
    """Run folder, config and steps, the newest first, or the one that is asked for."""
    path, config = open_run(run)
    steps = saved_steps(folder_of(path))
    if not steps:
        raise UserError(f"{run}: no checkpoint yet; gptjax train --resume {run}")
    if step is not None and step not in steps:
        raise UserError(f"--step {step}: {run} has {', '.join(map(str, steps))}")
    return path, config, steps if step is None else [step]


def _folder(run: Path, step: int) -> Path:
    return folder_of(run) / str(step)  # type: ignore[no-any-return]


def num_bytes(shape: Sequence[int], dtype: str) -> int:
    """Of an array in memory."""
    import ml_dtypes  # NumPy's names are these, too, once it is imported

    kind = getattr(ml_dtypes, dtype, None) or dtype
    return math.prod(shape) * np.dtype(kind).itemsize


def _size(folder: Path) -> int:
    return sum(bucket.sizes(folder).values())


def _age(folder: Path) -> str:
    seconds = max(0.0, time.time() - bucket.modified(folder))
    unit, length = next((pair for pair in AGES if seconds >= pair[1]), AGES[-1])
    return f"{seconds / length:.0f} {unit}"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
