"""The run folder: all of one run in one place, what it is made from pinned there, and nothing of it elsewhere.

config.json is what is in force, history.jsonl every start with what it changed, data.json the text, and what else is
learned from, by digests.
"""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from gptjax import bucket
from gptjax.config import Config, MaskedConfig, PolicyConfig, RewardedConfig, from_json, to_json, validate
from gptjax.config.fields import OnResume
from gptjax.config.mixture import PRESET, weighted
from gptjax.config.saved import Change, changes, get
from gptjax.data import files
from gptjax.data.sources import Corpus
from gptjax.data.texts import Mixture
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.errors import UserError
from gptjax.files import code_digest, read_json, write_whole
from gptjax.train import lock
from gptjax.train.checkpoint import folder_of, saved_steps
from gptjax.train.metrics import LOG, read_log
from gptjax.train.processes import is_first

CONFIG, META, TOKENIZER = "config.json", "meta.json", "tokenizer"
HISTORY, DATA = "history.jsonl", "data.json"
COMMIT = "GPTJAX_COMMIT"
"""Environment variable that names the commit where no clone does."""
PINS = {"init_from": "base.json", "reward": "reward.json", "distill.teacher": "teacher.json"}
"""Fields that name weights which no checkpoint of the run holds, and the files that hold their digests."""
NEW_DATA = "give the old one, or --new-data to go on with this one"
RESTORE = "put it back from a copy, or start a new run"
NOTHING: Mapping[str, str] = MappingProxyType({})
UNFINISHED = {lock.NAME, META, TOKENIZER, DATA, HISTORY}
"""What a start that was killed may leave before it has written CONFIG, and the next one may take over."""


def located(config: Config) -> Config:
    """The config with local paths made whole, so that a run goes on from whatever folder it is started in."""

    def whole(path: str) -> str:
        return bucket.whole(path) if path else path

    def found(source: str) -> str:
        if source.startswith(PRESET):
            return PRESET + whole(source.removeprefix(PRESET))
        if parts := weighted(source):
            return ",".join(str(replace(part, source=found(part.source))) for part in parts)
        return source if source == "stdlib" or source.startswith("tfds:") else files.absolute(source)

    def judge(name: str) -> str:
        """A run folder, FILE.py:NAME or MODULE:NAME."""
        file, colon, function = name.rpartition(":")
        if file.endswith(".py"):
            return f"{whole(file)}:{function}"
        return name if colon and not Path(name).is_dir() else whole(name)

    if isinstance(config, RewardedConfig):
        config = replace(config, reward=judge(config.reward), gold=judge(config.gold))
    if isinstance(config, PolicyConfig):
        config = replace(config, ptx=replace(config.ptx, source=found(config.ptx.source)))
    if isinstance(config, MaskedConfig):
        config = replace(config, distill=replace(config.distill, teacher=whole(config.distill.teacher)))
    data = replace(config.data, source=found(config.data.source))
    train = replace(config.train, local_dir=whole(config.train.local_dir))
    return replace(config, data=data, train=train, init_from=whole(config.init_from))


def pinned(config: Config) -> Config:
    """The config of a new run, without what would change its meaning when another field changes."""
    multiple = config.ramp_multiple if config.train.ramp_start else config.train.ramp_multiple
    return located(replace(config, train=replace(config.train, ramp_multiple=multiple)))


def base_folder(config: Config) -> Any:
    """A Path, or the place of an address."""
    return bucket.at(config.run) if config.run else Path("runs") / config.name


def claim(config: Config, named: bool, warn: Any, overwrite: bool = False) -> tuple[Path, lock.RunLock]:
    """An own, locked, empty folder for a new run: the one that is `named`, else the first free of runs/NAME, ...-2.
    `overwrite` removes the run that is in it.

    Raises UserError where the folder is taken or cannot be made.
    """
    base = base_folder(config)
    try:
        folder = _exactly(base) if named or overwrite or config.run else _first_free(base)
    except OSError as error:
        raise UserError(f"run {base}: cannot be made ({error.strerror}); name another with --run") from None
    held = lock.RunLock(folder, warn)
    try:
        bucket.fetch(folder)
        if overwrite:
            _empty(folder, config.init_from)
        _require_empty(folder)
    except BaseException:
        held.release()
        raise
    return folder, held


def _require_empty(folder: Path) -> None:
    inside = {path.name for path in folder.iterdir()}
    if inside - UNFINISHED:
        name = bucket.named(folder)
        remedy = f"gptjax train --resume {name}, --overwrite, or " if CONFIG in inside else ""
        raise UserError(f"run = {name}: exists and is not empty; {remedy}name another")


def _empty(folder: Path, init_from: str) -> None:
    """Remove a run, but for its lock, which is ours; CONFIG goes last, so that what is left of it is still one."""
    name = bucket.named(folder)
    if init_from and (init_from == name or Path(init_from).resolve() == folder.resolve()):
        raise UserError(f"--overwrite: run = {name} is also init_from, whose weights would go; name another run")
    if not (folder / CONFIG).is_file():
        return
    if bucket.is_remote(checkpoints := folder_of(folder)):
        bucket.clear(checkpoints)
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != lock.NAME:
                path.unlink()
    except OSError as error:
        raise UserError(f"--overwrite: {folder}: cannot be removed ({error.strerror}); mend that") from None


def _exactly(folder: Any) -> Path:
    if bucket.is_remote(folder):
        return bucket.opened(str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    return Path(folder)


def _first_free(base: Path) -> Path:
    """Made here, so that two starts at once get two folders."""
    base.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def fill_run(
    folder: Path,
    config: Config,
    tokenizer: Tokenizer,
    corpus: Corpus | None = None,
    beside: Mapping[str, str] = NOTHING,
) -> None:
    """Write what a run folder holds before its first step, with the digests of what is learned from. The config comes
    last: a folder that has one is whole."""
    (folder / TOKENIZER).mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / TOKENIZER)
    started = provenance()
    write_whole(folder / META, json.dumps(started | {"tokenizer": tokenizer.spec}, indent=2).encode())
    if corpus is not None:
        pin_data(folder, config, corpus, beside)
    _append(folder / HISTORY, started)
    write_whole(folder / CONFIG, to_json(config).encode())


def go_on(folder: Path, saved: Config, given: Config, started: dict[str, Any]) -> None:
    """Note another start of a run, as `provenance` describes it, and put what it changes in force."""
    changed = {change.name: [change.saved, change.given] for change in changes(saved, given)}
    _append(folder / HISTORY, started | {"changed": changed})
    if changed:
        write_whole(folder / CONFIG, to_json(given).encode())


def mark(folder: Path) -> str:
    """What tells a run folder as it is now from every other; empty where there is none."""
    path = folder / CONFIG
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def run_id(folder: Path) -> str:
    """A name that no other run has, nor another one that is started in this folder later, nor a copy of the folder."""
    digest = hashlib.sha256(f"{bucket.named(folder.absolute())}\0".encode() + (folder / META).read_bytes())
    return f"{folder.name}-{digest.hexdigest()[:12]}"


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def abandon(folder: Path) -> None:
    """Take away the folder of a new run that never made a step, so that the corrected command can have its name."""
    records = read_log(folder / LOG) if (folder / LOG).exists() else []
    if not saved_steps(folder_of(folder)) and all(record.get("kind") in ("start", "compile") for record in records):
        if bucket.is_remote(home := bucket.home(folder)):
            bucket.clear(home)
        shutil.rmtree(folder, ignore_errors=True)


def open_run(path: str) -> tuple[Path, Config]:
    """An existing run folder, or a copy of one in a bucket, and the config in force; raises UserError where it is none,
    or is damaged."""
    folder = bucket.opened(path)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"run {path}: no {CONFIG} in it, so it is not a run folder (nor a Hugging Face directory); name one below "
            "runs/"
        )
    try:
        return folder, pinned(from_json((folder / CONFIG).read_bytes()))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}; take it from a checkpoint's meta, or start a new run") from None
    except OSError as error:
        raise UserError(f"{folder / CONFIG}: {error.strerror}; make it readable") from None


def going_on(saved: Config, given: Config, folder: Path) -> tuple[Config, list[Change]]:
    """The config with which a run goes on, and what its user should know of the changes.

    Raises UserError where the given config changes what it may not.
    """
    ramp = replace(given.train, ramp_multiple=given.train.ramp_multiple or saved.train.ramp_multiple)
    decay = replace(given.optimizer, decay_tokens=given.optimizer.decay_tokens or saved.optimizer.decay_tokens)
    config = validate(located(replace(given, run=saved.run, train=ramp, optimizer=decay)))  # 0: as it was at the start
    every = [*changes(saved, config)]
    if wrong := [str(change) for change in every if change.allowed is None]:
        raise UserError(f"--resume {bucket.named(folder)}: this config contradicts the run: " + "; ".join(wrong))
    return config, [change for change in every if change.allowed is not OnResume.FREE]


def pin_data(folder: Path, config: Config, corpus: Corpus, beside: Mapping[str, str] = NOTHING) -> None:
    """beside: field -> digest of what it names, which is learned from beside the text."""
    write_whole(folder / DATA, json.dumps(_data_facts(config, corpus, beside), indent=2).encode())


def same_weights(folder: Path, field: str, source: str, prints: dict[str, str]) -> None:
    """Pin the weights beside which a run trains, named by a field, by their fingerprints, or see that they are those.

    Raises UserError where they are not.
    """
    digest = hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()
    path = folder / PINS[field]
    if path.is_file():
        if read_json(path, RESTORE).get("digest") != digest:
            raise UserError(
                f"{field} = {source}: not the weights that {bucket.named(folder)} was started from; put them back, or "
                "start a new run"
            )
    elif is_first():
        write_whole(path, json.dumps({"digest": digest, "source": source}, indent=2).encode())


def _data_facts(config: Config, corpus: Corpus, beside: Mapping[str, str]) -> dict[str, Any]:
    splits = (config.data.train_split, config.data.eval_split)
    records = {split: len(corpus.split(split, config.data.split_by)) for split in splits}
    facts = {"digest": corpus.digest, "records": records, "beside": dict(beside)}
    return facts | ({"mixture": corpus.described()} if isinstance(corpus, Mixture) else {})


def changed_data(folder: Path, config: Config, corpus: Corpus, beside: Mapping[str, str] = NOTHING) -> str | None:
    """How the text, or what is learned from `beside` it, differs from that of the run, in one line; None where all is
    the same, or was not pinned yet.

    Raises UserError where the run's own note of it is damaged.
    """
    if not (folder / DATA).is_file():
        return None
    saved, now = read_json(folder / DATA, RESTORE), _data_facts(config, corpus, beside)
    told = [_other_text(corpus.name, saved, now)] if saved.get("digest") != now["digest"] else []
    for name, digest in beside.items():
        if (then := saved.get("beside", {}).get(name, digest)) != digest:
            about = f"digest {then[:12]} then, {digest[:12]} now"
            told.append(f"{name} = {get(config, name)} is not what the run was trained with ({about})")
    return "; ".join(told) or None


def _other_text(name: str, saved: dict[str, Any], now: dict[str, Any]) -> str:
    if saved.get("mixture") != now.get("mixture"):
        then, here = saved.get("mixture", "no mixture"), now.get("mixture", "no mixture")
        return f"{name} is not the mixture that the run was trained on ({then} then, {here} now)"
    counts = "; ".join(
        f"{split}: {saved.get('records', {}).get(split, 0):,} records then, {count:,} now"
        for split, count in now["records"].items()
    )
    return (
        f"{name} is not the text that the run was trained on (digest {str(saved.get('digest'))[:12]} then, "
        f"{now['digest'][:12]} now; {counts})"
    )


def changed_code(folder: Path, now: dict[str, Any]) -> str | None:
    """How the program, `provenance` now, differs from that of the run's last start, in one line; None where it does
    not."""
    starts = read_log(folder / HISTORY) if (folder / HISTORY).is_file() else []
    if not starts or (last := starts[-1]).get("code") == now["code"]:
        return None
    return f"the code has changed since the run's last start ({_commit(last)} then, {_commit(now)} now)"


def _commit(start: dict[str, Any]) -> str:
    return f"commit {str(start.get('commit'))[:9]}" + (" and uncommitted changes" if start.get("modified") else "")


def provenance() -> dict[str, Any]:
    """Who starts a run: code, command, versions, devices."""
    return {
        "commit": _git("rev-parse", "HEAD") or os.environ.get(COMMIT) or "unknown",
        "modified": bool(_git("status", "--porcelain")),
        "code": code_digest(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": versions(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
    }


def _git(*words: str) -> str:
    """What git says of this package's clone; empty where there is neither, as in a container."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        return subprocess.run([*git, *words], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")}


def saved_tokenizer(run: Path) -> Tokenizer:
    """The run's own copy, so that a run folder samples and resumes wherever it is moved."""
    spec = read_json(run / META, RESTORE).get("tokenizer")
    if not isinstance(spec, str):
        raise UserError(f"{run / META}: names no tokenizer; write its `tokenizer`, such as bytes, into it")
    return load_tokenizer(spec.format(run / TOKENIZER))
