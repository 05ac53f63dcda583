"""Run folders in a bucket, by their address: gs://BUCKET/FOLDER.

The small files of such a run are worked on in a local copy, of this process and as long as it lives, for a log grows by
lines and an object does not grow: `send` writes what has changed back, each file whole. Checkpoints and the lock lie in
the bucket alone, at the run's `home`. A place is a Path, or what etils.epath has for one in a bucket.
"""

import atexit
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import has_magic
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from gptjax.errors import UserError
from gptjax.files import write_whole

SCHEME = "gs://"
COMMITTED = "commit_success.txt"  # Orbax's last file of a checkpoint, where a folder cannot be renamed
PIECE = 1 << 24  # bytes of a file that is copied
NOTE = ".gptjax-bucket"  # beside a copy: its address, and what of it is in the bucket
APART = {"checkpoints", "lock", "profile", "tensorboard"}
"""What a copy is made without: nobody reads it from there."""
REMEDY = "mount the bucket, as launch/tpu_pod.sh --bucket and launch/gke.py do, and name a path in it"


class Unreachable(UserError):
    """A bucket that did not answer, or refused."""


def is_address(text: str) -> bool:
    """Whether a text names no path: as one, it would be a folder of that name."""
    return bool(re.match("[a-z0-9]{2,}:/", text))


def whole(text: str) -> str:
    """What a text names, in words that mean the same in every folder."""
    return text if is_address(text) else str(Path(text).expanduser().absolute())


def require_known(text: str, name: str) -> None:
    """Raises UserError for an address of what has that name, a run or a text, that is no place in a bucket of Google's:
    Orbax writes to no others."""
    if is_address(text) and not re.match(f"{SCHEME}[^/]+/[^/]", text):
        raise UserError(
            f"{name}: neither a path nor {SCHEME}BUCKET/FOLDER, the only buckets that are read and written; {REMEDY}"
        )


def is_remote(place: Any) -> bool:
    return not isinstance(place, Path)


def at(text: str) -> Any:
    """The place that a text names. Raises UserError for an address that cannot be used."""
    if not is_address(text):
        return Path(text)
    require_known(text, text)
    if find_spec("gcsfs") is None:
        raise UserError(f"{text}: buckets are read by gcsfs, which is not installed; pip install 'gptjax[bucket]'")
    _files()  # before epath opens it
    from etils import epath

    return epath.Path(text)


def _files() -> Any:
    """gcsfs as epath opens it, too. It must not remember what was in a folder: other processes write there."""
    import fsspec

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs", finalize_on_close=True)


@contextmanager
def _reaching(place: Any) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:  # of gcsfs, aiohttp, google.auth: they share no kind
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unreachable(
            f"{place}: cannot be reached ({said}); see to the network, the bucket's name and your rights to it"
        ) from error


# A run


def opened(text: str) -> Path:
    """The run folder that a text names, or a local copy of what is in a bucket, empty where nothing is."""
    if not is_address(text):
        return Path(text)
    there = at(text)
    folder = Path(tempfile.mkdtemp(prefix="gptjax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run = folder / there.name
    _note(run, str(there), {})
    fetch(run)
    return run


def fetch(run: Path) -> None:
    """Make a copy anew of what is in the bucket now, as after its lock was taken. Nothing to do for other runs."""
    if not (note := _noted(run)):
        return
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    there, files = at(note["address"]), _files()
    with _reaching(there):
        for name in _names(files, there):
            write_whole(run / name, files.cat_file(f"{there}/{name}"))
    _note(run, str(there), _state(run))


def _names(files: Any, there: Any) -> Iterator[str]:
    """The files that a copy has; a folder that somebody made by hand is an object without a name in it."""
    root = str(there).removeprefix(SCHEME)
    try:
        listed = files.ls(root, detail=True)
    except FileNotFoundError:
        return
    for each in listed:
        if each["name"].removeprefix(f"{root}/") in APART:
            continue
        for name in files.find(each["name"]) if each["type"] == "directory" else [each["name"]]:
            below = name.removeprefix(f"{root}/")
            if name.startswith(f"{root}/") and not name.endswith("/") and ".." not in PurePosixPath(below).parts:
                yield below


def _state(run: Path) -> dict[str, list[int]]:
    """Size and time of every file of a copy, by name; the oldest first, so that what was written last is sent last."""
    found = {path.relative_to(run).as_posix(): path.stat() for path in run.rglob("*") if path.is_file()}
    states = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}
    return dict(sorted(states.items(), key=lambda item: item[1][1]))


def _note(run: Path, address: str, sent: dict[str, list[int]]) -> None:
    write_whole(run.parent / NOTE, json.dumps({"address": address, "sent": sent}).encode())


def _noted(run: Path) -> dict[str, Any]:
    """Of a copy; empty for a run that lies in a file system."""
    try:
        return dict(json.loads((run.parent / NOTE).read_bytes()))
    except OSError:
        return {}


def send(run: Path) -> None:
    """Bring the bucket up to a copy: what has changed is written, what is gone goes. Nothing to do for other runs."""
    if not (note := _noted(run)):
        return
    address, sent, now = note["address"], note["sent"], _state(run)
    for name, state in now.items():
        if sent.get(name) != state:
            write(at(f"{address}/{name}"), (run / name).read_bytes())
    for name in sent.keys() - now.keys():
        remove(at(f"{address}/{name}"))
    _note(run, address, now)


def named(run: Path) -> str:
    """A run as its user names it."""
    return str(_noted(run).get("address", run))


def home(run: Path) -> Any:
    """Where the checkpoints and the lock of a run are."""
    note = _noted(run)
    return at(note["address"]) if note else run


# Places


def create(place: Any, data: bytes) -> None:
    """A new file. Raises FileExistsError where there is one, also if it is made at the same moment."""
    if is_remote(place):
        with _reaching(place):
            _files().pipe_file(str(place), data, mode="create")
        return
    file = place.open("xb")
    try:
        with file:
            file.write(data)
    except OSError:  # a disk is full: what is there would be taken for the whole
        place.unlink(missing_ok=True)
        raise


def read(place: Any) -> bytes:
    if not is_remote(place):
        return bytes(place.read_bytes())
    with _reaching(place):
        return bytes(_files().cat_file(str(place)))


def write(place: Any, data: bytes) -> None:
    """A file that is whole or not there."""
    if not is_remote(place):
        return write_whole(place, data)
    with _reaching(place):
        _files().pipe_file(str(place), data)


def generation(place: Any) -> str:
    """What tells an object in a bucket from all that had its name before."""
    with _reaching(place):
        return str(_files().info(str(place))["generation"])


def remove(place: Any, generation: str = "") -> None:
    """A file, if it is there; in a bucket with a generation only that one."""
    if not is_remote(place):
        return place.unlink(missing_ok=True)
    match = {"ifGenerationMatch": generation} if generation else {}
    bucket, _, key = str(place).removeprefix(SCHEME).partition("/")
    with suppress(FileNotFoundError, FileExistsError), _reaching(place):  # the latter: another generation
        _files().call("DELETE", "b/{}/o/{}", bucket, key, **match)


def clear(place: Any) -> None:
    """Remove all that is below a place in a bucket."""
    with suppress(FileNotFoundError), _reaching(place):
        _files().rm(str(place), recursive=True)


def free_bytes(folder: Any) -> float:
    """That may still be written; a bucket has no end."""
    return math.inf if is_remote(folder) else shutil.disk_usage(folder).free


def sizes(folder: Any) -> dict[str, int]:
    """Bytes of every file below a place, by its name there."""
    if not is_remote(folder):
        found = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    root = str(folder).removeprefix(SCHEME)
    with _reaching(folder):
        return {name.removeprefix(f"{root}/"): each["size"] for name, each in _files().find(root, detail=True).items()}


def found(address: str) -> dict[str, dict[str, Any]]:
    """What is known of every file that an address names, by BUCKET/NAME: of one, of those below a folder, of those that
    match a glob. Raises UserError where there is none."""
    root = str(at(address)).removeprefix(SCHEME)
    with _reaching(address):
        every = _files().glob(root, detail=True) if has_magic(root) else _files().find(root, detail=True)
    files = {name: about for name, about in every.items() if about["type"] == "file" and not name.endswith("/")}
    if not files:
        raise UserError(f"{address}: no such file, nor one below it, nor a match as a glob; look what is in the bucket")
    return files


def download(name: str, path: Path) -> None:
    """Write the file BUCKET/NAME. Raises OSError where the disk is full."""
    with path.open("wb") as out:
        for data in _pieces(name):  # what a disk says of itself is not said of the bucket
            out.write(data)


def _pieces(name: str) -> Iterator[bytes]:
    with _reaching(f"{SCHEME}{name}"), _files().open(name, "rb") as there:
        while data := there.read(PIECE):
            yield data


def modified(folder: Any) -> float:
    """When a checkpoint was written, in seconds since the epoch."""
    return float((folder / COMMITTED).stat().mtime if is_remote(folder) else folder.stat().st_mtime)


def steps(folder: Any) -> dict[int, bool]:
    """The checkpoints below a place in a bucket, and whether each was written to its end."""
    files, root = _files(), str(folder).removeprefix(SCHEME)
    with _reaching(folder):
        try:
            found = {name.rpartition("/")[2] for name in files.ls(root, detail=False)}
        except FileNotFoundError:
            return {}
        return {int(name): files.exists(f"{root}/{name}/{COMMITTED}") for name in found if name.isdigit()}


def store(folder: Any) -> dict[str, str]:
    """TensorStore's name for a place."""
    if not is_remote(folder):
        return {"driver": "file", "path": f"{folder}/"}
    bucket, _, key = str(folder).removeprefix(SCHEME).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{key}/"}
