"""What labellers have said, a line of JSON each, as the training of a reward model reads it."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.data.chat import Message
from gptjax.data.dialogues import pairs, why_dropped
from gptjax.data.rankings import Ranking, parse
from gptjax.errors import UserError
from gptjax.files import sync_folder


@dataclass(frozen=True)
class Answer:
    """One labeller's ranks of the replies to one prompt."""

    labeller: str
    prompt: list[Message]
    replies: list[str]
    ranks: list[int]
    """From 1, the best, without gaps; equal ones are ties."""

    @property
    def key(self) -> str:
        return key_of(self.prompt)


def key_of(prompt: Sequence[Message]) -> str:
    """What tells one prompt from others."""
    return json.dumps(pairs(prompt))


class Lines:
    """JSON objects in a file, a line each, that this process alone adds to. A line is whole and on the disk when
    `append` returns; half of one, which a crash may leave, is cut off when the file is opened again."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that cannot be written, that another process adds to, or that holds other
        things."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"--out {path}: {error.strerror}; name a file that can be written") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise UserError(f"--out {path}: another gptjax label adds to it; name another file") from None
        try:
            self._cut()
            self.rows = list(read(path))
        except BaseException:
            self.close()
            raise
        self._size = os.fstat(self._file).st_size
        self._starts: list[int] = []

    def _cut(self) -> None:
        sync_folder(self.path.parent)
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if not _is_line(data[whole:]):
            os.ftruncate(self._file, whole)
        elif whole < len(data):  # whole, but for its end
            os.write(self._file, b"\n")

    def append(self, row: dict[str, Any]) -> None:
        """Raises OSError where it does not fit on the disk; the file is then as it was."""
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            written = os.write(self._file, data)
            if written < len(data):
                raise OSError(f"{written} of {len(data)} bytes were written; is the disk full?")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._starts.append(self._size)
        self._size += len(data)
        self.rows.append(row)

    def take_back(self) -> None:
        """The last line that this process appended."""
        self._size = self._starts.pop()
        os.ftruncate(self._file, self._size)
        os.fsync(self._file)
        self.rows.pop()

    def close(self) -> None:
        """Let others add to it."""
        os.close(self._file)


def _is_line(data: bytes) -> bool:
    """Whether a last line without its end is an object all the same, as an editor may leave it."""
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file. Raises UserError with the number of a line that is none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file of rankings") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is no JSON ({error}); mend or remove it") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is no JSON object; mend or remove it")
        yield row


def answers(rows: Sequence[dict[str, Any]], where: object) -> Iterator[Answer]:
    """The rankings among them, as training reads them; what it drops is none."""
    for row in rows:
        text = Ranking("drop").document(row, where)
        if not why_dropped(text):
            found = parse(text)
            yield Answer(str(row.get("labeller") or "?"), found.prompt, found.replies, found.ranks)


class Record:
    """The file of rankings, and beside it, with .aside behind its name, what teaches nothing: prompts that were
    skipped, and those whose replies were all tied."""

    def __init__(self, path: Path) -> None:
        self.rankings, self.aside = Lines(path), Lines(path.with_name(path.name + ".aside"))
        self._order: list[Lines] = []

    @property
    def files(self) -> dict[str, Lines]:
        """What each of them holds."""
        return {"rankings": self.rankings, "skipped or all tied": self.aside}

    @property
    def answers(self) -> list[Answer]:
        return list(answers(self.rankings.rows, self.rankings.path))

    def done_by(self, labeller: str) -> set[str]:
        """Keys of the prompts that a labeller has ranked or passed over."""
        ranked = {answer.key for answer in self.answers if answer.labeller == labeller}
        aside = [row for row in self.aside.rows if row.get("labeller") == labeller]
        return ranked | {key_of([Message(turn["role"], turn["content"]) for turn in row["prompt"]]) for row in aside}

    def add(self, labeller: str, prompt: Sequence[Message], replies: list[str], ranks: list[int]) -> None:
        """An answer; no ranks are a prompt that was skipped."""
        turns = [{"role": message.role, "content": message.content} for message in prompt]
        row = {"prompt": turns, "replies": replies, "ranks": ranks, "labeller": labeller}
        lines = self.rankings if len(set(ranks)) > 1 else self.aside
        lines.append(row)
        self._order.append(lines)

    @property
    def can_take_back(self) -> bool:
        return bool(self._order)

    def take_back(self) -> None:
        """The last answer of this process."""
        self._order.pop().take_back()

    def close(self) -> None:
        self.rankings.close()
        self.aside.close()
