"""Checkpoints: Orbax's manager, a position that the host keeps, and a fingerprint against silent damage.

Damage is what a file tells of itself: it is missing, cannot be decoded, or its arrays are not those that were saved.
Everything else that goes wrong in reading, of the file system, of memory or of a config that asks for other arrays,
is an error of this start, and leaves the checkpoints as they are.
"""

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from gptjax.config import Config, to_json
from gptjax.errors import UserError
from gptjax.sharding.rules import leaf_name
from gptjax.train.fingerprint import fingerprint
from gptjax.train.processes import every, is_first, together

X = TypeVar("X")

FOLDER = "checkpoints"
FORMAT = 2
# How TensorStore begins the message of a read that failed because of what it read.
DECODING = ("DATA_LOSS", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE", "INVALID_ARGUMENT")


class Damaged(Exception):
    """A checkpoint whose files are not whole, or not what was saved; the message says what is wrong."""


@dataclass(frozen=True)
class Position:
    """Where a run is; the schedules, the data order and dropout are functions of it."""

    step: int = 0
    tokens: int = 0
    data: tuple[int, ...] | None = None
    """One integer per data lane (see data.stream); None is the start."""


class Checkpoints:
    """Saves and restores (state, position) of one run folder."""

    def __init__(self, run: Path, config: Config):
        self._folder = (run / FOLDER).absolute()
        self._config = config
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policy = ocp.checkpoint_managers
        keep = [policy.LatestN(self._config.train.keep_last)]
        if self._config.train.keep_every:
            keep.append(policy.EveryNSteps(self._config.train.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
        )
        if self._folder.exists() and not self._folder.is_dir():
            raise UserError(f"{self._folder}: not a folder; move it away")
        return ocp.CheckpointManager(self._folder, options=options)

    def save(self, state: Any, position: Position) -> bool:
        """Start writing in the background; False if this step is already saved.

        Raises UserError when the disk is full.
        """
        if position.step in self._manager.all_steps():
            return False
        prints = fingerprint(state)
        meta = {
            "format": FORMAT,
            "position": asdict(position),
            "arrays": {name: [*about, prints[name]] for name, about in shapes(state).items()},
            "config": to_json(self._config),
        }
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
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
            if (reason := _storage_reason(error)) is None:
                raise
            safe = [step for step in self._manager.all_steps() if (self._folder / str(step)).is_dir()]
            last = f"the last complete one is step {max(safe)}" if safe else "none is complete yet"
            raise UserError(
                f"checkpoint in {self._folder}: cannot write ({reason}); {last}; free space and resume"
            ) from error

    def restore(self, abstract: Any, warn: Callable[[str], None]) -> tuple[Any, Position] | None:
        """The newest intact checkpoint, laid out as the shardings of `abstract` say; None before the first save.

        A damaged one is named through `warn`, set aside as STEP.damaged, and the one before it is used: all processes
        agree on it first. Raises UserError when damage left none, and where the arrays are not those of `abstract`.
        """
        saved = sorted(self._manager.all_steps(), reverse=True)
        for step in saved:
            try:
                return self._restore(step, abstract)
            except Damaged as error:
                warn(f"checkpoint {self._folder / str(step)} is damaged ({error}); using the one before it")
                self._set_aside(step)
        if saved or list(self._folder.glob("*.damaged*")):
            raise UserError(f"{self._folder}: every checkpoint is damaged; start a new run")
        return None

    def _restore(self, step: int, abstract: Any) -> tuple[Any, Position]:
        state, meta = _agreed(lambda: self._read(step, abstract))
        _agreed(lambda: unchanged(state, meta["arrays"]))
        data = meta["position"].pop("data")
        return state, Position(**meta["position"], data=None if data is None else tuple(data))

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        with reader(self._folder) as manager:
            meta = read_meta(manager, step)
            same_arrays(self._folder / str(step), shapes(abstract), meta["arrays"])
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            with reading(self._folder / str(step)):
                return manager.restore(step, args=arguments)["state"], meta

    def _set_aside(self, step: int) -> None:
        if is_first():
            folder = self._folder / str(step)
            names = (folder.with_name(f"{step}.damaged{'' if n == 1 else f'-{n}'}") for n in itertools.count(1))
            folder.rename(next(name for name in names if not name.exists()))
        every("")  # nobody lists the steps before it is gone
        self._manager.close()
        self._manager = self._open()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def restore_params(run: Path, abstract: Any) -> Any:
    """The parameters alone of the newest checkpoint of a run, laid out as the shardings of `abstract` say.

    Raises UserError where the run has none, a damaged one, or one with other parameters.
    """
    with reader((run / FOLDER).absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{run}: no checkpoint yet; gptjax train --resume {run}")
        item, folder = {"params": abstract}, run / FOLDER / str(step)
        try:
            meta = read_meta(manager, step)
            saved = {name: about for name, about in meta["arrays"].items() if name.startswith("params/")}
            same_arrays(folder, shapes(item), saved)
            restore = ocp.checkpoint_utils.construct_restore_args(item)
            arguments = ocp.args.PyTreeRestore(item, restore_args=restore, partial_restore=True)
            with reading(folder):
                restored = manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
            unchanged(restored, saved)
        except Damaged as error:
            raise UserError(
                f"checkpoint {folder} is damaged ({error}); gptjax train --resume {run} goes back to the one before it"
            ) from error
        return restored["params"]


def reader(folder: Path) -> ocp.CheckpointManager:
    """A manager that reads for this process alone: one that finds damage must not leave the others waiting in Orbax."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
    return ocp.CheckpointManager(folder, options=options)


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What was saved beside the arrays of a step. Raises Damaged, or UserError for another version's."""
    folder = Path(manager.directory) / str(step)
    with reading(folder):
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if not isinstance(meta, dict) or "format" not in meta:
        raise Damaged("its meta is not whole")
    if meta["format"] != FORMAT:
        raise UserError(
            f"{folder}: format {meta['format']}, this version reads {FORMAT}; go on with the version that wrote it"
        )
    return meta


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


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Sorts what reading a checkpoint can meet: Damaged, a UserError for the file system, the rest as it is."""
    try:
        yield
    except (Damaged, UserError):
        raise
    except Exception as error:  # whatever Orbax, TensorStore or JSON raise, it is one of three kinds
        causes = [*_causes(error)]
        if any(isinstance(cause, FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError) for cause in causes):
            raise Damaged(_first_line(error)) from error
        if system := next((cause for cause in causes if isinstance(cause, OSError)), None):
            reason = system.strerror or _first_line(system)
            raise UserError(f"{folder}: cannot be read ({reason}); nothing is changed, mend that and resume") from error
        if any(str(cause).startswith(DECODING) for cause in causes) or _lacks_item(error):
            raise Damaged(_first_line(causes[-1])) from error
        raise


def _lacks_item(error: Exception) -> bool:
    return isinstance(error, KeyError) and "was not found in the checkpoint" in str(error)


def _agreed(action: Callable[[], X]) -> X:
    """`action` on every process. Damage that one of them finds is damage for all, and an error is an error for all."""
    damage = ""

    def run() -> X | None:
        nonlocal damage
        try:
            return action()
        except Damaged as error:
            damage = str(error)
            return None

    result = together(run)
    if found := next(filter(None, every(damage)), ""):
        raise Damaged(found)
    return result  # type: ignore[return-value]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _storage_reason(error: BaseException) -> str | None:
    """Why the storage refused a write, None if the error is of another kind."""
    reasons = [os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)]
    return next((reason for reason in reasons if reason in _chain(error)), None)


def _chain(error: BaseException) -> str:
    """The messages of an exception and of all its causes: the reason sits below Orbax's own."""
    return " ".join(" ".join([str(cause), *getattr(cause, "__notes__", [])]) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
