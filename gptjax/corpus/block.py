"""Documents as arrays: where their words, terms and lines are, and 64-bit hashes of these.

A step in Python takes microseconds a document, and a rule as many steps as there are words; the loops take the words of
a thousand documents in one. Letters beyond the model's: D documents, N bytes, W spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from gptjax.corpus import loops

SPACE, LETTER, DIGIT, LATER = 1, 2, 4, 8
ASCII = bytes(range(128))
# First byte, range of the second, and up to which last byte it is a blank: U+00A0 to U+00BF, U+2000 to U+206F and
# U+3000 to U+303F; of the last two pages those of their first 64 that are more than punctuation do not matter here.
PUNCTUATION = ((0xC2, (0xA0, 0xBF), 0xA0), (0xE2, (0x80, 0x81), 0x8A), (0xE3, (0x80, 0x80), 0x80))


@cache
def _kinds() -> np.ndarray:
    """uint8 [256] of a byte's kinds. What is not ASCII counts as a letter, but for PUNCTUATION; LATER is every byte of
    a character but its first."""
    kinds = np.zeros(256, np.uint8)
    kinds[[*b" \t\n\r\v\f"]] = SPACE
    kinds[[*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1), *range(128, 256)]] = LETTER
    kinds[[*range(ord("0"), ord("9") + 1)]] = DIGIT
    kinds[0x80:0xC0] |= LATER
    return kinds


@dataclass(frozen=True, eq=False)
class Spans:
    """Stretches of a block's bytes, in order."""

    starts: np.ndarray
    """int64 [W]."""
    ends: np.ndarray
    """int64 [W]: the byte behind each."""
    owner: np.ndarray
    """int64 [W]: the document that each lies in."""

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True, eq=False)
class Block:
    """Some documents."""

    texts: Sequence[str]

    @cached_property
    def data(self) -> np.ndarray:
        """uint8 [N]: the UTF-8 of all, a newline behind each."""
        return np.frombuffer(b"\n".join([*self._encoded, b""]), np.uint8)

    @cached_property
    def _encoded(self) -> list[bytes]:
        return [text.encode() for text in self.texts]

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 [D]: where the newline behind each document is."""
        return np.cumsum([len(each) + 1 for each in self._encoded], dtype=np.int64) - 1

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [D] of characters."""
        return np.array([*map(len, self.texts)], np.int64)

    @cached_property
    def kinds(self) -> np.ndarray:
        """uint8 [N]: what each byte is."""
        kinds = np.take(_kinds(), self.data)
        for lead, page, blanks in PUNCTUATION:
            at = np.flatnonzero(self.data[:-1] == lead)
            at = at[(self.data[at + 1] >= page[0]) & (self.data[at + 1] <= page[1])]
            width = 2 if lead < 0xE0 else 3
            blank = (self.data[at + width - 1] <= blanks) * np.uint8(SPACE)
            for k in range(width):
                kinds[at + k] = blank | np.uint8(LATER * (k > 0))
        return kinds

    @cached_property
    def lowered(self) -> "Block":
        """The same in small letters."""
        made = Block([*map(_lowered, self.texts)])
        if np.array_equal(made.ends, self.ends):  # then bytes are of the same kinds, as all but a few letters' are
            for name in ("kinds", "tokens", "words", "terms", "lines"):
                made.__dict__[name] = getattr(self, name)
        return made

    @cached_property
    def tokens(self) -> Spans:
        """What stands between blanks."""
        return self._spans(self.kinds & SPACE == 0)

    @cached_property
    def words(self) -> Spans:
        """Tokens that have a letter or a digit: text whose punctuation stands apart, as WikiText's,
        has as many words as other text."""
        found = self.tokens
        real = self.count(found, self.kinds & (LETTER | DIGIT) != 0) > 0
        return Spans(found.starts[real], found.ends[real], found.owner[real])

    @cached_property
    def terms(self) -> Spans:
        """Runs of letters and digits."""
        return self._spans(self.kinds & (LETTER | DIGIT) != 0)

    @cached_property
    def term_hashes(self) -> np.ndarray:
        """uint64 [W]: `hashes` of the terms."""
        return self.hashes(self.terms)

    @cached_property
    def lines(self) -> Spans:
        """Lines that are not blank, without the blanks around them."""
        breaks, words = np.flatnonzero(self.data == ord("\n")), self.tokens
        behind = np.searchsorted(words.starts, breaks)  # tokens up to the end of each line
        before = np.concatenate([[0], behind[:-1]])
        first, last = before[behind > before], behind[behind > before] - 1
        return Spans(words.starts[first], words.ends[last], words.owner[first])

    def _spans(self, inside: np.ndarray) -> Spans:
        return Spans(*loops.spans(inside, self.ends))

    def characters(self, spans: Spans) -> np.ndarray:
        """int64 [W]: the characters of each."""
        if len(self.data) == len(self.texts) + int(self.sizes.sum()):  # ASCII
            return spans.ends - spans.starts
        return self.count(spans, self.kinds & LATER == 0)

    def count(self, spans: Spans, of: np.ndarray) -> np.ndarray:
        """int64 [W]: of how many bytes of each `of` [N] is true."""
        return loops.count(of, spans.starts, spans.ends)

    def hashes(self, spans: Spans) -> np.ndarray:
        """uint64 [W]: equal for equal bytes, and for others in one of 2^64 pairs."""
        return loops.hashes(self.data, spans.starts, spans.ends)

    def bounds(self, spans: Spans) -> np.ndarray:
        """int64 [D + 1]: where each document's spans begin, and how many there are."""
        return np.searchsorted(spans.owner, np.arange(len(self.texts) + 1))


def _lowered(text: str) -> str:
    """In small letters, which Python finds for ASCII alone ten times as fast."""
    if text.isascii():
        return text.lower()
    data = text.encode()
    others = data.translate(None, ASCII).decode()
    return data.lower().decode() if others == others.lower() else text.lower()
