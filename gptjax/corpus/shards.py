"""The data set as TFDS reads it: files of records in ArrayRecord, and what they hold."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.corpus.clean import columns
from gptjax.data.formats import Heard
from gptjax.files import json_text, write_whole

SPLIT, FORMAT = "train", "array_record"


@dataclass(frozen=True)
class Shard:
    """File `number` of the data set; as `pool.Work`."""

    folder: Path
    """Where the parts are."""
    out: Path
    number: int
    total: int
    name: str
    """Of the data set."""
    documents: tuple[tuple[int, np.ndarray, str], ...]
    """A part's number, which of its documents, and the origin's name."""
    size: int

    @property
    def path(self) -> Path:
        return self.out / f"{self.name}-{SPLIT}.{FORMAT}-{self.number:05}-of-{self.total:05}"

    def run(self, heard: Heard) -> None:
        """Writes the file, and beside it its SHA-256 and what it holds, which comes last. Raises OSError."""
        from array_record.python.array_record_module import ArrayRecordWriter

        half = self.path.with_name(f".{self.path.name}")
        count = size = 0
        try:
            out = ArrayRecordWriter(str(half), "group_size:1")  # as TFDS writes: each record can be read alone
            for text, origin in self._texts():
                record = _example(text, origin)
                out.write(record)
                count, size = count + 1, size + len(record)
                heard(len(text))
            out.close()
        except RuntimeError as error:  # as which it says that a disk is full
            raise OSError(str(error).split(";")[0]) from error
        about = {"sha256": _digest(half), "documents": count, "bytes": size}
        half.rename(self.path)
        write_whole(about_path(self.path), json_text(about).encode())

    def _texts(self) -> Iterator[tuple[bytes, bytes]]:
        for number, which, origin in self.documents:
            texts = columns(self.folder, number, "text")["text"]
            yield from ((texts[index].as_py(), origin.encode()) for index in which.tolist())


def about_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _example(text: bytes, origin: bytes) -> bytes:
    """As TFDS serialises {"text": ..., "origin": ...}."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    def value(data: bytes) -> Any:
        return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[data]))

    features = tf_feature_pb2.Features(feature={"origin": value(origin), "text": value(text)})
    made: bytes = tf_example_pb2.Example(features=features).SerializeToString(deterministic=True)
    return made


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_shards(sizes: Sequence[np.ndarray], most: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """The documents that stay, of about `most` bytes a shard: parts and which of their documents. sizes: of each part
    the bytes of each document, 0 for one that does not stay."""
    held, size = list[tuple[int, np.ndarray]](), 0
    for part, each in enumerate(sizes):
        which = np.flatnonzero(each)
        while len(which):
            ends = size + np.cumsum(each[which])
            count = min(int(np.searchsorted(ends, most)) + 1, len(which))
            held.append((part, which[:count]))
            size, which = int(ends[count - 1]), which[count:]
            if size >= most:
                yield held
                held, size = [], 0
    if held:
        yield held


def write_metadata(out: Path, name: str, version: str, about: Iterable[dict[str, Any]], description: str) -> None:
    """What makes the files in `out` a data set of TFDS."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming
    from tensorflow_datasets.core.folder_dataset import write_metadata_utils

    shards = list(about)
    template = naming.ShardedFileTemplate(data_dir=out, dataset_name=name, split=SPLIT, filetype_suffix=FORMAT)
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[shard["documents"] for shard in shards],
        num_bytes=sum(shard["bytes"] for shard in shards),
        filename_template=template,
    )
    write_metadata_utils.write_metadata(
        data_dir=out,
        features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "origin": tfds.features.Text()}),
        split_infos=[split],
        version=version,
        filename_template=template,
        check_data=False,
        description=description,
    )
