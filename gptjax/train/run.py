"""The run folder: all of one run in one place, and nothing of it elsewhere."""

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
from gptjax.errors import UserError

CONFIG, META, LOG, TOKENIZER = "config.json", "meta.json", "log.jsonl", "tokenizer"


def new_run(config: Config) -> Path:
    """Create and fill the folder of a new run. Raises UserError if the one that was asked for is taken."""
    folder = Path(config.run) if config.run else _first_free(Path("runs") / config.name)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"run = {folder}: exists and is not empty; gptjax train --resume {folder}, or name another")
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(to_json(config))
        (folder / META).write_text(json.dumps(_provenance(), indent=2))
    return folder


def _first_free(base: Path) -> Path:
    """runs/NAME, runs/NAME-2, ...: chosen by process 0, told to the others."""
    number = 1
    while base.with_name(_numbered(base.name, number)).exists():
        number += 1
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(number))
    return base.with_name(_numbered(base.name, number))


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def open_run(path: str) -> tuple[Path, Config]:
    """An existing run folder and its resolved config; raises UserError where it is none."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(f"run {path}: no {CONFIG} in it, so it is not a run folder; name one below runs/")
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
