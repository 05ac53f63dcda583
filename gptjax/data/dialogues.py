"""Conversations in records: which fields hold them, in the forms in which they are published, as messages.

A data set keeps each as one document of one record, which is JSON without blanks between: a conversation is a list of
its turns, [["user","Hi"],["assistant","Hello"]], and a row that was dropped is the reason, "empty message".
"""

import json
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.data.chat import HALF, Message, flaw
from gptjax.data.formats import column, kind
from gptjax.errors import UserError

INPUT = "input"  # of an instruction, which may have none
FORMS = (
    ("messages",),
    ("conversations",),
    ("instruction", INPUT, "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("chosen",),
)
TURN_FIELDS = (("role", "content"), ("from", "value"))
ROLE_OF = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
LONGEST_REASON = 200  # characters


@dataclass(frozen=True)
class Dropped:
    """What stands in the place of a conversation where there is none."""

    reason: str


class Invalid(Exception):
    """Why a record is none of what is learned from, in a clause."""


@dataclass(frozen=True)
class Dialogue:
    """The conversation of a record, or why it was dropped; `formats.Extract` for `DialogueConfig`."""

    fields: tuple[str, ...]
    """As `DialogueConfig.fields`."""
    invalid: str
    """As `DialogueConfig.invalid`."""

    def columns(self, names: Sequence[str], where: object) -> list[str]:
        if self.fields:
            return columns_of(self.fields, names, where)
        if not (found := form(names, FORMS)):
            raise UserError(f"data.source: {where}: {no_form(names)}")
        return [*found]

    def document(self, row: Any, where: object) -> str:
        return kept(lambda: pairs(_conversation(row, self.fields)), self.invalid, where)


def columns_of(fields: Sequence[str], names: Sequence[str], where: object) -> list[str]:
    """Those that `data.fields` lie in. Raises UserError where one is missing."""
    return [*dict.fromkeys(column(field, names, where, "data.fields") for field in fields)]


def kept(make: Callable[[], Any], invalid: str, where: object) -> str:
    """What a data set keeps of a record, as JSON: what `make` gives, or, where that raises Invalid, the reason.

    Raises UserError that names the place where such records are refused, and for bytes that are no text.
    """
    try:
        return _compact(make())
    except Invalid as error:
        why = textwrap.shorten(str(error), LONGEST_REASON, placeholder=" ...")
        if invalid == "drop":
            return _compact(why.encode(errors="backslashreplace").decode())
        raise UserError(
            f"data.source: {where}: {why}; mend it, or leave such records out with data.invalid drop"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"data.source: {where}: a text is not UTF-8 at byte {error.start}; mend or remove it") from None


def pairs(messages: Sequence[Message]) -> list[list[str]]:
    """A conversation as JSON keeps it."""
    return [[message.role, message.content] for message in messages]


def parse(text: str) -> list[Message] | Dropped:
    """What a record holds that `Dialogue` wrote."""
    found = json.loads(text)
    return Dropped(found) if isinstance(found, str) else [Message(role, content) for role, content in found]


def why_dropped(text: str) -> str:
    """The reason in a record of a dropped row; empty for a conversation, which is not parsed for it."""
    return str(json.loads(text)) if text.startswith('"') else ""


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def form(names: Collection[str], forms: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The fields of the first form that is there; empty where none is."""
    there = (each for each in forms if all(name in names or name == INPUT for name in each))
    return tuple(name for name in next(there, ()) if name in names)


def no_form(names: Iterable[str]) -> str:
    return f"no known form (set data.fields) among its fields {', '.join(names) or 'none'}"


def _conversation(row: Any, fields: tuple[str, ...]) -> list[Message]:
    """Messages that can be learned from. Raises Invalid, and UnicodeDecodeError."""
    messages = _messages(row, fields)
    if why := flaw(messages):
        raise Invalid(why)
    return messages


def _messages(row: Any, fields: tuple[str, ...]) -> list[Message]:
    """Whatever messages there are. Raises as `_conversation`."""
    row = record(row)
    names = fields or form(row, FORMS)
    if not names:
        raise Invalid(no_form(row))
    values = [reach(row, name) for name in names]
    if len(values) == 3:
        return [instructed(names, values), Message("assistant", text_in(values[2], names[2]))]
    if len(values) == 2:
        return [*_side(values[0], names[0], "user"), *_side(values[1], names[1], "assistant")]
    return whole(*values, *names)


def record(row: Any) -> dict[str, Any]:
    """Raises Invalid where a row has no fields."""
    if not isinstance(row, dict):
        raise Invalid(f"{kind(row)}, not an object with fields")
    return row


def instructed(names: Sequence[str], values: Sequence[Any]) -> Message:
    """What the user says: the first two values, an instruction and its input, which may be null."""
    instruction = text_in(values[0], names[0])
    more = "" if values[1] is None else text_in(values[1], names[1])
    return Message("user", f"{instruction}\n\n{more}" if more else instruction)


def _side(value: Any, name: str, role: str) -> list[Message]:
    """A prompt or a reply: the text of one message, or messages."""
    if isinstance(value, list | dict | np.ndarray):
        return listed(value, name)
    return [Message(role, text_in(value, name))]


def whole(value: Any, name: str) -> list[Message]:
    """A conversation in one field: a transcript, or messages."""
    return transcript(text_in(value, name)) if isinstance(value, str | bytes) else listed(value, name)


def transcript(text: str) -> list[Message]:
    """Turns that begin with a name, such as `\\n\\nHuman: Hi\\n\\nAssistant: Hello`, each without the blanks around."""
    before, *turns = TURN.split(text)
    if before or not turns:
        raise Invalid("a text that does not begin with Human: or Assistant:, so no transcript")
    return [Message(SPEAKERS[name], said.strip()) for name, said in zip(turns[::2], turns[1::2], strict=True)]


def listed(value: Any, name: str) -> list[Message]:
    return [_message(each) for each in _items(value, name)]


def _message(value: Any) -> Message:
    for role, content in TURN_FIELDS:
        if isinstance(value, dict) and role in value and content in value:
            said = text_in(value[role], role)
            return Message(ROLE_OF.get(said, said), text_in(value[content], content))
    raise Invalid("a message without role and content, or from and value")


def _items(value: Any, name: str) -> list[Any]:
    """Raises Invalid where a field holds no list."""
    items = list_of(value)
    if items is None:
        raise Invalid(f"{name} is {kind(value)}, neither messages nor text")
    return items


def list_of(value: Any) -> list[Any] | None:
    """A list as JSON, Arrow and TFDS give it, of which the latter gives one of records as a record of lists; None for
    what is none."""
    if isinstance(value, list | np.ndarray):
        return list(value)
    lists = [*value.values()] if isinstance(value, dict) else []
    if not lists or not all(isinstance(each, list | np.ndarray) for each in lists) or len({*map(len, lists)}) > 1:
        return None
    return [dict(zip(value, each, strict=True)) for each in zip(*lists, strict=True)]


def text_in(value: Any, name: str) -> str:
    """Raises Invalid, and UnicodeDecodeError."""
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise Invalid(f"{name} is {kind(value)}, not text")
    return value


def filled(value: Any, name: str) -> str:
    """A text that says something. Raises as `text_in`."""
    text = text_in(value, name)
    if not text.strip():
        raise Invalid(f"{name} is empty")
    if HALF.search(text):
        raise Invalid(f"{name} has half a character (a lone surrogate)")
    return text


def reach(row: dict[str, Any], name: str) -> Any:
    """What a field holds, whose name may be dotted. Raises Invalid where it is not there."""
    value: Any = row
    for step in [name] if name in row else name.split("."):
        items = list_of(value) if step.isdecimal() else None
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif items is not None and int(step) < len(items):
            value = items[int(step)]
        else:
            raise Invalid(f"no field {name} (data.fields) among {', '.join(row) or 'none'}")
    return value
