"""`gptjax checkpoint`: what is kept and why, damage with its file, and what is inside, whatever layout wrote it."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import environment
from jax.sharding import NamedSharding, PartitionSpec
from test_checkpoint import abstract, flip, largest

from gptjax import cli
from gptjax.config import Config, to_json
from gptjax.errors import UserError
from gptjax.terminal import size_words
from gptjax.train.checkpoint import FOLDER, Checkpoints, Position, intact, sizes
from gptjax.train.damage import Damaged
from gptjax.train.described import misdescribed
from gptjax.train.fingerprint import fingerprint, fingerprint_of_parts

State = dict[str, dict[str, jax.Array]]


def made(step: int) -> State:
    """Arrays that lie on 8 devices in three ways, one of which does not divide; and one too small to be cut."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(step)

    def on(shape: tuple[int, ...], *spec: str | None) -> jax.Array:
        return jax.device_put(
            jnp.asarray(rng.normal(size=shape), jnp.float32), NamedSharding(mesh, PartitionSpec(*spec))
        )

    params = {"w": on((64, 32), "a", "b"), "v": on((8, 6), None, "b"), "half": on((12,), "a").astype(jnp.bfloat16)}
    return {"params": params, "rest": {"count": jnp.int32(step), "scale": on((3, 5))}}


@pytest.fixture(scope="module")
def written(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 devices with checkpoints at 10, 20, 30 and 40, of which 20 was the best."""
    run = tmp_path_factory.mktemp("examined") / "run"
    config = replace(tiny, train=replace(tiny.train, keep_last=2, keep_every=10, keep_best=True))
    checkpoints = Checkpoints(run, config)
    for step in (10, 20, 30, 40):
        assert checkpoints.save(made(step), Position(step, 1000 * step, (step, 1), ((31, 36),) if step == 40 else ()))
    checkpoints.close()
    (run / "config.json").write_text(to_json(config))
    log = [{"kind": "eval", "step": 20, "loss": 2.25}, {"kind": "eval", "step": 30, "loss": 3.5}]
    log += [{"kind": "train", "step": step, "loss": 1.125} for step in (30, 40)]
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    return run


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    capsys.readouterr()
    return cli.run(["checkpoint", *words]), capsys.readouterr().out.splitlines()


def test_the_list_says_what_each_is_worth_and_why_it_is_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / FOLDER / "10").rename(run / FOLDER / "10.damaged")
    (run / FOLDER / "30" / "meta" / "metadata").write_text("{")
    status, lines = said(capsys, "ls", str(run))
    assert status == 0
    assert [line.split()[0] for line in lines] == ["step", "40", "30", "20", "10.damaged"]
    assert "40,000  1.1250 (training)" in lines[1] and lines[1].endswith("newest 2, every 10")
    assert "3.5000" in lines[2] and "damaged: " in lines[2]
    assert "20,000  2.2500" in lines[3] and lines[3].endswith("best, every 10")
    assert lines[4].endswith("set aside")
    size = sum(path.stat().st_size for path in (run / FOLDER / "20").rglob("*") if path.is_file())
    assert size_words(size) in lines[3]


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (7e15, "7000.0 TB")]
)
def test_sizes_in_words(size: float, words: str) -> None:
    assert size_words(size) == words


def test_one_cpu_verifies_what_eight_devices_wrote(run: Path) -> None:
    """As a user does on a machine of another kind; the bytes are those of the arrays."""
    words = [sys.executable, "-m", "gptjax", "checkpoint", "verify", str(run)]
    done = subprocess.run(words, env=environment(1), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    size = 4 * (64 * 32 + 8 * 6 + 3 * 5 + 1) + 2 * 12
    assert done.stdout.splitlines() == [
        f"step {step}: whole, 5 arrays, {size_words(size)}" for step in (40, 30, 20, 10)
    ]


def test_damage_is_told_with_its_file(run: Path, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = {step: run / FOLDER / str(step) for step in (10, 20, 30, 40)}
    victim = largest(steps[40] / "state" / "d")
    flip(victim)
    shards = steps[30] / "state" / "array_metadatas" / "process_0"
    shards.write_text(shards.read_text().replace("param_name", "param_nqme", 1))
    shutil.rmtree(steps[20] / "state")
    shutil.copytree(written / FOLDER / "10" / "state", steps[20] / "state")  # whole files of another step
    status, lines = said(capsys, "verify", str(run))
    assert status == 1 and len(lines) == 4
    assert f"step 40: damaged: {victim.relative_to(steps[40])}: " in lines[0]
    assert lines[1] == "step 30: damaged: state/array_metadatas/process_0: not what was saved"
    assert "step 20: damaged: params/half: does not match the fingerprint" in lines[2] and "5 such things" in lines[2]
    assert lines[3].startswith("step 10: whole")
    assert said(capsys, "verify", str(run), "--step", "10")[0] == 0
    with pytest.raises(UserError, match=r"--step 11: .* has 40, 30, 20, 10"):
        said(capsys, "verify", str(run), "--step", "11")


def test_what_cannot_be_read_is_no_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link to itself is refused by the system to every reader, root too."""
    path = run / FOLDER / "40" / "state" / "manifest.ocdbt"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(UserError, match=r"cannot be read \(Too many levels of symbolic links\)"):
        said(capsys, "verify", str(run), "--step", "40")


def test_inspect_shows_every_array_and_the_position(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = said(capsys, "inspect", str(run), "--step", "30")
    text = "\n".join(lines)
    assert status == 0
    assert f"{FOLDER}/30: step 30, 30,000 tokens" in text and "2 lanes at 30, 1" in text
    for words in ("2,108 trained parameters", "num_layers 4", "name tiny", r"sample_prompt '\n'"):
        assert words in text
    rows = [line.split() for line in lines[lines.index("") + 2 :]]
    assert [row[0] for row in rows] == ["params/half", "params/v", "params/w", "rest/count", "rest/scale"]
    assert rows[2] == ["params/w", "float32", "[64,", "32]", "8.2", "kB"]
    assert "  gone back  to step 31, over the rows up to step 36" in said(capsys, "inspect", str(run))[1]
    assert "gone back" not in text
    (run / FOLDER / "40" / "meta" / "metadata").write_text("{")
    with pytest.raises(UserError, match=r"damaged .*; gptjax checkpoint verify"):
        said(capsys, "inspect", str(run))


def test_what_a_save_will_take_is_said_before_it(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tree of 8 devices each part once: one process holds them all. Where it may not fit it is tried all the same,
    for it may be smaller on the disk."""
    size = 4 * (64 * 32 + 8 * 6 + 3 * 5 + 1) + 2 * 12
    assert sizes(made(1)) == sizes(abstract(made(1))) == (size, size)
    checkpoints = Checkpoints(tmp_path, tiny)
    for step, free in ((1, size - 1), (2, size)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert checkpoints.save(made(step), Position(step))
        warned = f"warning: checkpoint {tmp_path / FOLDER / '1'}: may need 8.5 kB, and 8.5 kB are free\n"
        assert capsys.readouterr().err == (warned if step == 1 else "")
    checkpoints.close()


def test_a_run_without_checkpoints_is_one_line(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        cli.run(["checkpoint", "ls", str(tmp_path)])
    (tmp_path / "config.json").write_text(to_json(tiny))
    with pytest.raises(UserError, match="no checkpoint yet; gptjax train --resume"):
        cli.run(["checkpoint", "verify", str(tmp_path)])


def test_any_bit_of_what_describes_the_arrays(run: Path) -> None:
    """Either it has no effect, or it is damage that names its file: never an error of its own kind."""
    folder = run / FOLDER / "10"
    state, rng, named = made(10), random.Random(0), 0
    saved = fingerprint(state)
    for file in ("_METADATA", "array_metadatas/process_0"):
        path = folder / "state" / file
        whole = path.read_bytes()
        for _ in range(25):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            try:
                assert fingerprint(intact(folder, abstract(state))[0]) == saved
            except Damaged as error:
                named += f"state/{file} is not what was saved" in str(error)
        path.write_bytes(whole)
        assert not misdescribed(folder / "state", saved)
    assert named > 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "float64", "int8"])
def test_a_fingerprint_of_parts_is_that_of_the_whole(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        whole = jnp.arange(7 * 5 * 3).reshape(7, 5, 3).astype(dtype)
        want = fingerprint({"x": whole})["x"]
    array = np.asarray(whole)
    parts = [((i, j, 0), array[i : i + 3, j : j + 2]) for i in (0, 3, 6) for j in (0, 2, 4)]
    assert fingerprint_of_parts(parts) == fingerprint_of_parts(parts[::-1]) == want
    assert fingerprint_of_parts([((), array)]) == want
    assert fingerprint_of_parts([((0, 0, 0), part) for _, part in parts]) != want
