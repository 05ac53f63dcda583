"""From a config file and words of the command line to a `Config`, with errors that name the nearest right word.

A config file defines `config() -> Config`.
"""

import dataclasses
import difflib
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gptjax.config.check import validate
from gptjax.config.fields import explain, explained, infos, nearest_name, parse
from gptjax.config.schema import LAYOUT_PRESETS, Config, LayoutConfig
from gptjax.errors import UserError


def load_config(path: str, overrides: list[str]) -> Config:
    """Read a config file, apply `--dotted.name value` overrides, validate.

    Raises UserError for a missing or broken file, an unknown key, a wrong type or value.
    """
    file = Path(path)
    if not file.is_file():
        nearest = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], 1)
        raise UserError(f"config {path}: no such file" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    with _neighbours(file.parent.resolve()):
        try:
            make = runpy.run_path(str(file)).get("config")
            config = make() if callable(make) else None
        except ValidationError as error:
            raise UserError(f"config {path}{_line(error, file)}: {explain(error, Config)}") from error
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"config {path}{_line(error, file)}: {type(error).__name__}: {first}") from error
    if not isinstance(config, Config):
        raise UserError(f"config {path}: must define config() that returns a gptjax.config.Config")
    return validate(override(config, overrides))


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
    args = list(args)
    while args:
        flag, equals, value = args.pop(0).partition("=")
        if not flag.startswith("--"):
            raise UserError(f"{flag}: expected --section.field value")
        if not equals:
            if not args:
                raise UserError(f"{flag}: a value is missing")
            value = args.pop(0)
        with explained(Config):
            config = _replace(config, flag[2:].replace("-", "_").split("."), value, flag)
    return config


def _replace(node: Any, path: list[str], value: str, flag: str) -> Any:
    known = infos(type(node))
    if path[0] not in known:
        raise UserError(f"{flag}: no such field; did you mean --{nearest_name(Config, flag[2:])}?")
    child = getattr(node, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(child):
            raise UserError(f"{flag}: {path[0]} has no fields of its own; use --{path[0]} {value}")
        new = _replace(child, path[1:], value, flag)
    elif isinstance(child, LayoutConfig):
        if value not in LAYOUT_PRESETS:
            raise UserError(f"{flag} {value}: choose from {', '.join(LAYOUT_PRESETS)}, or set --layout.fsdp and so on")
        new = LAYOUT_PRESETS[value]
    elif dataclasses.is_dataclass(child):
        raise UserError(f"{flag}: a section; set one of its fields, such as {flag}.{next(iter(infos(type(child))))}")
    else:
        new = parse(known[path[0]].annotation, value, flag)
    return dataclasses.replace(node, **{path[0]: new})
