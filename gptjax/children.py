"""Processes that end with who started them, however that one ends."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int = 0) -> None:
    """Called by a child, first of all: on Linux the kernel kills it when the thread that started it ends, also where
    that was by a signal which nobody can catch. One that knows the number of its parent ends where that is gone before
    it has come this far."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


class Children:
    """Runs commands, of several threads, and kills those that still go when its block is left; later ones do not
    start."""

    def __init__(self) -> None:
        self._going: set[subprocess.Popen[str]] = set()
        self._over = False

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._over = True
        for child in list(self._going):
            child.kill()

    def run(self, command: Sequence[str], text: str, timeout: float, **how: Any) -> subprocess.CompletedProcess[str]:
        """Give a command its standard input, and wait. Raises subprocess.TimeoutExpired, when it has been killed."""
        pipe = subprocess.PIPE
        if self._over:
            raise RuntimeError("nothing starts any more")
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **how) as child:
            self._going.add(child)
            try:
                out, errors = child.communicate(text, timeout)
            except BaseException:
                child.kill()
                raise
            finally:
                self._going.discard(child)
        return subprocess.CompletedProcess(command, child.returncode, out, errors)
