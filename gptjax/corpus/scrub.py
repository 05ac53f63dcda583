"""What is somebody's: addresses, telephone numbers and keys, each replaced by its kind in angle brackets."""

import re
from collections import Counter
from collections.abc import Collection
from functools import cache

PATTERNS = {
    # Version pins such as python@2.7 have no letters behind the last dot.
    "email": r"[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b",
    "key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bsk-[A-Za-z0-9_-]{20,}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}\b|\bAIza[0-9A-Za-z_-]{35}\b|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "ip": r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])",
    # With a country, with an area in brackets, in the North American form, or with the 0 of a long-distance call.
    "phone": r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}[ .-]\d{3,4}(?:[ .-]?\d{2,4})?"
    r"|\(\d{2,4}\)[ .-]?\d{3,4}[ .-]\d{3,4}|\d{3}[.-]\d{3}[.-]\d{4}|0\d{1,4}[ /-]\d{3,4}[ -]?\d{3,4})(?![\w-])",
}
AROUND = 40  # characters on each side that a sample shows


@cache
def _pattern(kind: str) -> re.Pattern[str]:
    return re.compile(PATTERNS[kind], re.DOTALL)


def scrubbed(text: str, kinds: Collection[str]) -> tuple[str, Counter[str]]:
    """A text without them, and how many of each kind there were."""
    found = Counter[str]()
    for kind in PATTERNS:
        if kind in kinds and (kind != "email" or "@" in text):
            text, count = _pattern(kind).subn(f"<{kind}>", text)
            found[kind] += count
    return text, +found


def sample(text: str, kind: str) -> str:
    """What stands around the first one that was replaced; nothing of it is there."""
    at = text.find(f"<{kind}>")
    return text[max(at - AROUND, 0) : at + len(kind) + 2 + AROUND].replace("\n", " ")
