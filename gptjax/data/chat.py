"""Conversations."""

from collections.abc import Sequence
from dataclasses import dataclass

ROLES = ("system", "user", "assistant")
FOLLOWS = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


def flaw(messages: Sequence[Message], *, reply: bool = True) -> str | None:
    """Why a conversation cannot be learned from (`reply`: the assistant has the last word) or be answered (the user
    has it), in a clause; None where it can."""
    before = ""
    for message in messages:
        if message.role not in ROLES:
            return f"unknown role {message.role}"
        if message.role not in FOLLOWS[before]:
            return f"roles out of order: {message.role} " + (f"after {before}" if before else "first")
        if not message.content.strip():
            return "empty message"
        if any("\ud800" <= letter <= "\udfff" for letter in message.content):
            return "half a character (a lone surrogate)"
        before = message.role
    if not messages:
        return "no message"
    if before == ("assistant" if reply else "user"):
        return None
    none = reply and all(message.role != "assistant" for message in messages)
    return "no assistant turn" if none else f"ends with {before}"
