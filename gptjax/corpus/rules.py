"""Gopher's rules of thumb for what is no prose (arXiv 2112.11446, table A1), on a block of documents at once.

Each rule gives bool [D] of what it drops. A document is counted under the first rule that drops it.
"""

from collections.abc import Iterator

import numpy as np

from gptjax.config.corpus import RulesConfig
from gptjax.corpus.block import LETTER, STEP, Block
from gptjax.data.order import mix

MOST_WORDS = 100_000
WORD_LENGTH = (3.0, 10.0)
COMMON = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "-", "*")
ELLIPSES = ("...", "…")
AGAIN = 0.30  # of lines, by their number
AGAIN_CHARACTERS = 0.20  # of lines, by their characters
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def dropped(block: Block, config: RulesConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Reason and whom it drops, bool [D], rule by rule."""
    if config.quality:
        yield from quality(block, config.min_words)
    if config.repetition:
        yield from repetition(block)


def quality(block: Block, min_words: int = 50) -> Iterator[tuple[str, np.ndarray]]:
    """What is too short, too long, or of other signs than prose."""
    words, size = block.words, len(block.texts)
    count = np.bincount(words.owner, minlength=size)
    some = np.maximum(count, 1)
    yield f"fewer than {min_words} words", count < min_words
    yield f"more than {MOST_WORDS:,} words", count > MOST_WORDS
    mean = np.bincount(words.owner, block.characters(words), size) / some
    yield "words too short or too long", (mean < WORD_LENGTH[0]) | (mean > WORD_LENGTH[1])
    signs = np.array([[text.count("#"), sum(map(text.count, ELLIPSES))] for text in block.texts]).reshape(-1, 2)
    yield "too many # or ellipses", signs.max(1, initial=0) > 0.1 * some
    lines = block.lines
    total = np.maximum(np.bincount(lines.owner, minlength=size), 1)
    for reason, marks, most in (("begin with bullets", BULLETS, 0.9), ("end with an ellipsis", ELLIPSES, 0.3)):
        found = np.bincount(lines.owner, _at_an_edge(block, marks, behind=marks is ELLIPSES), size)
        yield f"lines that {reason}", found / total > most
    letters = block.count(words, block.kinds & LETTER != 0) > 0
    yield "words without letters", np.bincount(words.owner, letters, size) < 0.8 * some
    yield "few of the commonest words", _common(block) < 2


def _at_an_edge(block: Block, marks: tuple[str, ...], behind: bool) -> np.ndarray:
    """bool [W]: whether each line begins, or ends, with one of the marks."""
    data, lines = block.data, block.lines
    found = np.zeros(len(lines), bool)
    for mark in map(str.encode, marks):
        there = lines.ends - lines.starts >= len(mark)
        first = (lines.ends - len(mark) if behind else lines.starts)[there]
        equal = [data[first + k] == byte for k, byte in enumerate(mark)]
        found[there] |= np.logical_and.reduce(equal)
    return found


def _common(block: Block) -> np.ndarray:
    """int64 [D]: how many of COMMON are in each."""
    low = block.lowered
    terms, hashes = low.terms, low.hashes(low.terms)
    wanted = Block(COMMON)
    there = np.zeros((len(COMMON), len(block.texts)), bool)
    for row, value in zip(there, wanted.hashes(wanted.terms), strict=True):
        row[terms.owner[hashes == value]] = True
    return there.sum(0)


def repetition(block: Block) -> Iterator[tuple[str, np.ndarray]]:
    """What says the same again and again."""
    size, lines = len(block.texts), block.lines
    again = _later(block.hashes(lines), lines.owner)
    count = np.maximum(np.bincount(lines.owner, minlength=size), 1)
    long = block.characters(lines)
    total = np.maximum(np.bincount(lines.owner, long, size), 1)
    yield "lines again, by their number", np.bincount(lines.owner, again, size) / count > AGAIN
    yield "lines again, by their length", np.bincount(lines.owner, again * long, size) / total > AGAIN_CHARACTERS
    words = block.words
    lengths = block.characters(words).astype(np.float64)
    total = np.maximum(np.bincount(words.owner, lengths, size), 1)
    for n, found in _repeats(block, lengths).items():
        reason = f"the commonest {n} words" if n in TOP else f"{n} words again"
        yield reason, found / total > (TOP | DUPLICATE)[n]


def _repeats(block: Block, lengths: np.ndarray) -> dict[int, np.ndarray]:
    """n -> float64 [D], blanks not counted: of TOP the characters of the sequence of n words that makes up most of each
    document, of DUPLICATE those of words that stand in a sequence which was there before.

    A sequence can be there twice only if both of its shorter ones are, so that fewer are looked at as n grows.
    """
    words, size = block.words, len(block.texts)
    hashes, before = block.hashes(words), np.concatenate([[0.0], np.cumsum(lengths)])
    ends = np.searchsorted(words.owner, np.arange(size), side="right")[words.owner]  # behind each document's words
    first, grams = np.arange(len(words)), hashes
    found = {}
    for n in (*TOP, *DUPLICATE):
        twice = np.zeros(len(words) + 1, bool)  # of the sequence of n - 1 words that begins at each word
        twice[first] = True
        longer = twice[first + 1] & (first + n <= ends[first]) if n > 2 else first + 2 <= ends
        first, grams = first[longer], grams[longer]
        grams = grams * np.uint64(STEP) + hashes[first + n - 1]
        where, group = _several(grams, words.owner[first])
        first, grams = first[where], grams[where]
        if n in TOP:
            weight = np.bincount(group)[group] * (before[first + n] - before[first])
            found[n] = _most(weight, words.owner[first], size)
        else:
            again = first[_after_first(group)]
            edges = np.bincount(again, minlength=len(words) + 1) - np.bincount(again + n, minlength=len(words) + 1)
            inside = np.cumsum(edges)[:-1] > 0
            found[n] = np.bincount(words.owner[inside], lengths[inside], size)
    return found


def _most(values: np.ndarray, owner: np.ndarray, size: int) -> np.ndarray:
    """float64 [D]: the greatest of each document's values, which are in the documents' order; 0 where it has none."""
    found = np.zeros(size)
    if len(values):
        begins = np.flatnonzero(np.diff(owner, prepend=-1))
        found[owner[begins]] = np.maximum.reduceat(values, begins)
    return found


def _later(hashes: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """bool [W]: whether the same was there before in the same document."""
    where, group = _several(hashes, owner)
    again = np.zeros(len(hashes), bool)
    again[where] = _after_first(group)
    return again


def _several(hashes: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where there are hashes that their document has several times, in order, and a number for each hash of each
    document; int64 [S]."""
    # A hash's last bits make room for its place: numbers are sorted three times as fast as places by numbers, and of a
    # block of 2^17 words two in 2^47 are taken for each other.
    bits = np.uint64(len(hashes).bit_length())
    keys = mix(hashes + mix(owner.astype(np.uint64))) >> bits
    packed = np.sort(keys << bits | np.arange(len(keys), dtype=np.uint64))
    values = packed >> bits
    new = np.diff(values, prepend=~values[:1]) != 0
    among = ~(new & np.append(new[1:], True)) if len(keys) else new
    places = (packed[among] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    order = np.argsort(places)
    return places[order], np.cumsum(new[among])[order] - 1


def _after_first(group: np.ndarray) -> np.ndarray:
    """bool [S]: whether an earlier one is of the same group."""
    earliest = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
    earliest[group[::-1]] = np.arange(len(group))[::-1]  # of those that write to one place the last one stays
    return np.arange(len(group)) != earliest[group]
