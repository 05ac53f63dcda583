"""Where the time of a run went, over all of its starts, from its log alone."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime

from gptjax.train.metrics import Reporter, duration
from gptjax.train.sinks import Record

PARTS = {
    "steps": "steps",
    "data": "waiting for data",
    "compile": "compiling",
    "save": "saving",
    "evaluate": "evaluating",
    "start": "starting",
    "down": "down",
    "lost": "lost",
}
"""Each part and what it is called: `evaluate` is all else that is done between steps; `start` is all before
the first compilation, and going back; `down` is between the last word of a start and the next; `lost` is what was done
after the checkpoint from which the run went on."""
PART_OF = {"compile": "compile", "save": "save", "local save": "save", "end": "save"}
"""Of what a kind of record took; of the others it is `evaluate`."""


def of_start(reporter: Reporter, began: float) -> dict[str, float]:
    """The cost of the record of a start; began: of `time.monotonic`."""
    before, seconds = [*reporter.earlier, *reporter.undone], time.monotonic() - began
    last = max((datetime.fromisoformat(r["time"]) for r in before if "time" in r), default=None)
    down = (datetime.now(UTC) - last).total_seconds() - seconds if last else 0.0
    return {"start": seconds, "down": max(0.0, down)} | _lost(reporter)


def of_rollback(reporter: Reporter, took: float) -> dict[str, float]:
    """The cost of the record of a rollback, which itself took so many seconds."""
    return {"start": took} | _lost(reporter)


def _lost(reporter: Reporter) -> dict[str, float]:
    """What is to be done again."""
    undone = reporter.undone
    trained = max((r["seconds"] for r in undone if "seconds" in r), default=0.0)
    begun = max((r["step"] for r in reporter.earlier if "seconds" in r), default=0)
    steps = max((r["step"] - begun for r in undone), default=0)
    between = sum(r.get("took", 0.0) for r in undone)
    return {"lost": max(0.0, trained - reporter.seconds) + between, "lost_steps": steps}


def cost_in_words(record: Record) -> str:
    """That of a start or a rollback."""
    cost = record.get("cost", {})
    told = [f"{PARTS[part]} {duration(cost[part])}" for part in ("down", "start") if cost.get(part)]
    if cost.get("lost_steps"):
        told.append(f"lost {cost['lost_steps']} steps, {duration(cost['lost'])}")
    return ", ".join(told)


def seconds_by_part(records: Iterable[Record]) -> dict[str, float]:
    """Seconds of each of PARTS. What an older version has not logged counts as none."""
    parts, trained = dict.fromkeys(PARTS, 0.0), 0.0
    for record in records:
        if record["kind"] == "train":
            window = max(0.0, record["seconds"] - trained)
            trained += window
            waited = window * min(record.get("data_wait") or 0.0, 1.0)  # of a window of one short step it can be more
            parts["data"] += waited
            parts["steps"] += window - waited
        parts[PART_OF.get(record["kind"], "evaluate")] += record.get("took", 0.0)
        for part, seconds in record.get("cost", {}).items():
            if part in parts:
                parts[part] += seconds
    return parts


def in_words(records: Iterable[Record]) -> str:
    """1h 02m: steps 91.2%, compiling 3.0%, ..., without the parts that took no time."""
    parts = seconds_by_part(records)
    total = sum(parts.values())
    shares = {part: seconds / total for part, seconds in parts.items() if total and seconds / total >= 0.0005}
    told = [f"{PARTS[part]} {share:.1%}" for part, share in shares.items()]
    return f"{duration(total)}: {', '.join(told)}" if told else "none"
