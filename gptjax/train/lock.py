"""One run folder, one run: a lock that names its holder and beats while the holder lives. In a bucket it is an object,
which is created and taken away on the condition that it is not, or still, there.

No clocks are compared, for hosts disagree about them: a lock of a process that is gone from this host is stale, and so
is one whose beat stands still while another start watches it.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptjax import bucket
from gptjax.errors import UserError
from gptjax.liveness import born

NAME = "lock"
BEAT = 5.0  # seconds between two beats
PATIENCE = 30.0  # seconds without a beat after which a holder on another host counts as dead


class RunLock:
    """Held from construction to `release`. Raises UserError where another process holds the folder."""

    def __init__(self, folder: Path, warn: Callable[[str], None], patience: float = PATIENCE, beat: float = BEAT):
        self._path: Any
        self._path, self._warn, self._patience = bucket.home(folder) / NAME, warn, patience
        self._own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "id": uuid.uuid4().hex,
        }
        self._count = 0
        self._take()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(beat,), name="run lock", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        while not self._create():
            holder = _read(self._path)
            if not _is_dead(holder):
                self._watch(holder)
            self._break(holder)

    def _create(self) -> bool:
        try:
            bucket.create(self._path, self._text().encode())
        except FileExistsError:
            return _read(self._path).get("id") == self._own["id"]  # as where the answer of a bucket was lost
        except OSError as error:
            said = error.strerror or "no such bucket"
            raise UserError(f"run {self._path.parent}: cannot be written ({said}); name another") from None
        return True

    def _text(self) -> str:
        return json.dumps(self._own | {"beat": self._count})

    def _watch(self, holder: dict[str, Any]) -> None:
        """Return if the holder gives no beat for so long; raises UserError at the first that it gives."""
        where = _named(holder)
        self._warn(f"run {self._path.parent} is locked by {where}; watching for {self._patience:g} s whether it lives")
        end = time.monotonic() + self._patience
        while time.monotonic() < end:
            time.sleep(min(0.2, self._patience))
            now = _read(self._path)
            if now != holder and now:
                raise UserError(
                    f"run {self._path.parent}: {_named(now)} is at work on it; wait for it, stop it, or name another"
                )
            if not self._path.exists():
                return

    def _break(self, holder: dict[str, Any]) -> None:
        """Take a stale lock away; of two that try at once, one takes the other's new lock and gives it back."""
        if bucket.is_remote(self._path):
            self._remove(holder)
            return
        aside = self._path.with_name(f"{NAME}.{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            self._path.rename(aside)
            if _read(aside).get("id") != holder.get("id"):
                with suppress(OSError):
                    os.link(aside, self._path)
            else:
                self._warn(f"took over the lock of {_named(holder)}, which is gone")
            aside.unlink()

    def _remove(self, holder: dict[str, Any]) -> None:
        """The same in a bucket, where what has changed since it was looked at is left alone."""
        with suppress(FileNotFoundError):
            seen = bucket.generation(self._path)
            if _read(self._path) == holder:
                bucket.remove(self._path, seen)
                self._warn(f"took away the lock of {_named(holder)}, which is gone")

    def _keep(self, beat: float) -> None:
        while not self._released.wait(beat):
            with suppress(bucket.Unreachable):  # for a while, and then others find this process dead
                self._beat()

    def _beat(self) -> None:
        if _read(self._path).get("id") != self._own["id"]:
            # Another start found this process dead, as after a long pause of the machine. Two runs that write one
            # folder would destroy it, so there is nothing to save or to wait for.
            print(f"error: lost the lock of run {self._path.parent} to another process; ending", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        self._count += 1
        with suppress(OSError):  # a full disk must not end a run that could still save
            bucket.write(self._path, self._text().encode())

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if _read(self._path).get("id") == self._own["id"]:
            bucket.remove(self._path)


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"


def _read(path: Any) -> dict[str, Any]:
    """The lock's holder; {} where there is none, or it is being written."""
    try:
        holder = json.loads(bucket.read(path))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host that is no more."""
    pid = holder.get("pid")
    return holder.get("host") == socket.gethostname() and isinstance(pid, int) and born(pid) != holder.get("born")
