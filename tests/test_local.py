"""Checkpoints on each host's own disk: which step is taken, what damage and a full disk do, a run that is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import environment
from jax.sharding import NamedSharding, PartitionSpec
from test_processes import both, file, free_port, place

from gptjax.config import Config, validate
from gptjax.errors import UserError
from gptjax.train.checkpoint import FOLDER, Checkpoints, Position, read_meta
from gptjax.train.fingerprint import fingerprint
from gptjax.train.local import ARRAYS, META, Local, newest, why_not

assert file  # a fixture

State = dict[str, Any]
A, B, NO = ("a", ""), ("b", ""), ("", "has a damaged one")


@pytest.mark.parametrize(
    ("held", "step"),
    [
        ([{}], None),
        ([{10: A, 20: A}], 20),
        ([{10: A, 20: A}, {10: A, 20: A}], 20),
        ([{10: A, 20: A}, {10: A}], 10),
        ([{10: A, 20: A}, {20: A, 30: A}, {20: A}], 20),
        ([{10: A}, {20: A}], None),
        ([{10: A, 20: A}, {}], None),
        ([{10: A, 20: NO}, {10: A, 20: A}], 10),
        ([{10: NO}, {10: NO}], None),
        ([{10: A, 20: A}, {10: A, 20: B}], 10),  # of two starts that went different ways
    ],
)
def test_the_newest_step_that_all_hold(held: list[dict[int, tuple[str, str]]], step: int | None) -> None:
    assert newest(held) == newest(held[::-1]) == step


def test_who_does_not_hold_a_step() -> None:
    assert why_not([{20: A}, {}], 20) == "process 1 has none"
    assert why_not([{20: A}, {20: NO}], 20) == "process 1 has a damaged one"
    assert why_not([{20: A}, {20: B}], 20) == "what the processes have there is not of one state"


def sharded(*spec: str | None) -> State:
    """On four devices: cut in four, cut in two with two copies, and whole on each."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    specs = {"w": PartitionSpec(*(spec or ("a", "b"))), "half": PartitionSpec(None, "b"), "count": PartitionSpec()}
    state = {"w": matrix, "half": matrix[:3].astype(jnp.bfloat16), "count": jnp.int32(7)}
    return {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in state.items()}


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def at(state: State, step: int) -> State:
    return state | {"count": state["count"] + step}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Steps 10 and 20 of three that were saved."""
    local = Local(str(tmp_path / "disk"), "run")
    for step in (5, 10, 20):
        assert local.save(at(sharded(), step), Position(step, 100 * step, (step, 1)))
    local.close()
    assert sorted(path.name for path in (tmp_path / "disk/run").iterdir()) == ["10", "20"]
    return tmp_path / "disk"


def restored(disk: Path, after: int = 0, like: State | None = None) -> tuple[int | None, list[str]]:
    """The step, whose arrays are right, and what was said."""
    warnings: list[str] = []
    found = Local(str(disk), "run").restore(abstract(like or sharded()), warnings.append, after)
    if found is None:
        return None, warnings
    state, position = found
    step = position.step
    assert position == Position(step, 100 * step, (step, 1))
    assert fingerprint(state) == fingerprint(at(sharded(), step))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, sharded())
    return step, warnings


def test_the_newest_comes_back_as_it_was_where_it_is_newer(disk: Path) -> None:
    size = (disk / "run/20/0" / ARRAYS).stat().st_size
    assert size == 64 * 32 * 4 + 3 * 32 * 2 + 4  # each part once
    assert restored(disk) == (20, []) == restored(disk, 19)
    assert restored(disk, 20) == (None, [])
    assert Local(str(disk), "another").restore(abstract(sharded()), pytest.fail, 0) is None
    assert Local("", "").restore(abstract(sharded()), pytest.fail, 0) is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda part: flip(part / ARRAYS), "w does not match the fingerprint"),
    "truncated": (lambda part: os.truncate(part / ARRAYS, 100), f"{ARRAYS} has 100 bytes"),
    "no arrays": (lambda part: (part / ARRAYS).unlink(), "No such file"),
    "meta flipped": (lambda part: flip(part / META), "damaged"),
    "meta cut": (lambda part: os.truncate(part / META, 10), "damaged"),
    "no meta": (lambda part: (part / META).unlink(), "No such file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(kind: str, disk: Path) -> None:
    damage, said = DAMAGE[kind]
    damage(disk / "run/20/0")
    step, (warning,) = restored(disk)
    assert step == 10 and said in warning and str(disk / "run/20") in warning and "\n" not in warning
    damage(disk / "run/10/0")
    assert restored(disk)[0] is None


def test_parts_of_another_layout_are_named_and_not_used(disk: Path) -> None:
    step, (warning,) = restored(disk, like=sharded("b", None))
    assert step is None and "20 is not used: process 0 has other parts of the arrays, as of another layout" in warning


def test_a_half_one_is_none_and_goes_at_the_next_start(disk: Path) -> None:
    (disk / "run/20/0").rename(disk / "run/20/0.half")
    assert restored(disk) == (10, [])
    assert not (disk / "run/20/0.half").exists()


def test_steps_after_the_one_that_is_gone_back_to_are_forgotten(disk: Path) -> None:
    local = Local(str(disk), "run")
    local.forget(10)
    assert restored(disk) == (10, [])
    local.forget(0)
    local.close()
    assert [*disk.iterdir()] == []


def test_a_full_disk_is_said_and_the_one_before_stays(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    local = Local(str(disk), "run")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert local.save(at(sharded(), 30), Position(30))
        local.wait()
    said = capfd.readouterr().err
    assert f"{disk / 'run/30/0'}: cannot be written (No space left on device); training goes on" in said
    assert restored(disk) == (20, []) and len([*disk.rglob(ARRAYS)]) == 1
    assert local.save(at(sharded(), 40), Position(40, 4000, (40, 1)))
    local.close()
    assert restored(disk) == (40, [])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("x")
    with pytest.raises(UserError, match=r"train.local_dir: .*disk/run: cannot be made \(.*\); name another"):
        Local(str(tmp_path / "disk"), "run")


def test_folder_and_interval_go_together(tiny: Config) -> None:
    for fields, message in (
        ({"local_dir": "/x"}, "give train.local_interval"),
        ({"local_interval": 5}, "there is no train.local_dir"),
        ({"local_dir": "gs://x/y", "local_interval": 5}, "train.local_dir = gs://x/y: an address"),
    ):
        with pytest.raises(UserError, match=message):
            validate(replace(tiny, train=replace(tiny.train, **fields)))


def test_it_comes_between_damage_and_the_one_before(disk: Path, tmp_path: Path, tiny: Config) -> None:
    """Persistent ones of steps 15 and 30, of which the newer is damaged."""
    checkpoints = Checkpoints(tmp_path / "shared", tiny)
    for step in (15, 30):
        checkpoints.save(at(sharded(), step), Position(step))
    checkpoints.wait()
    places, local = abstract(sharded()), Local(str(disk), "run")

    def found() -> int:
        newer = lambda step: local.restore(places, pytest.fail, step)  # noqa: E731
        return checkpoints.restore(places, lambda _: None, newer=newer)[1].step

    assert found() == 30
    (tmp_path / "shared" / FOLDER / "30/meta/metadata").write_text("{}")
    assert found() == 20
    local.forget(10)
    assert found() == 15
    checkpoints.close()


# Two processes, whose ninth step never comes.
STANDS = """
import time
from gptjax import cli
from gptjax.train import loop

calls = [0]

def rate(*args, plain=loop.learning_rate):
    calls[0] += 1
    if calls[0] == 9:
        time.sleep(300)
    return plain(*args)

loop.learning_rate = rate
cli.main()
"""


def killed_at_eight(words: list[str], disk: Path) -> None:
    """Both, once each has its part of step 8 on the disk that they share."""

    def whole() -> bool:
        return len([*disk.glob("*/8/[01]")]) == 2

    port, pipe = free_port(), subprocess.PIPE
    start = [sys.executable, "-c", STANDS, "train", *words, "--distributed"]
    started = [
        subprocess.Popen(start, env=environment(2, **place(index, port)), stdout=pipe, stderr=pipe, text=True)
        for index in range(2)
    ]
    deadline = time.monotonic() + 200
    while not whole() and time.monotonic() < deadline and started[0].poll() is None:
        time.sleep(0.05)
    for process in started:
        process.send_signal(signal.SIGKILL)
    ends = [process.communicate() for process in started]
    assert whole(), ends


def ended(run: Path) -> tuple[Any, Any]:
    """Position and fingerprints of the last checkpoint."""
    meta = read_meta((run / FOLDER / "12").absolute())
    return meta["position"], meta["arrays"]


@pytest.mark.slow
def test_a_run_that_is_killed_between_saves_goes_on_from_its_hosts_disks(
    file: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """To the same bits as one that was left alone and had no such disk; and from what all of them still have."""
    run, disk, plain, aside = (tmp_path / name for name in ("run", "disk", "plain", "aside"))
    words = ["--train.total_tokens", str(12 * 16 * 16), "--train.save_interval", "5", "--layout.data", "2"]
    left_alone = [file, "--run", str(plain), *words]
    assert [status for status, _, _ in both(left_alone, left_alone)] == [0, 0]
    words += ["--train.local_dir", str(disk), "--train.local_interval", "2"]
    killed_at_eight([file, "--run", str(run), *words], disk)
    own = next(disk.iterdir())
    assert sorted(path.name for path in own.iterdir()) == ["6", "8"] and (run / FOLDER / "5").is_dir()
    shutil.copytree(tmp_path, aside, symlinks=True)
    lost = {8: [], 6: [own / "8/1"], 5: [own / "8/1", own / "6/1"]}
    for step, parts in lost.items() if request.config.getoption("--whole") else [(8, [])]:
        for folder in (run, disk):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(aside / folder.name, folder)
        for part in parts:
            shutil.rmtree(part)
        again = both(*[["--resume", str(run)]] * 2)
        assert [status for status, _, _ in again] == [0, 0], again[1][2]
        assert f"resumed at step {step}, " in again[0][1] and ("going on from step" in again[0][1]) == (step != 5)
        assert ("8 is not used: process 1 has none" in again[0][2]) == (step != 8)
        assert ended(run) == ended(plain)
        assert not own.exists()  # the end is safe
