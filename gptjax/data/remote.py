"""Sources in a bucket: gs://BUCKET/ and a file, a folder or a glob. What they name is copied once below data.cache_dir,
for readers seek in files, and a training reads its text again and again."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gptjax import bucket
from gptjax.data.files import names
from gptjax.data.pool import Report
from gptjax.errors import UserError

FOLDER = "buckets"
AT_ONCE = 8


@dataclass(frozen=True)
class Object:
    """A file of a bucket."""

    name: str
    """BUCKET/NAME."""
    size: int
    time_ns: int
    """Of its copy: its generation, which is the microsecond of its writing, and so the same on every host."""
    path: Path
    """Of its copy."""

    @property
    def is_here(self) -> bool:
        try:
            stat = self.path.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.time_ns)


def has_address(source: str) -> bool:
    return any(map(bucket.is_address, names(source)))


def local(source: str, cache_dir: str) -> str:
    """The source with the names of copies in the place of addresses."""
    return ",".join(
        str(_root(cache_dir) / name.removeprefix(bucket.SCHEME)) if bucket.is_address(name) else name
        for name in names(source)
    )


def objects(source: str, cache_dir: str) -> list[Object]:
    """The files of a source that are in buckets. Raises UserError where an address names none, or cannot be reached."""
    found: dict[str, Object] = {}
    for address in filter(bucket.is_address, names(source)):
        for name, about in bucket.found(address).items():
            if ".." in PurePosixPath(name).parts:
                raise UserError(f"data.source = {address}: {name}: .. is no name of a file; rename it")
            path = _root(cache_dir) / name
            found[name] = Object(name, int(about["size"]), 1000 * int(about["generation"]), path)
    return [*found.values()]


def copy(source: str, cache_dir: str, every: Sequence[Object], report: Report) -> None:
    """Make copies of what is not here as it is there, and remove those of what is no longer there. One that is stopped
    leaves no half file under its name. Raises OSError where the disk is full."""
    left = [each for each in every if not each.is_here]
    done, total = 0, sum(each.size for each in left)
    with ThreadPoolExecutor(AT_ONCE, "copy") as pool:
        for size in pool.map(_copy, left):
            done += size
            report("copying", done, total)
    known = {each.path for each in every}
    for address in filter(bucket.is_address, names(source)):
        for path in _matches(local(address, cache_dir)):
            if path not in known:
                path.unlink(missing_ok=True)


def _copy(each: Object) -> int:
    each.path.parent.mkdir(parents=True, exist_ok=True)
    part = each.path.with_name(f".{each.path.name}.{os.getpid()}")
    try:
        bucket.download(each.name, part)
        os.utime(part, ns=(each.time_ns, each.time_ns))
        part.rename(each.path)
    finally:
        part.unlink(missing_ok=True)
    return each.size


def _root(cache_dir: str) -> Path:
    return Path(cache_dir).expanduser().absolute() / FOLDER


def _matches(name: str) -> Iterator[Path]:
    """The copies that a name stands for, without those that another process makes now."""
    some: Iterable[Path] = Path(name).rglob("*") if Path(name).is_dir() else map(Path, glob.glob(name, recursive=True))
    return (path for path in some if path.is_file() and not path.name.startswith("."))
