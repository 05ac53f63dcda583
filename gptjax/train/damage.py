"""What is wrong with a checkpoint that cannot be read.

Damage is what a file tells of itself: it is missing, cannot be decoded, or its arrays are not those that were saved.
Everything else that goes wrong in reading, of the file system, of memory or of a config that asks for other arrays,
is an error of this start, and leaves the checkpoints as they are.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from gptjax.errors import UserError
from gptjax.train.described import misdescribed
from gptjax.train.processes import every, together

X = TypeVar("X")

# How TensorStore begins the message of a read that failed because of what it read.
DECODING = ("DATA_LOSS", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE")


class Damaged(Exception):
    """A checkpoint whose files are not whole, or not what was saved; the message says what is wrong."""


@contextmanager
def reading(folder: Path, found: Iterable[str] = ()) -> Iterator[None]:
    """Sorts what reading a checkpoint, or the arrays `found` in it, can meet: Damaged, a UserError for the file system,
    the rest as it is."""
    try:
        yield
    except (Damaged, UserError):
        raise
    except Exception as error:  # whatever Orbax, TensorStore or JSON raise, it is one of these kinds
        system = system_error(error)
        missing = system is not None and system.errno == errno.ENOENT
        if system is None or missing:
            if _out_of_memory(error):
                raise
            if not (missing or _undecodable(error)):
                if found and (file := misdescribed(folder / "state", found)):
                    raise Damaged(f"{file} is not what was saved") from error
                raise
            system = unreadable(folder)
        if system is None:
            raise Damaged(_first_line([*_causes(error)][-1])) from error
        raise UserError(
            f"{system.filename or folder}: cannot be read ({system.strerror}); nothing is changed, mend that and resume"
        ) from error


def system_error(error: BaseException) -> OSError | None:
    """What the operating system said, in an exception or below it, None if it is of another kind. TensorStore passes it
    on as text."""
    found = None
    for cause in _causes(error):
        text = " ".join([str(cause), *getattr(cause, "__notes__", [])])
        told = re.search(r"(?:os_error_code='|OS error )(\d+)", text)
        number = cause.errno if isinstance(cause, OSError) else int(told[1]) if told else None
        if number is None and isinstance(cause, FileNotFoundError):
            number = errno.ENOENT  # Orbax's own, without a number
        if number is not None:
            name = cause.filename if isinstance(cause, OSError) else None
            found = OSError(number, os.strerror(number), name)
            if number != errno.ENOENT:
                return found
    return found


def unreadable(folder: Path) -> OSError | None:
    """What keeps this process from reading in a folder: for Orbax a folder that cannot be entered is an empty one."""

    def stop(error: OSError) -> None:
        raise error

    try:
        for parent, _, names in os.walk(folder, onerror=stop):
            for name in names:
                with open(os.path.join(parent, name), "rb") as file:
                    file.read(1)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _undecodable(error: BaseException) -> bool:
    return any(
        isinstance(cause, json.JSONDecodeError | UnicodeDecodeError)
        or str(cause).startswith(DECODING)
        or "Error decoding" in str(cause)  # an invalid argument has no such beginning
        for cause in _causes(error)
    )


def _out_of_memory(error: BaseException) -> bool:
    return any(isinstance(cause, MemoryError) or "RESOURCE_EXHAUSTED" in str(cause) for cause in _causes(error))


def agreed(action: Callable[[], X]) -> X:
    """`action` on every process, or Damaged on every process."""
    damage = ""

    def run() -> X | None:
        nonlocal damage
        try:
            return action()
        except Damaged as error:
            damage = str(error)
            return None

    result = together(run)
    if found := next(filter(None, every(damage)), ""):
        raise Damaged(found)
    return result  # type: ignore[return-value]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
