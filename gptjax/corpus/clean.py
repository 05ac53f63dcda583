"""One part of the sources: its documents through every step that looks at one document alone, and what stays as one
file, which has in it what was dropped and why.

A step that changes what it gives gets another VERSION: a build that was begun with the old one begins anew.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.corpus import CorpusConfig, OriginConfig
from gptjax.corpus import lines, loops, near, rules
from gptjax.corpus.block import Block, Spans
from gptjax.corpus.language import foreign
from gptjax.corpus.leaks import leaks
from gptjax.corpus.repair import repaired
from gptjax.corpus.scrub import sample, scrubbed
from gptjax.data.formats import Failed, Heard
from gptjax.data.order import mix
from gptjax.data.worker import Part
from gptjax.errors import UserError
from gptjax.files import write_whole

STEPS = ("repair", "language", "lines", "rules", "leaks", "scrub", "quality", "exact", "near")
VERSION = dict.fromkeys(STEPS, 1) | {"language": 3, "repair": 2}
BLOCK_CHARACTERS = 1 << 18  # of documents that a step looks at together
EXAMPLES, SHOWN = 3, 200  # texts of each reason that the manifest shows, and characters of each
UNREADABLE = "cannot be read"
TOO_LONG = "set `begins` to cut it, raise max_chars, or have it left out: invalid"
OTHER = np.uint64(0xC2B2AE3D27D4EB4F)  # a second base, for 128 bits


@dataclass
class Report:
    """What became of the documents of a part."""

    read: Counter[str] = field(default_factory=Counter)
    """`documents` and `bytes`."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents by reason."""
    dropped_bytes: Counter[str] = field(default_factory=Counter)
    scrubbed: Counter[str] = field(default_factory=Counter)
    """Replaced, by kind."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The beginnings of some documents that were dropped, by reason, and the surroundings of what was replaced."""
    leaks: list[dict[str, str]] = field(default_factory=list)
    """Of every document that has a part of an evaluation its beginning, the file and the words."""

    def drop(self, reason: str, text: str) -> None:
        self.dropped[reason] += 1
        self.dropped_bytes[reason] += len(text.encode(errors="replace"))
        self.show(reason, text[:SHOWN])

    def show(self, what: str, text: str) -> None:
        shown = self.examples.setdefault(what, [])
        if len(shown) < EXAMPLES:
            shown.append(text)

    def add(self, other: "Report") -> None:
        """Another part's, which comes behind."""
        for mine, theirs in zip(self._counters, other._counters, strict=True):
            mine.update(theirs)
        for reason, texts in other.examples.items():
            shown = self.examples.setdefault(reason, [])
            shown += texts[: EXAMPLES - len(shown)]
        self.leaks += other.leaks

    @property
    def _counters(self) -> tuple[Counter[str], ...]:
        return self.read, self.dropped, self.dropped_bytes, self.scrubbed


Kept = tuple[list[str], np.ndarray, np.ndarray]
"""Texts, their `exact_keys` uint64 [D, 2] and their signatures uint32 [D, K]."""


@dataclass(frozen=True)
class Clean:
    """Part `number` of all parts, of the recipe's origin `origin`; as `pool.Work`."""

    folder: Path
    number: int
    part: Part
    origin: int
    recipe: CorpusConfig

    @property
    def size(self) -> int:
        return self.part.size

    def run(self, heard: Heard) -> None:
        origin, report = self.recipe.origins[self.origin], Report()

        def failed(error: UserError) -> None:
            if origin.invalid == "refuse":
                raise error
            report.read.update(documents=1)
            report.drop(UNREADABLE, str(error))

        documents = _documents(self.part.documents(heard, failed), origin, failed)
        kept = [self._kept(texts, origin.prose, report) for texts in blocks(documents)]
        write_whole(path_of(self.folder, self.number), _written(kept, self.recipe, report))

    def _kept(self, texts: list[str], prose: bool, report: Report) -> Kept:
        """The block's documents that stay, in order."""
        recipe = self.recipe
        report.read.update(documents=len(texts), bytes=sum(len(text.encode(errors="replace")) for text in texts))
        block = _each(texts, lambda text: repaired(text, recipe.repair), report)
        if prose:
            if recipe.language.keep:
                block = _without([("another language", foreign(block.texts, recipe.language))], block, report)
            if recipe.rules.c4:
                block = _each(block.texts, lines.prose, report)
            block = _without(rules.dropped(block, recipe.rules), block, report)
        if recipe.leaks.sources:
            block = self._unknown(block, report)
        if recipe.scrub:
            block = Block([_scrubbed(text, recipe, report) for text in block.texts])
        found = near.signatures(block, recipe.near) if recipe.near.on else np.zeros((len(block.texts), 0), np.uint32)
        return [*block.texts], exact_keys(block), found

    def _unknown(self, block: Block, report: Report) -> Block:
        """Those that have no part of an evaluation."""
        found = leaks(block, self.folder, self.recipe.leaks)
        report.leaks += [
            {"begins": block.texts[number][:SHOWN], "file": file, "words": words}
            for number, (file, words) in found.items()
        ]
        gone = np.isin(np.arange(len(block.texts)), [*found])
        return _without([("a part of an evaluation", gone)], block, report)


def path_of(folder: Path, number: int) -> Path:
    return folder / f"clean-{number:05}.arrow"


def _documents(every: Iterable[Iterable[str]], origin: OriginConfig, failed: Failed) -> Iterator[str]:
    """Each text, or the documents in it; what stands before the first match is one, too."""
    for text_blocks in every:
        try:
            text = _joined_up_to(text_blocks, sys.maxsize if origin.begins else origin.max_chars)
        except UserError as error:
            failed(error)
            continue
        for document in _cut(text, origin.begins) if origin.begins else [text]:
            if len(document) > origin.max_chars:
                rule = f"origins: {origin.name}: max_chars = {origin.max_chars:,}"
                failed(UserError(f"{rule}: longer is the document that begins {document[:40]!r}; {TOO_LONG}"))
            else:
                yield document


def _joined_up_to(text_blocks: Iterable[str], most: int) -> str:
    """A text, of one that is longer a little more than `most` characters: the rest is read, and not held."""
    held, size = list[str](), 0
    for block in text_blocks:
        if size <= most:
            held.append(block)
            size += len(block)
    return "".join(held)


def _cut(text: str, begins: str) -> Iterator[str]:
    starts = [match.start() for match in re.finditer(begins, text, re.MULTILINE)]
    cuts = [0, *(start for start in starts if start), len(text)]
    return (text[a:b] for a, b in pairwise(cuts) if text[a:b].strip())


def blocks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents that a step looks at together."""
    held, size = list[str](), 0
    for text in documents:
        held.append(text)
        size += len(text)
        if size >= BLOCK_CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _each(texts: Sequence[str], step: Callable[[str], tuple[str, str]], report: Report) -> Block:
    """What a step makes of each text that it has no reason to drop."""
    held = []
    for text in texts:
        made, why = step(text)
        if why:
            report.drop(why, made)
        else:
            held.append(made)
    return Block(held)


def _without(reasons: Iterable[tuple[str, np.ndarray]], block: Block, report: Report) -> Block:
    """Those of which no reason is true, bool [D] each; a text is counted under the first that is."""
    stays = np.ones(len(block.texts), bool)
    for reason, gone in reasons:
        for number in np.flatnonzero(gone & stays).tolist():
            report.drop(reason, block.texts[number])
        stays &= ~gone
    return block if stays.all() else Block([text for text, there in zip(block.texts, stays, strict=True) if there])


def _scrubbed(text: str, recipe: CorpusConfig, report: Report) -> str:
    text, found = scrubbed(text, recipe.scrub)
    report.scrubbed += found
    for kind in found:
        report.show(f"replaced: {kind}", sample(text, kind))
    return text


def exact_keys(block: Block) -> np.ndarray:
    """uint64 [D, 2]: equal for texts that are the same but for blanks and capitals."""
    low = block.lowered
    words, hashes = low.tokens, low.hashes(low.tokens)
    return np.stack([_joined(words, hashes, len(block.texts), base) for base in (loops.BASE, OTHER)], 1)


def _joined(spans: Spans, hashes: np.ndarray, size: int, base: np.uint64) -> np.ndarray:
    """uint64 [D]: a hash of each document's spans in order."""
    count, total = np.bincount(spans.owner, minlength=size), np.zeros(size, np.uint64)
    first = np.cumsum(count) - count
    place = np.arange(len(spans)) - first[spans.owner]
    some = np.flatnonzero(count)
    if len(some):
        values = hashes * mix(place.astype(np.uint64) * base | np.uint64(1))
        total[some] = np.add.reduceat(values, first[some])
    return mix(total + count.astype(np.uint64))


def _written(kept: list[Kept], recipe: CorpusConfig, report: Report) -> bytes:
    import pyarrow

    columns = recipe.near.bands * recipe.near.rows * recipe.near.on
    texts = [text.encode() for some, _, _ in kept for text in some]
    keys = np.concatenate([np.zeros((0, 2), np.uint64), *(each for _, each, _ in kept)])
    found = np.concatenate([np.zeros((0, columns), np.uint32), *(each for _, _, each in kept)])
    table = {
        "text": pyarrow.array(texts, pyarrow.large_binary()),
        "size": pyarrow.array([*map(len, texts)], pyarrow.int64()),
        "key": _binary(keys),
        "signature": _binary(found),
    }
    if recipe.near.on:
        table |= {f"band_{i}": pyarrow.array(keys) for i, keys in enumerate(near.band_keys(found, recipe.near).T)}
    about = {b"report": json.dumps(vars(report)).encode()}
    batch = pyarrow.record_batch([*table.values()], names=[*table]).replace_schema_metadata(about)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, batch.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as out:
        out.write_batch(batch)
    return bytes(sink.getvalue())


def _binary(rows: np.ndarray) -> Any:
    """Rows of an array as Arrow's binary of one width."""
    import pyarrow

    width = rows.shape[1] * rows.itemsize
    if not width:
        return pyarrow.nulls(len(rows))
    kind = pyarrow.binary(width)
    return pyarrow.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pyarrow.py_buffer(rows.tobytes())])


def columns(folder: Path, number: int, *names: str) -> dict[str, Any]:
    """Some columns of a part that is written, as Arrow arrays."""
    import pyarrow

    with pyarrow.OSFile(str(path_of(folder, number))) as file:
        schema = pyarrow.ipc.open_file(file).schema
        options = pyarrow.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in names])
        batch = pyarrow.ipc.open_file(file, options=options).get_batch(0)
    return {name: batch.column(name) for name in names}


def rows(array: Any, dtype: Any) -> np.ndarray:
    """What `_binary` was made of."""
    width = getattr(array.type, "byte_width", 0) // np.dtype(dtype).itemsize
    if not width or not len(array):
        return np.zeros((len(array), width), dtype)
    return np.frombuffer(array.buffers()[1], dtype).reshape(-1, width)[array.offset : array.offset + len(array)]


def report_of(folder: Path, number: int) -> Report:
    import pyarrow

    with pyarrow.OSFile(str(path_of(folder, number))) as file:
        found = json.loads(pyarrow.ipc.open_file(file).schema.metadata[b"report"])
    counters = {name: Counter(found[name]) for name in ("read", "dropped", "dropped_bytes", "scrubbed")}
    return Report(**counters, examples=found["examples"], leaks=found["leaks"])
