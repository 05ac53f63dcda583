"""From a config file and words of the command line to a `Config`, with errors that name the nearest right word.

A config file defines `config() -> Config`.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import runpy
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from gptjax.config import LAYOUT_PRESETS, Config, LayoutConfig, get, validate
from gptjax.errors import UserError

FREE_ON_RESUME = {"name", "run", "data.cache_dir", "data.threads", "train.log_interval", "train.eval_interval"}
FREE_ON_RESUME |= {"train.eval_batches", "train.sample_interval", "train.sample_prompt", "train.save_interval"}
FREE_ON_RESUME |= {"train.keep_last", "train.keep_every", "train.profile_steps", "train.tensorboard"}
FREE_ON_RESUME |= {"train.compile_cache", "train.total_tokens"}
"""Fields, with all of `layout`, that change where, when and how long a run computes or what it reports, never
what it computes: a resumed run may differ in these and in no other."""


def load_config(path: str, overrides: list[str]) -> Config:
    """Read a config file, apply `--dotted.name value` overrides, validate.

    Raises UserError for a missing or broken file, an unknown key, a wrong type or value.
    """
    file = Path(path)
    if not file.is_file():
        nearest = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], 1)
        raise UserError(f"config {path}: no such file" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    sys.path.insert(0, str(file.parent.resolve()))  # a derived config imports its base by name
    try:
        make = runpy.run_path(str(file)).get("config")
    except Exception as error:
        raise UserError(f"config {path}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(make) or not isinstance(config := make(), Config):
        raise UserError(f"config {path}: must define config() that returns a gptjax.config.Config")
    return validate(override(config, overrides))


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
        config = _replace(config, flag[2:].replace("-", "_").split("."), value, flag)
    return config


def _replace(node: Any, path: list[str], value: str, flag: str) -> Any:
    names = {f.name for f in dataclasses.fields(node)}
    if path[0] not in names:
        every = [name for name, _, _, _ in walk(Config)]
        close = difflib.get_close_matches(flag[2:], every, 1, 0.0) or sorted(names)
        raise UserError(f"{flag}: no such field; did you mean --{close[0]}?")
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
        raise UserError(f"{flag}: a section; set one of its fields, such as {flag}.{dataclasses.fields(child)[0].name}")
    else:
        new = _parse(typing.get_type_hints(type(node))[path[0]], value, flag)
    return dataclasses.replace(node, **{path[0]: new})


def _parse(hint: Any, text: str, flag: str) -> Any:
    """One command-line value as the field's type."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if text in options:
            return text
        nearest = difflib.get_close_matches(text, options, 1, 0.0)[0]
        raise UserError(f"{flag} {text}: choose from {', '.join(options)}; nearest {nearest}")
    if origin is tuple:
        return tuple(_parse(options[0], part, flag) for part in text.split(",") if part)
    try:
        if hint is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if hint is int:
            number = float(text) if any(c in text for c in "eE.") else int(text)
            if int(number) != number:
                raise ValueError
            return int(number)
        return hint(text)
    except (KeyError, ValueError, OverflowError):
        example = {bool: "true or false", int: "a whole number, such as 1000 or 1e9", float: "a number, such as 3e-4"}
        raise UserError(f"{flag} {text}: expected {example[hint]}") from None


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Every leaf field below a dataclass: dotted name, type, default, docstring."""
    docs = _field_docs(cls)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from walk(hint, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hint, f.default, docs[f.name]


def _field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field, read from the source since Python drops it."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    docs = {}
    for statement, after in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            literal = after.value if isinstance(after, ast.Expr) else None
            text = literal.value if isinstance(literal, ast.Constant) else ""
            docs[statement.target.id] = " ".join(str(text).split())
    return docs | {f.name: docs.get(f.name, "") for f in dataclasses.fields(cls)}


def type_name(hint: Any) -> str:
    """A field's type as a user reads it in `--help`."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(options)
    if origin is tuple:
        return f"{type_name(options[0])},..."
    return str(hint) if isinstance(hint, types.UnionType) else hint.__name__


def differences(saved: Config, given: Config) -> list[str]:
    """Lines 'field: run has A, given B' for the fields that a resumed run must not change."""
    return [
        f"{name}: the run has {get(saved, name)!r}, given {get(given, name)!r}"
        for name, _, _, _ in walk(Config)
        if get(saved, name) != get(given, name) and name not in FREE_ON_RESUME and not name.startswith("layout.")
    ]
