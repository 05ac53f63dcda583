"""What a run says while it runs: a JSON-lines log, a progress bar or plain lines, and who else is told (sinks)."""

import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gptjax.files import json_text, write_whole
from gptjax.terminal import show_anything
from gptjax.train.sinks import BEGINS, Opener, Record, Sink

LOG = "log.jsonl"
SHOWN_WAIT = 0.01  # share of the time, from which it is told that data are waited for
TOLD = ("score", "gold", "kl", "length")  # where a stage has them, beside its loss, which says little there


class Reporter:
    """Writes records and shows them; on every process but the first it does nothing."""

    def __init__(
        self,
        log: Path,
        total_tokens: int,
        active: bool,
        resume_at: int | None = None,
        sinks: Sequence[Opener] = (),
    ):
        """A run that goes on at the step `resume_at` keeps its records up to there. Raises UserError of a sink that
        cannot be opened."""
        self.earlier: list[Record] = []
        """The records of the starts before this one."""
        self.undone: list[Record] = []
        """Those of steps that are to be done again."""
        self._active = active
        if not active:
            return
        if resume_at is not None:
            self.earlier, self.undone = _cut(log, resume_at)
        self._sinks: list[Sink] = []
        with ExitStack() as opened:
            for sink in sinks:
                self._sinks.append(opened.enter_context(closing(sink(self.earlier))))
            opened.pop_all()
        self._log = log.open("a", buffering=1, encoding="utf-8")
        self._total = total_tokens
        show_anything()
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._bar = TaskID(0)
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.percentage:3.0f}%"))
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console, expand=True)
            self._bar = self._progress.add_task("starting", total=total_tokens)
            self._progress.start()

    @property
    def seconds(self) -> float:
        """Of training in the starts before this one."""
        return max((r["seconds"] for r in self.earlier if "seconds" in r), default=0.0)

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Append one record to the log, and tell the sinks."""
        if not self._active:
            return
        record = {"kind": kind, "step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), **values}
        self._log.write(json_text(record) + "\n")
        for sink in self._sinks:
            sink.add(record)

    def train(self, step: int, tokens: int, seconds: float, seconds_left: float, **values: Any) -> None:
        """One training record: into the log, and onto the bar or a plain line."""
        self.record("train", step, tokens=tokens, seconds=seconds, **values)
        if not self._active:
            return
        told = "".join(f"  {name} {values[name]:.2f}" for name in TOLD if name in values)
        text = f"step {step}  loss {values['loss']:.4f}{told}  {values['tokens_per_s']:,.0f} tok/s"
        text += f"  mfu {values['mfu']:.1%}" if values.get("mfu") else ""
        if values.get("data_wait", 0) >= SHOWN_WAIT:
            who = f"{values['waiting']} " if "waiting" in values else ""
            text += f"  {who}waits for data {values['data_wait']:.0%}"
        text += f"  skipped {values['skipped']}" if values.get("skipped") else ""
        if self._progress is not None:
            self._progress.update(self._bar, description=text, completed=tokens)
        else:
            self._console.print(f"{text}  lr {values['lr']:.2e}  {duration(seconds_left)} left")

    def done(self, kind: str, step: int, tokens: int, seconds: float, took: float, values: dict[str, Any]) -> None:
        """The record of a periodic action; its numbers on a line, its texts below."""
        self.record(kind, step, tokens=tokens, seconds=seconds, took=took, **values)
        if not values:
            return
        numbers = [f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, int | float)]
        texts = [value for value in values.values() if isinstance(value, str)]
        self.say("\n".join(["  ".join([f"step {step}", kind, *numbers]), *texts]))

    def say(self, text: str) -> None:
        if self._active:
            self._console.print(text, markup=False)

    def close(self) -> None:
        if not self._active:
            return
        if self._progress is not None:
            self._progress.stop()
        for sink in self._sinks:
            sink.close()
        self._log.close()


def read_log(log: Path) -> list[Record]:
    """All whole records; a line that a kill cut short is left out."""
    records = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _cut(log: Path, step: int) -> tuple[list[Record], list[Record]]:
    """Drop the records after `step`, which a run that goes on there writes again, but for those of its starts; returns
    the rest, and them."""
    kept: list[Record] = []
    undone: list[Record] = []
    for record in read_log(log) if log.exists() else []:
        (kept if record["step"] <= step or record["kind"] in BEGINS else undone).append(record)
    write_whole(log, "".join(json_text(r) + "\n" for r in kept).encode())
    return kept, undone


def duration(seconds: float) -> str:
    """1h 02m"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s"
