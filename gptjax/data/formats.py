"""The documents of a file, kind by kind, exactly as they were written; what cannot be one is named with its place.

A byte-order mark at the beginning of a file is no text. Memory holds one document, or one row group.
"""

import codecs
import csv
import difflib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import IO, Any, Protocol

from gptjax.data.compressed import broken, open_plain
from gptjax.data.files import TextFile
from gptjax.data.web import archived, page_text
from gptjax.errors import UserError

BLOCK_BYTES = 1 << 20
ROWS = 256  # that are taken from a table at once
MARK = "\ufeff"
Heard = Callable[[int], None]
Failed = Callable[[UserError], None]
"""Told of a record that is none, and of a file that cannot be read on; it may raise what it is told."""


class Extract(Protocol):
    """What of a record is its document. A frozen dataclass, which goes to other processes as a pickle."""

    def columns(self, names: Sequence[str], where: object) -> list[str]:
        """Those columns of a table that `document` reads, each once. Raises UserError where one is missing."""
        ...

    def document(self, row: Any, where: object) -> str:
        """The text of a record's document, one without half a character. Raises UserError that says where there is
        none, and why."""
        ...


@dataclass(frozen=True)
class TextField:
    """The text of one field, as it was written."""

    name: str
    """A dotted one reaches into nested records."""

    def columns(self, names: Sequence[str], where: object) -> list[str]:
        return [column(self.name, names, where, "data.text_field")]

    def document(self, row: Any, where: object) -> str:
        if not isinstance(row, dict):
            raise UserError(f"data.source: {where}: not a JSON object; write {{{json.dumps(self.name)}: ...}}")
        return text_of(row, self.name, where)


def refused(error: UserError) -> None:
    """Raises it."""
    raise error


def documents(
    file: TextFile, extract: Extract, heard: Heard = lambda size: None, failed: Failed = refused
) -> Iterator[Iterable[str]]:
    """Each document of a file as blocks of text: of plain text the whole file, else what `extract` finds in each
    record; `heard` is told of the bytes that were read.

    `failed` is told of what cannot be read, a UserError that names file and place: of a record that is none, after
    which the next one comes, and of a file that is broken, which ends there.
    """
    try:
        with _own_errors(file):
            yield from READERS[file.kind](file, extract, heard, failed)
    except UserError as error:
        failed(error)


def found(extract: Extract, row: Any, where: object, failed: Failed) -> Iterator[list[str]]:
    """The document of a record, if it has one."""
    try:
        text = extract.document(row, where)
    except UserError as error:
        failed(error)
        return
    yield [text]


def in_spans(file: TextFile, span_bytes: int) -> list[tuple[TextFile, int]]:
    """A file in parts of about `span_bytes`, each with its size, where its kind can be entered in the middle; else
    whole. Together they give the documents of the file, in order."""
    with _own_errors(file):
        size = file.path.stat().st_size
        if size > span_bytes and not file.compression:
            if file.kind == "jsonl":
                cuts = [*range(0, size, span_bytes), size]
                return [(replace(file, span=(a, b)), b - a) for a, b in pairwise(cuts)]
            if file.kind == "parquet":
                return _row_groups(file, span_bytes)
    return [(file, size)]


def _row_groups(file: TextFile, span_bytes: int) -> list[tuple[TextFile, int]]:
    import pyarrow
    from pyarrow import parquet

    try:
        about = parquet.read_metadata(file.path)
    except pyarrow.ArrowException as error:
        raise _damaged(file, error) from None
    groups, start, size = [], 0, 0
    for i in range(about.num_row_groups):
        group = about.row_group(i)
        size += sum(group.column(c).total_compressed_size for c in range(group.num_columns))
        if size >= span_bytes or i + 1 == about.num_row_groups:
            groups.append((replace(file, span=(start, i + 1)), size))
            start, size = i + 1, 0
    return groups


@contextmanager
def _own_errors(file: TextFile) -> Iterator[None]:
    """Says of an error of the file's which file it is: without this it would pass for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a library's own, such as gzip.BadGzipFile
            raise _damaged(file, error) from None
        raise UserError(f"data.source: {file.path}: {reason(error)}; make it readable") from None


def text_of(row: dict[str, Any], field: str, where: object) -> str:
    """The text in a record, one without half a character. Raises UserError that says what is there instead."""
    value: Any = row
    names = [field] if field in row else field.split(".")
    for depth, name in enumerate(names):
        if not isinstance(value, dict):
            raise UserError(f"data.text_field = {field}: {'.'.join(names[:depth])} is {kind(value)} in {where}")
        if name not in value:
            raise no_field(field, where, value, "data.text_field")
        value = value[name]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"data.source: {where}: {field} is not UTF-8 at byte {error.start}; mend or remove it"
            ) from None
    if not isinstance(value, str):
        raise UserError(f"data.source: {where}: {field} is {kind(value)}, not text; mend or remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"data.source: {where}: half a surrogate pair is not Unicode; mend or remove it") from None
    return value


def no_field(field: str, where: object, names: Iterable[str], setting: str) -> UserError:
    near = difflib.get_close_matches(field, list(map(str, names)), 3, 0.0)
    return UserError(f"{setting} = {field}: not in {where}; nearest {', '.join(near) or 'none'}")


def column(field: str, names: Sequence[str], where: object, setting: str) -> str:
    """The column that a field, which may be dotted, lies in. Raises UserError where there is none."""
    top = field if field in names else field.split(".")[0]
    if top not in names:
        raise no_field(field, where, names, setting)
    return top


def reason(error: BaseException) -> str:
    """The first line of an error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def kind(value: Any) -> str:
    """What a value is, in a word."""
    return "null" if value is None else type(value).__name__


def _damaged(file: TextFile, error: BaseException) -> UserError:
    what = f"as {file.compression}" if file.compression else f"as {file.kind}"
    return UserError(f"data.source: {file.path}: not readable {what} ({reason(error)}); write or download it again")


@contextmanager
def _plain(file: TextFile, heard: Heard) -> Iterator[IO[bytes]]:
    """The file's bytes without their compression."""
    try:
        with open_plain(file.path, file.compression, heard) as stream:
            yield stream
    except broken() as error:
        if not file.compression:
            raise
        raise _damaged(file, error) from None


def _text(file: TextFile, _: Extract, heard: Heard, failed: Failed) -> Iterator[Iterable[str]]:
    yield _decoded(file, heard)


def _decoded(file: TextFile, heard: Heard) -> Iterator[str]:
    """A file's text in blocks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, first = 0, True  # offset: of the first byte that is not decoded yet
    with _plain(file, heard) as stream:
        while True:
            block = stream.read(BLOCK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data.source: {file.path}: not UTF-8 at byte {offset - pending + error.start}; convert it to UTF-8"
                ) from None
            offset += len(block)
            yield text.removeprefix(MARK) if first else text
            first = first and not text
            if not block:
                return


def _jsonl(file: TextFile, extract: Extract, heard: Heard, failed: Failed) -> Iterator[list[str]]:
    """A line belongs to the span that its first byte lies in."""
    start, end = file.span or (0, sys.maxsize)
    with _plain(file, heard) as lines:
        if start:
            lines.seek(start - 1)
            start += len(lines.readline()) - 1
        for line in lines:
            if start >= end:
                return
            where = _Line(file, start)
            line, start = line if start else line.removeprefix(codecs.BOM_UTF8), start + len(line)
            if line.strip():
                try:
                    row = json.loads(line)
                except (RecursionError, ValueError) as error:
                    failed(_no_json(where, error))
                    continue
                yield from found(extract, row, where, failed)


@dataclass(frozen=True)
class _Line:
    """The place of a line that begins at a byte; its number is counted when somebody asks."""

    file: TextFile
    start: int

    def __str__(self) -> str:
        number, left = 1, self.start
        with _plain(self.file, lambda size: None) as plain:
            while block := plain.read(min(left, BLOCK_BYTES)):
                number, left = number + block.count(b"\n"), left - len(block)
        return f"{self.file.path}:{number}"


def _no_json(where: object, error: Exception) -> UserError:
    if isinstance(error, RecursionError):
        return UserError(f"data.source: {where}: nested too deep to be read; remove it")
    return UserError(f"data.source: {where}: not JSON ({error}); mend or remove it")


def _json(file: TextFile, extract: Extract, heard: Heard, failed: Failed) -> Iterator[list[str]]:
    """Objects one after another, on lines or over several, or in one array."""
    values = _Values(file, heard)
    in_array = values.passes("[")
    while not values.ended("," if in_array else ""):
        if in_array and values.passes("]"):
            in_array = False
            continue
        where = f"{file.path}:{values.line}"
        yield from found(extract, values.take(where), where, failed)
    if in_array:
        raise UserError(f"data.source: {file.path}:{values.line}: not JSON (an array without its end); write it again")


class _Values:
    """JSON values in a text that is read as it is needed."""

    def __init__(self, file: TextFile, heard: Heard):
        self._blocks, self._text = _decoded(file, heard), ""
        self._decode = json.JSONDecoder().raw_decode
        self.at, self.line = 0, 1

    def _more(self, size: int) -> bool:
        """At least `size` characters more, or all that are left; False where none are."""
        blocks = [self._text[self.at :]]
        while size > 0 and (block := next(self._blocks, None)) is not None:
            blocks.append(block)
            size -= len(block)
        self._text, self.at = "".join(blocks), 0
        return any(blocks[1:])

    def _skip(self, characters: str) -> None:
        while True:
            while self.at < len(self._text) and self._text[self.at] in characters:
                self.line += self._text[self.at] == "\n"
                self.at += 1
            if self.at < len(self._text) or not self._more(BLOCK_BYTES):
                return

    def passes(self, character: str) -> bool:
        """Whether it is the next one that is not blank, which is then behind."""
        self._skip(" \t\r\n")
        found = self._text[self.at : self.at + 1] == character
        self.at += found
        return found

    def ended(self, also: str) -> bool:
        """Whether there is nothing but blanks, and the characters `also` between values."""
        self._skip(" \t\r\n" + also)
        return self.at == len(self._text)

    def take(self, where: str) -> Any:
        """The next value. Raises UserError where it is none."""
        while True:
            try:
                value, end = self._decode(self._text, self.at)
            except (RecursionError, ValueError) as error:
                # Twice as much each time: a long value is not begun anew for each block.
                if isinstance(error, RecursionError) or not self._more(max(len(self._text) - self.at, BLOCK_BYTES)):
                    raise _no_json(where, error) from None
                continue
            self.line += self._text.count("\n", self.at, end)
            self.at = end
            return value


def _csv(file: TextFile, extract: Extract, heard: Heard, failed: Failed) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)  # of the process; documents are longer than the 131,072 that it allows
    dialect: dict[str, Any] = {"delimiter": "\t" if file.kind == "tsv" else ",", "strict": True}
    with _plain(file, heard) as stream:
        rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), **dialect)
        try:
            extract.columns(rows.fieldnames or (), file.path)
            for row in rows:
                where = f"{file.path}:{rows.line_num}"
                if None in row or None in row.values():
                    columns = len(rows.fieldnames or ())
                    failed(UserError(f"data.source: {where}: not the {columns} columns of the first line; mend it"))
                    continue
                yield from found(extract, row, where, failed)
        except csv.Error as error:
            raise UserError(f"data.source: {file.path}:{rows.line_num}: not {file.kind} ({error}); mend it") from None
        except UnicodeDecodeError:
            raise UserError(
                f"data.source: {file.path}: not UTF-8 after line {rows.line_num}; convert it to UTF-8"
            ) from None


def _parquet(file: TextFile, extract: Extract, heard: Heard, failed: Failed) -> Iterator[list[str]]:
    import pyarrow
    from pyarrow import parquet

    with _seekable(file, heard) as stream:
        try:
            with parquet.ParquetFile(stream) as table:
                columns = extract.columns(table.schema_arrow.names, file.path)
                first, end = file.span or (0, table.num_row_groups)
                before = sum(table.metadata.row_group(i).num_rows for i in range(first))
                batches = table.iter_batches(batch_size=ROWS, columns=columns, row_groups=[*range(first, end)])
                yield from _rows(batches, file, extract, columns, failed, before)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise _damaged(file, error) from None


def _arrow(file: TextFile, extract: Extract, heard: Heard, failed: Failed) -> Iterator[list[str]]:
    """Arrow's two forms: the stream that Hugging Face's data sets write, and the file with an index at its end."""
    import pyarrow

    with _seekable(file, heard) as stream:
        try:
            whole = stream.read(6) == b"ARROW1"
            stream.seek(0)
            if whole:
                table = pyarrow.ipc.open_file(stream)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                batches = table = pyarrow.ipc.open_stream(stream)
            columns = extract.columns(table.schema.names, file.path)
            yield from _rows((part for batch in batches for part in _slices(batch)), file, extract, columns, failed)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise _damaged(file, error) from None


def _slices(batch: Any) -> Iterator[Any]:
    return (batch.slice(start, ROWS) for start in range(0, batch.num_rows, ROWS))


def _rows(
    batches: Iterable[Any], file: TextFile, extract: Extract, columns: list[str], failed: Failed, number: int = 0
) -> Iterator[list[str]]:
    """The documents of a table, `number` rows coming before."""
    for batch in batches:
        for row in batch.select(columns).to_pylist():
            yield from found(extract, row, f"{file.path} row {number}", failed)
            number += 1


@contextmanager
def _seekable(file: TextFile, heard: Heard) -> Iterator[IO[bytes]]:
    """A table is read from its end: one that is compressed goes to a temporary file first."""
    with _plain(file, heard) as stream:
        if not file.compression:
            yield stream
            return
        with tempfile.TemporaryFile() as plain:
            while block := stream.read(BLOCK_BYTES):
                plain.write(block)
            plain.seek(0)
            yield plain


def _html(file: TextFile, _: Extract, heard: Heard, failed: Failed) -> Iterator[list[str]]:
    with _plain(file, heard) as stream:
        yield [page_text(stream.read())]


def _warc(file: TextFile, _: Extract, heard: Heard, failed: Failed) -> Iterator[list[str]]:
    with _plain(file, heard) as stream:
        for text in archived(stream):
            yield [text]


READERS = {
    "text": _text,
    "html": _html,
    "warc": _warc,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}
