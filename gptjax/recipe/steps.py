"""What a recipe is, and which of its steps have still to be done.

A step is a function. Its name is that of a folder in the recipe's; its arguments are the folders of the steps of those
names, which come first. One that has an argument `folder` writes files into that; any other gives the config of a
training, whose run folder it becomes.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gptjax.config import Config, PolicyConfig, RewardedConfig, validate
from gptjax.config.fields import OnResume, walk
from gptjax.config.load import made_by, override, pairs, told
from gptjax.config.saved import get
from gptjax.data.texts import build
from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.stages.rewards import function_digest, is_function
from gptjax.terminal import Progress
from gptjax.train.checkpoint import FOLDER as CHECKPOINTS
from gptjax.train.checkpoint import saved_steps
from gptjax.train.run import CONFIG, open_run

Step = Callable[..., Any]
Inputs = dict[str, str]
FOLDER, NOTES, EVALUATION = "folder", "steps.json", "evaluation"
MATTERS = ("total_tokens", "total_steps", "epochs", "eval_interval", "eval_batches", "keep_best")
"""Of a training's fields that a run which goes on may change, those that change which weights come of it."""


@dataclass(frozen=True)
class Comparison:
    """The questions that several models answer side by side."""

    models: tuple[str, ...]
    """Steps, each of which is held against the one before."""
    questions: str
    """A file of prompts, a path from the recipe's folder."""
    gold: str = ""
    """FILE.py:NAME or MODULE:NAME: what a reply is worth, where that can be computed."""
    reward: str = ""
    """The step of a reward model, which judges too."""
    replies: int = 4
    """To each question, drawn at temperature 1."""
    most: int = 200
    """Questions, the first of the file."""
    max_tokens: int = 128
    """Of a reply."""


@dataclass(frozen=True)
class Recipe:
    """A chain of steps."""

    name: str
    steps: tuple[Step, ...]
    comparison: Comparison


@dataclass(frozen=True)
class Todo:
    """What is to become of a step."""

    what: Literal["skip", "resume", "make"]
    why: str


def load_recipe(path: str) -> Recipe:
    """The recipe of a file that defines `recipe() -> Recipe`. Raises UserError for another file, and for a chain that
    does not hold together."""
    found = made_by(path, "recipe")
    if not isinstance(found, Recipe):
        raise UserError(f"recipe {path}: must define recipe() that returns a gptjax.recipe.Recipe")
    known: list[str] = []
    for step in found.steps:
        name = step.__name__
        for other in arguments(step):
            if other not in known:
                raise UserError(f"recipe {path}: step {name} needs {other}, and no step before it has that name")
        if name in known:
            raise UserError(f"recipe {path}: two steps are called {name}")
        known.append(name)
    for name in (*found.comparison.models, *filter(None, [found.comparison.reward])):
        if name not in known:
            raise UserError(f"recipe {path}: comparison: no step is called {name}; choose from {', '.join(known)}")
    return found


def arguments(step: Step) -> list[str]:
    """The steps that a step is made from."""
    return [name for name in inspect.signature(step).parameters if name != FOLDER]


def writes_files(step: Step) -> bool:
    return FOLDER in inspect.signature(step).parameters


def words_for(recipe: Recipe, words: list[str]) -> dict[str, list[str]]:
    """Words of the command line by the step whose fields they set, --sft.train.epochs 2. Raises UserError for those of
    no training."""
    found: dict[str, list[str]] = {step.__name__: [] for step in recipe.steps if not writes_files(step)}
    for flag, value in pairs(words):
        name, _, field = flag[2:].partition(".")
        if name not in found or not field:
            raise UserError(f"{flag}: begin with the training that it is for: --{'., --'.join(found)}.")
        found[name] += [f"--{field}", value]
    return found


def config_of(step: Step, root: Path, words: list[str]) -> Config:
    """The config of a training step, once those before it are done."""
    file = Path(inspect.getsourcefile(step) or "")
    with told(file):
        config = step(**{name: root / name for name in arguments(step)})
    if not isinstance(config, Config):
        raise UserError("must give a config, or have an argument `folder` to write into")
    return replace(validate(override(config, words)), run=str(root / step.__name__))


def inputs_of(step: Step, root: Path, config: Config | None) -> Inputs:
    """What comes of a step depends on these, by their names."""
    before = [root / name for name in arguments(step)]
    if config is not None:  # what a training reads of files it knows by their contents, below
        before = [folder for folder in before if (folder / CONFIG).is_file()]
    made = {f"step {folder.name}": identity(folder) for folder in before}
    if config is None:
        return made | {"its code": _digest(inspect.getsource(inspect.getmodule(step) or step).encode())}
    with Progress() as progress:
        made["its text"] = build(config.data, progress).digest
        if isinstance(config, PolicyConfig) and config.ppo.ptx_coef:
            made["its pretraining text"] = build(config.ptx, progress).digest
    if Path(config.data.tokenizer).is_file():
        made["its tokenizer"] = digest_of(Path(config.data.tokenizer))
    if isinstance(config, RewardedConfig) and is_function(config.reward):
        made["its reward function"] = function_digest(config.reward)
    return made | _fields(config, root)


def _fields(config: Config, root: Path) -> Inputs:
    """The fields that matter to the weights; paths in the recipe's folder as seen from there."""
    found = {
        leaf.name: repr(get(config, leaf.name)).replace(f"{root.absolute()}/", "").replace(f"{root}/", "")
        for leaf in walk(type(config))
        if _matters(leaf)
    }
    return {"stage": config.stage} | found


def _matters(leaf: Any) -> bool:
    section, _, name = leaf.name.partition(".")
    free = leaf.on_resume in (OnResume.FREE, OnResume.ROUNDING) and not (section == "train" and name in MATTERS)
    return not free and leaf.name not in ("run", "data.source", "ptx.source")  # texts are known by their digests


def noted(root: Path) -> dict[str, Any]:
    """What each step was made from, and whether it is done."""
    path = root / NOTES
    return read_json(path, "remove it: all steps are then made again") if path.is_file() else {}


def identity(folder: Path) -> str:
    """What tells what is in a folder from anything else that could be there. Of a run its config, what it was made from
    and the steps that are saved, of files their contents."""
    if (folder / CONFIG).is_file():
        run, config = open_run(str(folder))
        before = noted(folder.parent).get(folder.name, {}).get("inputs")
        return _digest(json.dumps([saved_steps(run / CHECKPOINTS), _fields(config, folder.parent), before]).encode())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _digest(*(part for path in files for part in (str(path.relative_to(folder)).encode(), path.read_bytes())))


def digest_of(file: Path) -> str:
    """What tells the contents of a file from others; those of one that cannot be read are none."""
    return _digest(file.read_bytes() if file.is_file() else b"")


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def todo(known: dict[str, Any] | None, inputs: Inputs, there: bool) -> Todo:
    """What is to become of a step of which `known` is noted, with these inputs, whose folder is there or not."""
    if known is None:
        return Todo("make", "not there yet")
    if changed := _changed(known["inputs"], inputs):
        return Todo("make", f"made again: {changed}")
    if not there:
        return Todo("make", "made again: its folder is gone" if known["done"] else "not there yet")
    return Todo("skip", "done, and nothing it is made from has changed") if known["done"] else Todo("resume", "goes on")


def _changed(before: Inputs, now: Inputs) -> str:
    """Which inputs have changed, in words."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    said = [_said(name, before.get(name), now.get(name)) for name in names[:3]]
    return ", ".join(said) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _said(name: str, before: str | None, now: str | None) -> str:
    if name.startswith(("step ", "its ")):
        return f"{name.removeprefix('step ')} has changed"
    return f"{name} was {before} and is {now}"
