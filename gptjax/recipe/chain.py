"""The steps of a recipe, done one after the other: what is done is left alone, what was cut off goes on, and what is
made from something else now is made again.

FOLDER/steps.json notes what each step was made from, and whether it is done.
"""

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.files import write_whole
from gptjax.recipe import compare, page
from gptjax.recipe.steps import (
    EVALUATION,
    FOLDER,
    NOTES,
    Comparison,
    Inputs,
    Recipe,
    Step,
    Todo,
    arguments,
    config_of,
    digest_of,
    identity,
    inputs_of,
    noted,
    todo,
    words_for,
    writes_files,
)
from gptjax.stages.launch import Resumed, train
from gptjax.stages.rewards import function_digest
from gptjax.train.lock import RunLock
from gptjax.train.processes import warn
from gptjax.train.run import CONFIG, going_on, open_run

HALF = ".half"  # at the end of the name of a folder that is still written to


def run(recipe: Recipe, root: Path, words: list[str]) -> int:
    """Do what is to be done, in order; returns the exit status (128 + the signal that stopped a training, or 0)."""
    own = words_for(recipe, words)
    root.mkdir(parents=True, exist_ok=True)
    lock = RunLock(root, warn)
    try:
        started = time.monotonic()
        for number, step in enumerate(recipe.steps, 1):
            title = f"[{number}/{len(recipe.steps) + 1}] {step.__name__}"
            try:
                status = _step(title, step, root, own.get(step.__name__, []))
            except UserError as error:
                raise UserError(f"step {step.__name__}: {error}") from error
            if status:
                return status
        _evaluate(f"[{len(recipe.steps) + 1}/{len(recipe.steps) + 1}] {EVALUATION}", recipe.comparison, root)
        written = page.write(recipe, root)
        print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes: {written}", flush=True)
    finally:
        lock.release()
    return 0


def _step(title: str, step: Step, root: Path, words: list[str]) -> int:
    config = None if writes_files(step) else config_of(step, root, words)
    inputs, folder = inputs_of(step, root, config), root / step.__name__
    there = (folder / CONFIG).is_file() if config else folder.is_dir()
    work = partial(_train, config, folder) if config else partial(_make, step, root)
    return _do(title, root / step.__name__, inputs, there, work)


def _do(title: str, folder: Path, inputs: Inputs, there: bool, work: Callable[[Todo], int]) -> int:
    """What is to become of a folder is said, done and noted; returns the exit status."""
    root, name = folder.parent, folder.name
    due = todo(noted(root).get(name), inputs, there)
    print(f"\n{title}: {due.why}", flush=True)
    if due.what == "skip":
        return 0
    _note(root, name, inputs, done=False)
    status = work(due)
    if not status:
        _note(root, name, inputs, done=True)
    return status


def _train(config: Config, folder: Path, due: Todo) -> int:
    if due.what == "make":
        return train(config, None, named=True, overwrite=True)
    path, saved = open_run(str(folder))
    return train(going_on(saved, config, path)[0], Resumed(path, saved))


def _make(step: Step, root: Path, due: Todo) -> int:
    """Files are written beside, and get their name when all of them are there."""
    folder, half = root / step.__name__, root / (step.__name__ + HALF)
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    try:
        step(**{FOLDER: half}, **{name: root / name for name in arguments(step)})
        shutil.rmtree(folder, ignore_errors=True)
        half.rename(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; mend that and start again") from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return 0


def _evaluate(title: str, asked: Comparison, root: Path) -> None:
    names = dict.fromkeys((*asked.models, *filter(None, [asked.reward])))
    inputs: Inputs = {f"step {name}": identity(root / name) for name in names} | {"comparison": repr(asked)}
    inputs["its questions"] = digest_of(root / asked.questions)
    if asked.gold:
        inputs["its gold function"] = function_digest(asked.gold)

    def work(_: Todo) -> int:
        compare.write(asked, root, root / EVALUATION)
        return 0

    _do(title, root / EVALUATION, inputs, (root / EVALUATION).is_dir(), work)


def _note(root: Path, name: str, inputs: Inputs, *, done: bool) -> None:
    notes = noted(root) | {name: {"inputs": inputs, "done": done}}
    write_whole(root / NOTES, json.dumps(notes, indent=1).encode())
