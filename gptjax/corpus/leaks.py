"""Documents that hold a part of an evaluation: 13 words in a row that it has, too (GPT-3 paper, appendix C)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import DataConfig
from gptjax.config.corpus import LeaksConfig
from gptjax.corpus import loops
from gptjax.corpus.block import Block
from gptjax.data import remote
from gptjax.data.files import find
from gptjax.data.formats import documents
from gptjax.files import write_whole

INDEX, NAMES = "leaks.npy", "leaks.json"


@dataclass(frozen=True)
class EveryText:
    """All texts of a record, whatever its fields: a question, its choices, its answer; as `formats.Extract`."""

    def columns(self, names: Sequence[str], where: object) -> list[str]:
        return list(names)

    def document(self, row: Any, where: object) -> str:
        return "\n".join(_strings(row))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.encode(errors="replace").decode()
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def write_index(folder: Path, config: LeaksConfig) -> None:
    """uint64 [G, 2] of the sequences of all files, sorted, and the number of the file that each is in first.

    Raises UserError for a file that is not there or cannot be read."""
    sources = [remote.local(source, DataConfig.cache_dir) for source in config.sources]
    files = [file for source in sources for file in find(DataConfig(source=source)).files]
    found = [np.zeros((0, 2), np.uint64)]
    for number, file in enumerate(files):
        texts = ["".join(blocks) for blocks in documents(file, EveryText())]
        hashes = np.unique(_grams(Block(texts), config.ngram)[0])
        found.append(np.stack([hashes, np.full(len(hashes), number, np.uint64)], 1))
    every = np.concatenate(found)
    every = every[np.lexsort((every[:, 1], every[:, 0]))]
    np.save(folder / INDEX, every[np.unique(every[:, 0], return_index=True)[1]])
    write_whole(folder / NAMES, json.dumps([file.path.name for file in files]).encode())


def _grams(block: Block, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of sequences of words, letters and digits alone, of which document, and the number of the first word."""
    low = block.lowered
    grams, first = loops.ngrams(low.term_hashes, low.terms.owner, n)
    return grams, low.terms.owner[first], first


@cache
def _index(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Hashes, sorted, bool [2^k] of which first k bits one of them has, the file of each, and the files' names. Hashes
    are an array of their own: a search in a column would copy it each time."""
    hashes, files = np.ascontiguousarray(np.load(folder / INDEX).T)
    bits = min(len(hashes).bit_length() + 5, 26)
    table = np.zeros(1 << bits, bool)
    table[hashes >> np.uint64(64 - bits)] = True
    return hashes, table, files, json.loads((folder / NAMES).read_bytes())


def leaks(block: Block, folder: Path, config: LeaksConfig) -> dict[int, tuple[str, str]]:
    """Document -> the first file that it has a sequence of, and the words of that sequence."""
    known, table, files, names = _index(folder)
    grams, owner, first = _grams(block, config.ngram)
    if not len(known) or not len(grams):
        return {}
    # A look at one byte leaves one in thirty to be searched for, each of which misses the cache at every halving.
    maybe = np.flatnonzero(table[grams >> np.uint64(64 - len(table).bit_length() + 1)])
    place = np.minimum(np.searchsorted(known, grams[maybe]), len(known) - 1)
    right = known[place] == grams[maybe]
    hits, place = maybe[right], place[right]
    some, at = np.unique(owner[hits], return_index=True)
    low, found = block.lowered, {}
    for document, hit, known_at in zip(some.tolist(), hits[at].tolist(), place[at].tolist(), strict=True):
        start, end = low.terms.starts[first[hit]], low.terms.ends[first[hit] + config.ngram - 1]
        found[document] = names[int(files[known_at])], bytes(low.data[start:end]).decode()
    return found
