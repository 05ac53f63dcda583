"""A data set on the disk: the text of its records end to end, as any editor shows it, and where each of them ends.

    text-00000 ...   UTF-8, in parts
    records.npy      uint64 [records, 2]: the byte where each one ends, counted through all parts, times two, and one
                     more where its document ends; the CRC-32 of its bytes
    documents.npy    uint64 [documents, 2]: 64 bits of the SHA-256 of each one's text, and the number of its records
    about.json       digest, documents in each split, and the byte where each part ends

Nothing is packed: a record is one read of 2 microseconds, where an ArrayRecord of the same text takes 20 to 70, as long
as it takes to tokenise a short one.
"""

import hashlib
import io
import json
import os
import struct
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO
from zipfile import BadZipFile

import numpy as np

from gptjax.files import write_whole

RECORDS, DOCUMENTS, ABOUT = "records.npy", "documents.npy", "about.json"


@dataclass(frozen=True)
class Record:
    """A document, or one of the consecutive pieces of a long one; never empty unless last."""

    text: str
    last: bool
    """Whether the document ends here, so that an end-of-text token follows."""
    cut: bool = False
    """Whether it goes on, but not in the next record: that piece is in another split."""
    ids: np.ndarray | None = None
    """int32 [N], where its tokens are known (see `ids`), and its text is empty."""


def cut(blocks: Iterable[str], max_chars: int) -> Iterator[Record]:
    """One document, given in blocks, as records of `max_chars` characters and a last one of 1..max_chars."""
    held = ""
    for block in blocks:
        held += block
        whole = max(len(held) - 1, 0) // max_chars * max_chars  # leaves something for the last record
        yield from (Record(held[i : i + max_chars], False) for i in range(0, whole, max_chars))
        held = held[whole:]
    if held:
        yield Record(held, True)


def write_part(folder: Path, number: int, documents: Iterable[Iterable[str]], max_chars: int) -> None:
    """Part `number`, from nothing: its table comes last, so that a part with a table is whole.

    Memory holds one record, and 56 bytes for each one of the part.
    """
    records, about, end = array("Q"), array("Q"), 0
    with _text(folder, number).open("wb") as file:
        for document in documents:
            digest, count = hashlib.sha256(), 0
            for record in cut(document, max_chars):
                data = record.text.encode()
                file.write(data)
                digest.update(data)
                end, count = end + len(data), count + 1
                records.extend((end << 1 | record.last, zlib.crc32(data)))
            if count:
                about.extend(struct.unpack("<4Q", digest.digest()))
                about.append(count)
        file.flush()
        os.fsync(file.fileno())
    table = io.BytesIO()
    np.savez(
        table, records=np.array(records, "<u8").reshape(-1, 2), documents=np.array(about, "<u8").reshape(-1, 5), end=end
    )
    write_whole(_table(folder, number), table.getvalue())


def is_written(folder: Path, number: int) -> bool:
    """Whether a part is there, all of it."""
    try:
        with np.load(_table(folder, number)) as table:
            return bool(_text(folder, number).stat().st_size == table["end"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return False


def finish(folder: Path, splits: Sequence[str]) -> str:
    """Put the tables of all parts together, `splits` naming the split of each; returns the digest of the data set.

    It is that of its documents and records in order, however many parts they were written in; empty where there are
    none.
    """
    tables = [_table(folder, number) for number in range(len(splits))]
    sizes = [_sizes(table) for table in tables]
    ends = list(accumulate(end for _, _, end in sizes))
    counts = dict.fromkeys(splits, 0)
    shape = sum(records for records, _, _ in sizes), 2
    if not shape[0]:
        return ""
    every = np.lib.format.open_memmap(folder / RECORDS, mode="w+", dtype="<u8", shape=shape)
    about = np.empty((sum(documents for _, documents, _ in sizes), 2), "<u8")
    digest, row, document = hashlib.sha256(), 0, 0
    for number, path in enumerate(tables):
        with np.load(path) as table:
            records, documents = table["records"], table["documents"]
        records[:, 0] += np.uint64((ends[number] - sizes[number][2]) << 1)
        every[row : row + len(records)] = records
        about[document : document + len(documents)] = documents[:, [0, 4]]
        digest.update(documents.tobytes())
        row, document = row + len(records), document + len(documents)
        counts[splits[number]] += len(documents)
    if list(counts) != ["train"]:  # as all text has that is not of a catalogue
        digest.update(json.dumps(counts).encode())
    every.flush()
    np.save(folder / DOCUMENTS, about)
    facts = {"digest": digest.hexdigest(), "splits": counts, "ends": ends}
    write_whole(folder / ABOUT, json.dumps(facts).encode())
    for path in tables:
        path.unlink()
    return digest.hexdigest()


class Store:
    """A data set that is there, whatever becomes of the files that it was made from."""

    def __init__(self, folder: Path):
        """Raises OSError or ValueError where a file is missing or is not what it was."""
        about = json.loads((folder / ABOUT).read_bytes())
        self.folder = folder
        self.digest: str = about["digest"]
        self.splits: dict[str, int] = about["splits"]
        """Documents of each split, in order."""
        self.documents = np.load(folder / DOCUMENTS)
        self._records = np.asarray(np.load(folder / RECORDS, mmap_mode="r"))
        self._ends: list[int] = about["ends"]
        self._files: dict[int, IO[bytes]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def folder_of(self, number: int) -> Path:
        """Where record `number` lies."""
        return self.folder

    def is_last(self, number: int) -> bool:
        """Whether its document ends with record `number`."""
        return bool(self._records.item(number, 0) & 1)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [records]: the bytes of each."""
        return np.diff((self._records[:, 0] >> np.uint64(1)).astype(np.int64), prepend=0)

    def __getitem__(self, number: int) -> Record:
        """Record `number`. Raises ValueError where its bytes are not those that were written, and OSError."""
        mark, checksum = self._records.item(number, 0), self._records.item(number, 1)
        start, end = self._records.item(number - 1, 0) >> 1 if number else 0, mark >> 1
        part = bisect_right(self._ends, start)
        before = self._ends[part - 1] if part else 0
        # Read, not mapped: pages of a mapped file count as this process's memory.
        data = os.pread(self._file(part).fileno(), end - start, start - before)
        if zlib.crc32(data) != checksum:
            raise ValueError(f"record {number} is not what was written")
        return Record(data.decode(), bool(mark & 1))

    def _file(self, part: int) -> IO[bytes]:
        file = self._files.get(part)
        if file is None:  # of threads that come at once one opens it for all: what another reads must stay open
            file = self._files.setdefault(part, _text(self.folder, part).open("rb", buffering=0))
        return file


class Joined:
    """Data sets end to end."""

    def __init__(self, stores: Sequence[Store]):
        self.stores = tuple(stores)
        self.starts = [0, *accumulate(len(store) for store in stores)]
        """Of the records of each, and the end of the last."""
        self.digest = hashlib.sha256("\n".join(store.digest for store in stores).encode()).hexdigest()

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def sizes(self) -> np.ndarray:
        """int64 [records]: the bytes of each."""
        return np.concatenate([store.sizes for store in self.stores])

    def folder_of(self, number: int) -> Path:
        """Where record `number` lies."""
        return self.stores[self.place(number)[0]].folder

    def is_last(self, number: int) -> bool:
        """Whether its document ends with record `number`."""
        which, inside = self.place(number)
        return self.stores[which].is_last(inside)

    def __getitem__(self, number: int) -> Record:
        """Record `number`; raises what a `Store` raises."""
        which, inside = self.place(number)
        return self.stores[which][inside]

    def place(self, number: int) -> tuple[int, int]:
        """The number of the data set that record `number` is in, and its number there."""
        which = bisect_right(self.starts, number) - 1
        return which, number - self.starts[which]


def _text(folder: Path, number: int) -> Path:
    return folder / f"text-{number:05}"


def _table(folder: Path, number: int) -> Path:
    return folder / f"table-{number:05}.npz"


def _sizes(table: Path) -> tuple[int, int, int]:
    """Records, documents and bytes of a part."""
    with np.load(table) as part:
        return len(part["records"]), len(part["documents"]), int(part["end"])
