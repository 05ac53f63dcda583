"""The ids of a data set's records, made once by a tokenizer and kept beside it (`data.cache_tokens`): for hosts whose
cores are slower at tokenising than their accelerators at learning.

    ids.bin     uint16 or uint32, those of all records end to end
    ends.npy    uint64 [records]: where each one ends, in ids
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from gptjax.data import cache
from gptjax.data.formats import reason
from gptjax.data.pool import Report, cores
from gptjax.data.sources import TextSource
from gptjax.data.store import Joined, Record, Store
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError

VERSION = 1  # raise it when other files are made of the same records
IDS, ENDS = "ids.bin", "ends.npy"
GROUP = 64  # records that a thread takes at once


class Ids:
    """Ids by record, from a folder that `ids_of` made."""

    def __init__(self, folder: Path):
        self._ends = np.load(folder / ENDS, mmap_mode="r")
        self._file = (folder / IDS).open("rb", buffering=0)
        count = int(self._ends[-1]) if len(self._ends) else 0
        self._dtype = np.dtype("<u2" if (folder / IDS).stat().st_size == 2 * count else "<u4")

    def __getitem__(self, number: int) -> np.ndarray:
        """int32 ids of record `number`."""
        start, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        width = self._dtype.itemsize
        data = os.pread(self._file.fileno(), (end - start) * width, start * width)
        return np.frombuffer(data, self._dtype).astype(np.int32)


@dataclass(frozen=True)
class Tokenized:
    """A split whose records come as ids; as `stream.Source`."""

    text: TextSource
    ids: tuple[Ids, ...]
    """Of each store that its text is in."""

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> Record:
        store, number = self.text.store, int(self.text.chosen[index])
        last, goes_on = store.is_last(number), self.text.goes_on(index)
        which, inside = store.place(number) if isinstance(store, Joined) else (0, number)
        return Record("", last, cut=not last and not goes_on, ids=self.ids[which][inside])


def tokenized(cache_dir: str, text: TextSource, tokenizer: Tokenizer, report: Report = lambda *_: None) -> Tokenized:
    """A split as ids, which are made now unless they are there. Raises UserError where the disk is full."""
    stores = text.store.stores if isinstance(text.store, Joined) else (text.store,)
    return Tokenized(text, tuple(Ids(ids_of(cache_dir, store, tokenizer, report)) for store in stores))


def ids_of(cache_dir: str, store: Store, tokenizer: Tokenizer, report: Report = lambda *_: None) -> Path:
    """The folder of the ids of a data set, made now unless it is there; another process of this host that makes it is
    waited for."""
    root, key = cache.datasets(cache_dir), _key(store, tokenizer)
    stem = f"ids_{store.folder.name.rpartition('-')[0]}-{key}"
    try:
        cache.wait(root, stem, report)
        folder = cache.find(root, key)
        if folder is not None and not cache.flaw(folder):
            cache.note_use(folder)
            return folder
        with cache.making(root, stem) as made:
            _write(made, store, tokenizer, report)
            return cache.publish(made, stem, key)
    except OSError as error:
        raise UserError(
            f"data.cache_dir = {cache_dir}: cannot write the ids of the text ({reason(error)}); free space, choose "
            "another, or leave out data.cache_tokens"
        ) from error


def _key(store: Store, tokenizer: Tokenizer) -> str:
    return hashlib.sha256(json.dumps([VERSION, store.digest, tokenizer.digest]).encode()).hexdigest()[:16]


def _write(folder: Path, store: Store, tokenizer: Tokenizer, report: Report) -> None:
    dtype = np.dtype("<u2" if tokenizer.least_vocab_size <= 1 << 16 else "<u4")
    sizes, ends, end, done = store.sizes, np.zeros(len(store), "<u8"), 0, 0
    total = int(sizes.sum())

    def made(group: range) -> list[np.ndarray]:
        return [tokenizer.encode(store[number].text) for number in group]

    with (folder / IDS).open("wb") as file, ThreadPoolExecutor(cores(), "ids") as pool:
        groups = [range(start, min(start + GROUP, len(store))) for start in range(0, len(store), GROUP)]
        for group, every in zip(groups, _ahead(pool, made, groups), strict=True):
            for number, ids in zip(group, every, strict=True):
                file.write(ids.astype(dtype).tobytes())
                ends[number] = end = end + len(ids)
            done += int(sizes[group.start : group.stop].sum())
            report("tokenising", done, total)
        file.flush()
        os.fsync(file.fileno())
    np.save(folder / ENDS, ends)


def _ahead(
    pool: ThreadPoolExecutor, make: Callable[[range], list[np.ndarray]], groups: Sequence[range]
) -> Iterator[list[np.ndarray]]:
    """What is made of each group, in order, with a few under way: all of them would be all ids in memory."""
    left = iter(groups)
    under_way = [pool.submit(make, group) for group in islice(left, 4 * cores())]
    while under_way:
        yield under_way.pop(0).result()
        under_way += [pool.submit(make, group) for group in islice(left, 1)]
