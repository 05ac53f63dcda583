"""Two real processes, joined over the loopback: what one of them has wrong is everyone's error, and is named."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from devices import FAST, environment
from joined import free_port, place, together

from gptjax.config import Config, to_json
from gptjax.config.load import load_config
from gptjax.data.sources import build
from gptjax.data.tokenizers import load_tokenizer
from gptjax.stages.pretrain import Pretrain
from gptjax.train.checkpoint import FOLDER, Position, position_of, read_meta
from gptjax.train.metrics import read_log
from gptjax.train.run import HISTORY


def alone(folder: Path) -> list[str]:
    """What to start a process with that is to see an empty file system in the place of a folder."""
    apart = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {folder} && exec "$@"', "sh"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no process a file system of its own (unshare --mount)")
    return apart


@pytest.fixture(scope="module")
def file(plain: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    train = replace(plain.train, ramp_start=0, ramp_tokens=0, total_tokens=4 * 16 * 16, eval_batches=0)  # four steps
    config = replace(plain, train=train)
    path = tmp_path_factory.mktemp("config") / "plain.py"
    text = f"from gptjax.config import from_json\n\n\ndef config():\n    return from_json({to_json(config)!r})\n"
    path.write_text(text)
    return str(path)


def test_the_process_that_differs_is_named(file: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = [file, "--run", str(run), "--resume", "auto"]
    done = together(line, [*line, "--optimizer.b2", "0.9"])
    host = socket.gethostname()
    for status, _, errors in done:
        assert status != 0
        assert f"error: optimizer.b2: process 1 on {host} has 0.9, most have 0.95; start the same" in errors
        assert "Traceback" not in errors
    assert not run.exists()


def test_a_cache_that_the_hosts_do_not_share_is_refused_with_the_way_out(file: str, tmp_path: Path) -> None:
    """The second process sees an empty file system in the place of the cache, as another host does."""
    cache = tmp_path / "cache"
    cache.mkdir()
    apart = alone(cache)
    line = [file, "--run", str(tmp_path / "run"), "--data.cache_dir", str(cache)]
    done = together(line, line, before=[[], apart])
    for status, _, errors in done:
        assert status != 0
        assert "is not there on" in errors and "let hosts share data.cache_dir" in errors
        assert "build it first on every host: gptjax data CONFIG" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()
    assert len([*(cache / "datasets").glob("[!.]*")]) == 1


@pytest.mark.slow
def test_damage_that_one_process_finds_is_damage_for_both(file: str, tmp_path: Path) -> None:
    """A part of the newest checkpoint lies where only the first process sees it: a link that goes through the folder
    in which a process was started. Both set the checkpoint aside, once, and neither waits for the other."""
    run = tmp_path / "run"
    line = [file, "--run", str(run), "--resume", "auto", "--train.save_interval", "2"]
    first = together(line, line)
    assert [status for status, _, _ in first] == [0, 0], first[1][2]
    steps = sorted(int(path.name) for path in (run / FOLDER).iterdir())
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    part = run / FOLDER / str(steps[-1]) / "state" / "ocdbt.process_1"
    part.rename(here / "part")
    part.symlink_to("/proc/self/cwd/part")
    again = together(line, line, before=[["env", "-C", str(here)], ["env", "-C", str(elsewhere)]])
    assert [status for status, _, _ in again] == [0, 0], again[1][2]
    assert again[0][2].count("is damaged") == 1 and f"resumed at step {steps[-2]}" in again[0][1]
    assert sorted(path.name for path in (run / FOLDER).iterdir()) == sorted([f"{steps[-1]}.damaged", *map(str, steps)])


@pytest.mark.slow
def test_a_run_folder_that_the_hosts_do_not_share_is_refused(file: str, tmp_path: Path) -> None:
    """The second process sees an empty file system in its place, as a host that has no such mount."""
    (tmp_path / "runs").mkdir()
    apart = alone(tmp_path / "runs")
    line = [file, "--run", str(tmp_path / "runs" / "run")]
    done = together(line, line, before=[[], apart])
    for status, _, errors in done:
        assert status != 0
        assert (
            "does not see what the first process wrote there; name a folder on storage that all hosts share" in errors
        )
    assert [*(tmp_path / "runs").iterdir()] == []


# The fourth and the fifth batch have no targets, so that their loss is no number. At the tenth call of the schedule,
# after the way back, the second process makes a mistake, and the first waits as on a device that raises nothing.
GOES_BACK = """
import os, time
from gptjax import cli
from gptjax.data.stream import TokenStream
from gptjax.train import loop

batches, calls = [0], [0]

def batch(self, *args, plain=TokenStream.batch):
    rows, batches[0] = plain(self, *args), batches[0] + 1
    if batches[0] in (4, 5):
        rows.targets[...] = -1
    return rows

def rate(*args, plain=loop.learning_rate):
    calls[0] += 1
    if calls[0] == 10:
        if os.environ["JAX_PROCESS_ID"] == "1":
            print(f"at {time.time()}", flush=True)
            raise RuntimeError("a mistake")
        time.sleep(300)
    return plain(*args)

TokenStream.batch, loop.learning_rate = batch, rate
cli.main()
"""


@pytest.mark.slow
def test_both_go_back_and_when_one_falls_both_end_soon(file: str, tmp_path: Path) -> None:
    """To the same checkpoint, and on with the rows that come then; at the end each has status 1 and the reason."""
    run, port, pipe = tmp_path / "run", free_port(), subprocess.PIPE
    words = [sys.executable, "-c", GOES_BACK, "train", file, "--run", str(run), "--distributed"]
    words += ["--train.log_interval", "1", "--train.save_interval", "2"]
    words += ["--train.total_tokens", "1e6", "--optimizer.max_bad_steps", "2"]
    where = [environment(2, **place(index, port)) for index in range(2)]
    started = [subprocess.Popen(words, env=each, stdout=pipe, stderr=pipe, text=True) for each in where]
    ends = [process.communicate(timeout=400) for process in started]
    took = time.time() - float(ends[1][0].rpartition("at ")[2])
    assert [process.returncode for process in started] == [1, 1], ends
    assert ends[1][1].endswith("RuntimeError: a mistake\n") and "Traceback" in ends[1][1]
    assert ends[0][1] == f"error: process 1 on {socket.gethostname()} ended: RuntimeError: a mistake\n"
    assert took < 60  # else 300: of JAX's barrier, or until the first wakes
    (told,) = [r for r in read_log(run / "log.jsonl") if r["kind"] == "rollback"]
    assert (told["step"], told["end"]) == (2, 5)
    config = load_config(file, [])
    stage = Pretrain(config, "cpu", tokenizer=load_tokenizer("bytes"), corpus=build(config.data))
    with closing(stage.feed(None, range(8))) as feed:
        for _ in range(7):  # of one process: five steps, and two that followed
            feed.batch(2, None)
        want = Position(4, 4 * 16 * 16, tuple(feed.positions), ((2, 5),))
    assert position_of(read_meta((run / FOLDER / "4").absolute())) == want


@pytest.mark.slow
def test_processes_that_one_command_starts(file: str, tmp_path: Path) -> None:
    """launch/local.sh: they meet, train together and end."""
    script = Path(__file__).parents[1] / "launch/local.sh"
    run = tmp_path / "run"
    words = [script, "--processes", "2", "--devices", "2", "--", file, "--run", str(run), "--layout.data", "4"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        words, env=os.environ | {"PATH": path, "XLA_FLAGS": FAST}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line[:3] for line in done.stdout.splitlines()} == {"[0]", "[1]"}
    (start,) = map(json.loads, (run / HISTORY).read_text().splitlines())
    assert start["devices"]["count"] == 4
    assert (run / FOLDER / "4").is_dir()
