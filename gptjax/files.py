"""Files that are whole or not there, and JSON that every reader takes."""

import hashlib
import json
import math
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptjax.errors import UserError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that no reader, and no crash, ever meets half of it; its folder is made where there is none.

    The bytes are on the disk before the file has its name, and the name before this returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last; file systems that have no such thing, such as those over a bucket, refuse."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON as every reader takes it: it knows no NaN and no infinity, they are written as null."""

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: plain(child) for key, child in node.items()}
        if isinstance(node, list | tuple):
            return [plain(child) for child in node]
        return None if isinstance(node, float) and not math.isfinite(node) else node

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A small JSON object. Raises UserError, in one line with the remedy, where the file is missing, cut short or of
    another form."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: not whole JSON ({error}); {remedy}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    return values


def code_digest() -> str:
    """Of this package's source."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:24]
