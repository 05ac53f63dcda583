"""Conversations as token ids: one format for fine-tuning, rollouts, evaluation, `chat` and the server.

A turn is <|role|>, the text and <|end|>, with nothing between and nothing after; what the publisher's tokenizer puts
before every text comes first. Trained are the texts of the assistant and their <|end|>.

`transformers` gives the same ids and mask by the template that goes with the tokenizer, but for three things. A text
that spells a reserved name is that token there, and letters here (by `sanitize_control_tokens` there too, which may
group them otherwise). U+2581 in a text for a SentencePiece model has other ids. Its mask leaves out a reply whose first
character yields no token, as the blank of a tokenizer that drops blanks, and all that follow.
"""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gptjax.data.tokenizers import SPECIALS, Tokenizer
from gptjax.data.tokenizers.huggingface import CONFIG, FLAGS, RULES
from gptjax.data.tokenizers.tokenizer import TEMPLATE
from gptjax.errors import UserError

ROLES = ("system", "user", "assistant")
FOLLOWS = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
TURNS = "an optional system turn, then user and assistant in turn, each with text"
END = SPECIALS[-1]
HALF = re.compile(r"[\ud800-\udfff]")
NAMES = re.compile(r"<[^<>\s'\"{}]+>|\[/?[A-Z_]+\]")  # how templates write reserved tokens

JINJA = """\
{{- BEGIN -}}
{%- set first = 1 if messages[0]["role"] == "system" else 0 -%}
{%- for message in messages -%}
  {%- set role, text = message["role"], message["content"] -%}
  {%- set due = "system" if loop.index0 < first else ["user", "assistant"][(loop.index0 - first) % 2] -%}
  {%- if role not in ["system", "user", "assistant"] -%}
    {{- raise_exception("unknown role " ~ role) -}}
  {%- elif role != due -%}
    {{- raise_exception("roles out of order: " ~ role ~ " in the place of " ~ due) -}}
  {%- elif text is not string or not text | trim -%}
    {{- raise_exception("empty message, or one that is not text") -}}
  {%- endif -%}
  {{- "<|" ~ role ~ "|>" -}}
  {%- if role == "assistant" -%}
    {%- generation -%}{{- text ~ "<|end|>" -}}{%- endgeneration -%}
  {%- else -%}
    {{- text ~ "<|end|>" -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if messages[-1]["role"] != "user" -%}
    {{- raise_exception("nothing to answer: ends with " ~ messages[-1]["role"]) -}}
  {%- endif -%}
  {{- "<|assistant|>" -}}
{%- endif -%}
"""
"""The format as `transformers` reads it. Every dash is needed: none of these blanks may come between two tokens."""


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
        if why := _flaw(message, before):
            return why
        before = message.role
    if not messages:
        return "no message"
    if before == ("assistant" if reply else "user"):
        return None
    none = reply and all(message.role != "assistant" for message in messages)
    return "no assistant turn" if none else f"ends with {before}"


def _flaw(message: Message, before: str) -> str | None:
    role = message.role
    if role not in ROLES:
        shown = role if role and role.isprintable() else repr(role)
        return f"unknown role {shown}, nearest {difflib.get_close_matches(role, ROLES, 1, 0.0)[0]}"
    if role not in FOLLOWS[before]:
        return f"roles out of order: {role} " + (f"after {before}" if before else "first")
    if not message.content.strip():
        return "empty message"
    if HALF.search(message.content):
        return "half a character (a lone surrogate)"
    return None


@dataclass(frozen=True, eq=False)
class Rendered:
    """A conversation to learn from. Raises UserError where nothing of it is trained, or everything is."""

    ids: np.ndarray
    """int32 [N]"""
    trained: np.ndarray
    """bool [N]: the ids that the model learns to give."""

    def __post_init__(self) -> None:
        count, total = int(self.trained.sum()), len(self.trained)
        if count in (0, total):
            raise UserError(
                f"loss mask: {count} of {total} tokens are trained; keep some of the reply and some of what it answers "
                "(a longer model.seq_len cuts less off)"
            )


@dataclass(frozen=True)
class ChatFormat:
    """Messages to ids by a tokenizer that has the chat tokens; make one with `chat_format`."""

    tokenizer: Tokenizer

    @property
    def end(self) -> int:
        """The id of <|end|>, with which the assistant ends its turn."""
        return self.tokenizer.special[END]

    @property
    def template(self) -> str:
        """The format in Jinja."""
        return _template(self.tokenizer)

    def render(self, messages: Sequence[Message]) -> Rendered:
        """A conversation that the assistant ends. Raises UserError, in one line, for what `flaw` says."""
        _require(messages, reply=True)
        parts = [(self._begin, False)]
        for message in messages:
            parts += [(self._head(message.role), False), (self._body(message), message.role == "assistant")]
        return Rendered(
            np.concatenate([ids for ids, _ in parts]),
            np.concatenate([np.full(len(ids), trained) for ids, trained in parts]),
        )

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids of a conversation that the assistant is to answer, <|assistant|> the last, int32 [N]. Raises as
        `render`."""
        _require(messages, reply=False)
        parts = [self._begin]
        for message in messages:
            parts += [self._head(message.role), self._body(message)]
        return np.concatenate([*parts, self._head("assistant")])

    def reply(self, text: str) -> np.ndarray:
        """Ids of what the assistant says and its <|end|>, int32 [N]; `prompt` and `reply` are what `render` gives."""
        return self._body(Message("assistant", text))

    @property
    def _begin(self) -> np.ndarray:
        return np.array(self.tokenizer.begin, np.int32)

    def _head(self, role: str) -> np.ndarray:
        return np.array([self.tokenizer.special[f"<|{role}|>"]], np.int32)

    def _body(self, message: Message) -> np.ndarray:
        return np.append(self.tokenizer.encode_inside(message.content), np.int32(self.end))


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """The format in the ids of a tokenizer. Raises UserError where the model has no room for the chat tokens."""
    if tokenizer.absent:
        raise UserError(
            f"model.vocab_size = {tokenizer.vocab_size}: no room for the chat tokens {' '.join(tokenizer.absent)}; "
            f"make the model with --model.vocab_size {tokenizer.chat_vocab_size}"
        )
    return ChatFormat(tokenizer)


def _require(messages: Sequence[Message], reply: bool) -> None:
    if why := flaw(messages, reply=reply):
        last = "the assistant's last" if reply else "the user's last"
        raise UserError(f"messages: {why}; a conversation is {TURNS}, {last}")


def with_chat(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with our template in the place of a publisher's, for a run that learns to chat.

    A publisher's token with the name of one of ours may take the blanks beside it; here it is the token alone. And
    `transformers` is to count the blank before a word as its token's, or it would lose the mask of what begins so.
    """

    def plain(node: dict[str, Any]) -> dict[str, Any]:
        if node.get("trim_offsets") is True:
            return node | {"trim_offsets": False}
        if node.get("content") not in SPECIALS[1:]:
            return node
        return node | dict.fromkeys(FLAGS, False) | {"special": True}

    def edited(name: str, data: bytes) -> bytes:
        values = json.loads(data, object_hook=plain)
        if name == CONFIG:
            values.pop("chat_template", None)
        return data if values == json.loads(data) else json.dumps(values).encode()

    files = {name: edited(name, data) if name in (RULES, CONFIG) else data for name, data in tokenizer.files.items()}
    return replace(tokenizer, files=files).with_template(_template(tokenizer))


def is_chat(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer carries our template: that of a model that has learned this format."""
    return tokenizer.files.get(TEMPLATE) == _template(tokenizer).encode()


def other_format(tokenizer: Tokenizer) -> str:
    """What a tokenizer's template is written for, in a few words, where it is not ours; "" where it is or is none."""
    text = _given(tokenizer)
    if not text or is_chat(tokenizer):
        return ""
    names = [name for name in dict.fromkeys(NAMES.findall(text)) if name not in SPECIALS]
    return f"other tokens: {', '.join(names[:4])}" if names else "other turns"


def require_no_other(tokenizer: Tokenizer) -> None:
    """Raises UserError for a tokenizer with a template that is not ours: its model has learned another format."""
    if other := other_format(tokenizer):
        raise UserError(
            f"tokenizer: its chat template is written for {other}; fine-tune the model (stage sft), which gives it ours"
        )


def _given(tokenizer: Tokenizer) -> str:
    """The template that a tokenizer came with, or several; "" if none."""
    if TEMPLATE in tokenizer.files:
        return tokenizer.files[TEMPLATE].decode("utf-8", "replace")
    return str(json.loads(tokenizer.files.get(CONFIG, b"{}")).get("chat_template") or "")


def _template(tokenizer: Tokenizer) -> str:
    begin = "".join(tokenizer.pieces[i].decode("utf-8", "replace") for i in tokenizer.begin)
    return JINJA.replace("BEGIN", json.dumps(begin, ensure_ascii=False), 1)
