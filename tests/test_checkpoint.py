"""What a checkpoint is worth: damage is found, and nothing else is taken for it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from devices import environment
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.config import Config, to_json
from gptjax.errors import UserError
from gptjax.files import read_json, write_whole
from gptjax.train import fingerprint as module
from gptjax.train.checkpoint import FOLDER, FORMAT, Checkpoints, Position, restore_params
from gptjax.train.fingerprint import fingerprint

State = dict[str, Any]


def make() -> State:
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    return {"params": {"w": matrix, "half": matrix[:3].astype(jnp.bfloat16)}, "count": jnp.int32(7)}


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture(scope="module")
def written(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of one state, for tests to copy."""
    run = tmp_path_factory.mktemp("checkpoints") / "run"
    checkpoints = Checkpoints(run, replace(tiny, train=replace(tiny.train, keep_last=5)))
    for step in (1, 2, 3):
        assert checkpoints.save(make() | {"count": jnp.int32(step)}, Position(step, 10 * step, (step,)))
    checkpoints.close()
    return run


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def restore(run: Path, config: Config, wanted: State | None = None) -> tuple[State, Position, list[str]]:
    warnings: list[str] = []
    checkpoints = Checkpoints(run, config)
    found = checkpoints.restore(abstract(make() if wanted is None else wanted), warnings.append)
    assert found
    checkpoints.close()
    return *found, warnings


def names(run: Path) -> set[str]:
    return {path.name for path in (run / FOLDER).iterdir()}


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path, old: str, new: str, count: int = -1) -> None:
    text = path.read_text()
    assert text.count(old) == 1 or count == 1
    path.write_text(text.replace(old, new, count))


def cut_manifests(step: Path) -> None:
    for manifest in step.rglob("manifest.ocdbt"):
        halve(manifest)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda step: flip(largest(step / "state")),
    "truncated": lambda step: halve(largest(step / "state")),
    "deleted": lambda step: largest(step / "state").unlink(),
    "emptied": lambda step: largest(step / "state").write_bytes(b""),
    "manifest": cut_manifests,
    "no state": lambda step: shutil.rmtree(step / "state"),
    "meta cut": lambda step: halve(step / "meta" / "metadata"),
    "meta empty": lambda step: (step / "meta" / "metadata").write_text(""),
    "meta null": lambda step: (step / "meta" / "metadata").write_text("null"),
    "meta digit": lambda step: change(step / "meta" / "metadata", '"tokens": 30', '"tokens": 70'),
    "meta keys": lambda step: (step / "meta" / "metadata").write_text(f'{{"format": {FORMAT}}}'),
    "no meta": lambda step: shutil.rmtree(step / "meta"),
    # What Orbax notes beside the arrays: it trusts these files, and raises whatever comes of a bit that is not theirs.
    "shards": lambda step: change(step / "state" / "array_metadatas" / "process_0", "param_name", "param_nqme", 1),
    "tree": lambda step: change(step / "state" / "_METADATA", "key_type", "kEy_type", 1),
    "name": lambda step: change(step / "state" / "_METADATA", '"key": "half"', '"key": "hclf"'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_set_aside_as_often_as_it_comes(kind: str, run: Path, tiny: Config, written: Path) -> None:
    for time in ("", "-2"):  # the same step twice: the run came to it again
        DAMAGE[kind](run / FOLDER / "3")
        with pytest.raises(UserError, match=r"is damaged \(.*\); gptjax train --resume .* goes back") as error:
            restore_params(run, abstract(make())["params"])
        assert "\n" not in str(error.value) and "3" in names(run)
        state, position, warnings = restore(run, tiny)
        assert position == Position(2, 20, (2,))
        assert fingerprint(state) == fingerprint(make() | {"count": jnp.int32(2)})
        assert len(warnings) == 1 and f"{FOLDER}/3 is damaged (" in warnings[0] and "\n" not in warnings[0]
        assert f"3.damaged{time}" in names(run) and "3" not in names(run)
        shutil.copytree(written / FOLDER / "3", run / FOLDER / "3")


def test_when_all_are_damaged_the_run_says_so(run: Path, tiny: Config) -> None:
    for step in "123":
        flip(largest(run / FOLDER / step / "state"))
    with pytest.raises(UserError, match="every checkpoint is damaged; start a new run"):
        restore(run, tiny)


def test_arrays_that_were_saved_elsewhere_in_the_tree_are_damage(run: Path, tiny: Config, written: Path) -> None:
    """Whole files of another checkpoint: rows exchanged, an array reversed, two signs exchanged."""
    w = make()["params"]["w"]
    swapped = w.at[jnp.array([3, 9])].set(w[jnp.array([9, 3])])
    signs = w.at[0, 0].set(-w[0, 0]).at[0, 1].set(-w[0, 1])
    for changed in (swapped, w[::-1], signs):
        other = run.with_name("other")
        checkpoints = Checkpoints(other, tiny)
        state = make() | {"count": jnp.int32(3)}
        checkpoints.save(state | {"params": state["params"] | {"w": changed}}, Position(3, 30, (3,)))
        checkpoints.close()
        shutil.rmtree(run / FOLDER / "3" / "state")
        shutil.move(other / FOLDER / "3" / "state", run / FOLDER / "3" / "state")
        shutil.rmtree(other)
        _, position, warnings = restore(run, tiny)
        assert position.step == 2 and "params/w does not match the fingerprint" in warnings[0]
        shutil.copytree(written / FOLDER / "3", run / FOLDER / "3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"extra": jnp.zeros(2)}, "extra: the checkpoint has no such array, the config makes float32[2]"),
        (lambda s: {"params": s["params"]}, "count: the checkpoint has int32[], the config makes no such array"),
        (
            lambda s: s | {"params": s["params"] | {"w": jnp.zeros((64, 16))}},
            "params/w: the checkpoint has float32[64, 32], the config makes float32[64, 16]",
        ),
        (
            lambda s: s | {"params": s["params"] | {"half": s["params"]["half"].astype(jnp.float32)}},
            "params/half: the checkpoint has bfloat16[3, 32], the config makes float32[3, 32]",
        ),
    ],
)
def test_another_tree_is_an_error_that_names_the_leaf(
    change: Callable[[State], State], message: str, run: Path, tiny: Config
) -> None:
    before = names(run)
    with pytest.raises(UserError) as error:
        restore(run, tiny, change(make()))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert names(run) == before


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (PermissionError(13, "Permission denied"), r"cannot be read \(Permission denied\); nothing is changed"),
        (OSError(5, "Input/output error"), r"cannot be read \(Input/output error\)"),
        (OSError(116, "Stale file handle"), r"cannot be read \(Stale file handle\)"),
        (MemoryError(), ""),
        (ValueError("RESOURCE_EXHAUSTED: out of memory allocating 1 byte"), "RESOURCE_EXHAUSTED"),
        (ValueError("UNAVAILABLE: the bucket did not answer"), "UNAVAILABLE"),
        (TypeError("a mistake in a library"), "a mistake"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_an_error_of_this_start_is_no_damage(
    raised: Exception, expected: str, run: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that raises stands in for the disk, the bucket or the memory that fails."""
    before = names(run)

    def failing(*args: Any, **kwargs: Any) -> Any:
        try:
            raise raised
        except Exception as cause:
            raise Exception("Encountered error while reading array index") from cause

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", failing)
    kind = UserError if isinstance(raised, OSError) else Exception
    with pytest.raises(kind) as error:
        restore(run, tiny)
    if isinstance(raised, OSError):
        assert error.match(expected)
    else:
        assert error.value.__cause__ is raised
    assert names(run) == before


@pytest.mark.parametrize("name", ["meta", "meta/metadata", "state", "state/d", "state/manifest.ocdbt", "data"])
def test_what_cannot_be_read_is_not_missing(name: str, run: Path, tiny: Config) -> None:
    """A link to itself is refused by the system to every reader, root too, and tests for existence say no."""
    step, before = run / FOLDER / "3", names(run)
    path = largest(step / "state") if name == "data" else step / name
    path.rename(run / "away")
    path.symlink_to(path)
    reason = r"cannot be read \(Too many levels of symbolic links\); nothing is changed, mend that and resume"
    with pytest.raises(UserError, match=reason):
        restore(run, tiny)
    with pytest.raises(UserError, match=reason):
        restore_params(run, abstract(make())["params"])
    assert names(run) == before
    path.unlink()
    (run / "away").rename(path)
    assert restore(run, tiny)[1].step == 3


def test_memory_that_ends_where_a_file_was_missing_is_no_damage(
    run: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: Any, **kwargs: Any) -> Any:
        try:
            (run / "none").read_bytes()
        except FileNotFoundError:
            raise MemoryError  # noqa: B904

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", read)
    before = names(run)
    with pytest.raises(MemoryError):
        restore(run, tiny)
    assert names(run) == before


def test_damage_that_cannot_be_set_aside_is_one_line(run: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(largest(run / FOLDER / "3" / "state"))

    def refused(self: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(UserError, match=r"3: cannot be set aside \(Read-only file system\); mend that and resume"):
        restore(run, tiny)


def test_a_save_that_the_system_refuses_is_one_line(
    tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, tiny)
    checkpoints.save(make(), Position(1))
    checkpoints.wait()

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("PERMISSION_DENIED: Failed to open: \"x\": Stale file handle [os_error_code='116']")

    monkeypatch.setattr(ocp.CheckpointManager, "save", refused)
    with pytest.raises(
        UserError, match=r"cannot write \(Stale file handle\); the last complete one is step 1; mend th"
    ):
        checkpoints.save(make(), Position(2))


KILLED = """
import os, signal, sys
from pathlib import Path
from gptjax.config import from_json
from gptjax.train.checkpoint import FOLDER, Checkpoints, Position
import jax.numpy as jnp

folder, config = Path(sys.argv[1]), from_json(sys.argv[2])
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove")

def saves(run, last):  # ends before the last-th thing that the second save does to a file
    done, counts = 0, False
    def watch(event, about):
        nonlocal done
        if counts and event in EVENTS and f"{FOLDER}/2" in str(about[0]):
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    checkpoints = Checkpoints(run, config)
    for step in (1, 2):
        counts = step == 2
        checkpoints.save({"w": jnp.full((64, 32), float(step))}, Position(step))
        checkpoints.wait()
    return done

def child(name, last):  # before JAX has a thread
    if (pid := os.fork()) == 0:
        os._exit(saves(folder / name, last))
    return os.waitpid(pid, 0)[1]

total = os.waitstatus_to_exitcode(child("whole", 0))
assert total > 10, total
for part in range(6):
    assert os.WTERMSIG(child(str(part), 1 + (total - 1) * part // 5)) == signal.SIGKILL
"""


def test_a_kill_in_any_part_of_a_save_leaves_the_one_before(tiny: Config, tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path), to_json(tiny)]
    killed = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=400)
    assert killed.returncode == 0, killed.stderr
    state = {"w": jnp.full((64, 32), 1.0)}
    left: set[str] = set()
    for part in range(6):
        run = tmp_path / str(part)
        left |= names(run)
        assert "1" in names(run) and "2" not in names(run)
        found, position, warnings = restore(run, tiny, state)
        assert (position.step, warnings) == (1, [])
        assert fingerprint(found) == fingerprint(state)
        checkpoints = Checkpoints(run, tiny)
        assert checkpoints.save(state, Position(2))
        checkpoints.close()
        assert restore(run, tiny, state)[1].step == 2 and names(run) == {"1", "2"}
    assert len(left) > 1  # a half one was there


def test_what_a_killed_save_left_is_gone_before_the_next_opens(tiny: Config, tmp_path: Path) -> None:
    """Not while it saves: two that opened the folder one after the other removed it at once, and one of them failed."""
    half = tmp_path / FOLDER / "2.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    for number in range(2000):
        (half / str(number)).touch()
    Checkpoints(tmp_path, tiny).close()
    assert not half.exists()
    checkpoints = Checkpoints(tmp_path, tiny)
    assert checkpoints.save({"w": jnp.ones(3)}, Position(2))
    checkpoints.close()
    assert names(tmp_path) == {"2"}


def test_another_format_is_one_line_and_stays(run: Path, tiny: Config) -> None:
    path = run / FOLDER / "3" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"format": 1}))
    with pytest.raises(UserError, match=f"format 1, this version reads {FORMAT}; go on with the version that wrote it"):
        restore(run, tiny)
    assert "3" in names(run)


def test_checkpoints_that_are_a_file(tmp_path: Path, tiny: Config) -> None:
    (tmp_path / FOLDER).write_text("x")
    with pytest.raises(UserError, match="not a folder; move it away"):
        Checkpoints(tmp_path, tiny)
    with pytest.raises(UserError, match="not a folder; move it away"):
        restore_params(tmp_path, abstract(make())["params"])


# The fingerprint


DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool", "float8_e4m3fn", "int4", "complex64"]


@given(st.data())
def test_a_fingerprint_sees_places_signs_and_bits(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "int8", "bool"]))
    values = data.draw(
        st.lists(st.integers(0, 1) if dtype == "bool" else st.integers(-100, 100), min_size=12, max_size=12)
    )
    array = np.array(values).reshape(4, 3)

    def print_of(x: np.ndarray) -> str:
        return fingerprint({"x": jnp.asarray(x.astype(np.int32)).astype(dtype)})["x"]

    i, j = data.draw(st.tuples(st.integers(0, 11), st.integers(0, 11)))
    swapped = array.copy()
    swapped.flat[[i, j]] = array.flat[[j, i]]
    one_off = array.copy()
    one_off.flat[i] = not one_off.flat[i] if dtype == "bool" else one_off.flat[i] + 1
    transposed, signs = array.copy(), array.copy()
    transposed[:3] = array[:3].T
    signs.flat[[i, j]] *= -1
    variants = [swapped, array[::-1], array[:, ::-1], np.roll(array, 1, axis=0), -array, one_off, transposed, signs]
    for other in variants:
        if dtype == "bool":
            other = other != 0
        same = np.array_equal(other, array if dtype != "bool" else array != 0)
        assert (print_of(other) == print_of(array)) == same


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fingerprint_of_any_type_is_the_same_on_every_layout(dtype: str) -> None:
    rng = np.random.default_rng(1)
    array = jnp.asarray(rng.integers(0, 2 if dtype == "bool" else 7, (8, 16)), jnp.int32).astype(dtype)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    alone = fingerprint({"x": jax.device_put(array, jax.devices()[0])})
    for spec in (("a", "b"), (None, ("b", "a")), ()) if dtype == "float32" else (("a", "b"),):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        if dtype == "int4":  # jaxlib 0.10.2 does not move sharded arrays of half bytes
            continue
        assert fingerprint({"x": jax.device_put(array, sharding)}) == alone
    other = jnp.asarray(np.asarray(array.astype(jnp.complex64 if dtype == "complex64" else jnp.float32))[::-1])
    assert fingerprint({"x": other.astype(dtype)}) != alone


@given(st.integers(0, 95), st.integers(0, 31))
def test_a_fingerprint_sees_every_bit(place: int, bit: int) -> None:
    words = np.random.default_rng(2).integers(0, 2**32, (8, 12), np.uint32)
    flipped = words.copy()
    flipped.flat[place] ^= np.uint32(1) << np.uint32(bit)
    one, other = (fingerprint({"x": jnp.asarray(x)})["x"] for x in (words, flipped))
    assert one[:8] != other[:8] and one[8:] != other[8:]  # each of the two sums by itself


def test_fingerprints_of_keys_scalars_and_nothing() -> None:
    tree = {"key": jax.random.key(3), "scalar": jnp.float32(2), "none": jnp.zeros((0, 3)), "old": jax.random.PRNGKey(3)}
    prints = fingerprint(tree)
    assert prints.keys() == tree.keys()
    assert prints["key"] != fingerprint({"key": jax.random.key(4)})["key"]
    assert all(len(mark) == 16 for mark in prints.values())


def test_a_fingerprint_gathers_nothing_and_is_compiled_once() -> None:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    array = jax.device_put(jnp.ones((512, 64)), NamedSharding(mesh, PartitionSpec("a")))
    text = module._program(array).lower(array).compile().as_text()
    assert "all-gather" not in text and "all-reduce" in text
    assert "reduce-window" not in text  # ten times slower on a CPU, with room for every mixed word
    tree = {str(i): array * i for i in range(5)}
    fingerprint(tree)
    programs = module._program(array)._cache_size()
    fingerprint(jax.tree.map(lambda x: x + 1, tree))
    assert module._program(array)._cache_size() == programs


def test_a_fingerprint_is_the_same_from_numpy_and_from_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["float32", "bfloat16", "int8", "uint32", "bool", "complex64", "float8_e4m3fn", "float16"]
    tree = {kind: jax.random.normal(jax.random.key(1), (3, 4, 5)).astype(kind) for kind in kinds}
    tree |= {"key": jax.random.key(3), "scalar": jnp.float32(2), "none": jnp.zeros((0, 3))}
    with jax.enable_x64(True):
        tree |= {"long": jnp.arange(5) << 40, "double": jnp.float64(1) / 3}
    small = fingerprint(tree)
    monkeypatch.setattr(module, "SMALL", -1)
    assert fingerprint(tree) == small
    assert small["scalar"] == "86b7389d0399d7b6"  # as runs have it on disk


# A disk that is full


@pytest.mark.parametrize("parts", ["save", "wait_until_finished", "close", "save wait_until_finished close"])
def test_a_failed_write_is_raised_once(
    parts: str, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of Orbax's calls meets it, or all of them, as where the arrays and what is beside them both fail: one
    error of one line. Orbax's manager stands in, which fails as on a full disk."""
    checkpoints, plain = Checkpoints(tmp_path, tiny), Mock(all_steps=lambda: [])
    checkpoints.close()
    for part in parts.split():
        getattr(plain, part).side_effect = OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoints, "_manager", plain)
    said = []
    for call in (lambda: checkpoints.save({"a": jnp.ones(2)}, Position(1, 1, None)), checkpoints.close):
        try:
            call()
        except UserError as error:
            said.append(str(error))
    assert len(said) == 1
    assert "cannot write (No space left on device); none is complete yet; free space and resume" in said[0]


# Whole files


def test_a_whole_file_is_synced_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("sync") or sync(handle))
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append("rename") or rename(self, to))
    write_whole(tmp_path / "a" / "file", b"data")
    assert events == ["sync", "rename", "sync"]  # the bytes, then the name

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a" / "file", b"other")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "a").iterdir()] == [("file", b"data")]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file"), ("", "not whole JSON"), ('{"a": 1', "not whole JSON"), ("3", "object")],
)
def test_a_small_file_that_is_not_whole_is_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_json(tmp_path / "x.json", "do this")
    assert str(error.value).endswith("; do this") and "\n" not in str(error.value)
