"""The data sets that were built from local files: which there are, whether they are whole, and their removal."""

import json
import os
import shutil
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gptjax.files import write_whole

SIZES = "sizes.json"  # of every file beside it; its own time is that of the last use
UNFINISHED, DAMAGED, WHOLE = "unfinished", "damaged", "whole"
DAY = 86400.0  # seconds


@dataclass(frozen=True)
class Entry:
    """A data set, or what is left of one whose building was stopped."""

    folder: Path
    state: str
    """WHOLE, DAMAGED or UNFINISHED."""
    size_bytes: int
    used: float
    """Seconds since the epoch."""


def datasets(cache_dir: str) -> Path:
    return Path(cache_dir).expanduser() / "datasets"


def entries(cache_dir: str) -> list[Entry]:
    """All of them by name; those that are being built right now are left out."""
    root = datasets(cache_dir)
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [_entry(folder) for folder in folders if not _alive(folder)]


def seal(folder: Path) -> None:
    """Note what a data set is made of, once all of it is written."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_whole(folder / SIZES, json.dumps(sizes, indent=1).encode())


def flaw(folder: Path) -> str:
    """What is wrong with a data set as far as its files tell without being read; empty where nothing is."""
    try:
        sizes = json.loads((folder / SIZES).read_bytes())
        for name, size in sizes.items():
            there = (folder / name).stat().st_size
            if there != size:
                return f"{name} has {there:,} bytes instead of {size:,}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is not there"
    except (ValueError, AttributeError):
        return f"{SIZES} is cut short"
    return ""


def note_use(folder: Path) -> None:
    with suppress(OSError):  # a cache may be for reading only
        os.utime(folder / SIZES)


def workplace(folder: Path) -> Path:
    """A new name beside a data set for the time of its building. What dead builders of it left goes."""
    for old in folder.parent.glob(f".{folder.name}.*"):
        if not _alive(old):
            shutil.rmtree(old, ignore_errors=True)
    return folder.with_name(f".{folder.name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}")


def remove(folder: Path) -> None:
    """All of a data set at once for whoever looks for it; who reads it reads on."""
    gone = workplace(folder) if not folder.name.startswith(".") else folder
    with suppress(FileNotFoundError):  # another process was first
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def prune(cache_dir: str, days: float) -> list[Entry]:
    """Remove what was not used for so many days, and all that is not whole; returns what went."""
    old = [e for e in entries(cache_dir) if e.state != WHOLE or time.time() - e.used > days * DAY]
    for entry in old:
        remove(entry.folder)
    return old


def _entry(folder: Path) -> Entry:
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    state = UNFINISHED if folder.name.startswith(".") else DAMAGED if flaw(folder) else WHOLE
    sizes = folder / SIZES
    used = sizes.stat().st_mtime if sizes.is_file() else max((file.st_mtime for file in files), default=0.0)
    return Entry(folder, state, sum(file.st_size for file in files), used)


def _host() -> str:
    return socket.gethostname().replace(".", "_")


def _alive(folder: Path) -> bool:
    """Whether a folder's builder may still be at work: a process of this host that lives; of another host, one that
    wrote within a day."""
    hidden, *parts = folder.name.split(".")
    if hidden or len(parts) != 4:
        return False
    _, host, process, _ = parts
    if host == _host() and process.isdigit():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    with suppress(FileNotFoundError):
        return time.time() - max(path.stat().st_mtime for path in [folder, *folder.rglob("*")]) < DAY
    return False
