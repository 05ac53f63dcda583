"""Data sets of the TFDS catalogue: which there are, that they are prepared, and the documents in their splits."""

import difflib
import json
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from gptjax.config import SourceConfig
from gptjax.data.formats import Extract, Failed, Heard, TextField, found, no_field, reason, refused
from gptjax.errors import UserError

PREFIX = "tfds:"


@dataclass(frozen=True)
class Rows:
    """A part of a split."""

    source: str
    split: str
    start: int
    stop: int
    extract: Extract
    size: int

    def documents(self, heard: Heard, failed: Failed = refused) -> Iterator[Iterable[str]]:
        """`failed` is told of a row that cannot be read, and of one that is no record."""
        rows = _rows(self.source, self.split)
        for number in range(self.start, self.stop):
            where = f"{self.source} {self.split} record {number}"
            try:
                row = rows[number]
            except Exception as error:  # whatever a library makes of damaged bytes
                failed(UserError(f"data.source: {where}: damaged ({reason(error)}); prepare it again"))
                continue
            yield from found(self.extract, row, where, failed)
            heard(self.size // (self.stop - self.start))


def open_builder(config: SourceConfig, extract: Extract) -> Any:
    """The data set's builder, in TFDS's own data folder (TFDS_DATA_DIR moves it). Raises UserError where there is no
    such data set, or it has not what `extract` reads."""
    builder = _builder(config.source)
    features = builder.info.features
    if isinstance(extract, TextField):  # better before the download than after
        _require_text(extract.name, config.source, features)
    else:
        extract.columns([*features] if hasattr(features, "items") else [], config.source)
    return builder


def prepare(config: SourceConfig, builder: Any) -> None:
    """Download and write what is not there. Raises UserError where that fails."""
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


def splits(builder: Any) -> dict[str, int]:
    """The rows of each split."""
    return {name: info.num_examples for name, info in builder.info.splits.items()}


def parts(config: SourceConfig, extract: Extract, builder: Any, split: str, part_bytes: int) -> list[Rows]:
    """The rows of a split in parts of about so many bytes."""
    info = builder.info.splits[split]
    row_bytes = max(info.num_bytes // max(info.num_examples, 1), 1)
    step = max(part_bytes // row_bytes, 1)
    starts = [*range(0, info.num_examples, step), info.num_examples]
    return [
        Rows(config.source, split, start, stop, extract, row_bytes * (stop - start)) for start, stop in pairwise(starts)
    ]


def identity(builder: Any) -> str:
    """What is another where the data set is: its name, version, counts and shards."""
    found = {name: [info.num_bytes, *info.shard_lengths] for name, info in builder.info.splits.items()}
    return json.dumps([builder.info.full_name, found], sort_keys=True)


def _builder(source: str) -> Any:
    import tensorflow_datasets as tfds

    name = source.removeprefix(PREFIX)
    try:
        if (Path(name).expanduser() / "dataset_info.json").is_file():
            return tfds.builder_from_directory(Path(name).expanduser())
        return tfds.builder(name, file_format="array_record")
    except ValueError as error:  # an unknown data set, configuration or version
        base = name.split("/")[0].split(":")[0]
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(base, known, 1, 0.0) if base not in known else []
        why = f"TFDS has no such data set; nearest tfds:{near[0]}" if near else reason(error)
        raise UserError(f"data.source = {source}: {why}") from None


def _rows(source: str, split: str) -> Any:
    try:
        return _builder(source).as_data_source(split)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"data.source = {source}: {reason(error)}; prepare it as array_record") from error


def _require_text(field: str, source: str, features: Any) -> None:
    """Raises UserError where a field, which may be dotted, is no text among TFDS's features."""
    feature = features
    for name in field.split("."):
        if not hasattr(feature, "items") or name not in feature:
            raise no_field(field, source, feature if hasattr(feature, "items") else (), "data.text_field")
        feature = feature[name]
    dtype = getattr(feature, "np_dtype", None)
    if hasattr(feature, "items") or getattr(feature, "shape", None) != () or dtype not in (np.object_, np.str_, bytes):
        raise UserError(f"data.text_field = {field}: of {source} it is a {type(feature).__name__}, not text")
