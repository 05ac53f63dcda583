"""Where text comes from: every source is a TFDS data set of `Record`s, read by random access.

Local text is written once as an ArrayRecord data set under `data.cache_dir`, in a folder named
after a digest of its files, so it is reused until a file changes. TensorFlow is never needed.
"""

import difflib
import hashlib
import itertools
import json
import shutil
import socket
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from gptjax.config import DataConfig
from gptjax.data import cache
from gptjax.data.files import Found, TextFile, find
from gptjax.data.formats import documents, no_field, reason, text_of
from gptjax.data.splits import bounds, chosen
from gptjax.errors import UserError

FORMAT_VERSION = "1.2.0"  # part of the digest: raise it when the records of the same files change
DIGEST, DOCUMENTS = "digest.txt", "documents.npy"
BATCH_RECORDS = 256  # records between two rewrites of the data set's metadata


@dataclass(frozen=True)
class Record:
    """A document, or one of the consecutive pieces of a long one; never empty unless last."""

    text: str
    last: bool
    """Whether the document ends here, so that an end-of-text token follows."""
    cut: bool = False
    """Whether it goes on, but not in the next record: that piece is in another split."""


@dataclass(frozen=True)
class TextSource:
    """The records of one split by index."""

    name: str
    folder: Path
    rows: Sequence[dict[str, Any]]
    """The TFDS data source."""
    text_field: str
    chosen: np.ndarray | None
    """The rows of the split, which say whether they are the last of their document. None for all, each a document."""

    def __len__(self) -> int:
        return len(self.rows) if self.chosen is None else len(self.chosen)

    def __getitem__(self, index: int) -> Record:
        """Record `index`; raises IndexError outside 0..len-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = index if self.chosen is None else int(self.chosen[index])
        try:
            row = self.rows[number]
        except Exception as error:  # whatever a library makes of damaged bytes
            raise _damaged(self.name, self.folder, self.chosen is None, f"record {number}: {reason(error)}") from error
        text = text_of(row, self.text_field, f"{self.name} record {number}")
        if self.chosen is None or row["last"]:
            return Record(text, True)
        following = int(self.chosen[index + 1]) if index + 1 < len(self) else -1
        return Record(text, False, cut=following != number + 1)


@dataclass(frozen=True)
class Corpus:
    """A data set that is there, whatever becomes of the files that it was made from. Made by `build` or `reopen`."""

    name: str
    folder: Path
    digest: str
    """Of its records in order; of a data set of TFDS's catalogue: of its name, version, counts and shards."""
    text_field: str
    builder: Any
    documents: np.ndarray | None
    """See `splits.chosen`; None for TFDS's catalogue, whose splits are its own."""

    def split(self, name: str, split_by: str) -> TextSource:
        """One split, such as `train[:95%]`. Raises UserError where there is none of the name, or nothing in it."""
        if self.documents is None:
            return self._of_catalogue(name)
        try:
            low, high = bounds(name)
        except ValueError:
            raise UserError(
                f"split {name}: not one of {self.name}; give train, or a part in percent such as train[:95%]"
            ) from None
        rows = chosen(self.documents, low, high, split_by)
        if not len(rows):
            count = f"{len(self.documents):,} document(s) of {int(self.documents[:, 1].sum()):,} record(s)"
            other = "data.split_by = position and a lower" if split_by == "document" else "a lower"
            raise UserError(
                f"split {name}: empty, as {self.name} has {count}; take other splits, or {other} data.max_chars"
            )
        try:
            source = self.builder.as_data_source("train")
        except Exception as error:
            raise _damaged(self.name, self.folder, False, reason(error)) from error
        return TextSource(self.name, self.folder, source, self.text_field, rows)

    def _of_catalogue(self, name: str) -> TextSource:
        splits = {each: info.num_examples for each, info in self.builder.info.splits.items()}
        records = ", ".join(f"{each} of {count} record{'s' * (count != 1)}" for each, count in splits.items())
        try:
            empty = self.builder.info.splits[name].num_examples <= 0
        except (ValueError, KeyError, AssertionError):
            raise UserError(f"split {name}: not a split of {self.name}, which has {records}") from None
        if empty:
            remedy = "choose other data.train_split and data.eval_split"
            raise UserError(f"split {name}: empty, as {self.name} has {records}; {remedy}")
        try:
            rows = self.builder.as_data_source(name)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"data.source = {self.name}: {reason(error)}; prepare it as array_record") from error
        return TextSource(self.name, self.folder, rows, self.text_field, None)


def _damaged(name: str, folder: Path, catalogue: bool, why: str) -> UserError:
    remedy = "prepare it again" if catalogue else f"gptjax data --cache --remove {folder.name}, and it is built again"
    return UserError(f"data.source = {name}: its data set in {folder} is damaged ({why}); {remedy}")


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
        cache.note_use(found)
        return Corpus(config.source, found, digest, "text", builder, np.load(found / DOCUMENTS))
    raise UserError(
        f"data.source = {config.source}: the data set in {folder} is not there on {socket.gethostname()}; let hosts "
        "share data.cache_dir (TFDS_DATA_DIR), or build it first on every host: gptjax data CONFIG"
    )


def open_source(config: DataConfig, split: str) -> TextSource:
    """One split of `data.source`, building the data set if need be; raises what `build` and `Corpus.split` raise."""
    return build(config).split(split, config.split_by)


def _of_catalogue(config: DataConfig, builder: Any) -> Corpus:
    splits = {name: [info.num_bytes, *info.shard_lengths] for name, info in builder.info.splits.items()}
    about = json.dumps([builder.info.full_name, config.text_field, splits], sort_keys=True)
    digest = hashlib.sha256(about.encode()).hexdigest()
    return Corpus(config.source, Path(builder.data_dir), digest, config.text_field, builder, None)


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
        why = f"TFDS has no such data set; nearest tfds:{near[0]}" if near else reason(error)
        raise UserError(f"data.source = {config.source}: {why}") from None
    _require_text(config, builder.info.features)  # better before the download than after
    return builder


def _require_text(config: DataConfig, features: Any) -> None:
    """Raises UserError where `data.text_field`, which may be dotted, is no text among TFDS's features."""
    feature = features
    for name in config.text_field.split("."):
        if not hasattr(feature, "items") or name not in feature:
            raise no_field(config.text_field, config.source, feature if hasattr(feature, "items") else ())
        feature = feature[name]
    dtype = getattr(feature, "np_dtype", None)
    if hasattr(feature, "items") or getattr(feature, "shape", None) != () or dtype not in (np.object_, np.str_, bytes):
        kind = type(feature).__name__
        raise UserError(f"data.text_field = {config.text_field}: of {config.source} it is a {kind}, not text")


def _prepare(config: DataConfig, builder: Any) -> None:
    """Download and write what is not there."""
    try:
        if not builder.is_prepared():
            for host in {urlsplit(url).hostname for url in builder.url_infos}:
                socket.getaddrinfo(host, None)  # without network TFDS would retry for minutes before it says so
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # whatever a download, an archive or a data set's own code can raise
        raise UserError(
            f"data.source = {config.source}: TFDS could not prepare it ({reason(error)}); it needs network, or a copy "
            f"prepared as array_record in {builder.data_dir}"
        ) from error


def local_folder(config: DataConfig) -> tuple[Path, Found]:
    """Where the data set of local files lies, or will, and the files that it is made from."""
    found = find(config)
    paths = [(file, file.path.resolve()) for file in found.files]
    stats = [(str(path), file.kind, path.stat().st_size, path.stat().st_mtime_ns) for file, path in paths]
    key = json.dumps([FORMAT_VERSION, config.text_field, config.max_chars, stats])
    return cache.datasets(config.cache_dir) / f"{found.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}", found


def _own_folder(config: DataConfig) -> Path:
    """Where this host would have the data set, from its own copy of the files if it has one."""
    try:
        return local_folder(config)[0]
    except UserError:
        return Path()


def _local(config: DataConfig) -> Path:
    """The folder of the data set of local files, written now unless the cache has it."""
    folder, found = local_folder(config)
    if folder.is_dir() and cache.flaw(folder):
        cache.remove(folder)
    if not folder.is_dir():
        records = _records(config, found.files)
        first = next(records)
        try:
            _build(folder, itertools.chain([first], records))
        except (OSError, RuntimeError) as error:  # ArrayRecord reports a full disk as RuntimeError
            raise UserError(
                f"data.cache_dir = {config.cache_dir}: cannot write the data set ({reason(error)}); "
                "free space or choose another"
            ) from error
    return folder


def left_out(config: DataConfig) -> str:
    """The files of a folder or a glob that are not read, in words; empty where all are."""
    try:
        return "" if config.source.startswith("tfds:") else find(config).note()
    except UserError:  # the text is in the cache, its files are not here
        return ""


def look(config: DataConfig) -> tuple[str, Corpus | None]:
    """What a run would read, in words, and the data set if it is built; nothing is written.

    Raises UserError where the files or the data set are not there, or their beginning cannot be read.
    """
    if config.source.startswith("tfds:"):
        builder = _tfds_builder(config)
        made = _of_catalogue(config, builder) if builder.is_prepared() else None
        return f"{config.source} {'in' if made else 'to be prepared in'} {builder.data_dir}", made
    folder, found = local_folder(config)
    files = found.files
    size = sum(file.path.stat().st_size for file in files)
    shown = ", ".join(str(file.path) for file in files[:3]) + (", ..." if len(files) > 3 else "")
    text = f"{config.source}: {len(files):,} file(s), {size / 1e6:,.1f} MB: {shown}"
    text += f"; {found.note()}" if found.left_out else ""
    if folder.is_dir() and not (flaw := cache.flaw(folder)):
        return f"{text}; built in {folder}", reopen(config, folder)
    next(_records(config, files))
    again = f" again, for {flaw}," if folder.is_dir() else ""
    return f"{text}; to be built{again} in {folder}", None


def _records(config: DataConfig, files: Sequence[TextFile]) -> Iterator[Record]:
    """Of all files in order. Raises UserError where there is no text in them."""
    none = True
    for file in files:
        for document in documents(file, config.text_field):
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
    import tensorflow_datasets as tfds

    folder.parent.mkdir(parents=True, exist_ok=True)
    about = array("Q")
    data = cache.workplace(folder)
    data.mkdir()
    try:
        identity = tfds.core.dataset_info.DatasetIdentity(
            "text", tfds.core.Version(FORMAT_VERSION), str(data), __name__
        )
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "last": np.bool_})
        info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
        writer = tfds.core.SequentialWriter(info, max_examples_per_shard=1 << 62, file_format="array_record")
        writer.initialize_splits(["train"])
        rows = ({"text": record.text, "last": record.last} for record in _noted(records, about))
        while batch := list(itertools.islice(rows, BATCH_RECORDS)):
            writer.add_examples({"train": batch})
        writer.close_all()
        found = np.array(about, "<u8").reshape(-1, 5)
        (data / DIGEST).write_text(hashlib.sha256(found.tobytes()).hexdigest() + "\n")
        np.save(data / DOCUMENTS, found[:, [0, 4]])
        cache.seal(data)
        try:
            data.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same records
                raise
    finally:
        shutil.rmtree(data, ignore_errors=True)


def _noted(records: Iterable[Record], about: "array[int]") -> Iterator[Record]:
    """The records, while `about` takes five words a document: the SHA-256 of its text and the number of its records."""
    digest, count = hashlib.sha256(), 0
    for record in records:
        digest.update(record.text.encode())
        count += 1
        if record.last:
            about.extend(np.frombuffer(digest.digest(), "<u8").tolist())
            about.append(count)
            digest, count = hashlib.sha256(), 0
        yield record


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
