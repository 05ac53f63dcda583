"""`gptjax run`: what is started again, what is given up, what is stuck; and a real run that is killed on its way."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import as_file
from devices import environment
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import Config
from gptjax.stages.weights import on_device, open_weights
from gptjax.supervisor import (
    EVENTS,
    FLOOR,
    LONGEST,
    LOST,
    LOST_WORDS,
    Care,
    Fall,
    Supervisor,
    given_up,
    no_progress,
    pause,
    stuck,
)
from gptjax.train.checkpoint import FOLDER, saved_steps
from gptjax.train.metrics import read_log
from gptjax.train.pulse import STEP, WATCH, Beat, Pulse, read

CARE = Care(tries=3, patience=10, grace=100, backoff=2)


def fall(status: int = 1, began: int = 0, step: int = 5, words: str = "error: broken", why: str = "") -> Fall:
    return Fall(status, began, step, words, why)


@pytest.mark.parametrize(
    ("falls", "why"),
    [
        ([fall()], ""),
        ([fall(), fall()], "fell twice at step 5 with the same words: error: broken"),
        ([fall(), fall(step=6)], ""),
        ([fall(), fall(words="error: other")], ""),
        ([fall(), fall(137), fall()], "3 times in a row"),
        ([fall(137), fall(137)], ""),
        ([fall(137), fall(139), fall(134)], "fell 3 times in a row without getting beyond step 0"),
        ([fall(137), fall(137), fall(137, began=4)], ""),
        ([fall(137), fall(137, began=4), fall(137, began=4), fall(137, began=4)], "beyond step 4"),
        ([fall(words="error: No space left on device")] * 2, ""),
        ([fall(words="error: No space left on device")] * 3, "3 times in a row"),
        ([fall(words="error: process 0 cannot listen at port 9: Address already in use; end what does")] * 2, ""),
        ([fall(137, began=4), fall(139), fall(137, began=4)], "beyond step 4"),  # one never began
        ([fall(137, words="stacks", why="no step for 60 s")] * 2, ""),
    ],
)
def test_what_is_given_up(falls: list[Fall], why: str) -> None:
    said = given_up(falls, CARE.tries)
    assert (why in said) if why else not said


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_pauses_double_while_nothing_is_gained(began: list[int]) -> None:
    falls = [fall(137, began=step) for step in began]
    count = no_progress(falls)
    assert 1 <= count <= len(falls)
    assert pause(falls, 2.0) == min(2.0**count, LONGEST)
    assert no_progress([*falls, fall(137, began=9)]) == 1


@pytest.mark.parametrize(
    ("beat", "silent", "why"),
    [
        (None, 1e9, ""),  # a text may take hours to build
        (Beat("start", 0, 0, 0.0), 99, ""),
        (Beat("start", 0, 0, 0.0), 101, "start: not done within 100 s"),
        (Beat("save", 0, 40, 0.1), 99, ""),
        (Beat("save", 0, 40, 0.1), 101, "save: not done"),
        (Beat(STEP, 0, 40, 0.1), FLOOR - 1, ""),
        (Beat(STEP, 0, 40, 0.1), FLOOR + 1, "no step for 31 s, where one takes 0.1 s"),
        (Beat(STEP, 0, 40, 20.0), 199, ""),
        (Beat(STEP, 0, 40, 20.0), 201, "no step for 201 s"),
        (Beat(STEP, 0, 0, 0.0), 99, ""),  # before the first step's length is known
    ],
)
def test_what_is_stuck(beat: Beat | None, silent: float, why: str) -> None:
    said = stuck(beat, silent, CARE)
    assert (why in said) if why else not said


def test_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("gptjax.train.pulse.time.monotonic", lambda: clock[0])
    path = tmp_path / "pulse"
    assert read(path) == (None, 0.0)
    pulse = Pulse({"GPTJAX_PULSE": str(path)})
    pulse.begin(7)
    assert read(path)[0] == Beat("start", 7, 7, 0.0)
    for step in range(8, 12):
        clock[0] += 2.0
        pulse.step(step)
    assert read(path)[0] == Beat(STEP, 7, 11, 2.0)
    with pulse.doing("eval"):
        assert read(path)[0] == Beat("eval", 7, 11, 2.0)
        clock[0] += 500
    pulse.step(12)  # the evaluation is no part of its length
    clock[0] += 2.0
    pulse.step(13)
    assert read(path)[0] == Beat(STEP, 7, 13, 2.0)
    silent = Pulse({})
    silent.begin(0)
    silent.step(1)


TRAINER = """
import json, os, sys, time
from pathlib import Path
path, count = Path(os.environ["GPTJAX_PULSE"]), Path(sys.argv[1])
number = int(count.read_text() or 0) if count.exists() else 0
count.write_text(str(number + 1))
def beat(phase, step): path.write_text(json.dumps(dict(phase=phase, began=0, step=step, step_seconds=0.01)))
exec(sys.argv[2].split("|")[number])
"""


def watched(tmp_path: Path, lives: str, care: Care = CARE) -> subprocess.Popen[str]:
    """A supervisor in a process of its own, whose trainer does at its n-th start the n-th of `lives`."""
    program = f"""
import sys
from pathlib import Path
from gptjax import supervisor
supervisor.FLOOR = supervisor.DUMP = 0.5
made = supervisor.Supervisor([], Path({str(tmp_path)!r}), supervisor.{care!r})
made._command = [sys.executable, "-S", "-c", {TRAINER!r}, {str(tmp_path / "count")!r}, {lives!r}]
sys.exit(made.keep())
"""
    words = [sys.executable, "-c", program]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def events(run: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (run / EVENTS).read_text().splitlines()]


QUICK = Care(tries=3, patience=10, grace=2, backoff=0.1)


@pytest.mark.parametrize(
    ("lives", "status", "said", "told"),
    [
        ("pass", 0, "", ["start", "end"]),
        ("beat('step', 3); os.kill(os.getpid(), 9)|pass", 0, "fell at step 3 (exit status 137", ["start", "fall"]),
        ("sys.exit('error: no')|sys.exit('error: no')", 1, "twice at step 0 with the same words: error: no", []),
        ("sys.exit(143)", 143, "", ["start", "end"]),
        ("beat('step', 4); time.sleep(60)|pass", 0, "no step for", ["start", "fall", "start", "end"]),
        ("beat('save', 4); time.sleep(60)|pass", 0, "save: not done within 2 s", ["start", "fall", "start", "end"]),
        (
            f"print({LOST!r} + '\\n  @ 0x1\\n***', file=sys.stderr); os.abort()|pass",
            0,
            f"SIGABRT; last words: {LOST_WORDS}",
            [],
        ),
        ("1/0|beat('step', 1); 1/0|pass", 0, "ZeroDivisionError: division by zero", []),
        ("beat('save', 4); os.utime(path, (9, 9)); time.sleep(1.2)", 0, "", ["start", "end"]),  # a clock that was set
    ],
)
def test_a_trainer_is_started_again_or_not(lives: str, status: int, said: str, told: list[str], tmp_path: Path) -> None:
    with watched(tmp_path, lives, QUICK) as supervisor:
        _, errors = supervisor.communicate(timeout=60)
    assert supervisor.returncode == status
    assert said in errors
    noted = [event["event"] for event in events(tmp_path) if event["event"] != "on"]
    assert noted[: len(told)] == told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_on_to_the_trainer_and_ends_both(number: signal.Signals, tmp_path: Path) -> None:
    lives = (
        "import signal; [signal.signal(n, lambda n, _: sys.exit(128 + n)) for n in (2, 15)]; "
        f"open({str(tmp_path / 'up')!r}, 'w'); time.sleep(60)"
    )
    with watched(tmp_path, lives, QUICK) as supervisor:
        wait_for(lambda: (tmp_path / "up").exists())
        supervisor.send_signal(number)
        supervisor.communicate(timeout=30)
    assert supervisor.returncode == 128 + number
    assert [event["event"] for event in events(tmp_path)] == ["start", "end"]


def test_events_that_a_full_disk_does_not_take_are_noted_later(tmp_path: Path) -> None:
    supervisor = Supervisor([], tmp_path, QUICK)
    full = tmp_path / EVENTS
    full.symlink_to("/dev/full")
    supervisor._note("start")
    supervisor._note("fall", step=3)
    full.unlink()
    full.write_text('{"event": "sta')  # as much as there was room for
    supervisor._note("end")
    assert [event["event"] for event in read_log(full)] == ["start", "fall", "end"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells a child of its parent's end")
def test_a_trainer_whose_watch_is_gone_before_it_looks_ends(tmp_path: Path) -> None:
    program = "import os; from gptjax.train.pulse import end_unwatched; end_unwatched(os.environ); print('on')"
    ends = []
    for watch in (os.getpid(), os.getpid() + 1):
        environment = os.environ | {WATCH: str(watch)}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        ends.append((done.returncode, done.stdout))
    assert ends == [(0, "on\n"), (-signal.SIGKILL, "")]


def wait_for(there, seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_run_that_is_killed_twice_and_stopped_once_ends_where_it_would_have(plain: Config, tmp_path: Path) -> None:
    """The same parameters, to the bit, as of a run that nobody disturbed; each fall is noted with its step."""
    config = as_file(replace(plain, train=replace(plain.train, total_tokens=36 * 128, save_interval=6)), tmp_path)
    command = [sys.executable, "-m", "gptjax"]
    runs = tmp_path / "plain", tmp_path / "run"
    words = [*command, "train", config, "--run", str(runs[0])]
    subprocess.run(words, env=environment(), check=True, capture_output=True)
    run = runs[1]
    words = [*command, "run", config, "--run", str(run), "--backoff", "0"]

    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=environment(), text=True, **pipes) as supervisor:
        for seen in (1, 2):
            wait_for(lambda seen=seen: len(saved_steps(run / FOLDER)) >= seen or supervisor.poll() is not None)
            for child in children_of(supervisor.pid):
                os.kill(child, signal.SIGKILL)
        _, errors = supervisor.communicate(timeout=300)
    assert supervisor.returncode == 0, errors
    falls = [event for event in events(run) if event["event"] == "fall"]
    assert 1 <= len(falls) <= 2 and all(event["status"] == 137 for event in falls)
    ended = [max(saved_steps(folder / FOLDER)) for folder in runs]
    assert ended[0] == ended[1]
    jax.tree.map(np.testing.assert_array_equal, *(weights_of(folder, plain) for folder in runs))


def weights_of(run: Path, config: Config) -> Any:
    return open_weights(str(run)).load(config.model, on_device(config, jax.local_devices()[0]))


def test_a_signal_that_comes_while_a_trainer_is_being_started_reaches_it(tmp_path: Path) -> None:
    """Once, and before it is known to whoever watches: a trainer that missed it would go on for days."""
    supervisor = Supervisor([], tmp_path, QUICK)
    supervisor._hear(signal.SIGTERM, None)
    supervisor._child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], text=True)
    supervisor._forward()
    assert supervisor._child.wait(30) == -signal.SIGTERM
