"""Checkpoints on each host's own disk, beside those of the run folder: cheap enough for every few minutes, and worth
nothing once a host is lost.

Each process writes the parts of the state that its devices hold, into FOLDER/RUN/STEP/PROCESS. A run goes on from the
newest step that all of them hold, where it is newer than what the run folder has; of processes that hold the same parts
one is enough.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.errors import UserError
from gptjax.files import sync_folder, write_whole
from gptjax.sharding.rules import leaf_name
from gptjax.terminal import size_words
from gptjax.train.checkpoint import Position, digest, position_of, shapes, sizes, unchanged
from gptjax.train.copies import Parts, copies, whole
from gptjax.train.damage import Damaged, agreed
from gptjax.train.fingerprint import fingerprint
from gptjax.train.processes import every, together

FORMAT = 1
META, ARRAYS = "meta.json", "arrays"
HALF = ".half"
"""Ends the name of one that is not whole."""
Place = tuple[tuple[int, int], ...]
"""Begin and end of a part along each dimension of its array."""
SHARED = ("arrays", "position")
"""What all processes note alike."""
NONE = "", "has none"
Held = Mapping[int, tuple[str, str]]
"""Of one process: step -> (the mark of what was saved, the same on all; empty where it is of no use here, and why)."""


class Local:
    """Saves and restores (state, position) of one run on this host. Without a folder it holds nothing.

    Raises UserError where the folder cannot be made.
    """

    def __init__(self, folder: str, run: str):
        """run: what tells the run from all others that use the folder."""
        self._folder = Path(folder) / run if folder else None
        self._own = str(jax.process_index())
        self._thread: threading.Thread | None = None
        self._used = 0
        self._bad: set[int] = set()
        if made := self._folder:
            together(lambda: self._make_ready(made))

    def _make_ready(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"train.local_dir: {folder}: cannot be made ({error.strerror}); name another") from None
        for half in folder.glob(f"*/{self._own}{HALF}"):
            shutil.rmtree(half, ignore_errors=True)  # what stays is met, and told of, by the save of its step

    def _at(self, step: int) -> Path:
        assert self._folder
        return self._folder / str(step) / self._own

    def _steps(self) -> list[int]:
        """Those of which this process has its part, whole."""
        try:
            found = [*self._folder.glob(f"*/{self._own}")] if self._folder else []
        except OSError:  # of a disk that is gone, which the next save will tell of
            return []
        return [int(path.parent.name) for path in found if path.parent.name.isdigit()]

    def facts(self, abstract: Any, interval: int) -> dict[str, str]:
        """What the saves take, and which one the run goes on from, in words."""
        if self._folder is None:
            return {}
        size, free = sizes(abstract)[1], shutil.disk_usage(self._folder).free
        told = f"every {interval:,} steps {size_words(size)} a process, two kept in {self._folder}; "
        told += f"{size_words(free)} free there"
        return {"local": f"going on from step {self._used:,} here; {told}" if self._used else told}

    def save(self, state: Any, position: Position) -> bool:
        """Copy this process's parts, and start to write them in the background; False if all have this step already.

        A disk that is full or fails is told of, and no error: the run folder's checkpoints are those that count.
        """
        self.wait()
        # Nobody is more than one save behind. One that all hold stays until the next is whole on this host.
        common = set.intersection(*(set(json.loads(told)) for told in every(json.dumps(self._steps()))))
        if position.step in common:
            return False
        for step in self._steps():
            if step != max(common, default=None):
                self._remove(step)
        prints = fingerprint(state)
        meta: dict[str, Any] = {
            "format": FORMAT,
            "processes": jax.process_count(),
            "position": asdict(position),
            "arrays": {name: [*about, prints[name]] for name, about in shapes(state).items()},
        }
        parts = [*_parts(state)]
        for _, _, part in parts:
            part.copy_to_host_async()
        copied = [(name, place, _copied(part)) for name, place, part in parts]
        self._thread = threading.Thread(
            target=self._write, args=(position.step, meta, copied), name="local checkpoint", daemon=True
        )
        self._thread.start()
        return True

    def _write(self, step: int, meta: dict[str, Any], parts: list[tuple[str, Place, np.ndarray]]) -> None:
        to = self._at(step)
        half = to.with_name(to.name + HALF)
        try:
            half.mkdir(parents=True)
            meta["parts"], size = [], 0
            with (half / ARRAYS).open("xb") as file:
                while parts:  # each goes once it is written
                    name, place, part = parts.pop(0)
                    meta["parts"].append([name, place, size])
                    size += file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
                file.flush()
                os.fsync(file.fileno())
            meta["size"] = size
            meta["digest"] = digest(meta)
            write_whole(half / META, json.dumps(meta).encode())
            half.rename(to)
            sync_folder(to.parent)
        except OSError as error:
            shutil.rmtree(half, ignore_errors=True)
            said = f"local checkpoint {to}: cannot be written ({error.strerror}); training goes on without it"
            print(f"warning: {said}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Block until the background write is done."""
        if self._thread:
            self._thread.join()
        self._thread = None

    def restore(self, abstract: Any, warn: Callable[[str], None], after: int) -> tuple[Any, Position] | None:
        """The newest step after `after` of which every process has its part intact, laid out as the shardings of
        `abstract` say; None where there is none. All processes agree. What is newer, and of no use, is named through
        `warn`."""
        if self._folder is None:
            return None
        mine = {step: self._held(step, abstract) for step in self._steps() if step > after and step not in self._bad}
        every_ones = map(json.loads, every(json.dumps(mine)))
        held = [{int(step): (mark, why) for step, (mark, why) in one.items()} for one in every_ones]
        several = copies(abstract)
        groups = several.groups if several else tuple((process,) for process in range(len(held)))
        step = newest(held, groups)
        above = max((each for steps in held for each in steps if each > (step or 0)), default=0)
        if above:
            warn(f"local checkpoint {self._folder / str(above)} is not used: {why_not(held, above)}")
        if step is None:
            return None
        here = self._folder / str(step)
        have = [bool(steps.get(step, NONE)[0]) for steps in held]
        try:
            if all(have):
                parts, meta = agreed(lambda: self._read(step, abstract))
                state = whole(abstract, parts)
            else:
                assert several
                warn(f"local checkpoint {here}: {why_not(held, step)}; who has the same parts sends them")
                reads = jax.process_index() in (next(each for each in group if have[each]) for group in groups)
                read, told = agreed(lambda: self._read(step, abstract) if reads else (None, {}))
                notes = json.dumps({name: told[name] for name in SHARED}) if told else ""
                meta = json.loads(next(filter(None, every(notes))))
                state = several.spread(abstract, read)
            agreed(lambda: unchanged(state, meta["arrays"]))
        except Damaged as error:
            warn(f"local checkpoint {here} is damaged ({error}); using the one before it")
            self._bad.add(step)
            return self.restore(abstract, warn, after)
        self._used = step
        return state, position_of(meta)

    def _held(self, step: int, abstract: Any) -> tuple[str, str]:
        try:
            meta = self._meta(step)
        except Damaged as error:
            return "", f"has a damaged one ({error})"
        if meta["processes"] != jax.process_count():
            return "", f"has one of {meta['processes']} processes"
        there = _table(meta)
        wanted = {(name, place) for name, leaf in _leaves(abstract) for place in _devices(leaf).values()}
        if {name: about[:2] for name, about in meta["arrays"].items()} != shapes(abstract) or wanted - there.keys():
            return "", "has other parts of the arrays, as of another layout"
        return digest({name: meta[name] for name in SHARED}), ""

    def _meta(self, step: int) -> dict[str, Any]:
        try:
            meta = json.loads((self._at(step) / META).read_bytes())
            size = (self._at(step) / ARRAYS).stat().st_size
        except (OSError, ValueError) as error:
            raise Damaged(str(error)) from error
        if not isinstance(meta, dict) or meta.pop("digest", None) != digest(meta) or meta["format"] != FORMAT:
            raise Damaged("its meta is not what was saved")
        if size != meta["size"]:
            raise Damaged(f"{ARRAYS} has {size:,} bytes, {meta['size']:,} were saved")
        return meta

    def _read(self, step: int, abstract: Any) -> tuple[Parts, dict[str, Any]]:
        """The parts of the arrays, and what was saved beside them. Raises Damaged."""
        meta = self._meta(step)
        there = _table(meta)
        parts: Parts = []
        try:
            with (self._at(step) / ARRAYS).open("rb") as file:
                for name, leaf in _leaves(abstract):
                    on = _devices(leaf)
                    read = {place: _part(file, there[name, place], place, leaf.dtype) for place in {*on.values()}}
                    parts.append([jax.device_put(read[place], device, may_alias=False) for device, place in on.items()])
        except OSError as error:
            raise Damaged(str(error)) from error
        return parts, meta

    def forget(self, step: int) -> None:
        """Remove this process's parts of the steps after one, from which the run goes on."""
        self.wait()
        for later in self._steps():
            if later > step:
                self._remove(later)

    def _remove(self, step: int) -> None:
        shutil.rmtree(self._at(step), ignore_errors=True)
        with suppress(OSError):  # others have their parts there
            self._at(step).parent.rmdir()

    def close(self) -> None:
        self.wait()
        with suppress(OSError):  # it holds nothing only after the end
            if self._folder:
                self._folder.rmdir()


def newest(held: Sequence[Held], groups: Sequence[Sequence[int]]) -> int | None:
    """The newest step that has the same mark wherever it is held, and is held by one at least of each group of
    processes, whose parts are the same; None where there is none."""

    def marks(step: int, group: Iterable[int]) -> set[str]:
        return {held[process].get(step, NONE)[0] for process in group} - {""}

    steps = {step for one in held for step in one}
    alike = [step for step in steps if len(marks(step, range(len(held)))) == 1]
    return max((step for step in alike if all(marks(step, group) for group in groups)), default=None)


def why_not(held: Sequence[Held], step: int) -> str:
    """Why a step that some hold cannot be used."""
    for process, steps in enumerate(held):
        mark, why = steps.get(step, NONE)
        if not mark:
            return f"process {process} {why}"
    return "what the processes have there is not of one state"


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield leaf_name(path), leaf


def _parts(tree: Any) -> Iterator[tuple[str, Place, jax.Array]]:
    """Each different part of each array that the devices of this process hold."""
    for name, leaf in _leaves(tree):
        different = {_place(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
        yield from ((name, place, part) for place, part in different.items())


def _devices(leaf: Any) -> dict[Any, Place]:
    """Which part of an array, or of what stands for one, each device of this process has."""
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    return {device: _place(index, leaf.shape) for device, index in places.items()}


def _place(index: Sequence[slice], shape: Sequence[int]) -> Place:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _copied(part: jax.Array) -> np.ndarray:
    """On the host. The next step writes over the memory of a device, which for a CPU is what NumPy would see."""
    on_cpu = all(device.platform == "cpu" for device in part.devices())
    return np.array(part, copy=True) if on_cpu else np.asarray(part)


def _table(meta: dict[str, Any]) -> dict[tuple[str, Place], int]:
    """Where in the file each part begins."""
    return {(name, tuple((a, b) for a, b in place)): offset for name, place, offset in meta["parts"]}


def _part(file: Any, offset: int, place: Place, dtype: Any) -> np.ndarray:
    part = np.empty([b - a for a, b in place], dtype)
    file.seek(offset)
    if file.readinto(part.reshape(-1).view(np.uint8).data) != part.nbytes:
        raise Damaged(f"{ARRAYS} is cut short")
    return part
