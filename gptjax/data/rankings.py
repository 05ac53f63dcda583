"""Ranked replies in records, in the forms in which they are published: a prompt, its replies, and how good each is.

A data set keeps each as one document of one record, which is JSON without blanks between: the turns of the prompt, the
replies, and their ranks from 1 (the best) without gaps, [[["user","Hi"]],["Hello","No"],[1,2]]; a row that was dropped
is the reason, "all replies tied".
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.data.chat import Message, flaw
from gptjax.data.dialogues import Invalid, kept, list_of, listed, pairs, record, text_in, transcript
from gptjax.data.formats import kind
from gptjax.errors import UserError

PROMPT = "prompt"  # which a pair may have, or be two whole conversations without it
FORMS = ((PROMPT, "replies", "ranks"), (PROMPT, "chosen", "rejected"))
MOST = 9  # replies of a prompt, as many as InstructGPT's labelers were shown
TRANSCRIPT = "\n\nHuman:"  # with which one begins as it is published; words of a user may begin with a name alone


@dataclass(frozen=True)
class Ranked:
    """A prompt that the user ends, and two to nine replies of which not all are as good."""

    prompt: list[Message]
    replies: list[str]
    ranks: list[int]
    """From 1, the best, without gaps; equal ones are ties."""


@dataclass(frozen=True)
class Ranking:
    """The ranked replies of a record, or why it was dropped; `formats.Extract` for `RankingConfig`."""

    invalid: str
    """As `RankingConfig.invalid`."""

    def columns(self, names: Sequence[str], where: object) -> list[str]:
        for form in FORMS:
            if set(form[1:]) <= set(names):
                return [name for name in form if name in names]
        raise UserError(f"data.source: {where}: {_no_form(names)}")

    def document(self, row: Any, where: object) -> str:
        def made() -> list[Any]:
            found = _ranked(row)
            return [pairs(found.prompt), found.replies, found.ranks]

        return kept(made, self.invalid, where)


def parse(text: str) -> Ranked:
    """What a record holds that `Ranking` wrote and did not drop."""
    prompt, replies, ranks = json.loads(text)
    return Ranked([Message(*each) for each in prompt], replies, ranks)


def _no_form(names: Sequence[str]) -> str:
    known = " nor ".join(", ".join(form) for form in FORMS)
    return f"neither {known} among its fields {', '.join(names) or 'none'}"


def _ranked(row: Any) -> Ranked:
    """Raises Invalid, and UnicodeDecodeError."""
    row = record(row)
    if "replies" in row and "ranks" in row:
        found = _listed(row)
    elif "chosen" in row and "rejected" in row:
        found = _pair(row)
    else:
        raise Invalid(_no_form([*row]))
    if why := _flaw(found):
        raise Invalid(why)
    order = {rank: place for place, rank in enumerate(sorted(set(found.ranks)), 1)}
    return Ranked(found.prompt, found.replies, [order[rank] for rank in found.ranks])


def _flaw(found: Ranked) -> str | None:
    """Why nothing can be learned from it, in a clause; None where something can."""
    count = len(found.replies)
    if len(found.ranks) != count:
        return "other numbers of replies and of ranks"
    if not 2 <= count <= MOST:
        return "fewer than 2 replies" if count < 2 else f"more than {MOST} replies"
    if not all(reply.strip() for reply in found.replies):
        return "empty reply"
    if len(set(found.ranks)) == 1:
        return "all replies tied"
    if len(set(zip(found.replies, found.ranks, strict=True))) > len(set(found.replies)):
        return "equal replies of different ranks"
    if not found.prompt:
        return "no prompt"
    every = ([*found.prompt, Message("assistant", reply)] for reply in found.replies)
    return flaw(found.prompt, reply=False) or next(filter(None, map(flaw, every)), None)


def _listed(row: dict[str, Any]) -> Ranked:
    replies, ranks = (_items(row[name], name) for name in ("replies", "ranks"))
    if not all(isinstance(rank, int | np.integer) and not isinstance(rank, bool) for rank in ranks):
        raise Invalid("ranks that are no integers")
    return Ranked(_prompt(row), [text_in(reply, "a reply") for reply in replies], [int(rank) for rank in ranks])


def _items(value: Any, name: str) -> list[Any]:
    items = list_of(value)
    if items is None:
        raise Invalid(f"{name} is {kind(value)}, not a list")
    return items


def _pair(row: dict[str, Any]) -> Ranked:
    """Two replies to the prompt beside them, or two whole conversations that differ in their last turn alone."""
    prompt = _prompt(row)
    (before, chosen), (also, rejected) = (_reply(row[name], name, prompt) for name in ("chosen", "rejected"))
    if before != also or (prompt and before != prompt):
        raise Invalid("chosen and rejected answer different prompts")
    return Ranked(before, [chosen, rejected], [1, 2])


def _prompt(row: dict[str, Any]) -> list[Message]:
    """The turns before a reply; none where the record has no such field. A transcript may end in the name of who is to
    speak."""
    if row.get(PROMPT) is None:
        return []
    said = turns(row[PROMPT], PROMPT, "user")
    return said[:-1] if said and said[-1] == Message("assistant", "") else said


def _reply(value: Any, name: str, prompt: list[Message]) -> tuple[list[Message], str]:
    """The turns before a reply, and what it says. One turn alone follows the prompt."""
    said = turns(value, name, "assistant")
    if not said or said[-1].role != "assistant":
        raise Invalid(f"{name} does not end with the assistant's words")
    return prompt if len(said) == 1 else said[:-1], said[-1].content


def turns(value: Any, name: str, role: str) -> list[Message]:
    """Messages, a transcript, or the text of one message of a role."""
    if list_of(value) is not None:
        return listed(value, name)
    text = text_in(value, name)
    return transcript(text) if text.startswith(TRANSCRIPT) else [Message(role, text)]
