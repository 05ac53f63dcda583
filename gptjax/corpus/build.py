"""`gptjax data build`: from a recipe to a data set, in three passes, each of which goes on from the files that it has
written: parts of the sources are cleaned, of copies the best is chosen, what stays is written.

The output is a function of the recipe and the text alone: parts are cut by bytes, and nothing depends on who was first.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import DataConfig
from gptjax.config.corpus import MANIFEST, CorpusConfig, OriginConfig
from gptjax.config.load import made_by
from gptjax.corpus import clean, copies, leaks, quality
from gptjax.corpus.beam import by_beam
from gptjax.corpus.shards import Shard, about_path, in_shards, write_metadata
from gptjax.data import build as builds
from gptjax.data import cache
from gptjax.data.pool import Died, Progress, Report, Work, work
from gptjax.data.sources import planned
from gptjax.data.worker import Part
from gptjax.errors import UserError
from gptjax.files import json_text, read_json, write_whole

EXACT, NEAR, POOR = "exact copy", "near copy", "unlike good text"


def load_corpus(path: str) -> CorpusConfig:
    """The recipe of a file that defines `corpus() -> CorpusConfig`. Raises UserError for another file, and for two
    origins of one name."""
    found = made_by(path, "corpus")
    if not isinstance(found, CorpusConfig):
        raise UserError(f"recipe {path}: must define corpus() that returns a gptjax.config.CorpusConfig")
    names = [origin.name for origin in found.origins]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"recipe {path}: origins: two are called {name}; rename one")
    for side in ("good", "raw"):
        for name in getattr(found.quality, side):
            if name not in names:
                raise UserError(f"recipe {path}: quality.{side} = {name}: no origin; choose from {', '.join(names)}")
    return found


@dataclass(frozen=True)
class Plan:
    """What a data set is made from."""

    recipe: CorpusConfig
    key: str
    """Of the recipe, of the files and of the steps' versions."""
    parts: Sequence[tuple[int, Part]]
    """In order: the number of an origin, and a part of it."""


def plan(recipe: CorpusConfig, report: Report = lambda *_: None) -> Plan:
    """Raises UserError where a source is not there."""
    parts, keys = list[tuple[int, Part]](), []
    for number, origin in enumerate(recipe.origins):
        found = planned(_source(origin), True, report)
        keys.append(found.key)
        # Of one size however large the source: a part is held in memory as a whole, and no file is open in between.
        parts += [(number, part) for part in found.parts(builds.PART_BYTES)]
    keys += [planned(DataConfig(source=source), True, report).key for source in recipe.leaks.sources]
    about = json.dumps([asdict(recipe), clean.VERSION, keys], sort_keys=True)
    return Plan(recipe, hashlib.sha256(about.encode()).hexdigest()[:16], parts)


def _source(origin: OriginConfig) -> DataConfig:
    return DataConfig(
        source=origin.source,
        format=origin.format,
        text_field=origin.text_field,
        train_split=origin.split,
        eval_split=origin.split,
    )


Do = Callable[[Sequence[Work], Callable[[int], None]], None]
"""Does pieces of work, and says how many bytes are done."""


def build(
    recipe: CorpusConfig, out: Path, report: Report = lambda *_: None, most: int = 1, beam: str | None = None
) -> Path:
    """The folder OUT/NAME/VERSION of the data set, made now unless it is there: by at most so many processes, or by
    Apache Beam with such options.

    Stopped at any moment, it leaves what is finished beside it, with which the next build goes on, and nothing under
    its name. Raises UserError for a source that is not there or cannot be read, where another data set has the name,
    and where nothing stays; OSError where the disk is full.
    """
    made_of, folder = plan(recipe, report), out / recipe.name / recipe.version
    stem = f"{recipe.name}-{made_of.key}"
    out.mkdir(parents=True, exist_ok=True)
    cache.wait(out, stem, report)
    if folder.exists():
        return _as_asked(folder, made_of)
    with cache.making(out, stem, keep=(Died, OSError)) as made:
        do = partial(work, most=most) if beam is None else by_beam(beam, made)
        _make(made, made_of, report, do)
        folder.parent.mkdir(exist_ok=True)
        (made / "data").rename(folder)
        cache.remove(made)
    return folder


def _as_asked(folder: Path, made_of: Plan) -> Path:
    if not (folder / MANIFEST).is_file():
        raise UserError(f"--out: {folder} is there, and is no data set of gptjax data build; name another folder")
    if read_json(folder / MANIFEST, "remove the folder, and build again").get("key") != made_of.key:
        raise UserError(
            f"--out: {folder} was made from another recipe or other files; give the recipe another version, or name "
            "another folder"
        )
    return folder


def _make(made: Path, made_of: Plan, report: Report, do: Do) -> None:
    recipe, data = made_of.recipe, made / "data"
    if recipe.leaks.sources and not (made / leaks.NAMES).exists():
        leaks.write_index(made, recipe.leaks)
    pieces = [clean.Clean(made, i, part, origin, recipe) for i, (origin, part) in enumerate(made_of.parts)]
    _work(pieces, [clean.path_of(made, i).exists() for i in range(len(pieces))], "cleaning", report, do)
    if recipe.quality.good:
        _score(made, made_of, report, do)
    report("looking for copies", 0, 1)
    sizes, found = _choose(made, made_of)
    if not any(map(np.any, sizes)):
        raise UserError(f"recipe {recipe.name}: no document stays; see what drops them: {_most(found)}")
    data.mkdir(exist_ok=True)
    names = [recipe.origins[origin].name for origin, _ in made_of.parts]
    every = list(in_shards(sizes, recipe.shard_bytes))
    shards = [
        Shard(
            made,
            data,
            number,
            len(every),
            recipe.name,
            tuple((part, which, names[part]) for part, which in held),
            int(sum(sizes[part][which].sum() for part, which in held)),
        )
        for number, held in enumerate(every)
    ]
    _work(shards, [about_path(shard.path).exists() for shard in shards], "writing", report, do)
    about = [read_json(about_path(shard.path), "build again") for shard in shards]
    described = f"Made by gptjax data build of {', '.join(origin.name for origin in recipe.origins)}."
    write_metadata(data, recipe.name, recipe.version, about, described)
    write_whole(data / MANIFEST, json_text(_manifest(made_of, found, shards, about), indent=1).encode())
    for shard in shards:
        about_path(shard.path).unlink()


def _work(pieces: Sequence[Work], done: Sequence[bool], what: str, report: Report, do: Do) -> None:
    left = [piece for piece, there in zip(pieces, done, strict=True) if not there]
    do(left, Progress(report, what, sum(piece.size for piece in pieces), left))


def _score(made: Path, made_of: Plan, report: Report, do: Do) -> None:
    """Of raw text, how like good text each document is."""
    recipe, parts = made_of.recipe, [origin for origin, _ in made_of.parts]
    if not (made / quality.MODEL).exists():
        report("learning what good text is", 0, 1)
        quality.train(made, parts, recipe)
    raw = _numbers(recipe, recipe.quality.raw)
    pieces = [quality.Score(made, i, clean.path_of(made, i).stat().st_size) for i, of in enumerate(parts) if of in raw]
    _work(pieces, [quality.path_of(made, piece.number).exists() for piece in pieces], "scoring", report, do)


def _numbers(recipe: CorpusConfig, names: Sequence[str]) -> list[int]:
    return [number for number, origin in enumerate(recipe.origins) if origin.name in names]


def _scores(made: Path, part: int, count: int) -> np.ndarray:
    """float64 [D] of a part's documents; 1 where it is not scored."""
    return quality.scores_of(made, part) if quality.path_of(made, part).exists() else np.ones(count)


Found = dict[str, dict[str, Any]]
"""By origin what was read, what was dropped by reason, and what stays."""


def _choose(made: Path, made_of: Plan) -> tuple[list[np.ndarray], Found]:
    """Of each part the bytes of its documents, 0 for those that do not stay; and what became of all."""
    recipe, parts = made_of.recipe, [origin for origin, _ in made_of.parts]
    tables = [clean.columns(made, i, "size", "key") for i in range(len(parts))]
    size, counts = np.concatenate([table["size"].to_numpy() for table in tables]), [len(t["size"]) for t in tables]
    origin, ends = np.repeat(parts, counts), np.cumsum(counts)
    ranks = copies.rank(origin, size)
    keys = np.concatenate([clean.rows(table["key"], np.uint64) for table in tables])
    lost = dict[str, np.ndarray]()
    kept = np.ones(len(size), bool)
    if recipe.quality.good:
        raw = np.isin(origin, _numbers(recipe, recipe.quality.raw))
        score = np.concatenate([_scores(made, i, count) for i, count in enumerate(counts)])
        kept = ~raw | quality.stays(score, keys[:, 1], recipe.quality.alpha)
        lost[POOR] = ~kept
    if recipe.exact:
        one = np.unique(keys[kept], axis=0, return_inverse=True)[1]
        best = copies.same(one.ravel(), ranks[kept]) == np.arange(len(one))
        lost[EXACT] = _among(kept, ~best)
        kept = kept & ~lost[EXACT]
    if recipe.near.on:
        every = np.flatnonzero(kept)
        bands = (_band(made, len(parts), i)[every] for i in range(recipe.near.bands))
        pairs = copies.candidates(bands, ranks[every])
        edges = copies.close(pairs, lambda some: _signatures(made, ends, every[some]), recipe.near.threshold)
        stays = copies.stays(len(every), edges, ranks[every])
        lost[NEAR] = _among(kept, ~stays)
        kept = kept & ~lost[NEAR]
    found = _found(made, made_of, size, origin, kept, lost)
    return np.split(np.where(kept, size, 0), ends[:-1]), found


def _band(made: Path, parts: int, band: int) -> np.ndarray:
    """uint64 [D]: the keys of all documents."""
    name = f"band_{band}"
    return np.concatenate([clean.columns(made, i, name)[name].to_numpy() for i in range(parts)])


def _signatures(made: Path, ends: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """uint32 [U, K] of some documents, int64 [U] in order. ends: int64, the document behind each part."""
    cuts = np.searchsorted(numbers, np.concatenate([[0], ends]))
    found = []
    for part, (first, last) in enumerate(pairwise(cuts.tolist())):
        if first < last:
            rows = clean.rows(clean.columns(made, part, "signature")["signature"], np.uint32)
            found.append(rows[numbers[first:last] - (ends[part - 1] if part else 0)])
    return np.concatenate(found)


def _among(some: np.ndarray, which: np.ndarray) -> np.ndarray:
    """bool [D]: those of `some` [D] of which `which`, an answer for each of them in order, is true."""
    found = np.zeros(len(some), bool)
    found[some] = which
    return found


def _found(
    made: Path, made_of: Plan, size: np.ndarray, origin: np.ndarray, kept: np.ndarray, lost: dict[str, np.ndarray]
) -> Found:
    found: Found = {}
    for number, about in enumerate(made_of.recipe.origins):
        total, here = clean.Report(), origin == number
        for i, (of, _) in enumerate(made_of.parts):
            if of == number:
                total.add(clean.report_of(made, i))
        for reason, gone in lost.items():
            total.dropped[reason] += int((gone & here).sum())
            total.dropped_bytes[reason] += int(size[gone & here].sum())
        found[about.name] = {
            "read": dict(total.read),
            "dropped": {
                reason: {"documents": count, "bytes": total.dropped_bytes[reason]}
                for reason, count in total.dropped.items()
                if count
            },
            "kept": {"documents": int((kept & here).sum()), "bytes": int(size[kept & here].sum())},
            "replaced": dict(total.scrubbed),
            "examples": total.examples,
            "leaks": total.leaks,
        }
    return found


def _most(found: Found) -> str:
    """The commonest reasons, in words."""
    counts: dict[str, int] = {}
    for about in found.values():
        for reason, each in about["dropped"].items():
            counts[reason] = counts.get(reason, 0) + each["documents"]
    first = sorted(counts, key=lambda reason: -counts[reason])[:3]
    return "; ".join(f"{reason} ({counts[reason]:,})" for reason in first) or "there is no text"


def _manifest(made_of: Plan, found: Found, shards: Sequence[Shard], about: Sequence[dict[str, Any]]) -> dict[str, Any]:
    files = {shard.path.name: each for shard, each in zip(shards, about, strict=True)}
    whole = hashlib.sha256("".join(each["sha256"] for each in about).encode()).hexdigest()
    return {
        "key": made_of.key,
        "digest": whole,
        "recipe": asdict(made_of.recipe),
        "steps": clean.VERSION,
        "origins": found,
        "files": files,
    }
