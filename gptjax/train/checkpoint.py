"""Checkpoints: Orbax's manager, a position that the host keeps, and a fingerprint against silent damage."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gptjax.config import Config, to_json
from gptjax.errors import UserError

FOLDER = "checkpoints"
FORMAT = 1
CHANGED = "its arrays do not match the fingerprint taken when they were saved"


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
        return ocp.CheckpointManager(self._folder, options=options)

    def save(self, state: Any, position: Position) -> bool:
        """Start writing in the background; False if this step is already saved.

        Raises UserError when the disk is full.
        """
        if position.step in self._manager.all_steps():
            return False
        meta = {
            "format": FORMAT,
            "position": asdict(position),
            "fingerprint": fingerprint(state),
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

        A damaged one is named through `warn`, set aside as STEP.damaged, and the one before it is used.
        Raises UserError when damage left none.
        """
        saved = sorted(self._manager.all_steps(), reverse=True)
        for step in saved:
            try:
                return self._restore(step, abstract)
            except UserError:
                raise
            except Exception as error:  # whatever a broken file makes Orbax, TensorStore or JSON raise
                damaged = f"checkpoint {self._folder / str(step)} is damaged ({_first_line(error)})"
                warn(f"{damaged}; using the one before it")
                self._set_aside(step)
        if saved or list(self._folder.glob("*.damaged")):
            raise UserError(f"{self._folder}: every checkpoint is damaged; start a new run")
        return None

    def _restore(self, step: int, abstract: Any) -> tuple[Any, Position]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta["format"] != FORMAT:
            raise UserError(f"{self._folder / str(step)}: format {meta['format']}, this version reads {FORMAT}")
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state = self._manager.restore(step, args=arguments)["state"]
        if fingerprint(state) != meta["fingerprint"]:
            raise ValueError(CHANGED)
        data = meta["position"].pop("data")
        return state, Position(**meta["position"], data=None if data is None else tuple(data))

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            folder = self._folder / str(step)
            folder.rename(folder.with_name(f"{step}.damaged"))
        self._manager.close()
        self._manager = self._open()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def restore_params(run: Path, abstract: Any) -> Any:
    """The parameters alone of the newest checkpoint of a run, laid out as the shardings of `abstract` say.

    Raises UserError where the run has none, or a damaged one.
    """
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager((run / FOLDER).absolute(), options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{run}: no checkpoint yet; gptjax train --resume {run}")
        item = {"params": abstract}
        restore = ocp.checkpoint_utils.construct_restore_args(item)
        arguments = ocp.args.PyTreeRestore(item, restore_args=restore, partial_restore=True)
        both = ocp.args.Composite(state=arguments, meta=ocp.args.JsonRestore())
        try:
            restored = manager.restore(step, args=both)
            params, written = restored["state"]["params"], restored["meta"]["fingerprint"]
            if fingerprint(params) != written[: len(jax.tree.leaves(params))]:  # they are the state's first leaves
                raise ValueError(CHANGED)
        except Exception as error:  # whatever a broken file makes Orbax, TensorStore or JSON raise
            damaged = f"checkpoint {run / FOLDER / str(step)} is damaged ({_first_line(error)})"
            raise UserError(f"{damaged}; gptjax train --resume {run} goes back to the one before it") from error
        return params


def fingerprint(state: Any) -> list[int]:
    """One checksum per array: its 32-bit words summed modulo 2³², equal on every layout, changed by any flipped bit."""

    @jax.jit
    def sums(leaves: list[jax.Array]) -> jax.Array:
        words = [jax.lax.bitcast_convert_type(leaf, jnp.uint32) for leaf in leaves]
        return jnp.stack([jnp.sum(w, dtype=jnp.uint32) for w in words])

    return [int(x) for x in np.asarray(sums(jax.tree.leaves(state)))]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _storage_reason(error: BaseException) -> str | None:
    """Why the storage refused a write, None if the error is of another kind."""
    reasons = [os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)]
    return next((reason for reason in reasons if reason in _chain(error)), None)


def _chain(error: BaseException | None) -> str:
    """The messages of an exception and of all its causes: the reason sits below Orbax's own."""
    texts = []
    while error is not None:
        texts += [str(error), *getattr(error, "__notes__", [])]
        error = error.__cause__ or error.__context__
    return " ".join(texts)
