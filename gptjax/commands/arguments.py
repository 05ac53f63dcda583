"""Words of the command line as the arguments of a verb.

A value is the word behind its flag, whatever it looks like: `--prompt --a.b` asks for a text of that form. Where a verb
takes the fields of a config (`Overrides`), every other `--section.field value` is one.
"""

import dataclasses
import difflib
import textwrap
from typing import Annotated, Any, Protocol

from gptjax.config.fields import described, docs, explained, infos, parse, walk
from gptjax.config.fields import flag as as_flag
from gptjax.config.schema import Config
from gptjax.config.stages import STAGES
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Positional:
    """Marks an argument that is given by its place. A tuple takes all that are there."""

    metavar: str


class Repeated:
    """Marks a tuple of texts, of which a flag gives one, commas and all, each time that it is there."""


@dataclasses.dataclass(frozen=True)
class Words:
    """Marks the argument that holds a config's fields as they were given: flags of this form."""

    form: str = "--section.field value"


Overrides = Annotated[tuple[str, ...], Words()]
HELP = ("-h", "--help")


class Verb(Protocol):
    """What a file of this room defines as `Command`."""

    def run(self) -> int | None:
        """Do it; returns the exit status, None for 0."""


def read(verb: str, cls: Any, words: list[str]) -> Verb:
    """The arguments of a verb. Raises UserError that names the word that is wrong."""
    flags = {as_flag(name): name for name in infos(cls) if not _marked(cls, name)}
    takes_fields = any(isinstance(mark, Words) for info in infos(cls).values() for mark in info.metadata)
    values: dict[str, Any] = {}
    places: list[str] = []
    fields: list[str] = []
    left = list(words)
    leaves = [leaf for stage in STAGES.values() for leaf in walk(stage)] if takes_fields else []
    known = [*flags, *(f"--{leaf.name}" for leaf in leaves), *HELP]
    while left:
        word = left.pop(0)
        flag, equals, text = word.partition("=")
        if not word.startswith("-") or word == "-":
            places.append(word)
        elif flag in flags:
            hint = infos(cls)[flags[flag]].annotation
            if hint is bool and not equals:
                values[flags[flag]] = True
                continue
            given = text if equals else _value(flag, left, known)
            if any(isinstance(mark, Repeated) for mark in infos(cls)[flags[flag]].metadata):
                values[flags[flag]] = (*values.get(flags[flag], ()), given)
            else:
                values[flags[flag]] = parse(hint, given, flag)
        elif takes_fields and _is_field(flag):
            fields += [word] if equals else [flag, _value(flag, left, known)]
        else:
            raise UserError(f"{flag}: gptjax {verb} has no such argument{_near(flag, known)}; see its --help")
    values |= _by_place(verb, cls, places)
    if takes_fields:
        values["overrides"] = tuple(fields)
    with explained(cls, flags=True):
        made: Verb = cls(**values)
        return made


def _marked(cls: Any, name: str) -> bool:
    """Whether an argument has no flag."""
    return any(isinstance(mark, Positional | Words) for mark in infos(cls)[name].metadata)


def _is_field(flag: str) -> bool:
    """A dotted name, or one of a config's own; whether there is such a field is for the config to say."""
    name = flag.removeprefix("--")
    return flag.startswith("--") and ("." in name or any(name in infos(stage) for stage in STAGES.values()))


def _value(flag: str, left: list[str], flags: list[str]) -> str:
    """The word behind a flag. Another flag of the verb, or a field, there is a value that was forgotten."""
    if not left or left[0].partition("=")[0] in flags:
        behind = f", before {left[0]} (a text of that form: {flag}={left[0]})" if left else ""
        raise UserError(f"{flag}: a value is missing{behind}")
    return left.pop(0)


def _near(flag: str, known: list[str]) -> str:
    close = difflib.get_close_matches(flag, known, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _by_place(verb: str, cls: Any, places: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    left = list(places)
    for name, info in infos(cls).items():
        mark = next((mark for mark in info.metadata if isinstance(mark, Positional)), None)
        if mark is None:
            continue
        if str(info.annotation).startswith("tuple"):
            values[name], left = tuple(left), []
        elif left:
            values[name] = parse(info.annotation, left.pop(0), mark.metavar)
        if info.is_required() and not values.get(name):
            raise UserError(f"gptjax {verb}: {mark.metavar} is missing: {docs(cls)[name]}")
    if left:
        raise UserError(f"{left[0]}: gptjax {verb} takes no such word; see its --help")
    return values


def usage(verb: str, cls: Any, root: type[Config]) -> str:
    """The help of a verb: its arguments, and every field of a config of a stage where it takes them."""
    arguments, options, form = [], [], ""
    for leaf in walk(cls):
        mark = next((mark for mark in leaf.metadata if isinstance(mark, (Positional, Words))), None)
        if isinstance(mark, Words):
            form = mark.form
        elif mark:
            many = "..." if str(leaf.hint).startswith("tuple") else ""
            required = leaf.default is dataclasses.MISSING
            arguments.append((f"{mark.metavar}{many}" if required else f"[{mark.metavar}{many}]", leaf.doc))
        else:
            kind = "" if leaf.hint is bool else "  " + described(cls, leaf)
            options.append((f"{as_flag(leaf.name)}{kind}", leaf.doc))
    line = " ".join(["usage: gptjax", verb, *(name for name, _ in arguments)])
    line += (" [--option value ...]" if options else "") + (f" [{form} ...]" if form else "")
    parts = [line, textwrap.fill(" ".join((cls.__doc__ or "").split()), 120)]
    for title, rows in (("arguments", arguments), ("options", options)):
        if rows:
            parts.append("\n".join([f"{title}:", *(f"  {name}\n{_indented(doc)}" for name, doc in rows)]))
    if form == Words.form:
        rows = [(f"--{leaf.name}  {described(root, leaf)}", leaf.doc) for leaf in walk(root)]
        title = f"fields of stage {root.stage} (those of another: gptjax {verb} CONFIG --help):"
        parts.append("\n".join([title, *(f"  {name}\n      {doc}" for name, doc in rows)]))
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return textwrap.fill(text, 120, initial_indent=" " * 6, subsequent_indent=" " * 6)
