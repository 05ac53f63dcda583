"""One run by one process, by two, four and eight: who holds which devices changes what travels between processes, and
nothing of what is learned. Real processes, with as many virtual devices together each time."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import as_file
from devices import FAST
from joined import start, together

from gptjax import cli
from gptjax.config import Config
from gptjax.train.checkpoint import FOLDER, Position, position_of, read_meta
from gptjax.train.metrics import read_log

STEPS = 50
DEVICES = 8
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "data 8": (2, {"data": 8, "fsdp": 1}),
    "fsdp 8": (2, {"fsdp": 8}),
    "tensor 8": (2, {"fsdp": 1, "tensor": 8}),
    "replica 4 x fsdp 2": (2, {"replica": 4, "fsdp": 2}),
    "pipeline 4 x data 2": (8, {"pipeline": 4, "data": 2, "fsdp": 1}),
    "context 4 x data 2": (2, {"context": 4, "data": 2, "fsdp": 1}),
    "pipeline 2 x context 2 x tensor 2": (4, {"pipeline": 2, "context": 2, "tensor": 2, "fsdp": 1}),
}
"""Layers and degrees on 8 devices. With tensor, pipeline and context several processes hold the same rows."""
TITLE = "50 steps by several processes: largest difference of a loss from the run by one, and on one device"


@pytest.fixture(scope="module")
def steady(tiny: Config) -> Config:
    """A window that 4 x 2 chunks of the sequence can hold; an epsilon that keeps Adam from blowing the rounding of a
    vanishing gradient up to a whole step."""
    model = replace(tiny.model, num_layers=2, window=3, dtype="float32")
    train = replace(tiny.train, total_tokens=10**9, total_steps=STEPS, log_interval=1, save_interval=0)
    optimizer = replace(tiny.optimizer, eps=1e-5)
    return replace(tiny, model=model, optimizer=optimizer, train=train)


@pytest.fixture(scope="module")
def steady_file(steady: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    return as_file(steady, tmp_path_factory.mktemp("config"))


def losses(run: Path, kind: str = "train") -> np.ndarray:
    return np.array([record["loss"] for record in read_log(run / "log.jsonl") if record["kind"] == kind])


def schedule(run: Path) -> list[tuple[Any, ...]]:
    """Of each step: its number, tokens and learning rate."""
    return [(r["step"], r["tokens"], r["lr"]) for r in read_log(run / "log.jsonl") if r["kind"] == "train"]


def ended(run: Path) -> tuple[Position, Any]:
    """Where the run stands, and its parameters as Orbax reads them, on no devices."""
    folder = (run / FOLDER / str(STEPS)).absolute()
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder / "state").item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = reader.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=plain))
    return position_of(read_meta(folder)), arrays["params"]


def newest(run: Path) -> int:
    return max(int(path.name) for path in (run / FOLDER).iterdir() if path.name.isdigit())


def train(words: list[str], processes: int, devices: int) -> None:
    """By so many processes, with so many devices together."""
    if processes > 1:
        done = together(*[words] * processes, devices=devices // processes)
    else:
        one = start(words, devices, [])
        output, errors = one.communicate()
        done = [(one.returncode, output, errors)]
    for status, output, errors in done:
        assert status == 0, output + errors
        assert "warning" not in errors


@pytest.fixture(scope="module")
def alone(steady_file: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of so many layers by one process, on one device or on a layout of eight; each is made once."""
    folder = tmp_path_factory.mktemp("runs")

    def run(layers: int, degrees: dict[str, int] | None = None) -> Path:
        words = words_of(layers, degrees or {})
        path = folder / "".join(words).replace("--", "_")
        if not path.exists():
            train([steady_file, "--run", str(path), *words], 1, DEVICES if degrees else 1)
            assert losses(path)[-1] < losses(path)[0] - 0.5
        return path

    return run


def words_of(layers: int, degrees: dict[str, int]) -> list[str]:
    fields = {"model.num_layers": layers} | {f"layout.{axis}": degree for axis, degree in degrees.items()}
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def far(a: Path, b: Path) -> float:
    """The largest difference of two runs' losses, the evaluation's at the end among them; all else is the same."""
    assert schedule(a) == schedule(b)
    assert len(schedule(a)) == STEPS
    (one, params), (two, others) = ended(a), ended(b)
    assert one == two
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), params, others)
    return max(float(abs(losses(a, kind) - losses(b, kind)).max()) for kind in ("train", "eval"))


@pytest.mark.whole
@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_processes_equal_one(
    name: str,
    processes: int,
    steady_file: str,
    alone: Callable[..., Path],
    tmp_path: Path,
    table_row: Callable[[str, str], None],
) -> None:
    layers, degrees = LAYOUTS[name]
    train([steady_file, "--run", str(tmp_path / "run"), *words_of(layers, degrees)], processes, DEVICES)
    one, device = far(tmp_path / "run", alone(layers, degrees)), far(tmp_path / "run", alone(layers))
    table_row(TITLE, f"{name:34} {processes} x {DEVICES // processes}  one process {one:.1e}  one device {device:.1e}")
    assert max(one, device) < 1e-5


@pytest.mark.slow
def test_two_processes_hold_the_same_rows(steady_file: str, tmp_path: Path) -> None:
    """Each with half of every sequence: the few steps of many devices of this process."""
    line = [steady_file, "--train.total_steps", "6", "--train.eval_batches", "0", "--run"]
    train([*line, str(tmp_path / "two"), *words_of(2, {"context": 2, "fsdp": 1})], 2, 2)
    assert cli.run(["train", *line, str(tmp_path / "one")]) == 0
    assert schedule(tmp_path / "two") == schedule(tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-5)


@contextmanager
def local(words: list[str], processes: int) -> Iterator["subprocess.Popen[str]"]:
    """launch/local.sh with a device a process; in a session of its own, which ends here at the latest."""
    script = Path(__file__).parents[1] / "launch/local.sh"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [script, "--processes", str(processes), "--", *words]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env=os.environ | {"PATH": path, "XLA_FLAGS": FAST}, **pipes) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)


def until(words: list[str], processes: int, step: int, number: int) -> tuple[int, str]:
    """(status, output) of a start that gets a signal once it has told of a step: SIGTERM comes to local.sh, SIGKILL to
    all at once."""
    printed = ""
    with local(words, processes) as started:
        for line in started.stdout or ():
            printed += line
            if line.startswith(f"[0] step {step} "):
                if number == signal.SIGKILL:
                    os.killpg(started.pid, number)
                else:
                    started.send_signal(number)
                break
        printed += started.communicate(timeout=900)[0]
        return started.returncode, printed


@pytest.mark.whole
def test_a_run_goes_on_with_two_processes_and_then_eight(
    steady_file: str, alone: Callable[..., Path], tmp_path: Path, table_row: Callable[[str, str], None]
) -> None:
    """Begun by four and stopped, gone on with by two and killed, all by the same words; and ended by eight, who are
    told of the run alone. The layout follows the devices."""
    run = tmp_path / "run"
    line = [steady_file, "--run", str(run), "--resume", "auto", "--train.save_interval", "10"]
    status, printed = until(line, 4, 12, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM and "4 x cpu, layout fsdp 4, 4 processes" in printed, printed
    first = newest(run)
    assert 12 <= first < 27
    status, printed = until(line, 2, 31, signal.SIGKILL)
    assert status == -signal.SIGKILL and f"resumed at step {first}" in printed, printed
    assert "layout fsdp 2, 2 processes" in printed
    second = newest(run)
    assert second in (20, 30) and second > first
    with local(["--resume", str(run)], 8) as started:
        printed, _ = started.communicate(timeout=900)
    assert started.returncode == 0 and f"resumed at step {second}" in printed, printed
    assert "layout fsdp 8, 8 processes" in printed
    most = far(run, alone(2))
    table_row(TITLE, f"fsdp: 4 processes to {first}, 2 to {second}, 8 to {STEPS}  one device {most:.1e}")
    assert most < 1e-5
