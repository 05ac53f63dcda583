"""Prompts in records, in the forms in which they are published: alone, or as the beginning of a conversation or of
ranked replies, perhaps with the answer that is right.

A data set keeps each as one document of one record, which is JSON without blanks between: the turns of the prompt and
the answer, [[["user","2 + 2?"]],"4"]; a row that was dropped is the reason, "empty message".
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from gptjax.data.chat import Message, flaw
from gptjax.data.dialogues import (
    INPUT,
    Invalid,
    columns_of,
    form,
    instructed,
    kept,
    no_form,
    pairs,
    reach,
    record,
    text_in,
    whole,
)
from gptjax.data.rankings import PROMPT, turns
from gptjax.errors import UserError

ANSWER = "answer"
WHOLE = ("messages", "conversations", "chosen")  # a conversation with its reply, as `dialogues` reads it
FORMS = (("messages",), ("conversations",), ("instruction", INPUT), (PROMPT,), ("question",), ("chosen",))


@dataclass(frozen=True)
class Asked:
    """A prompt that the user ends."""

    prompt: list[Message]
    answer: str
    """What a reply may be compared with; empty where the record has none."""


@dataclass(frozen=True)
class Asking:
    """The prompt of a record, or why it was dropped; `formats.Extract` for `PromptConfig`."""

    fields: tuple[str, ...]
    """As `PromptConfig.fields`."""
    invalid: str
    """As `PromptConfig.invalid`."""

    def columns(self, names: Sequence[str], where: object) -> list[str]:
        if self.fields:
            return columns_of(self.fields, names, where)
        if not form(names, FORMS):
            raise UserError(f"data.source: {where}: {no_form(names)}")
        return [name for name in (*chain(*FORMS), ANSWER) if name in names]  # of a row some may be null

    def document(self, row: Any, where: object) -> str:
        def made() -> list[Any]:
            found = _asked(row, self.fields)
            return [pairs(found.prompt), found.answer]

        return kept(made, self.invalid, where)


def parse(text: str) -> Asked:
    """What a record holds that `Asking` wrote and did not drop."""
    prompt, answer = json.loads(text)
    return Asked([Message(*each) for each in prompt], answer)


def _asked(row: Any, fields: tuple[str, ...]) -> Asked:
    """Raises Invalid, and UnicodeDecodeError."""
    row = record(row)
    names, beside = (fields[:2], fields[2:]) if len(fields) == 3 else (fields[:1], fields[1:])
    if not fields:
        there = [name for name, value in row.items() if value is not None]
        names, beside = form(there, FORMS), (ANSWER,) if ANSWER in there else ()
    if not names:
        raise Invalid(no_form(name + " (null)" * (value is None) for name, value in row.items()))
    values = [reach(row, name) for name in names]
    said = [instructed(names, values)] if len(values) == 2 else _turns(*values, *names)
    while said and said[-1].role == "assistant":
        said.pop()
    answer = next((text_in(value, name) for name in beside if (value := reach(row, name)) is not None), "")
    if why := _flaw(said, answer):
        raise Invalid(why)
    return Asked(said, answer)


def _turns(value: Any, name: str) -> list[Message]:
    return whole(value, name) if name in WHOLE else turns(value, name, "user")


def _flaw(prompt: list[Message], answer: str) -> str | None:
    """Why it cannot be answered, in a clause; None where it can."""
    if not prompt:
        return "no prompt"
    return flaw(prompt, reply=False) or (flaw([*prompt, Message("assistant", answer)]) if answer.strip() else None)
