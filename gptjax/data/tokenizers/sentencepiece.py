"""SentencePiece models that give every text back."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from gptjax.data.tokenizers.tokenizer import SPECIALS, Tokenizer, reserve
from gptjax.errors import UserError

FILE = "tokenizer.model"
NORMALIZER, DENORMALIZER = 3, 5  # fields of the model's message; those of a normaliser are
NAME, CHARSMAP, DUMMY_PREFIX, REMOVE_BLANKS, ESCAPE_BLANKS = 1, 2, 3, 4, 5
PROBE = "  a\tb\r\n\n ▁é\0\U0001f600½ﬁ e\u0301\u212b가 \u1100\u1161 " + "".join(SPECIALS)


def load_model(spec: str, data: bytes) -> Tokenizer:
    """The tokenizer of a .model file. Raises UserError for another file, and for a model that loses characters."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise UserError(
            f"data.tokenizer = {spec}: not a SentencePiece model; use bytes, a folder or a .model"
        ) from None

    def piece(i: int) -> bytes:
        if model.is_control(i) or model.is_unknown(i):
            return b""
        text: str = model.id_to_piece(i)
        return bytes([int(text[1:-1], 16)]) if model.is_byte(i) else text.replace("▁", " ").encode()

    size = model.get_piece_size()
    own = {name: model.piece_to_id(name) for name in SPECIALS if model.is_control(model.piece_to_id(name))}
    pieces, special = reserve([piece(i) for i in range(size)], own, SPECIALS)
    bar = [model.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]

    def encode(text: str) -> np.ndarray:
        text.encode()
        # SentencePiece writes a space as U+2581, so a U+2581 of the text must go in as bytes.
        first, *rest = text.split("▁")
        ids: list[int] = model.encode(first)
        for part in rest:
            ids += bar
            ids += model.encode(part)
        return np.array(ids, np.int32)

    tokenizer = Tokenizer(pieces, special, special[SPECIALS[0]], encode, "{}", {FILE: data})
    losses, ids = [*_losses(data)], encode(PROBE).tolist()
    if tokenizer.decode(ids) != PROBE:
        losses = losses or ["it has no byte fallback"]
    if not special.keys().isdisjoint(map(model.id_to_piece, ids)):
        losses.append("a text yields a token with the name of a reserved one")
    if losses:
        raise UserError(
            f"data.tokenizer = {spec}: loses characters ({'; '.join(losses)}); train one with `gptjax tokenizer train`"
        )
    return tokenizer


def _losses(data: bytes) -> Iterator[str]:
    """What the model's own normaliser says that it does to a text."""
    model = _fields(data)
    rules, back = _fields(model.get(NORMALIZER, b"")), _fields(model.get(DENORMALIZER, b""))
    if rules.get(CHARSMAP):
        yield f"it normalises by rules {rules.get(NAME, b'').decode() or 'of its own'}"
    if rules.get(DUMMY_PREFIX, True):
        yield "it puts a blank before a text"
    if rules.get(REMOVE_BLANKS, True):
        yield "it drops blanks"
    if not rules.get(ESCAPE_BLANKS, True):
        yield "it does not mark blanks"
    if back.get(CHARSMAP):
        yield "it changes text on the way back"


def _fields(data: bytes) -> dict[int, Any]:
    """The last value of each field of a protocol buffer by number, a number or bytes. The generated reader in the
    package takes only the newest protobuf, which others may not want."""
    found: dict[int, Any] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = number()
        if tag & 7 == 0:
            found[tag >> 3] = number()
            continue
        size = number() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
        found[tag >> 3] = data[at : at + size]
        at += size
    return found
