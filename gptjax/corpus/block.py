"""Documents as arrays: where their words, terms and lines are, and 64-bit hashes of these and of sequences of them.

A step in Python takes microseconds a document, and a rule as many steps as there are words; numpy takes the words of a
thousand documents in one. Letters beyond the model's: D documents, N bytes, W spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from gptjax.data.order import mix

BASE, STEP = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95  # odd, so that both have inverses modulo 2^64
SPACE, LETTER, DIGIT, LATER = 1, 2, 4, 8
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


@cache
def _powers(base: int, size: int) -> np.ndarray:
    """uint64 [size] of base^0, base^1, ... modulo 2^64."""
    every = np.full(size, base, np.uint64)
    every[0] = 1
    return np.multiply.accumulate(every)


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
        kinds = _kinds()[self.data]
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
        made = Block([text.lower() for text in self.texts])
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
    def lines(self) -> Spans:
        """Lines that are not blank, without the blanks around them."""
        breaks, words = np.flatnonzero(self.data == ord("\n")), self.tokens
        behind = np.searchsorted(words.starts, breaks)  # tokens up to the end of each line
        before = np.concatenate([[0], behind[:-1]])
        first, last = before[behind > before], behind[behind > before] - 1
        return Spans(words.starts[first], words.ends[last], words.owner[first])

    def _spans(self, inside: np.ndarray) -> Spans:
        around = np.concatenate([[False], inside])  # a newline ends the block
        edges = np.flatnonzero(around[1:] != around[:-1])
        starts, ends = edges[::2], edges[1::2]
        behind = np.searchsorted(starts, self.ends)  # spans up to the end of each document
        return Spans(starts, ends, np.repeat(np.arange(len(behind)), np.diff(behind, prepend=0)))

    def characters(self, spans: Spans) -> np.ndarray:
        """int64 [W]: the characters of each."""
        if len(self.data) == len(self.texts) + int(self.sizes.sum()):  # ASCII
            return spans.ends - spans.starts
        return self.count(spans, self.kinds & LATER == 0)

    def count(self, spans: Spans, of: np.ndarray) -> np.ndarray:
        """int64 [W]: of how many bytes of each `of` [N] is true."""
        before = np.zeros(len(of) + 1, np.int32)
        np.cumsum(of, dtype=np.int32, out=before[1:])
        found: np.ndarray = (before[spans.ends] - before[spans.starts]).astype(np.int64)
        return found

    def hashes(self, spans: Spans) -> np.ndarray:
        """uint64 [W]: equal for equal bytes, and for others in one of 2^64 pairs."""
        sums, inverse = self._sums, _powers(pow(BASE, -1, 1 << 64), self._room)
        return mix((sums[spans.ends] - sums[spans.starts]) * inverse[spans.starts])

    @property
    def _room(self) -> int:
        """Of the tables of powers, of which there are few."""
        return 1 << max(len(self.data), 1).bit_length()

    @cached_property
    def _sums(self) -> np.ndarray:
        """uint64 [N + 1]: of each byte and its power, up to each place."""
        sums = np.zeros(len(self.data) + 1, np.uint64)
        np.multiply(self.data + np.uint64(1), _powers(BASE, self._room)[: len(self.data)], out=sums[1:])
        np.cumsum(sums, out=sums)
        return sums


def ngrams(hashes: np.ndarray, owner: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each n spans in a row of one document, the hash, uint64 [G], and the number of the first, int64 [G]."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    total = hashes[:count].copy()
    for k in range(1, n):
        total = total * np.uint64(STEP) + hashes[k : count + k]
    first = np.flatnonzero(owner[:count] == owner[n - 1 :])
    return mix(total[first]), first
