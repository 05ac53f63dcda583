"""Where text comes from: every source is a TFDS data set of `Record`s, read by random access.

Local text is written once as an ArrayRecord data set under `data.cache_dir`, in a folder named
after a digest of its files, so it is reused until a file changes. TensorFlow is never needed.
"""

import codecs
import contextlib
import difflib
import glob
import hashlib
import itertools
import json
import os
import socket
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gptjax.config import DataConfig
from gptjax.errors import UserError

FORMAT_VERSION = "1.1.0"  # part of the digest: raise it when the records of the same files change
DIGEST = "digest.txt"
BLOCK_BYTES = 1 << 20
BATCH_RECORDS = 256  # records between two rewrites of the data set's metadata
# Not library code, or tables rather than text that reads as Python.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Record:
    """A document, or one of the consecutive pieces of a long one; never empty unless last."""

    text: str
    last: bool
    """Whether the document ends here, so that an end-of-text token follows."""


@dataclass(frozen=True)
class TextSource:
    """The records of one split by index."""

    name: str
    rows: Sequence[dict[str, Any]]
    """The TFDS data source."""
    text_field: str
    pieces: bool
    """Whether rows say if they are the last of their document; elsewhere each row is one."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """Record `index`; raises IndexError outside 0..len-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        row = self.rows[index]
        return Record(row[self.text_field].decode(), bool(row["last"]) if self.pieces else True)


@dataclass(frozen=True)
class Corpus:
    """A data set that is there, whatever becomes of the files that it was made from. Made by `build` or `reopen`."""

    name: str
    folder: Path
    digest: str
    """Of its records in order; of a data set of TFDS's catalogue: of its name, version, counts and shards."""
    text_field: str
    pieces: bool
    max_chars: int
    builder: Any

    def split(self, name: str) -> TextSource:
        """One split, such as `train[:95%]`. Raises UserError where there is none of the name, or nothing in it."""
        splits = {each: info.num_examples for each, info in self.builder.info.splits.items()}
        records = ", ".join(f"{each} of {count} record{'s' * (count != 1)}" for each, count in splits.items())
        try:
            empty = self.builder.info.splits[name].num_examples <= 0
        except (ValueError, KeyError, AssertionError):
            raise UserError(f"split {name}: not a split of {self.name}, which has {records}") from None
        if empty:
            remedy = "choose other data.train_split and data.eval_split"
            remedy += f", or lower data.max_chars = {self.max_chars}" if self.pieces else ""
            raise UserError(f"split {name}: empty, as {self.name} has {records}; {remedy}")
        try:
            rows = self.builder.as_data_source(name)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"data.source = {self.name}: {_reason(error)}; prepare it as array_record") from error
        return TextSource(self.name, rows, self.text_field, self.pieces)


def build(config: DataConfig) -> Corpus:
    """The data set of `data.source`, made now unless it is there.

    Raises UserError for files, fields or data sets that are missing, broken or empty, and for a disk that is full; a
    build that fails leaves nothing behind.
    """
    if not config.source.startswith("tfds:"):
        return reopen(config, _local(config))
    builder = _tfds_builder(config)
    _prepare(config, builder)
    return _of_catalogue(config, builder)


def reopen(config: DataConfig, folder: Path) -> Corpus:
    """What `build` made, perhaps on another host, in a folder that this one sees.

    Raises UserError where it is not there.
    """
    import tensorflow_datasets as tfds

    if config.source.startswith("tfds:"):
        builder = _tfds_builder(config)
        if builder.is_prepared():
            return _of_catalogue(config, builder)
    elif found := next((there for there in (folder, _own_folder(config)) if (there / DIGEST).is_file()), None):
        builder = tfds.builder_from_directory(str(found))
        digest = (found / DIGEST).read_text().strip()
        return Corpus(config.source, found, digest, "text", True, config.max_chars, builder)
    raise UserError(
        f"data.source = {config.source}: the data set in {folder} is not there on {socket.gethostname()}; let hosts "
        "share data.cache_dir (TFDS_DATA_DIR), or build it first on every host: gptjax data CONFIG"
    )


def open_source(config: DataConfig, split: str) -> TextSource:
    """One split of `data.source`, building the data set if need be; raises what `build` and `Corpus.split` raise."""
    return build(config).split(split)


def _of_catalogue(config: DataConfig, builder: Any) -> Corpus:
    splits = {name: [info.num_bytes, *info.shard_lengths] for name, info in builder.info.splits.items()}
    about = json.dumps([builder.info.full_name, config.text_field, splits], sort_keys=True)
    digest = hashlib.sha256(about.encode()).hexdigest()
    return Corpus(config.source, Path(builder.data_dir), digest, config.text_field, False, config.max_chars, builder)


def _tfds_builder(config: DataConfig) -> Any:
    """A data set of the TFDS catalogue, in TFDS's own data folder (TFDS_DATA_DIR moves it)."""
    import tensorflow_datasets as tfds

    name = config.source.removeprefix("tfds:")
    try:
        builder = tfds.builder(name, file_format="array_record")
    except ValueError as error:  # an unknown data set, configuration or version
        base = name.split("/")[0].split(":")[0]
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(base, known, 1, 0.0) if base not in known else []
        reason = f"TFDS has no such data set; nearest tfds:{near[0]}" if near else _reason(error)
        raise UserError(f"data.source = {config.source}: {reason}") from None
    if config.text_field not in builder.info.features:  # better before the download than after
        raise _no_field(config, config.source, builder.info.features)
    return builder


def _prepare(config: DataConfig, builder: Any) -> None:
    """Download and write what is not there."""
    try:
        if not builder.is_prepared():
            for host in {urlsplit(url).hostname for url in builder.url_infos}:
                socket.getaddrinfo(host, None)  # without network TFDS would retry for minutes before it says so
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # whatever a download, an archive or a data set's own code can raise
        raise UserError(
            f"data.source = {config.source}: TFDS could not prepare it ({_reason(error)}); it needs network, or a copy "
            f"prepared as array_record in {builder.data_dir}"
        ) from error


def local_folder(config: DataConfig) -> tuple[Path, list[Path]]:
    """Where the data set of local files lies, or will, and the files that it is made from, in order."""
    name, files = _find(config)
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = json.dumps([FORMAT_VERSION, config.text_field, config.max_chars, stats])
    cache = Path(config.cache_dir).expanduser() / "datasets"
    return cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}", files


def _own_folder(config: DataConfig) -> Path:
    """Where this host would have the data set, from its own copy of the files if it has one."""
    try:
        return local_folder(config)[0]
    except UserError:
        return Path()


def _local(config: DataConfig) -> Path:
    """The folder of the data set of local files, written now unless the cache has it."""
    folder, files = local_folder(config)
    if not folder.is_dir():
        records = _records(config, files)
        first = next(records)
        try:
            _build(folder, itertools.chain([first], records))
        except (OSError, RuntimeError) as error:  # ArrayRecord reports a full disk as RuntimeError
            raise UserError(
                f"data.cache_dir = {config.cache_dir}: cannot write the data set ({_reason(error)}); "
                "free space or choose another"
            ) from error
    return folder


def look(config: DataConfig) -> tuple[str, Corpus | None]:
    """What a run would read, in words, and the data set if it is built; nothing is written.

    Raises UserError where the files or the data set are not there, or their beginning cannot be read.
    """
    if config.source.startswith("tfds:"):
        builder = _tfds_builder(config)
        made = _of_catalogue(config, builder) if builder.is_prepared() else None
        return f"{config.source} {'in' if made else 'to be prepared in'} {builder.data_dir}", made
    folder, files = local_folder(config)
    size = sum(file.stat().st_size for file in files)
    shown = ", ".join(str(file) for file in files[:3]) + (", ..." if len(files) > 3 else "")
    text = f"{config.source}: {len(files):,} file(s), {size / 1e6:,.1f} MB: {shown}"
    if folder.is_dir():
        return f"{text}; built in {folder}", reopen(config, folder)
    next(_records(config, files))
    return f"{text}; to be built in {folder}", None


def _records(config: DataConfig, files: Sequence[Path]) -> Iterator[Record]:
    """Of all files in order. Raises UserError where there is no text in them."""
    none = True
    for file in files:
        for document in _documents(file, config):
            for record in cut(document, config.max_chars):
                none = False
                yield record
    if none:
        raise UserError(f"data.source = {config.source}: no text in {len(files)} file(s); give files with text")


def _build(folder: Path, records: Iterable[Record]) -> None:
    """Write the records in order as a TFDS data set, and their digest, all of it or nothing.

    A GeneratorBasedBuilder would hold every record of an ordered data set in memory; the sequential
    writer holds one batch.
    """
    import numpy as np
    import tensorflow_datasets as tfds

    folder.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        data = Path(temporary) / "data"
        data.mkdir()
        identity = tfds.core.dataset_info.DatasetIdentity(
            "text", tfds.core.Version(FORMAT_VERSION), str(data), __name__
        )
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "last": np.bool_})
        info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
        writer = tfds.core.SequentialWriter(info, max_examples_per_shard=1 << 62, file_format="array_record")
        writer.initialize_splits(["train"])
        rows = ({"text": record.text, "last": record.last} for record in _digested(records, digest))
        while batch := list(itertools.islice(rows, BATCH_RECORDS)):
            writer.add_examples({"train": batch})
        writer.close_all()
        (data / DIGEST).write_text(digest.hexdigest() + "\n")
        try:
            data.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same records
                raise


def _digested(records: Iterable[Record], digest: Any) -> Iterator[Record]:
    """The records, while `digest` takes in each text with its length and whether a document ends there."""
    for record in records:
        text = record.text.encode()
        digest.update(f"{len(text)} {record.last:d} ".encode() + text)
        yield record


def _find(config: DataConfig) -> tuple[str, list[Path]]:
    """A short name of a local source and its files in order."""
    if config.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        names: list[str] = []
        for folder, inner, leaves in os.walk(root):
            inner[:] = set(inner) - NOT_STDLIB  # os.walk goes no deeper than these
            sources = (leaf for leaf in leaves if leaf.endswith(".py") and not leaf.startswith("_sysconfigdata"))
            names += [(Path(folder) / leaf).relative_to(root).as_posix() for leaf in sources]
        # In the order of a hash every slice is a fair sample of the whole.
        return "stdlib", [root / name for name in sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest())]
    path = Path(config.source).expanduser()
    if path.is_dir():
        raise UserError(f"data.source = {config.source}: a folder; give a glob, such as {config.source}/**/*.txt")
    matches = [path] if path.is_file() else map(Path, sorted(glob.glob(str(path), recursive=True)))
    files = [file.resolve() for file in matches if file.is_file()]
    if not files:
        remedy = "give stdlib, a file, a glob, or tfds:NAME"
        raise UserError(f"data.source = {config.source}: no such file, nor a match as a glob; {remedy}")
    return "".join(c if c.isalnum() else "_" for c in path.stem)[:40], files


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


def _documents(file: Path, config: DataConfig) -> Iterator[Iterable[str]]:
    """Each document of a file as blocks of text."""
    if file.suffix == ".jsonl":
        yield from _jsonl(file, config)
    elif file.suffix == ".parquet":
        yield from _parquet(file, config)
    else:
        yield _text(file)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Errors of the file system as the user's; without this they would pass for a full disk."""
    try:
        yield
    except OSError as error:
        raise UserError(f"data.source: {file}: {_reason(error)}; make it readable") from None


def _text(file: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that is not decoded yet
    try:
        with _reading(file), file.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                yield decoder.decode(block)
                offset = stream.tell() - len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"data.source: {file}: not UTF-8 at byte {offset + error.start}; convert it to UTF-8") from None


def _jsonl(file: Path, config: DataConfig) -> Iterator[list[str]]:
    with _reading(file), file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"data.source: {where}: not JSON ({error}); mend or remove the line") from None
            if not isinstance(row, dict):
                raise UserError(f"data.source: {where}: not a JSON object; write {{{config.text_field!r}: ...}}")
            if config.text_field not in row:
                raise _no_field(config, where, row)
            yield [_checked(row[config.text_field], config, where)]


def _parquet(file: Path, config: DataConfig) -> Iterator[list[str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with _reading(file), parquet.ParquetFile(file) as table:
            if config.text_field not in table.schema_arrow.names:
                raise _no_field(config, str(file), table.schema_arrow.names)
            batches = table.iter_batches(batch_size=BATCH_RECORDS, columns=[config.text_field])
            for number, value in enumerate(v for batch in batches for v in batch.column(0).to_pylist()):
                yield [_checked(value, config, f"{file} row {number}")]
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise UserError(f"data.source: {file}: not readable as Parquet ({_reason(error)}); write it anew") from None


def _checked(value: Any, config: DataConfig, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"data.source: {where}: {config.text_field} is {kind}, not text; mend or remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"data.source: {where}: half a surrogate pair is not Unicode; mend or remove it") from None
    return value


def _no_field(config: DataConfig, where: str, names: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(config.text_field, list(names), 3, 0.0)
    return UserError(f"data.text_field = {config.text_field}: not in {where}; nearest {', '.join(near) or 'none'}")


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
