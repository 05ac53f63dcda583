"""The data sets that were built: which there are, whether they are whole, where new ones are made, and their removal.

A data set has the name of its content. Beside them `.keys` says which one a source was built to, by a key of its files.
"""

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gptjax.files import write_whole
from gptjax.liveness import born

SIZES = "sizes.json"  # of every file beside it; its own time is that of the last use
KEYS, GONE = ".keys", ".gone"
UNFINISHED, DAMAGED, WHOLE = "unfinished", "damaged", "whole"
DAY = 86400.0  # seconds
WAIT = 0.2  # seconds between two looks at another builder


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
    return [_entry(folder) for folder in folders if folder.name != KEYS and not _alive(folder)]


def find(root: Path, key: str) -> Path | None:
    """The data set of a key, if it was built and is still there."""
    try:
        folder = root / (root / KEYS / key).read_text()
    except (OSError, ValueError):
        return None
    return folder if folder.is_dir() else None


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


def builder(root: Path, stem: str) -> int | None:
    """The process of this host that is making the data set of such a stem, if there is one."""
    for folder in root.glob(f".{stem}.*"):
        host, pid, birth = _maker(folder)
        if host == _host() and _lives(pid, birth):
            return int(pid)
    return None


def workplace(root: Path, stem: str) -> Path:
    """A folder of this process to make a data set in, with what a builder of the same that died has finished."""
    root.mkdir(parents=True, exist_ok=True)
    own = root / _workplace(stem, f"{os.getpid()}-{born(os.getpid())}")
    for old in root.glob(f".{stem}.*"):
        if not _alive(old):
            with suppress(OSError):  # another process was first
                old.rename(own)
                return own
    own.mkdir()
    return own


def wait(root: Path, stem: str, report: Callable[[str, int, int], None]) -> None:
    """Until no process of this host makes the data set of such a stem."""
    while pid := builder(root, stem):
        report(f"waiting for process {pid}, which builds it", 0, 1)
        time.sleep(WAIT)


@contextmanager
def making(root: Path, stem: str, keep: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """A workplace. What is finished in it is left to the next builder where a signal ends this one, or an error that is
    one of `keep`; another leaves nothing."""
    made = workplace(root, stem)
    try:
        yield made
    except keep:
        abandon(made)
        raise
    except Exception:
        remove(made)
        raise
    except BaseException:
        abandon(made)
        raise


def abandon(made: Path) -> None:
    """Leave what is finished in a workplace to the next builder."""
    with suppress(OSError):
        made.rename(made.with_name(_workplace(made.name.split(".")[1], "nobody")))


def publish(made: Path, name: str, key: str) -> Path:
    """Give what was made in a workplace its name, all of it at once. Equal data that is there is kept."""
    sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    write_whole(made / SIZES, json.dumps(sizes, indent=1).encode())
    folder = made.with_name(name)
    if folder.is_dir() and flaw(folder):
        remove(folder)
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        remove(made)
    write_whole(made.parent / KEYS / key, folder.name.encode())
    return folder


def remove(folder: Path) -> None:
    """All of a data set at once for whoever looks for it; who reads it reads on."""
    gone = folder.with_name(f"{GONE}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):  # another process was first
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def prune(cache_dir: str, days: float) -> list[Entry]:
    """Remove what was not used for so many days, and all that is not whole; returns what went."""
    old = [e for e in entries(cache_dir) if e.state != WHOLE or time.time() - e.used > days * DAY]
    for entry in old:
        remove(entry.folder)
    root = datasets(cache_dir)
    for key in (root / KEYS).glob("[!.]*"):
        if find(root, key.name) is None:
            key.unlink(missing_ok=True)
    return old


def _entry(folder: Path) -> Entry:
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    state = UNFINISHED if folder.name.startswith(".") else DAMAGED if flaw(folder) else WHOLE
    sizes = folder / SIZES
    used = sizes.stat().st_mtime if sizes.is_file() else max((file.st_mtime for file in files), default=0.0)
    return Entry(folder, state, sum(file.st_size for file in files), used)


def _workplace(stem: str, maker: str) -> str:
    return f".{stem}.{_host()}.{maker}.{uuid.uuid4().hex[:8]}"


def _host() -> str:
    return socket.gethostname().replace(".", "_")


def _maker(folder: Path) -> tuple[str, str, str]:
    """Host, process and birth of who works in a workplace; empty where it is none."""
    hidden, *parts = folder.name.split(".")
    if hidden or len(parts) != 4:
        return "", "", ""
    pid, _, birth = parts[2].partition("-")
    return parts[1], pid, birth


def _lives(pid: str, birth: str) -> bool:
    """Whether a process of this host, as `_maker` names it, is still the one that it was."""
    return pid.isdigit() and bool(birth) and born(int(pid)) == birth


def _alive(folder: Path) -> bool:
    """Whether a folder's maker may still be at work: a process of this host that lives; of another host, one that
    wrote within a day."""
    host, pid, birth = _maker(folder)
    if not host:
        return False
    if host == _host():
        return _lives(pid, birth)
    with suppress(FileNotFoundError):
        return time.time() - max(path.stat().st_mtime for path in [folder, *folder.rglob("*")]) < DAY
    return False
