"""The bytes behind every id of a tokenizer of the `tokenizers` library."""

import re
from collections.abc import Callable
from typing import Any

from gptjax.data.tokenizers.byte_level import byte_names

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
BLANK = "▁"  # what SentencePiece, and those that follow it, write for a space


def table(
    library: Any, rules: dict[str, Any], unknown: int | None
) -> tuple[list[bytes], bool, Callable[[list[int]], str] | None]:
    """Pieces by id, whether a blank is put before a text and taken off again, and the library's way from ids to text
    where joining the pieces is not the same. Ids without a token, and the unknown, have no bytes."""
    steps = _steps(rules["decoder"])
    kinds = [step["type"] for step in steps]
    added = {token["id"] for token in rules["added_tokens"]}
    if kinds == ["ByteLevel"]:
        to_byte = {name: byte for byte, name in enumerate(byte_names())}
        read, joined = lambda token: _byte_level(token, to_byte), True
    elif joined := all(map(_is_plain, steps)) and bool({"Metaspace", "Replace"} & set(kinds)):
        read = lambda token: _plain(token, "ByteFallback" in kinds)  # noqa: E731
    else:
        prefix = rules["model"].get("continuing_subword_prefix") or ""
        read = lambda token: token.removeprefix(prefix).encode()  # noqa: E731
    vocab = library.get_vocab(with_added_tokens=True)
    pieces = [b""] * (1 + max(vocab.values(), default=-1))
    for token, i in vocab.items():
        pieces[i] = token.encode() if i in added else read(token)
    if unknown is not None:
        pieces[unknown] = b""
    blank_first = joined and any(map(_takes_blank, steps))
    return pieces, blank_first, None if joined else lambda ids: library.decode(ids, skip_special_tokens=False)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _is_plain(step: dict[str, Any]) -> bool:
    """Whether a step of a decoder does to every token the same, or takes the blank that is put before a text."""
    kind = step["type"]
    if kind == "Replace":
        return (step["pattern"], step["content"]) == ({"String": BLANK}, " ")
    if kind == "Strip":
        return (step["content"], step["stop"]) == (" ", 0) and step["start"] <= 1
    return kind in ("ByteFallback", "Fuse") or (kind == "Metaspace" and step["replacement"] == BLANK)


def _takes_blank(step: dict[str, Any]) -> bool:
    return (step["type"] == "Strip" and step["start"] == 1) or step.get("prepend_scheme", "never") != "never"


def _byte_level(token: str, to_byte: dict[str, int]) -> bytes:
    """A token of other letters than the 256 names stands for itself."""
    if all(letter in to_byte for letter in token):
        return bytes(to_byte[letter] for letter in token)
    return token.encode()


def _plain(token: str, fallback: bool) -> bytes:
    if fallback and (byte := BYTE.fullmatch(token)):
        return bytes([int(byte[1], 16)])
    return token.replace(BLANK, " ").encode()
