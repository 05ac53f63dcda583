"""Checkpoints on each host's own disk: which step is taken, what damage and a full disk do, a run that is killed."""

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
from joined import free_port, place, together
from test_processes import alone, file
from toy import NAN_GRADIENT, NAN_LOSS, Toy, crash_at, fit, records, toy_config

from gptjax.config import Config, validate
from gptjax.errors import UserError
from gptjax.train.checkpoint import FOLDER, Checkpoints, Position, read_meta
from gptjax.train.copies import twins
from gptjax.train.fingerprint import fingerprint
from gptjax.train.local import ARRAYS, META, Local, newest, why_not

assert file  # a fixture

State = dict[str, Any]
A, B, NO = ("a", ""), ("b", ""), ("", "has a damaged one")


@pytest.mark.parametrize(
    ("held", "alone", "in_pairs"),
    [
        ([{}, {}], None, None),
        ([{10: A, 20: A}, {10: A, 20: A}], 20, 20),
        ([{10: A, 20: A}, {10: A}], 10, 20),
        ([{10: A}, {20: A}], None, 20),
        ([{10: A, 20: A}, {}], None, 20),
        ([{10: A, 20: NO}, {10: A, 20: A}], 10, 20),
        ([{10: NO}, {10: NO}], None, None),
        ([{10: A, 20: A}, {10: A, 20: B}], 10, 10),  # of two starts that went different ways
        ([{20: A}, {10: A, 20: A}, {}, {10: A, 20: A}], None, 20),
        ([{20: A}, {10: A, 30: A}, {10: A}, {10: A, 20: A, 30: A}], None, 20),
    ],
)
def test_the_newest_step_that_all_hold(
    held: list[dict[int, tuple[str, str]]], alone: int | None, in_pairs: int | None
) -> None:
    """Where each has parts of its own, and where the first half of them has the same as the second."""
    half = len(held) // 2
    assert newest(held, [(i,) for i in range(len(held))]) == alone
    assert newest(held, [(i, i + half) for i in range(half)]) == in_pairs


@pytest.mark.parametrize(
    ("held", "groups"),
    [
        ({0: "ab", 1: "ab"}, ((0, 1),)),
        ({0: "ab", 1: "cd", 2: "ab", 3: "cd"}, ((0, 2), (1, 3))),
        ({0: "aabb", 1: "aabb"}, ((0, 1),)),
        ({0: "ab", 1: "cd"}, None),
        ({0: "ab", 1: "bc"}, None),
        ({0: "ab", 1: "ab", 2: "cd"}, None),
    ],
)
def test_processes_that_hold_the_same(held: dict[int, str], groups: object) -> None:
    assert twins(held) == groups


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


@pytest.mark.parametrize(("call", "step"), [(5, 4), (9, 8), (12, 7), (15, 10)])
def test_a_crash_among_bad_steps_that_are_gone_back_over_changes_nothing(
    call: int, step: int, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 8 to 10 are bad, and the run goes back to 6, past what the disk has: each step that the run folder lacks.
    `call` of the schedule is where it ends, `step` that of the disk from which it goes on."""
    bad = {8: NAN_LOSS, 9: NAN_GRADIENT, 10: NAN_LOSS}
    config = toy_config(tiny, 20, save_interval=3, keep_last=9)
    config = replace(config, optimizer=replace(config.optimizer, max_bad_steps=3))
    assert fit(config, Toy(bad), tmp_path / "plain") == 0
    local = replace(config, train=replace(config.train, local_dir=str(tmp_path / "disk"), local_interval=1))
    run = tmp_path / "run"
    run.mkdir()
    (run / "meta.json").write_text("{}")
    crash_at(call, monkeypatch)
    with pytest.raises(RuntimeError, match="gone"):
        fit(local, Toy(bad), run)
    assert fit(local, Toy(bad), run, resume=True) == 0
    assert records(run, "start")[1]["step"] == step
    assert records(run, "start")[1]["local"].startswith(f"going on from step {step} here; every 1 steps")
    mine, others = (read_meta((each / FOLDER / "20").absolute()) for each in (run, tmp_path / "plain"))
    assert mine["position"] == others["position"] and mine["arrays"] == others["arrays"]
    assert mine["position"]["passed"] == [[6, 10]]


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
    deadline = time.monotonic() + 400
    while not whole() and time.monotonic() < deadline and started[0].poll() is None:
        time.sleep(0.05)
    for process in started:
        process.send_signal(signal.SIGKILL)
    ends = [process.communicate() for process in started]
    assert whole(), ends


MORE = ["--train.total_tokens", str(12 * 16 * 16), "--train.save_interval", "5"]
Ended = tuple[Any, Any]


def ended(run: Path) -> Ended:
    """Position and fingerprints of the last checkpoint."""
    meta = read_meta((run / FOLDER / "12").absolute())
    return meta["position"], meta["arrays"]


class Killed:
    """A run of two processes that was killed between saves."""

    def __init__(self, file: str, folder: Path, *layout: str):
        self.run, self.disk, self.aside = (folder / name for name in ("run", "disk", "aside"))
        words = [file, "--run", str(self.run), *MORE, *layout]
        words += ["--train.local_dir", str(self.disk), "--train.local_interval", "2"]
        killed_at_eight(words, self.disk)
        (self.own,) = self.disk.iterdir()
        assert sorted(path.name for path in self.own.iterdir()) == ["6", "8"]
        assert {path.name for path in (self.run / FOLDER).iterdir()} == {"5"}
        for path in (self.run, self.disk):
            shutil.copytree(path, self.aside / path.name)

    def goes_on(self, *lost: str, hides: str = "") -> tuple[str, str, Ended]:
        """(output, errors) of the first process, after both went on to the end, and what is there then. What is `lost`
        on the disk is gone, and what the second process is not to see of the run `hides`."""
        for path in (self.run, self.disk):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(self.aside / path.name, path)
        for part in lost:
            shutil.rmtree(self.own / part)
        words = ["--resume", str(self.run)]
        done = together(words, words, before=[[], alone(self.run / hides) if hides else []])
        assert [status for status, _, _ in done] == [0, 0], done
        assert not self.own.exists()  # the end is safe
        return *done[0][1:], ended(self.run)


EVERY_PART = ("8/1", "8/0", "6/1", "6/0")
HIDDEN = f"{FOLDER}/5/state"


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_from_one_copy(file: str, tmp_path: Path) -> None:
    """That on a disk, where the other host has lost its own, which has the parameters' copies."""
    said, warned, _ = Killed(file, tmp_path, "--layout.replica", "2").goes_on("8/1", "6/1")
    assert "resumed at step 8, " in said and "going on from step 8 here" in said
    assert "8: process 1 has none; who has the same parts sends them" in warned
    assert "checkpoints by 1 of 2 processes" in said


@pytest.mark.whole
def test_either_copy_leads_to_the_same_bits(file: str, tmp_path: Path) -> None:
    """That on a disk, and that in the run folder, whose arrays one process alone opens: the other sees an empty folder
    in their place."""
    killed = Killed(file, tmp_path, "--layout.replica", "2")
    _, _, one = killed.goes_on("8/1", "6/1")
    said, warned, other = killed.goes_on(*EVERY_PART, hides=HIDDEN)
    assert "resumed at step 5, " in said and "going on from" not in said and "damaged" not in warned
    assert one == other


@pytest.mark.whole
@pytest.mark.parametrize("layout", ["fsdp", "data"])
def test_a_run_that_was_killed_goes_on_from_what_is_left(layout: str, file: str, tmp_path: Path) -> None:
    """Where each process has parts of its own, and where both hold all: to the bits of a run that was left alone and
    had no such disks."""
    degrees, plain = ["--layout.fsdp", "1", f"--layout.{layout}", "4"], tmp_path / "plain"
    left_alone = [file, "--run", str(plain), *MORE, *degrees]
    assert [status for status, _, _ in together(left_alone, left_alone)] == [0, 0]
    killed = Killed(file, tmp_path, *degrees)
    said, warned, end = killed.goes_on()
    assert "resumed at step 8, " in said and "going on from step 8 here" in said and "8: " not in warned
    assert end == ended(plain)
    said, warned, end = killed.goes_on("8/1")
    if layout == "fsdp":
        assert "resumed at step 6, " in said and "8 is not used: process 1 has none" in warned
    else:
        assert "resumed at step 8, " in said and "8: process 1 has none; who has the same parts sends them" in warned
    assert end == ended(plain)
    said, warned, end = killed.goes_on(*EVERY_PART, hides=HIDDEN if layout == "data" else "")
    assert "resumed at step 5, " in said and "damaged" not in warned
    assert ("checkpoints by 1 of 2 processes" in said) == (layout == "data")
    assert end == ended(plain)
