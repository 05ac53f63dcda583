"""The run folder: all of one run in one place, and nothing of it elsewhere."""

import itertools
import json
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from gptjax.config import Config, from_json, to_json
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.errors import UserError

CONFIG, META, LOG, TOKENIZER = "config.json", "meta.json", "log.jsonl", "tokenizer"


def new_run(config: Config, tokenizer: Tokenizer) -> Path:
    """Create and fill the folder of a new run; process 0 chooses and the others are told.

    The config is written last: a folder that has one is whole. Raises UserError if the folder is taken.
    """
    base = Path(config.run) if config.run else Path("runs") / config.name
    if jax.process_index() == 0:
        number = _first_free(base) if not config.run else 0 if base.exists() and any(base.iterdir()) else 1
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(number if jax.process_index() == 0 else 0))
    if number == 0:
        raise UserError(f"run = {base}: exists and is not empty; gptjax train --resume {base}, or name another")
    folder = _numbered(base, number)
    if jax.process_index() == 0:
        fill_run(folder, config, tokenizer)
    return folder


def fill_run(folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Write what a run folder holds before its first step; the config last."""
    (folder / TOKENIZER).mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / TOKENIZER)
    (folder / META).write_text(json.dumps(_provenance() | {"tokenizer": tokenizer.spec}, indent=2))
    (folder / CONFIG).write_text(to_json(config))


def _first_free(base: Path) -> int:
    """Of runs/NAME, runs/NAME-2, ..."""
    return next(number for number in itertools.count(1) if not _numbered(base, number).exists())


def _numbered(base: Path, number: int) -> Path:
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def open_run(path: str) -> tuple[Path, Config]:
    """An existing run folder and its resolved config; raises UserError where it is none."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"run {path}: no {CONFIG} in it, so it is not a run folder (nor a Hugging Face directory); name one below "
            "runs/"
        )
    return folder, from_json((folder / CONFIG).read_text())


def _provenance() -> dict[str, Any]:
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip() or "unknown",
        "modified": bool(dirty.stdout.strip()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")},
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
    }


def saved_tokenizer(run: Path) -> Tokenizer:
    """The run's own copy, so that a run folder samples and resumes wherever it is moved."""
    spec = json.loads((run / META).read_text())["tokenizer"]
    return load_tokenizer(spec.format(run / TOKENIZER))
