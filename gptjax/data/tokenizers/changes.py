"""What a tokenizer does to a text that does not come back from its ids as it was."""

from collections.abc import Iterator
from typing import Any

from gptjax.data.tokenizers.tokenizer import Tokenizer

KEEPERS = {"Prepend", "Replace", "ByteLevel"}  # normalisers that only write a blank or a byte in another way
LATIN = "".join(map(chr, range(0x300)))
PROBES = {
    "moves or drops blanks": ["  a  b ", " "],
    "takes U+2581 for a blank": ["a▁b"],
    "composes letters": ["e\u0301 \u212b \u1e9b\u0323", "ﬁ½①"],
    "loses letters": [LATIN, "Größe 東京 привет नमस्ते \U0001f600 \ufeff\u2028\ufffd"],
    "takes words for its unknown or its bytes": ["<unk>[UNK]", "<0x41>"],
}


def changes(tokenizer: Tokenizer, rules: dict[str, Any]) -> Iterator[str]:
    """A clause for everything, by what the rules say and by trial."""
    kinds = [step["type"] for step in _steps(rules["normalizer"])]
    if others := [kind for kind in dict.fromkeys(kinds) if kind not in KEEPERS]:
        yield f"normalises ({', '.join(others)})"
    for token in rules["added_tokens"]:
        if not token["special"] and (token["lstrip"] or token["rstrip"]):
            yield f"{token['content']!r} takes the blanks beside it"
    before = ""
    if tokenizer.decode(tokenizer.encode("a")) == " a":
        before = " "
        yield "puts a blank before it"
    for clause, texts in PROBES.items():
        said = bool(others) and clause == "composes letters"
        if not said and any(tokenizer.decode(tokenizer.encode(text)) not in (text, before + text) for text in texts):
            yield clause


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer]
    return [one for step in normalizer["normalizers"] for one in _steps(step)]
