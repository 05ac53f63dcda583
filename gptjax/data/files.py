"""Which files a source names, and of which kind each is: by the name that it was given, never by what a link hides."""

import glob
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptjax import bucket
from gptjax.config import DataConfig, SourceConfig
from gptjax.errors import UserError

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".html": "html",
    ".htm": "html",
    ".warc": "warc",
    ".wet": "warc",
}
TEXTS = {"text", "html", "warc"}  # whose documents have no fields
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
REVISION = re.compile("[0-9a-f]{40}")
# What publishers put beside records: the card of a data set, and what `datasets` writes into its folders.
CARDS = {"readme.md", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# Not library code, or tables rather than text that reads as Python.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class TextFile:
    """A file to read."""

    path: Path
    """As it was named: a snapshot's link has the ending that the blob behind it lacks."""
    kind: str
    """One of the values of KINDS."""
    compression: str = ""
    """One of the values of COMPRESSIONS; empty for none."""
    span: tuple[int, int] | None = None
    """The part to read of a large file, as `formats.in_spans` makes it; None for all."""


@dataclass(frozen=True)
class Found:
    """What a source names."""

    name: str
    files: list[TextFile]
    """In order, each once, whatever its links and overlapping globs."""
    left_out: Counter[str]
    """How many files of a glob or a folder have an ending that is not read, by ending."""

    def note(self) -> str:
        """What was left out, in words; empty where nothing was."""
        rest = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in sorted(self.left_out.items()))
        return f"{self.left_out.total()} file(s) left out: {rest}" if rest else ""


def find(config: SourceConfig) -> Found:
    """The files of a local `data.source`. Raises UserError for names without files, of kinds that are not read, and
    for links to nothing."""
    if config.source == "stdlib" and isinstance(config, DataConfig):
        return Found("stdlib", [TextFile(path, "text") for path in _stdlib()], Counter())
    files: dict[tuple[int, int], TextFile] = {}
    left_out: dict[tuple[int, int], str] = {}
    for name in names(config.source):
        path = Path(name).expanduser()
        alone = path.is_file()
        some = [path] if alone else [*_below(path, config)]
        cards = _cards(some, config) if path.is_dir() else set()
        for each in some:
            about = _about(each, config)
            kind, compression = _kind(each, config)
            if kind and each not in cards:
                files.setdefault(about, TextFile(each, kind, compression))
            elif alone:
                raise UserError(
                    f"data.source: {each}: not one of the kinds read ({_read(config)}); or say which: data.format"
                )
            else:
                left_out.setdefault(about, each.name if kind else "".join(each.suffixes[-2:]).lower())
    counted = Counter(ending for about, ending in left_out.items() if about not in files)
    found = Found(short_name(config.source), list(files.values()), counted)
    if not files:
        raise UserError(
            f"data.source = {config.source}: {found.note()}; read are {_read(config)}; or say which: data.format"
        )
    return found


def names(source: str) -> list[str]:
    """The parts of a comma list; a file whose own name has commas is one."""
    if Path(source).expanduser().is_file():
        return [source]
    return [part.strip() for part in source.split(",") if part.strip()]


def absolute(source: str) -> str:
    """A source that means the same in every folder."""
    return ",".join(map(bucket.whole, names(source)))


def _below(path: Path, config: SourceConfig) -> Iterator[Path]:
    """The files of a folder, or of a glob, sorted."""
    if path.is_dir():
        every: Iterable[Path] = _walk(path)
    else:
        every = map(Path, sorted(glob.glob(str(path), recursive=True)))
    some = False
    for each in every:
        if not each.is_dir():
            some = True
            yield each
    if not some:
        own = "stdlib, " if isinstance(config, DataConfig) else ""
        remedy = f"give {own}files, folders, globs (with commas between), or tfds:NAME"
        where = "an empty folder" if path.is_dir() else "no such file, nor a match as a glob"
        raise UserError(f"data.source = {config.source}: {path}: {where}; {remedy}")


def _walk(root: Path) -> Iterator[Path]:
    """Every file below, sorted, hidden ones left out; a folder that is met twice, through a link, is walked once."""
    seen = set()
    for folder, inner, leaves in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (Path(folder, leaf) for leaf in sorted(leaves) if not leaf.startswith("."))


def _about(path: Path, config: SourceConfig) -> tuple[int, int]:
    """What is the same for one file under two names."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise UserError(
            f"data.source = {config.source}: {path} is a link to a file that is not there; download it again"
        ) from None
    except OSError as error:
        raise UserError(f"data.source: {path}: {error.strerror}; make it readable") from None
    return stat.st_dev, stat.st_ino


def _kinds(config: SourceConfig) -> dict[str, str]:
    """KINDS without those in which there are no records, unless they are to be read as text."""
    return {ending: kind for ending, kind in KINDS.items() if kind not in TEXTS or isinstance(config, DataConfig)}


def _read(config: SourceConfig) -> str:
    """The endings that are read, in words."""
    return f"{' '.join(_kinds(config))}, each also with {' '.join(COMPRESSIONS)}"


def _kind(path: Path, config: SourceConfig) -> tuple[str, str]:
    """Kind and compression by the endings of a name, in capitals or not; an empty kind is not read."""
    endings = [ending.lower() for ending in path.suffixes]
    compression = COMPRESSIONS.get(endings.pop(), "") if endings and endings[-1] in COMPRESSIONS else ""
    if config.format != "auto":
        return config.format, compression
    return (_kinds(config).get(endings[-1], "") if endings else ""), compression


def _cards(files: list[Path], config: SourceConfig) -> set[Path]:
    """Those of a folder that describe its records; none where nothing else than text is in it."""
    cards = {path for path in files if path.name.lower() in CARDS}
    kinds = {_kind(path, config)[0] for path in files if path not in cards}
    return cards if kinds - {*TEXTS, ""} else set()


def short_name(source: str) -> str:
    """The first part of a source that says more than where it lies: no wildcard, revision, or folder's common name."""
    for part in reversed(Path(names(source)[0]).parts):
        stem = part.split(".")[0] or part.strip(".")
        name = "".join(c if c.isalnum() else "_" for c in stem).strip("_")
        if name and not REVISION.fullmatch(name) and name not in ("data", "snapshots", "main"):
            return name[:40]
    return "text"


def _stdlib() -> list[Path]:
    """Python's own library."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for folder, inner, leaves in os.walk(root):
        inner[:] = set(inner) - NOT_STDLIB  # os.walk goes no deeper than these
        sources = (leaf for leaf in leaves if leaf.endswith(".py") and not leaf.startswith("_sysconfigdata"))
        found += [(Path(folder) / leaf).relative_to(root).as_posix() for leaf in sources]
    return [root / name for name in sorted(found)]
