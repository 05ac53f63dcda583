"""Checkpoints: Orbax's manager, a position that the host keeps, and a fingerprint against silent damage."""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gptjax import bucket
from gptjax.config import Config, to_json
from gptjax.errors import UserError
from gptjax.sharding.rules import leaf_name
from gptjax.terminal import size_words
from gptjax.train.copies import one_copy, parts_of
from gptjax.train.damage import Damaged, agreed, reading, system_error
from gptjax.train.fingerprint import fingerprint
from gptjax.train.metrics import LOG, read_log
from gptjax.train.processes import first, is_first, together, warn

FOLDER = "checkpoints"
FORMAT = 2
HALF = "*.orbax-checkpoint-tmp*"  # what Orbax calls a checkpoint until it is whole


@dataclass(frozen=True)
class Position:
    """Where a run is; the schedules, the data order and dropout are functions of it."""

    step: int = 0
    tokens: int = 0
    data: tuple[int, ...] | None = None
    """One integer per data lane (see data.stream); None is the start."""
    passed: tuple[tuple[int, int], ...] = ()
    """(step to which the run went back, step up to which the rows were passed over then), for each time that it did."""


@dataclass(frozen=True)
class _Best:
    """Orbax's PreservationPolicy for the checkpoint with the lowest loss."""

    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = lowest(self.losses, [each.step for each in checkpoints])
        return [each.step == best for each in checkpoints]


class Checkpoints:
    """Saves and restores (state, position) of one run folder."""

    def __init__(self, run: Path, config: Config):
        self._run, self._folder = run, folder_of(run)
        self._config = config
        told = json.loads(first(lambda: json.dumps([*evaluated(run).items()]))) if config.train.keep_best else ()
        self._losses: dict[int, float] = dict(told)
        self._failed = False
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policy = ocp.checkpoint_managers
        keep: list[Any] = [policy.LatestN(self._config.train.keep_last)]
        if self._config.train.keep_best:
            keep.append(_Best(self._losses))
        if self._config.train.keep_every:
            keep.append(policy.EveryNSteps(self._config.train.keep_every))
        options = ocp.CheckpointManagerOptions(preservation_policy=policy.AnyPreservationPolicy(keep))
        together(lambda: _made_ready(self._folder))  # before Orbax, whose processes wait for each other
        # Compressed, as is Orbax's default, 1.5 GB of float32 get 8% smaller, for about 8 s of a core in the place of
        # 1.4 to 3.1, and up to a copy of them more in the host's memory.
        handlers = {"state": ocp.PyTreeCheckpointHandler(use_compression=False), "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def note(self, step: int, loss: float) -> None:
        """The loss of an evaluation at a step, by which the best checkpoint is found."""
        self._losses[step] = loss

    def save(self, state: Any, position: Position) -> bool:
        """Start writing in the background; False if this step is already saved.

        Raises UserError when the disk is full, or cannot be written for another reason.
        """
        if position.step in self._manager.all_steps():
            return False
        size, free = sizes(state)[0], bucket.free_bytes(self._folder)
        if size > free:
            at = self._folder / str(position.step)
            warn(f"checkpoint {at}: may need {size_words(size)}, and {size_words(free)} are free")
        if bucket.is_remote(self._folder):  # before the step can be gone on from: its log leads there
            together(lambda: bucket.send(self._run) if is_first() else None)
        prints = fingerprint(state)
        meta = {
            "format": FORMAT,
            "position": asdict(position),
            "arrays": {name: [*about, prints[name]] for name, about in shapes(state).items()},
            "config": to_json(self._config),
        }
        meta["digest"] = digest(meta)
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        with self._explained():
            return bool(self._manager.save(position.step, args=arguments, force=True))

    def wait(self) -> None:
        """Block until the background write is done; raises what it met."""
        with self._explained():
            self._manager.wait_until_finished()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A failed write as one line that says what is safe."""
        try:
            yield
        except Exception as error:
            if (system := system_error(error)) is None:
                raise
            self._failed = True
            safe = [step for step in self._manager.all_steps() if (self._folder / str(step)).is_dir()]
            last = f"the last complete one is step {max(safe)}" if safe else "none is complete yet"
            remedy = "free space" if system.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) else "mend that"
            raise UserError(
                f"checkpoint in {self._folder}: cannot write ({system.strerror}); {last}; {remedy} and resume"
            ) from error

    def restore(
        self,
        abstract: Any,
        warn: Callable[[str], None],
        most: float = math.inf,
        newer: Callable[[int], tuple[Any, Position] | None] = lambda _: None,
    ) -> tuple[Any, Position] | None:
        """The newest intact checkpoint, of step `most` at most, laid out as the shardings of `abstract` say; None
        before the first save. `newer` gives one from elsewhere that is newer than a step, if there is one.

        A damaged one is named through `warn`, set aside as STEP.damaged, and the one before it is used: all processes
        agree on it first. Raises UserError when damage left none, and where the arrays are not those of `abstract`.
        """
        every = json.loads(first(lambda: json.dumps(saved_steps(self._folder))))
        saved = [step for step in every if step <= most]
        for step in saved:
            if found := newer(step):
                return found
            try:
                return self._restore(step, abstract)
            except Damaged as error:
                warn(f"checkpoint {self._folder / str(step)} is damaged ({error}); using the one before it")
                self._set_aside(step)
        if found := newer(0):
            return found
        if saved or (not every and list(self._folder.glob("*.damaged*"))):
            raise UserError(f"{self._folder}: every checkpoint is damaged; start a new run")
        return None

    def _restore(self, step: int, abstract: Any) -> tuple[Any, Position]:
        state, meta = intact(self._folder / str(step), abstract)
        return state, position_of(meta)

    def forget(self, step: int) -> None:
        """Remove the checkpoints after a step, to which the run goes back, and what is known of them.

        The newest first: a run that is killed meanwhile goes on from one that led here, and comes here again.
        """
        self.wait()

        def remove() -> None:
            for later in saved_steps(self._folder) if is_first() else ():
                if later > step:
                    _discard(self._folder / str(later))

        together(remove)
        self._manager.reload()
        for later in [each for each in self._losses if each > step]:
            del self._losses[later]

    def _set_aside(self, step: int) -> None:
        folder = self._folder / str(step)
        names = (folder.with_name(f"{step}.damaged{'' if n == 1 else f'-{n}'}") for n in itertools.count(1))

        def rename() -> None:
            if is_first():
                try:
                    folder.rename(next(name for name in names if not name.exists()))
                except OSError as error:
                    raise UserError(
                        f"{folder}: cannot be set aside ({error.strerror}); mend that and resume"
                    ) from error

        together(rename)  # nobody lists the steps before it is gone
        self._manager.reload()

    def close(self) -> None:
        """End with what is being written. A failure that was raised before is not raised again: Orbax has one for each
        part of a checkpoint."""
        with suppress(UserError) if self._failed else nullcontext(), self._explained():
            self._manager.wait_until_finished()
            self._manager.close()


def position_of(meta: dict[str, Any]) -> Position:
    """That of what was saved beside the arrays."""
    told = meta["position"]
    passed = tuple((there, end) for there, end in told.get("passed", ()))
    return Position(told["step"], told["tokens"], None if told["data"] is None else tuple(told["data"]), passed)


def evaluated(run: Path) -> dict[int, float]:
    """The loss of each evaluation that the log of a run has, by step."""
    records = read_log(run / LOG) if (run / LOG).is_file() else []
    found = {r["step"]: r.get("loss") for r in records if r.get("kind") == "eval"}
    return {step: loss for step, loss in found.items() if isinstance(loss, float)}


def lowest(losses: dict[int, float], steps: Iterable[int]) -> int | None:
    """The one of these steps with the lowest loss, the first of equals; None where none was evaluated."""
    return min(sorted(set(steps) & losses.keys()), key=losses.__getitem__, default=None)


def restore_params(
    run: Path,
    abstract: Any,
    *,
    best: bool = False,
    step: int | None = None,
    at: Sequence[str] = ("params",),
    apart: Sequence[str] = (),
) -> Any:
    """The trained parameters alone of the checkpoint of a run that `chosen_step` says, or what it keeps `at` another
    place, laid out as the shardings of `abstract` say; without those whose names begin with a part that is `apart`.

    Raises UserError where the run has none, a damaged one, or one with other parameters.
    """
    folder = folder_of(run) / str(chosen_step(run, best=best, step=step))
    try:
        part = "/".join([*at, ""])
        restored, _ = intact(folder, _below(at, abstract), part, [f"{part}{name}/" for name in apart])
    except Damaged as error:
        raise UserError(
            f"checkpoint {folder} is damaged ({error}); gptjax train --resume {bucket.named(run)} goes back to the one "
            "before it"
        ) from error
    for name in at:
        restored = restored[name]
    return restored


def _below(at: Sequence[str], tree: Any) -> Any:
    for name in reversed(at):
        tree = {name: tree}
    return tree


def chosen_step(run: Path, *, best: bool = False, step: int | None = None) -> int:
    """The `step` that is asked for, or that of the newest checkpoint of a run, or of the `best` if any was evaluated;
    the same on every process.

    Raises UserError where there is no such checkpoint.
    """
    saved, name = json.loads(first(lambda: json.dumps(saved_steps(folder_of(run))))), bucket.named(run)
    if not saved:
        raise UserError(f"{name}: no checkpoint yet; gptjax train --resume {name}")
    if step is not None:
        if step not in saved:
            raise UserError(f"{name}: no checkpoint {step}; it has {', '.join(map(str, saved))}")
        return step
    return int(first(lambda: str((lowest(evaluated(run), saved) if best else None) or saved[0])))


def folder_of(run: Path) -> Any:
    """Where the checkpoints of a run are."""
    return bucket.home(run.absolute()) / FOLDER


def saved_steps(folder: Path, make: bool = False) -> list[int]:
    """The whole checkpoints in a folder, the newest first: a half one has another name. None where there is no folder,
    unless it is to be made. Raises UserError where it cannot be."""
    if bucket.is_remote(folder):
        return sorted((step for step, whole in bucket.steps(folder).items() if whole), reverse=True)
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        return sorted((int(name) for name in os.listdir(folder) if name.isdigit()), reverse=True)
    except FileNotFoundError:
        return []
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: not a folder; move it away") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be used ({error.strerror}); mend that and try again") from error


def _made_ready(folder: Path) -> None:
    """Without what saves that were cut off have left. Orbax would remove it beside the run, and still be at it when the
    next one opens the folder, whose save then misses what is gone."""
    if bucket.is_remote(folder):
        for step in [step for step, whole in bucket.steps(folder).items() if not whole] if is_first() else ():
            bucket.clear(folder / str(step))
        return
    saved_steps(folder, make=True)
    if is_first():
        for half in folder.glob(HALF):
            shutil.rmtree(half, ignore_errors=True)  # what stays is met, and told of, by the save of its step


def _discard(folder: Any) -> None:
    """Remove a checkpoint, which is none from the first moment on; what a kill leaves of it goes at the next start."""
    if bucket.is_remote(folder):
        bucket.remove(folder / bucket.COMMITTED)
        bucket.clear(folder)
    else:
        half = folder.parent / HALF.replace("*", folder.name, 1).strip("*")
        folder.rename(half)
        shutil.rmtree(half, ignore_errors=True)


def intact(folder: Path, abstract: Any, part: str = "", but: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """`read`, and every array is what was saved: all processes say so, or each raises."""
    if one := one_copy(abstract):  # it is read, and sent to where the others belong
        several, there = one
        state, meta = agreed(lambda: read(folder, there, part, but, reads=several.is_first))
        parts = parts_of(state) if several.is_first else None
        del state  # each array goes once it is sent
        state = several.spread(abstract, parts)
    else:
        state, meta = agreed(lambda: read(folder, abstract, part, but))
    agreed(lambda: unchanged(state, meta["arrays"]))  # each sees its own copy of what is replicated
    return state, meta


def read(
    folder: Path, abstract: Any, part: str = "", but: Sequence[str] = (), reads: bool = True
) -> tuple[Any, dict[str, Any]]:
    """The arrays of a checkpoint whose names begin with `part`, but with none of those, and what was saved beside them.
    Who gets the arrays elsewhere `reads` none.

    Raises Damaged, and UserError for the file system, another version, and arrays that are not those of `abstract`.
    """
    meta = read_meta(folder)
    found = meta["arrays"].items()
    saved = {name: about for name, about in found if name.startswith(part) and not name.startswith(tuple(but))}
    same_arrays(folder, shapes(abstract), saved)
    if not reads:
        return None, meta
    arguments = ocp.args.PyTreeRestore(
        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=bool(part)
    )
    with reading(folder, found=meta["arrays"]), closing(ocp.PyTreeCheckpointHandler()) as handler:
        # Orbax's handler itself: the manager around it ends in a barrier, where a process that fails is waited for.
        state = handler.restore(folder / "state", args=arguments)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
            raise KeyError("an array that is not in Orbax's own notes, and was left out")
        return state, meta


def read_meta(folder: Path) -> dict[str, Any]:
    """What was saved beside the arrays of a step. Raises Damaged, or UserError for another version's."""
    with reading(folder):
        meta = json.loads((folder / "meta" / "metadata").read_bytes())
    if not isinstance(meta, dict) or "format" not in meta:
        raise Damaged("its meta is not whole")
    if meta["format"] != FORMAT:
        raise UserError(
            f"{folder}: format {meta['format']}, this version reads {FORMAT}; go on with the version that wrote it"
        )
    if meta.pop("digest", None) != digest(meta):
        raise Damaged("its meta is not what was saved")
    return meta


def sizes(tree: Any) -> tuple[int, int]:
    """Bytes of the arrays of a tree, or of what stands for them; and of those parts of which this process holds a copy,
    which is what a save takes of its memory."""
    leaves = jax.tree.leaves(tree)
    held = 0
    for leaf in leaves:
        places = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        parts = len({str(place) for place in places})
        held += parts * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves), held


def digest(meta: dict[str, Any]) -> str:
    """Of what is saved beside the arrays, as JSON: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def shapes(tree: Any) -> dict[str, list[Any]]:
    """Name -> [shape, dtype] of every array, or of what stands for one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def same_arrays(folder: Path, wanted: dict[str, list[Any]], saved: dict[str, list[Any]]) -> None:
    """Raises UserError that names the first array in which a checkpoint is not what a config makes."""
    for name in sorted(wanted.keys() | saved.keys()):
        here, there = wanted.get(name), saved.get(name, [])[:2] or None
        if here != there:
            a, b = (f"{about[1]}{about[0]}" if about else "no such array" for about in (there, here))
            raise UserError(
                f"{folder}: {name}: the checkpoint has {a}, the config makes {b}; use the config of its run"
            )


def unchanged(tree: Any, saved: dict[str, list[Any]]) -> None:
    """Raises Damaged that names the first array which is not what was saved."""
    prints = fingerprint(tree)
    if changed := [name for name, mark in prints.items() if saved[name][2] != mark]:
        raise Damaged(
            f"{changed[0]} does not match the fingerprint taken when it was saved; {len(changed)} such arrays"
        )
