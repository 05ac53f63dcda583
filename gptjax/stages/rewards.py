"""What a reply is worth by a Python function that a config names."""

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptjax import bucket
from gptjax.errors import UserError
from gptjax.train.processes import first

Judge = Callable[..., Any]


def is_function(name: str) -> bool:
    """Whether a config's `reward` names a function, and no run folder."""
    return ":" in name and not bucket.is_address(name) and not Path(name).is_dir()


def load_function(name: str, field: str = "reward") -> Judge:
    """The function of FILE.py:NAME or MODULE:NAME that a field names. Raises UserError where there is none."""
    where, _, attribute = name.rpartition(":")
    try:
        module = _of_file(where) if where.endswith(".py") else importlib.import_module(where)
    except FileNotFoundError:
        raise UserError(f"{field} = {name}: no file {where}; name one, FILE.py:NAME") from None
    except Exception as error:
        raise UserError(f"{field} = {name}: {where} cannot be imported ({_said(error)}); mend it") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"{field} = {name}: {where} has no function {attribute or 'of no name'}; give its name")
    try:
        inspect.signature(found).bind("prompt", "reply")
    except TypeError:
        if _asks(found) != 3:
            raise UserError(
                f"{field} = {name}: takes other arguments than (prompt, reply) or (prompt, reply, answer)"
            ) from None
    return found  # type: ignore[no-any-return]


def function_digest(name: str) -> str:
    """Of the file in which such a function stands, of none that it imports; empty for a module without one."""
    where = name.rpartition(":")[0]
    path = where if where.endswith(".py") else getattr(importlib.import_module(where), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _of_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _asks(function: Judge) -> int:
    """Arguments that it takes by their place."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(each.kind in kinds for each in inspect.signature(function).parameters.values())


def ask(function: Judge, said: Sequence[tuple[str, str, str]], about: str) -> list[float]:
    """What a function gives for each (prompt, reply, answer), asked on the first process alone. Raises UserError that
    begins with `about`, on all of them, for a function that raises, or gives no finite number."""
    count = min(_asks(function), 3)
    found: list[float] = json.loads(first(lambda: json.dumps([_one(function, each[:count], about) for each in said])))
    return found


def _one(function: Judge, arguments: Sequence[str], about: str) -> float:
    about = f"{about}: of prompt {arguments[0][-80:]!r} and reply {arguments[1][:80]!r}"
    try:
        value = function(*arguments)
    except Exception as error:
        raise UserError(f"{about}: raised {_said(error)}; mend it and resume with --new-data") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{about}: gave {value!r}, no number; mend it and resume with --new-data") from None
    if not math.isfinite(number):
        raise UserError(f"{about}: gave {number}; mend it and resume with --new-data")
    return number


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
