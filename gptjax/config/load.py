"""From a config file and words of the command line to a `Config`, with errors that name the nearest right word.

A config file defines `config() -> Config`.
"""

import dataclasses
import difflib
import inspect
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gptjax.config.check import validate
from gptjax.config.corpus import CorpusConfig, OriginConfig
from gptjax.config.fields import explain, explained, infos, nearest_name, parse
from gptjax.config.schema import LAYOUT_PRESETS, Config, LayoutConfig
from gptjax.config.stages import STAGES
from gptjax.errors import UserError


def load_config(path: str, overrides: list[str]) -> Config:
    """Read a config file, apply `--dotted.name value` overrides, validate.

    Raises UserError for a missing or broken file, an unknown key, a wrong type or value. Arguments of the file's
    `config` are fields that others of its fields follow from, such as `init_from`: they get the override's value.
    """
    config = made_by(path, "config", overrides)
    if not isinstance(config, Config):
        raise UserError(f"config {path}: must define config() that returns a gptjax.config.Config")
    return validate(override(config, overrides))


def made_by(path: str, name: str, overrides: Sequence[str] = ()) -> Any:
    """What the function of that name in a config file gives; None where it has none. Raises UserError as
    `load_config`."""
    file = Path(path)
    if not file.is_file():
        nearest = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], 1)
        raise UserError(f"config {path}: no such file" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    with _neighbours(file.parent.resolve()), told(file):
        make = runpy.run_path(str(file)).get(name)
        return make(**_arguments(make, overrides)) if callable(make) else None


@contextmanager
def told(file: Path) -> Iterator[None]:
    """Whatever a config file raises is a UserError that names the line."""
    try:
        yield
    except UserError:
        raise
    except ValidationError as error:
        raise UserError(f"config {file}{_line(error, file)}: {explain(error, _root(error))}") from error
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"config {file}{_line(error, file)}: {type(error).__name__}: {first}") from error


def stage_of(path: str) -> type[Config]:
    """The class of the config that a file makes, by the type that its `config` says it returns: nothing is made."""
    file = Path(path)
    if not file.is_file():
        return Config
    with _neighbours(file.parent.resolve()), suppress(Exception):
        made = runpy.run_path(str(file))["config"].__annotations__["return"]
        if isinstance(made, type) and issubclass(made, Config):
            return made
    return type(load_config(path, []))


def _arguments(make: Any, overrides: Sequence[str]) -> dict[str, str]:
    """Those arguments of `make` that are set on the command line."""
    given = dict(pairs(overrides))
    return {name: given[f"--{name}"] for name in inspect.signature(make).parameters if f"--{name}" in given}


def pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flag and value of `--a.b value` and `--a.b=value`."""
    left = list(words)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if not flag.startswith("--"):
            raise UserError(f"{flag}: expected --section.field value")
        if not equals:
            if not left:
                raise UserError(f"{flag}: a value is missing")
            value = left.pop(0)
        yield flag, value


def _root(error: ValidationError) -> type:
    """The stage, or recipe, whose config has a section of the class that was made wrongly."""
    for root in (*STAGES.values(), CorpusConfig, OriginConfig):
        if error.title in (root.__name__, *(getattr(info.annotation, "__name__", "") for info in infos(root).values())):
            return root
    return Config


@contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """A derived config imports its base by name; another folder's base of the same name is another file."""
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == folder:
                del sys.modules[name]


def _line(error: Exception, file: Path) -> str:
    """` line N` of the config file, where the error went through it."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f" line {lines[-1]}" if lines else ""


def override(config: Config, args: list[str]) -> Config:
    """Apply `--a.b value` and `--a.b=value` pairs to nested frozen dataclasses."""
    for flag, value in pairs(args):
        with explained(type(config)):
            config = _replace(config, flag[2:].replace("-", "_").split("."), value, flag, type(config))
    return config


def _replace(node: Any, path: list[str], value: str, flag: str, root: type[Config]) -> Any:
    known = infos(type(node))
    if path[0] not in known or flag[2:] in root.unused:
        in_stage = "" if root is Config else f" in stage {root.stage}"
        raise UserError(f"{flag}: no such field{in_stage}; did you mean --{nearest_name(root, flag[2:])}?")
    child = getattr(node, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(child):
            raise UserError(f"{flag}: {path[0]} has no fields of its own; use --{path[0]} {value}")
        new = _replace(child, path[1:], value, flag, root)
    elif isinstance(child, LayoutConfig):
        if value not in LAYOUT_PRESETS:
            raise UserError(f"{flag} {value}: choose from {', '.join(LAYOUT_PRESETS)}, or set --layout.fsdp and so on")
        new = LAYOUT_PRESETS[value]
    elif dataclasses.is_dataclass(child):
        raise UserError(f"{flag}: a section; set one of its fields, such as {flag}.{next(iter(infos(type(child))))}")
    else:
        new = parse(known[path[0]].annotation, value, flag)
    return dataclasses.replace(node, **{path[0]: new})
