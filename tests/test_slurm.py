"""launch/slurm.sh under a real SLURM: two tasks on this machine that train together, fall, are stopped and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import as_file
from devices import environment

from gptjax.config import Config
from gptjax.supervisor import EVENTS
from gptjax.train.checkpoint import FOLDER, saved_steps
from gptjax.train.metrics import LOG, read_log
from gptjax.train.run import HISTORY

ROOT = Path(__file__).parents[1]
ABSENT = 77  # what cluster.sh ends with where there is no SLURM to be had


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which its commands are run."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    inherited = {name: value for name, value in environment().items() if not name.startswith(("SLURM_", "SBATCH_"))}
    inherited |= {"PATH": path, "PYTHONPATH": str(ROOT)}
    words = [ROOT / "tests/slurm/cluster.sh", "sh", "-c", "echo $SLURM_CONF; cat"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin and process.stdout and process.stderr
        if not (conf := process.stdout.readline().strip()):
            why = process.stderr.read()
            if process.wait() == ABSENT:
                pytest.skip(why.strip().splitlines()[-1])
            raise AssertionError(why)
        try:
            yield inherited | {"SLURM_CONF": conf}
        finally:
            process.stdin.close()
            process.wait(60)


def wait_for(there: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.2)


class Job:
    """One that launch/slurm.sh has submitted."""

    def __init__(self, environment: dict[str, str], config: str, run: Path, *fields: str) -> None:
        self.environment, self.run = environment, run
        self.log = run.with_suffix(".out")
        words = ["--nodes", "2", "--gpus-per-node", "0", "--time", "30", "--run", str(run), f"--sbatch=-o{self.log}"]
        said = self.call(ROOT / "launch/slurm.sh", *words, "--", config, *fields)
        self.number = said.split()[-1]

    def call(self, *words: str | Path) -> str:
        done = subprocess.run(words, env=self.environment, cwd=self.run.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state(self) -> dict[str, str]:
        shown = self.call("scontrol", "show", "job", self.number, "--oneliner").split()
        return dict(word.split("=", 1) for word in shown if "=" in word)

    def wait(self, state: str, seconds: float = 300) -> None:
        try:
            wait_for(lambda: self.state()["JobState"] == state, seconds)
        except AssertionError:
            nodes = self.call("sinfo", "--long", "--Node", "--list-reasons") + self.call("sinfo", "--Node")
            raise AssertionError(f"{self.state()}\n{nodes}\n{self.log.read_text()[-4000:]}") from None

    def saved(self) -> list[int]:
        return saved_steps(self.run / FOLDER)

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in (self.run / EVENTS).read_text().splitlines()]


def trainers(run: Path) -> list[int]:
    """Processes of this run that train, without those that watch them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "train" in words and str(run) in words:
            found.append(int(path.parent.name))
    return found


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(run / LOG) if record["kind"] == "train"}


@pytest.mark.slow
@pytest.mark.whole  # six minutes on 2 cores
def test_two_tasks_train_under_slurm(tiny: Config, tmp_path: Path) -> None:
    """Both hold half of the data of one run, which has the losses of one process; one that is killed is started again
    in its place; a job that is told to stop saves, goes back into the queue by itself, and ends where it should."""
    config = as_file(replace(tiny, train=replace(tiny.train, log_interval=1)), tmp_path)
    fields = ["--layout.data", "2", "--train.compile_cache", os.environ["JAX_COMPILATION_CACHE_DIR"]]
    alone = tmp_path / "alone"
    words = [sys.executable, "-m", "gptjax", "train", config, "--run", str(alone), *fields]
    subprocess.run(words, env=environment(2), check=True, capture_output=True)
    expected = losses(alone)
    assert len(expected) > 20

    with cluster() as where:
        plain = Job(where, config, tmp_path / "plain", *fields)
        plain.wait("COMPLETED")
        (start,) = [json.loads(line) for line in (plain.run / HISTORY).read_text().splitlines()]
        assert start["devices"]["count"] == 2  # one of each task
        assert "joins the processes that JAX finds" in plain.log.read_text()
        assert sorted(plain.events()) == ["end", "end", "start", "start"]
        assert losses(plain.run) == pytest.approx(expected, abs=1e-5)

        hurt = Job(where, config, tmp_path / "hurt", *fields)
        wait_for(lambda: bool(hurt.saved()), 120)
        both = trainers(hurt.run)
        assert len(both) == 2
        os.kill(both[0], signal.SIGKILL)
        hurt.wait("COMPLETED", 400)
        assert hurt.events().count("fall") >= 2  # without the other, neither goes on
        assert losses(hurt.run) == pytest.approx(expected, abs=1e-5)

        stopped = Job(where, config, tmp_path / "stopped", *fields)
        wait_for(lambda: bool(stopped.saved()), 120)
        stopped.call("scancel", "--signal=TERM", stopped.number)
        stopped.wait("PENDING", 60)
        assert stopped.state()["Requeue"] == "1"
        step = stopped.saved()[0]
        stopped.wait("COMPLETED", 400)  # SLURM lets two minutes pass before it starts it again
        assert stopped.state()["Restarts"] == "1"
        assert f"resumed at step {step}" in stopped.log.read_text()
        assert losses(stopped.run) == pytest.approx(expected, abs=1e-5)

        broken = Job(where, config, tmp_path / "broken", *fields, "--data.source", str(tmp_path / "nothing"))
        broken.wait("FAILED")
        assert broken.state()["Restarts"] == "0"
