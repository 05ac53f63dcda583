"""Where text and conversations come from: files, and the TFDS catalogue. Both are made once into a data set under
`data.cache_dir`, and read by random access from there."""

import hashlib
import json
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from gptjax.config import (
    DataConfig,
    DialogueConfig,
    LabelledConfig,
    PairConfig,
    PromptConfig,
    RankingConfig,
    SourceConfig,
)
from gptjax.data import build as builds
from gptjax.data import cache, catalogue, remote
from gptjax.data.build import Plan, part_bytes
from gptjax.data.dialogues import Dialogue, why_dropped
from gptjax.data.files import TextFile, find, short_name
from gptjax.data.formats import Extract, Failed, Heard, TextField, documents, in_spans, reason, refused
from gptjax.data.labelled import Labelled
from gptjax.data.pairs import Pair
from gptjax.data.pool import Report, cores
from gptjax.data.prompts import Asking
from gptjax.data.rankings import Ranking
from gptjax.data.splits import bounds, chosen
from gptjax.data.store import Joined, Record, Store, cut
from gptjax.data.worker import Part
from gptjax.errors import UserError

FORMAT_VERSION = "2.0.0"  # raise it when the records of the same files change
ALL = "train"  # the one split that files have
NEVER = sys.maxsize  # characters after which a conversation is cut

AnySource: TypeAlias = DataConfig | DialogueConfig


@dataclass(frozen=True)
class TextSource:
    """The records of one split by index."""

    name: str
    store: Store | Joined
    chosen: np.ndarray
    """The split's records of the store."""

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all records."""
        return int(self.store.sizes[self.chosen].sum())

    def __getitem__(self, index: int) -> Record:
        """Record `index`; raises IndexError outside 0..len-1, and UserError where the data set is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(self.chosen[index])
        try:
            record = self.store[number]
        except (OSError, ValueError) as error:
            raise _damaged(self.name, self.store.folder_of(number), reason(error)) from error
        return record if record.last or self.goes_on(index) else Record(record.text, False, cut=True)

    def goes_on(self, index: int) -> bool:
        """Whether the next record of the split is the one that follows in the store."""
        return index + 1 < len(self) and int(self.chosen[index + 1]) == int(self.chosen[index]) + 1


@dataclass(frozen=True)
class Corpus:
    """The text of a source. Made by `build` or `reopen`."""

    name: str
    store: Store | Joined
    in_pieces: bool = True
    """Whether a long document is several records, so that other settings give other splits."""

    @property
    def label(self) -> str:
        """A short name."""
        return Path(self.place).name.rpartition("-")[0]

    @property
    def place(self) -> str:
        """Where it lies, for `reopen`."""
        return str(self.store.folder_of(0))

    @property
    def digest(self) -> str:
        """Of its documents and records in order."""
        return self.store.digest

    def split(self, name: str, split_by: str) -> TextSource:
        """One split, such as `train[:95%]`. Raises UserError where there is none of the name, or nothing in it."""
        assert isinstance(self.store, Store)
        splits, about = self.store.splits, self.store.documents
        base, low, high = _bounds(name, self.name, splits)
        first = sum([*splits.values()][: [*splits].index(base)])
        of_it = about[first : first + splits[base]]
        rows = chosen(of_it, low, high, split_by) + int(about[:first, 1].sum())
        if not len(rows):
            count = f"{len(of_it):,} document(s) of {int(of_it[:, 1].sum()):,} record(s)"
            by_position = "data.split_by = position and " if split_by == "document" else ""
            other = f", or {by_position}a lower data.max_chars" if self.in_pieces else ""
            raise UserError(f"split {name}: empty, as {self.name} has {count}; take other splits{other}")
        return TextSource(self.name, self.store, rows)


def _bounds(name: str, source: str, splits: Iterable[str]) -> tuple[str, float, float]:
    """A slice, as `splits.bounds` reads it. Raises UserError where the source has no such split."""
    try:
        found = bounds(name)
    except ValueError:
        found = ("", 0.0, 0.0)
    if found[0] not in splits:
        raise UserError(
            f"split {name}: not one of {source}; give {' or '.join(splits)}, or a part in percent such as train[:95%]"
        )
    return found


def _damaged(name: str, folder: Path, why: str) -> UserError:
    remedy = f"gptjax data --cache --remove {folder.name}, and it is built again"
    return UserError(f"data.source = {name}: its data set in {folder} is damaged ({why}); {remedy}")


@dataclass(frozen=True)
class Files:
    """A part of a source of files: some that are small, or a span of one."""

    files: tuple[TextFile, ...]
    extract: Extract
    size: int
    split: str = ALL

    def documents(self, heard: Heard, failed: Failed = refused) -> Iterator[Any]:
        for file in self.files:
            yield from documents(file, self.extract, heard, failed)


def build(config: AnySource, report: Report = lambda what, done, total: None, processes: int | None = None) -> Corpus:
    """The data set of `data.source`, made now unless it is there; `report` is told how far that is. A large one is made
    by `processes`, by default one for each core.

    Raises UserError for files, fields or data sets that are missing, broken or empty, and for a disk that is full; a
    build that fails leaves nothing behind. Also for conversations that are all dropped.
    """
    plan, root = planned(config, True, report), cache.datasets(config.cache_dir)
    folder = cache.find(root, plan.key)
    if folder is not None and cache.flaw(folder):
        cache.remove(folder)
        folder = None
    try:
        folder = folder or builds.build(root, plan, _max_chars(config), report, processes or cores())
    except OSError as error:
        raise UserError(
            f"data.cache_dir = {config.cache_dir}: cannot write the data set ({reason(error)}); "
            "free space or choose another"
        ) from error
    corpus = reopen(config, folder)
    if isinstance(config, DialogueConfig):
        _require_example(corpus, "" if isinstance(config, RankingConfig) else ", or set data.fields")
    return corpus


def _require_example(corpus: Corpus, remedy: str) -> None:
    """Raises UserError where every record was dropped; reads no further than to the first that was not."""
    every = TextSource(corpus.name, corpus.store, np.arange(len(corpus.store)))
    if all(why_dropped(every[number].text) for number in range(len(every))):
        raise UserError(
            f"data.source = {corpus.name}: all of its {len(every):,} records are dropped, the first for: "
            f"{why_dropped(every[0].text)}; mend them{remedy}"
        )


def dropped(source: TextSource) -> Counter[str]:
    """How many records of a split of conversations were dropped, by reason. Equal reasons are on one side of a split,
    as all equal documents are."""
    reasons = (why_dropped(source[number].text) for number in range(len(source)))
    return Counter(reason for reason in reasons if reason)


def reopen(config: AnySource, folder: Path) -> Corpus:
    """What `build` made, perhaps on another host, in a folder that this one sees, or in its own cache.

    Raises UserError where it is not there.
    """
    own = cache.datasets(config.cache_dir) / folder.name
    found = next((there for there in (folder, own) if there.is_dir()), None)
    if found is None:
        raise UserError(
            f"data.source = {config.source}: the data set in {folder} is not there on {socket.gethostname()}; let "
            "hosts share data.cache_dir, or build it first on every host: gptjax data CONFIG"
        )
    try:
        store = Store(found)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise _damaged(config.source, found, reason(error)) from error
    cache.note_use(found)
    return Corpus(config.source, store, in_pieces=_max_chars(config) != NEVER)


def open_source(config: DataConfig, split: str) -> TextSource:
    """One split of `data.source`, building the data set if need be; raises what `build` and `Corpus.split` raise."""
    return build(config).split(split, config.split_by)


def left_out(config: SourceConfig) -> str:
    """The files of a folder or a glob that are not read, in words; empty where all are."""
    try:
        return "" if config.source.startswith(catalogue.PREFIX) else find(config).note()
    except UserError:  # the text is in the cache, its files are not here
        return ""


def look(config: AnySource) -> tuple[str, Corpus | None]:
    """What a run would read, in words, and the data set if it is built; nothing is written.

    Raises UserError where the files or the data set are not there, or their beginning cannot be read.
    """
    plan, root = planned(config, prepare=False), cache.datasets(config.cache_dir)
    text, folder, again = f"{config.source}: {plan.about}", cache.find(root, plan.key), ""
    if folder is not None:
        if not (flaw := cache.flaw(folder)):
            return f"{text}; built in {folder}", reopen(config, folder)
        again = f" again, for {flaw},"
    for part in plan.parts(part_bytes(plan.size))[:1]:
        next((record for blocks in part.documents(lambda size: None) for record in cut(blocks, 1)), None)
    return f"{text}; to be built{again} in {root}", None


def planned(config: AnySource, prepare: bool, report: Report = lambda *_: None) -> Plan:
    """What the data set of a source is made from; `prepare` says that it may be downloaded. Raises UserError where the
    source is not there."""
    if config.source.startswith(catalogue.PREFIX):
        return _of_catalogue(config, prepare)
    if remote.has_address(config.source):
        return _of_buckets(config, prepare, report)
    found = find(config)
    paths = [(file, file.path.resolve()) for file in found.files]
    stats = [(str(path), file.kind, path.stat().st_size, path.stat().st_mtime_ns) for file, path in paths]
    total = sum(size for _, _, size, _ in stats)
    shown = ", ".join(str(file.path) for file in found.files[:3]) + (", ..." if len(found.files) > 3 else "")
    about = f"{len(found.files):,} file(s), {total / 1e6:,.1f} MB: {shown}"
    about += f"; {found.note()}" if found.left_out else ""
    return Plan(found.name, _key(config, stats), about, total, partial(_parts, _extract(config), found.files))


def _parts(extract: Extract, files: Sequence[TextFile], each: int) -> Sequence[Part]:
    """Of about so many bytes, in the files' order."""
    made, held, size = [], [], 0
    for file in files:
        for span, span_size in in_spans(file, each):
            held.append(span)
            size += span_size
            if size >= each:
                made.append(Files(tuple(held), extract, size))
                held, size = [], 0
    return [*made, Files(tuple(held), extract, size)] if held else made


def _of_buckets(config: AnySource, prepare: bool, report: Report) -> Plan:
    every, where = remote.objects(config.source, config.cache_dir), remote.local(config.source, config.cache_dir)
    left = [each for each in every if not each.is_here]
    if left and not prepare:
        size, root = sum(each.size for each in left), Path(config.cache_dir) / remote.FOLDER
        about = f"{len(every):,} file(s), of which {len(left):,}, {size / 1e6:,.1f} MB, are to be copied to {root}"
        return Plan(short_name(config.source), "none", about, 0, lambda _: [])
    try:
        if prepare:
            remote.copy(config.source, config.cache_dir, every, report)
    except OSError as error:
        raise UserError(
            f"data.cache_dir = {config.cache_dir}: cannot write copies of {config.source} ({reason(error)}); free "
            "space or choose another"
        ) from error
    made = planned(replace(config, source=where), prepare)
    return replace(made, about=f"{made.about}; copies of {config.source}")


def _of_catalogue(config: AnySource, prepare: bool) -> Plan:
    extract = _extract(config)
    builder = catalogue.open_builder(config, extract)
    name, about = re.sub(r"\W", "_", config.source.removeprefix(catalogue.PREFIX)), f"data in {builder.data_dir}"
    if prepare:
        catalogue.prepare(config, builder)
    elif not builder.is_prepared():
        return Plan(name, "none", f"{about}, to be prepared", 0, lambda _: [])
    rows = catalogue.splits(builder)
    named = [*dict.fromkeys(_bounds(each, config.source, rows)[0] for each in (config.train_split, config.eval_split))]
    about += ": " + ", ".join(f"{each} of {count:,} record(s)" for each, count in rows.items())
    return Plan(
        name,
        _key(config, [catalogue.identity(builder), named]),
        about,
        sum(builder.info.splits[split].num_bytes for split in named),
        lambda each: [part for split in named for part in catalogue.parts(config, extract, builder, split, each)],
    )


def _extract(config: AnySource) -> Extract:
    if isinstance(config, RankingConfig):
        return Ranking(config.invalid)
    if isinstance(config, PromptConfig):
        return Asking(config.fields, config.invalid)
    if isinstance(config, PairConfig):
        return Pair(config.fields, config.invalid)
    if isinstance(config, LabelledConfig):
        return Labelled(config.fields, config.invalid)
    if isinstance(config, DialogueConfig):
        return Dialogue(config.fields, config.invalid)
    return TextField(config.text_field)


def _max_chars(config: AnySource) -> int:
    """Characters of the longest record."""
    return NEVER if isinstance(config, DialogueConfig) else config.max_chars


def _key(config: AnySource, what: Any) -> str:
    """Of the files, and of the settings that make another data set of them."""
    settings: list[Any]
    if isinstance(config, RankingConfig):
        settings = ["rankings", config.invalid]
    elif isinstance(config, PromptConfig):
        settings = ["prompts", config.fields, config.invalid]
    elif isinstance(config, PairConfig):
        settings = ["pairs", config.fields, config.invalid]
    elif isinstance(config, LabelledConfig):
        settings = ["labelled", config.fields, config.invalid]
    elif isinstance(config, DialogueConfig):
        settings = [config.fields, config.invalid]
    else:
        settings = [config.text_field, config.max_chars]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *settings, what]).encode()).hexdigest()[:16]
