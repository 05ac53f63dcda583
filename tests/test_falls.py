"""What a report says of a run's falls, from the events of its watches."""

from typing import Any

import pytest

from gptjax.train.falls import interruptions, why

CLOCK = {"0": 0, "1": -7}  # hours by which the second host is behind


def event(second: int, process: str, kind: str, **more: Any) -> dict[str, Any]:
    hour = 12 + CLOCK[process]
    return {
        "event": kind,
        "time": f"2026-01-01T{hour:02d}:00:{second:02d}+00:00",
        "host": "h",
        "process": process,
        **more,
    }


def on(second: int, process: str, step: int, seconds: float, again: bool = True) -> dict[str, Any]:
    return event(second, process, "on", step=step, seconds=seconds, again=again)


BEGIN = [event(0, p, "start") for p in "01"] + [on(9, p, 0, 9.0, again=False) for p in "01"]


def test_what_falls_together_is_one_interruption_with_its_cost() -> None:
    """By the watches' own seconds, for their hosts are hours apart."""
    told = interruptions(
        [
            *BEGIN,
            event(20, "1", "fall", status=137, step=14, words=""),
            event(22, "0", "fall", status=1, step=14, words="error: lost a peer"),
            event(23, "1", "start"),
            event(25, "1", "fall", status=1, step=0, words="error: another version", stuck=""),
            event(26, "1", "start"),
            event(26, "0", "start"),
            on(34, "1", 12, 9.5),
            on(35, "0", 12, 13.0),
            event(50, "0", "fall", status=137, step=30, words="stacks", stuck="no step for 31 s"),
        ]
    )
    first, second = told
    assert (first["step"], first["seconds_lost"], first["steps_lost"]) == (14, 13.0, 2)
    assert first["what"].splitlines() == [
        "process 1: exit status 137, SIGKILL",
        "process 0: exit status 1: error: lost a peer",
        "process 1: exit status 1: error: another version",
    ]
    assert second["what"] == "process 0: no step for 31 s\n"
    assert "seconds_lost" not in second  # it has not gone on


def test_what_a_scheduler_starts_again_is_told_of() -> None:
    """A watch that was killed can note nothing, and nobody watches while a stopped run waits."""
    killed = [event(20, "0", "start"), on(30, "0", 6, 10.0, again=False)]
    (row,) = interruptions([*BEGIN, *killed])
    assert row["what"] == "process 0: started anew\n" and row["seconds_lost"] == 10.0

    stopped = [event(20, "0", "end", status=143, step=8), event(40, "0", "start"), on(50, "0", 8, 10.0, again=False)]
    (row,) = interruptions([*BEGIN, *stopped])
    assert (row["what"], row["seconds_lost"], row["steps_lost"]) == ("process 0: exit status 143, SIGTERM\n", 30.0, 0)
    assert interruptions([*BEGIN, event(20, "0", "end", status=0, step=8)]) == []


@pytest.mark.parametrize(
    ("status", "words", "told"),
    [
        (1, "error: no", "exit status 1: error: no"),
        (1, "", "exit status 1: no words"),
        (137, "", "exit status 137, SIGKILL"),
        (134, "a peer is gone", "exit status 134, SIGABRT; last words: a peer is gone"),
        (255, "", "exit status 255: no words"),  # no signal has this number
    ],
)
def test_what_ended_a_process(status: int, words: str, told: str) -> None:
    assert why(status, words) == told
    assert why(status, words, "save: not done") == "save: not done"
