"""Gopher's rules of thumb for what is no prose (arXiv 2112.11446, table A1), on a block of documents at once.

Each rule gives bool [D] of what it drops. A document is counted under the first rule that drops it.
"""

from collections.abc import Iterator

import numpy as np

from gptjax.config.corpus import RulesConfig
from gptjax.corpus import loops
from gptjax.corpus.block import LETTER, Block

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
    lines = block.lines
    found = np.zeros(len(lines), bool)
    for mark in map(str.encode, marks):
        there = lines.ends - lines.starts >= len(mark)
        first = lines.ends - len(mark) if behind else lines.starts
        for k, byte in enumerate(mark):
            there &= np.take(block.data, first + k, mode="clip") == byte
        found |= there
    return found


def _common(block: Block) -> np.ndarray:
    """int64 [D]: how many of COMMON are in each."""
    low = block.lowered
    wanted = Block(COMMON)
    there = np.zeros((len(COMMON), len(block.texts)), bool)
    for row, value in zip(there, wanted.term_hashes, strict=True):
        row[low.terms.owner[low.term_hashes == value]] = True
    return there.sum(0)


def repetition(block: Block) -> Iterator[tuple[str, np.ndarray]]:
    """What says the same again and again."""
    size, lines = len(block.texts), block.lines
    again = loops.again(block.hashes(lines), block.bounds(lines))
    count = np.maximum(np.bincount(lines.owner, minlength=size), 1)
    long = block.characters(lines)
    total = np.maximum(np.bincount(lines.owner, long, size), 1)
    yield "lines again, by their number", np.bincount(lines.owner, again, size) / count > AGAIN
    yield "lines again, by their length", np.bincount(lines.owner, again * long, size) / total > AGAIN_CHARACTERS
    words = block.words
    lengths = block.characters(words).astype(np.float64)
    total = np.maximum(np.bincount(words.owner, lengths, size), 1)
    top, inside = loops.repeats(block.hashes(words), lengths, block.bounds(words), max(DUPLICATE))
    for n, most in TOP.items():
        yield f"the commonest {n} words", top[:, n] / total > most
    for n, most in DUPLICATE.items():
        yield f"{n} words again", inside[:, n] / total > most
