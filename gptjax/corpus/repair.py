"""Texts as they were meant: the encoding, composed characters, no marks that nobody sees."""

import re
import unicodedata
from functools import cache

from gptjax.config.corpus import RepairConfig

JUNK = "\x00-\x08\x0e-\x1f\x7f\ufffd"
# Control characters but tab and newline; soft hyphen, zero-width and direction marks, byte-order mark.
UNSEEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff"
BREAKS = "\r\n?|[\x0b\x0c\x85\u2028\u2029]"
PLAIN = bytes([*b"\t\n", *range(0x20, 0x7F)])  # of ASCII, what is none of these
ENCODINGS = ("latin-1", "cp1252", "cp1250", "cp1251", "cp1253", "cp437")  # as which UTF-8 is read by mistake
NO_TEXT, EMPTY = "no text but bytes", "empty"


def repaired(text: str, config: RepairConfig) -> tuple[str, str]:
    """A text mended, and the reason why it is dropped, empty where it stays."""
    # Patterns look at some 25 MB/s, bytes are left out at 1 GB/s: most texts have few that are not plain.
    data = text.encode(errors="surrogatepass")
    rest = data.translate(None, PLAIN).decode(errors="surrogatepass")
    odd = _pattern(f"[{JUNK}{UNSEEN}\u2028\u2029]").search(rest) is not None
    if odd and len(_pattern(f"[{JUNK}]").findall(text)) > config.max_junk * len(text):
        return text, NO_TEXT
    if config.encoding and _pattern(_misread()).search(rest):
        text = "\n".join(map(_decoded, text.split("\n")))
    if config.unicode:
        if odd:
            text = _pattern(f"[{UNSEEN}]").sub("", _pattern(BREAKS).sub("\n", text))
        if not text.isascii():
            text = unicodedata.normalize("NFC", text)
    return text, "" if text.strip() else EMPTY


def _decoded(line: str) -> str:
    """By ftfy, whose other repairs would change text that is right: curly quotes, ligatures, entities."""
    if line.isascii() or not _pattern(_misread()).search(line):
        return line
    from ftfy import fix_encoding

    return fix_encoding(line)


@cache
def _misread() -> str:
    """What all misread UTF-8 has: a character of a first byte, then one of a later byte. ftfy looks closer, at 3 MB/s,
    which is 30 times slower."""
    first, later = (
        "".join(sorted({bytes([byte]).decode(name, "ignore") for name in ENCODINGS for byte in some}))
        for some in (range(0xC2, 0xF5), range(0x80, 0xC0))
    )
    return f"[{re.escape(first)}][{re.escape(later)}]"


_pattern = cache(re.compile)
