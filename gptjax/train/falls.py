"""What a run's watches have noted (gptjax/supervisor.py): when it fell, what that cost, and where it went on."""

import signal
from collections.abc import Iterable
from datetime import datetime
from typing import Any

EVENTS = "supervisor.jsonl"
"""Lines of all watches of a run: `event`, `time`, `host`, `process` where there are several, and more.

start: a trainer is started; on: it makes steps, so many `seconds` after it fell last, or after its watch began, from
`step` on; fall; given up; end, with the exit `status`."""
MOST = 200  # characters of what a process has said
Event = dict[str, Any]


def interruptions(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Each with `time` and `step` at which it began, `what` fell, a line for each process and try, and once it was over
    `seconds_lost`, until steps were made again, and `steps_lost`, which are made once more.

    Events come in the order in which they were written: hosts disagree about the time. The processes of a run fall
    together and go on together, so what falls until the next that goes on is one interruption.
    """
    found: list[dict[str, Any]] = []
    last: dict[str, Event] = {}
    for event in events:
        who = f"process {event['process']}" if "process" in event else event.get("host", "")
        before, last[who] = last.get(who), event
        if event["event"] == "on":
            if found:
                _over(found[-1], event)
        elif words := _fallen(event, before):
            if not found or "seconds_lost" in found[-1]:
                found.append({"time": event["time"], "step": 0, "what": ""})
            now = found[-1]
            now["step"] = max(now["step"], event.get("step", (before or {}).get("step", 0)))
            now["what"] += f"{who}: {words}\n"
    return found


def _fallen(event: Event, before: Event | None) -> str:
    """Why a process went down; empty where it did not."""
    if event["event"] == "start":
        return "started anew" if before and before["event"] in ("start", "on") else ""
    return why(event["status"], event.get("words", ""), event.get("stuck", ""))[:MOST] if event.get("status") else ""


def why(status: int, words: str, stuck: str = "") -> str:
    """What ended a process: the reason for which its watch killed it, or its exit status and what it said last."""
    if stuck:
        return stuck
    killed = signal.Signals(status - 128).name if status - 128 in {*signal.Signals} else ""
    told = f"exit status {status}" + (f", {killed}" if killed else "")
    return told + (f"; last words: {words}" if killed and words else f": {words or 'no words'}" if not killed else "")


def _over(interruption: dict[str, Any], on: Event) -> None:
    """It goes on: by the clock of the watch, unless that was another one."""
    began, now = (datetime.fromisoformat(each["time"]) for each in (interruption, on))
    seconds = on["seconds"] if on["again"] else max(on["seconds"], (now - began).total_seconds())
    interruption["seconds_lost"] = max(interruption.get("seconds_lost", 0.0), round(seconds, 1))
    interruption["steps_lost"] = max(0, interruption["step"] - on["step"])
