"""What a run says while it runs: a JSON-lines log always, TensorBoard files, a progress bar or plain lines."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gptjax.files import write_whole


class Clock:
    """Seconds spent training, without the pauses (evaluation, samples, compilation)."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - before

    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._paused


class Reporter:
    """Writes records and shows them; on every process but the first it does nothing."""

    def __init__(self, log: Path, total_tokens: int, tensorboard: bool, active: bool, append_from: int | None = None):
        self._active = active
        if not active:
            return
        if append_from is not None:
            _cut(log, append_from)
        self._log = log.open("a", buffering=1)
        self._total = total_tokens
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._bar = TaskID(0)
        self._events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # here: it costs 0.3 s, and not every run wants it

            self._events = SummaryWriter(str(log.parent / "tensorboard"))
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.percentage:3.0f}%"))
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console, expand=True)
            self._bar = self._progress.add_task("starting", total=total_tokens)
            self._progress.start()

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Append one record to the log, and its numbers to TensorBoard."""
        if not self._active:
            return
        self._log.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def train(self, step: int, tokens: int, seconds_left: float, **values: Any) -> None:
        """One training record: into the log, and onto the bar or a plain line."""
        self.record("train", step, tokens=tokens, **values)
        if not self._active:
            return
        text = f"step {step}  loss {values['loss']:.4f}  {values['tokens_per_s']:,.0f} tok/s"
        text += f"  mfu {values['mfu']:.1%}" if values.get("mfu") else ""
        text += f"  skipped {values['skipped']}" if values.get("skipped") else ""
        if self._progress is not None:
            self._progress.update(self._bar, description=text, completed=tokens)
        else:
            self._console.print(f"{text}  lr {values['lr']:.2e}  {_duration(seconds_left)} left")

    def say(self, text: str) -> None:
        if self._active:
            self._console.print(text, markup=False)

    def close(self) -> None:
        if not self._active:
            return
        if self._progress is not None:
            self._progress.stop()
        if self._events is not None:
            self._events.close()
        self._log.close()


def read_log(log: Path) -> list[dict[str, Any]]:
    """All whole records; a line that a kill cut short is left out."""
    records = []
    for line in log.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _cut(log: Path, step: int) -> None:
    """Drop the records after `step`: a resumed run writes them again."""
    kept = [r for r in read_log(log) if r["step"] <= step] if log.exists() else []
    write_whole(log, "".join(json.dumps(r) + "\n" for r in kept).encode())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s"
