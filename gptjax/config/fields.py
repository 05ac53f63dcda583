"""Frozen dataclasses whose fields carry all that is known of them: type, bounds, docstring, and whether a run may
change them. One mechanism checks values from Python files, the command line and saved JSON: pydantic, at construction.

What it finds wrong becomes one line that names field, value and the nearest right one.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from gptjax.errors import UserError

__all__ = [
    "FREE",
    "ROUNDING",
    "SAME_CONTENT",
    "Count",
    "OnResume",
    "Positive",
    "Seed",
    "described",
    "docs",
    "every_leaf",
    "explain",
    "explained",
    "flag",
    "frozen",
    "infos",
    "nearest_name",
    "parse",
    "typed",
    "walk",
]

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class OnResume(Enum):
    """What may become of a field when a run goes on; a field without this mark may not change."""

    FREE = "where, when and how long a run computes and what it reports, never what it computes"
    ROUNDING = "changes the order of sums, and so the last digits alone"
    SAME_CONTENT = "a name, whose content the run folder knows by its digest"


FREE, ROUNDING, SAME_CONTENT = OnResume.FREE, OnResume.ROUNDING, OnResume.SAME_CONTENT

if typing.TYPE_CHECKING:
    from dataclasses import dataclass as frozen
else:

    def frozen(cls: type) -> type:
        """A frozen dataclass with checked fields, each with its docstring below it, or in the class it is from."""
        rules = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
        return pydantic_dataclass(cls, frozen=True, config=rules)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One field that holds a value and not a section."""

    name: str
    """Dotted below its root."""
    hint: Any
    default: Any
    """dataclasses.MISSING where a value must be given."""
    metadata: tuple[Any, ...]
    owner: type

    @property
    def doc(self) -> str:
        return docs(self.owner)[self.name.rpartition(".")[2]]

    @property
    def on_resume(self) -> OnResume | None:
        return next((mark for mark in self.metadata if isinstance(mark, OnResume)), None)


def infos(cls: Any) -> dict[str, FieldInfo]:
    """What pydantic knows of a class's own fields."""
    known: dict[str, FieldInfo] = cls.__pydantic_fields__
    return known


def walk(cls: Any) -> Iterator[Leaf]:
    """Every leaf field below a class made by `frozen` that it has a use for; a section's marks are its fields' too."""
    unused = getattr(cls, "unused", ())
    return (leaf for leaf in every_leaf(cls) if leaf.name not in unused)


def every_leaf(cls: Any, prefix: str = "", inherited: tuple[Any, ...] = ()) -> Iterator[Leaf]:
    """Also those that it has no use for."""
    for name, info in infos(cls).items():
        if dataclasses.is_dataclass(info.annotation):
            yield from every_leaf(info.annotation, f"{prefix}{name}.", tuple(info.metadata))
        else:
            default = dataclasses.MISSING if info.is_required() else info.get_default(call_default_factory=True)
            yield Leaf(prefix + name, info.annotation, default, (*info.metadata, *inherited), cls)


def docs(cls: type) -> dict[str, str]:
    """The docstring below each field, of the class or of the one it is from, in one line; "" where there is none. Read
    from the source when they are asked for: at each import that would be a tenth of a second."""
    found = dict.fromkeys(infos(cls), "")
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        found |= _classes(base.__module__)[base.__name__]
    return found


@cache
def _classes(module: str) -> dict[str, dict[str, str]]:
    """What stands below the fields of each class of a module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: dict(_below_fields(node)) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _below_fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for pair in pairwise(node.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


@contextmanager
def explained(root: type, flags: bool = False) -> Iterator[None]:
    """Turns what pydantic finds wrong with `root`, or a section of it, into a UserError.

    It names `model.window = 0`, or with `flags` an argument as it is typed: `--top-k -1`.
    """
    try:
        yield
    except ValidationError as error:
        raise UserError(explain(error, root, flags)) from None


def flag(name: str) -> str:
    """A verb's argument as it is typed."""
    return "--" + name.replace("_", "-")


def explain(error: ValidationError, root: type, flags: bool = False) -> str:
    """The first of the errors, in one line; a misspelt name before a name that is missing for it."""

    def show(name: str, value: Any) -> str:
        return f"{flag(name)} {_written(value)}" if flags else f"{name} = {_written(value)}"

    first = min(error.errors(), key=lambda one: "unexpected" not in one["type"])
    section = _section(root, error.title)
    path = [*section, *(part for part in _by_name(root, section, first["loc"]) if isinstance(part, str))]
    name, kind, value = ".".join(path), first["type"], first["input"]
    if kind == "unexpected_keyword_argument":
        return f"{show(name, value)}: no such field; did you mean {nearest_name(root, name)}?"
    if kind == "json_invalid":
        return f"not whole JSON ({first['ctx']['error']})"
    if kind == "unexpected_positional_argument":
        return f"{error.title}: takes fewer values than were given; name them, such as {next(walk(root)).name} = ..."
    if kind in ("missing", "missing_argument"):
        return f"{flag(name) if flags else name}: a value is missing"
    info = _info(root, path)
    if info is None or dataclasses.is_dataclass(info.annotation):
        wanted = getattr(info.annotation, "__name__", "") if info else error.title
        return f"{show(name or error.title, value)}: expected {wanted}(...)"
    if any(isinstance(part, int) for part in first["loc"]):
        info = FieldInfo.from_annotation(_item_hint(info.annotation))
    return f"{show(name, value)}: {_remedy(first, info)}"


def _by_name(root: type, section: list[str], loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """Where an error is, of a value that was given by its place the field's name."""
    if not loc or not isinstance(loc[0], int):
        return loc
    made = infos(root)[section[0]].annotation if section else root
    return ([*infos(made)][loc[0]], *loc[1:])


def nearest_name(root: type, name: str) -> str:
    """The field or section most like a wrong name."""
    leaves = [leaf.name for leaf in walk(root)]
    known = [*leaves, *(leaf.rpartition(".")[0] for leaf in leaves if "." in leaf)]
    return difflib.get_close_matches(name, known, 1, 0.0)[0]


def _section(root: type, title: str) -> list[str]:
    """Where in `root` the class of this name stands; [] for the root itself."""
    for name, info in infos(root).items():
        if dataclasses.is_dataclass(info.annotation) and getattr(info.annotation, "__name__", "") == title:
            return [name]
    return []


def _info(root: Any, path: list[str]) -> FieldInfo | None:
    info = None
    for name in path:
        if not dataclasses.is_dataclass(root) or name not in infos(root):
            return None
        info = infos(root)[name]
        root = info.annotation
    return info


def _item_hint(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def _remedy(error: Any, info: FieldInfo) -> str:
    """What a value must be, and the nearest that is."""
    value, kind, hint = error["input"], error["type"], info.annotation
    if kind == "literal_error":
        return choose(hint, value)
    if kind == "finite_number":
        return "must be a finite number" + _such_as(info)
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        closest = _nearest(value, info)
        return f"must {bounds(info)}" + (f"; nearest {_written(closest)}" if closest is not None else "")
    if kind in ("string_too_short", "too_short", "too_long"):
        return ("has the wrong number of values" if value else "must not be empty") + _such_as(info)
    if kind in ("value_error", "assertion_error"):
        return str(error["ctx"]["error"])
    near = f"; nearest {int(value)}" if kind == "int_type" and isinstance(value, float) and value.is_integer() else ""
    return f"expected {example(hint)}, not {type(value).__name__}{near}"


def _such_as(info: FieldInfo) -> str:
    return "" if info.is_required() or not info.default else f", such as {_written(info.default)}"


def choose(hint: Any, value: Any) -> str:
    """The choices of a Literal and the nearest to a wrong one."""
    options = [str(option) for option in typing.get_args(hint)]
    return f"choose from {', '.join(options)}; nearest {difflib.get_close_matches(str(value), options, 1, 0.0)[0]}"


@dataclasses.dataclass(frozen=True)
class Edge:
    """One end of what a number may be."""

    value: float
    closed: bool
    step: int
    """From an open end towards what is allowed."""

    def nearest(self, whole: bool) -> float | None:
        """The outermost number that is allowed; None at an open end of the real numbers."""
        return self.value if self.closed else self.value + self.step if whole else None


def _edges(info: FieldInfo) -> tuple[Edge | None, Edge | None]:
    low = high = None
    for mark in info.metadata:
        if isinstance(mark, Ge | Gt):
            low = Edge(mark.ge, True, 1) if isinstance(mark, Ge) else Edge(mark.gt, False, 1)  # type: ignore[arg-type]
        if isinstance(mark, Le | Lt):
            high = Edge(mark.le, True, -1) if isinstance(mark, Le) else Edge(mark.lt, False, -1)  # type: ignore[arg-type]
    return low, high


def bounds(info: FieldInfo) -> str:
    """The bounds of a number as a user reads them, such as `be positive`; empty without bounds."""
    low, high = _edges(info)
    if low and high:
        if info.annotation is int:
            return f"lie in {low.nearest(True)}..{high.nearest(True)}"
        return f"lie in {'[' if low.closed else '('}{low.value:g}, {high.value:g}{']' if high.closed else ')'}"
    if low and low.value == 0:
        return "not be negative" if low.closed else "be positive"
    if low:
        return f"be {'at least' if low.closed else 'above'} {low.value:g}"
    return f"be {'at most' if high.closed else 'below'} {high.value:g}" if high else ""


def _nearest(value: Any, info: FieldInfo) -> float | None:
    low, high = _edges(info)
    edge = low if low and (value < low.value or (value == low.value and not low.closed)) else high
    return edge.nearest(info.annotation is int) if edge else None


EXAMPLES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number, such as 1000 or 1e9",
    float: "a number, such as 3e-4",
    str: "text",
    Path: "a path",
}


def example(hint: Any) -> str:
    """What a value of a type looks like."""
    if typing.get_origin(hint) is tuple:
        return f"values in a tuple, each {example(_item_hint(hint))}"
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if isinstance(hint, types.UnionType):
        return f"{example(_given(hint))}, or none"
    return EXAMPLES.get(hint, type_name(hint))


def type_name(hint: Any) -> str:
    """A field's type as a user reads it in `--help`."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return type_name(options[0])
    if origin is Literal:
        return "|".join(map(str, options))
    if origin is tuple:
        return f"{type_name(options[0])},..."
    if isinstance(hint, types.UnionType):
        return type_name(_given(hint))
    return str(hint.__name__).lower()


def _given(hint: types.UnionType) -> Any:
    """The type of a value that may be left out or switched off."""
    return next(option for option in typing.get_args(hint) if option is not types.NoneType)


def _is_off(hint: types.UnionType, text: str) -> bool:
    """Whether a word switches a number off; as text or a path it would name something."""
    return text.lower() == "none" and _given(hint) in (int, float)


def described(cls: type, leaf: Leaf) -> str:
    """Type, bounds and default of a field, for `--help`."""
    info = _info(cls, leaf.name.split("."))
    assert info is not None
    limits = re.sub(r"\b(be|lie) ", "", bounds(info))
    default = "required" if leaf.default is dataclasses.MISSING else f"default {_shown(leaf.default)}"
    off = "|none" if isinstance(leaf.hint, types.UnionType) and leaf.default is not None else ""
    return f"{type_name(leaf.hint)}{off}  ({f'{limits}; ' if limits else ''}{default})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "empty"
    return "none" if value is None else repr(value) if value == "" else f"{value}".replace("\n", "\\n")


def _written(value: Any) -> str:
    """A value as the messages show it, short enough for a line."""
    text = str(value) if isinstance(value, str) and value and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return ",".join(value) if isinstance(value, tuple) else str(value).lower()


def parse(hint: Any, text: str, name: str) -> Any:
    """One word of the command line as a value of a field's type; bounds are for the class to check."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return parse(options[0], text, name)
    if isinstance(hint, types.UnionType):
        return None if _is_off(hint, text) else parse(_given(hint), text, name)
    if origin is Literal:
        if text in options:
            return text
        raise UserError(f"{name} {text}: {choose(hint, text)}")
    if origin is tuple:
        return tuple(parse(options[0], part, name) for part in text.split(",") if part)
    try:
        if hint is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if hint is int:
            return whole(text)
        if hint is float and not math.isfinite(float(text)):
            raise ValueError
        return hint(text)
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"{name} {text}: expected {EXAMPLES[hint]}") from None


def whole(text: str) -> int:
    """`1000`, `1e9` or `1.5e3`; raises ValueError for what is not a whole number."""
    if not any(c in text for c in "eE."):
        return int(text)
    number = float(text)
    if int(number) != number:
        raise ValueError
    return int(number)
