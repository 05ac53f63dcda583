"""A process that writes parts of a data set as its parent says: tasks come in as pickles, progress and results go out.

It is a program of its own, so that a script without a guard can build a text, and nothing of JAX is in it. When its
parent is gone, so is its standard output, and it ends with the next megabyte.
"""

import os
import pickle
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gptjax.data.formats import Failed, Heard, refused
from gptjax.data.store import write_part
from gptjax.errors import UserError


class Part(Protocol):
    """A piece of a source."""

    @property
    def split(self) -> str: ...
    @property
    def size(self) -> int:
        """Bytes to be read, about."""
        ...

    def documents(self, heard: Heard, failed: Failed = refused, /) -> Any:
        """Each as blocks of text; see `formats.documents`."""
        ...


@dataclass(frozen=True)
class Task:
    """Part `number` of the data set in `folder`."""

    folder: Path
    number: int
    part: Part
    max_chars: int

    @property
    def size(self) -> int:
        return self.part.size

    def run(self, heard: Heard) -> None:
        write_part(self.folder, self.number, self.part.documents(heard), self.max_chars)


def main() -> None:
    """Work until there is nothing more to read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all: the parent decides
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between

    def send(value: Any) -> None:
        pickle.dump(value, out)
        out.flush()

    while True:
        try:
            task: Task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            task.run(send)
            send(None)
        except (UserError, OSError) as error:
            send(error)


if __name__ == "__main__":
    main()
