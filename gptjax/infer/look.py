"""What a model makes of a text, as one HTML page that needs nothing else: how likely each token was, and where each of
them attends.

All words of a text reach the page as JSON and are put in as text, never as HTML.
"""

import base64
import html
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.html import page as html_page

WEIGHTS = 16_000_000  # that a page holds, a byte each
TOKENS = 512  # that it holds at most: beyond, a heat map has less than a pixel for each
SHOWN = 8  # likeliest tokens beside each one


@dataclass(frozen=True, eq=False)
class Look:
    """What is shown of T tokens, of which some stand before the text."""

    ids: list[int]
    before: int
    """How many of them do; nothing says how likely these are."""
    logits: np.ndarray
    """float32 [T, V], of what comes after each."""
    attention: np.ndarray
    """float32 [L, H, T, T]: what each token (row) takes from each."""
    windows: list[int | None]
    """W of each banded layer, None of a dense one."""


def require_room(tokens: int, layers: int, heads: int) -> None:
    """Raises UserError for a text of more tokens than a page holds of so many heads."""
    most = min(TOKENS, math.isqrt(2 * WEIGHTS // (layers * heads)))
    if tokens > most:
        raise UserError(f"text: {tokens} tokens; a page holds {most}, of {layers} layers of {heads} heads; shorten it")


def page(look: Look, tokenizer: Tokenizer, title: str, layer: int = 0, head: int = 0) -> str:
    """The page, which first shows that layer and head."""
    data = described(look, tokenizer) | {"layer": layer, "head": head, "attention": encoded(look.attention)}
    # Inside a script only "<" could end it or begin a comment.
    words = {"title": html.escape(title), "data": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")}
    return re.sub("<!--(title|data)-->", lambda found: words[found[1]], html_page("infer/look.html"))


def described(look: Look, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that a page shows but the attention, for JSON."""
    tokens = [_token(look, tokenizer, place) for place in range(len(look.ids))]
    return {
        "figures": _figures(tokens),
        "tokens": tokens,
        "vocabulary": look.logits.shape[1],
        "windows": look.windows,
        "heads": look.attention.shape[1],
    }


def encoded(attention: np.ndarray) -> str:
    """`packed`, for JSON."""
    return base64.b64encode(packed(attention)).decode()


def _token(look: Look, tokenizer: Tokenizer, place: int) -> dict[str, Any]:
    """What the page knows of a token: p is None for one that stands before the text."""
    i = look.ids[place]
    about: dict[str, Any] = {"text": written(tokenizer, i), "label": label(tokenizer, i), "p": None}
    if place < look.before:
        return about
    logits = look.logits[place - 1].astype(np.float64)
    p = np.exp(logits - np.logaddexp.reduce(logits))
    best = np.argsort(-logits, kind="stable")[:SHOWN].tolist()
    tops = [(label(tokenizer, t), _short(p[t]), t == i) for t in best]
    return about | {"p": _short(p[i]), "rank": 1 + int((logits > logits[i]).sum()), "tops": tops}


def _figures(tokens: list[dict[str, Any]]) -> str:
    nats = [-math.log(max(token["p"], 1e-300)) for token in tokens if token["p"] is not None]
    mean = sum(nats) / len(nats)
    return f"{len(nats):,} tokens, {mean:.3f} nats each: perplexity {math.exp(mean):,.1f}"


def _short(p: float) -> float:
    return float(f"{p:.6g}")


def packed(attention: np.ndarray) -> bytes:
    """[L, H, T, T] as a byte for each token that a token may see, row by row: 255 times the square root of its weight,
    so that small ones keep their digits."""
    rows, columns = np.tril_indices(attention.shape[-1])
    return np.rint(255 * np.sqrt(attention[..., rows, columns])).astype(np.uint8).tobytes()


def written(tokenizer: Tokenizer, i: int) -> str:
    """A token as it stands in a text, with a sign for what would not be seen."""
    piece = tokenizer.pieces[i]
    try:
        text = tokenizer.decode([i], inside=True) if tokenizer.join else piece.decode()
    except UnicodeDecodeError:  # a part of a character
        return f"⟨{piece.hex(' ')}⟩"
    return "".join(map(_visible, text)) or "∅"


def label(tokenizer: Tokenizer, i: int) -> str:
    """The same on one line."""
    return written(tokenizer, i).replace("↵\n", "↵").replace(" ", "␣")


def _visible(character: str) -> str:
    """A line's end with a sign before it, and control characters as the signs that U+2400 has for them."""
    if character == "\n":
        return "↵\n"
    return chr(0x2400 + ord(character)) if character < " " else "␡" if character == "\x7f" else character
