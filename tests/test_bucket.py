"""Run folders in a bucket. The bucket is a stand-in for Google Cloud Storage, fake_gcs, which gcsfs, Orbax and
TensorStore reach as they do the real one; the real one is not tested here."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import as_file

import gptjax
from gptjax import bucket, cli
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.stages.weights import run_and_step
from gptjax.train import lock as locks
from gptjax.train.checkpoint import saved_steps
from gptjax.train.lock import RunLock
from gptjax.train.metrics import read_log
from gptjax.train.run import open_run, run_id

pytest.importorskip("gcsfs", reason="needs the extra bucket")
from fake_gcs import Server, serving

STEP = 16 * 16  # tokens
SMALL = "gs://small/runs"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def place(server: Server, request: pytest.FixtureRequest) -> Any:
    """A folder in the bucket, of this test alone."""
    return bucket.at(f"{SMALL}/{request.node.name}")


def test_an_object_is_made_once_and_removed_only_as_it_was_seen(place: Any) -> None:
    file = place / "file"
    bucket.create(file, b"one")
    with pytest.raises(FileExistsError):
        bucket.create(file, b"two")
    assert bucket.read(file) == b"one"
    seen = bucket.generation(file)
    bucket.write(file, b"three")
    bucket.remove(file, seen)
    assert bucket.read(file) == b"three"
    bucket.remove(file, bucket.generation(file))
    with pytest.raises(FileNotFoundError):
        bucket.read(file)
    bucket.remove(file)


def test_a_copy_is_sent_back_as_it_is(place: Any, server: Server) -> None:
    for name in ("config.json", "tokenizer/model", "checkpoints/1/x", "tensorboard/x", "lock"):
        bucket.write(place / name, name.encode())
    run = bucket.opened(str(place))
    inside = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert inside == {"config.json", "tokenizer/model"}
    assert bucket.named(run) == str(place) == str(bucket.home(run))
    before = dict(server.objects)
    bucket.send(run)
    assert server.objects == before
    (run / "log.jsonl").write_text("1\n")
    (run / "tokenizer" / "model").unlink()
    bucket.send(run)
    with (run / "log.jsonl").open("a") as log:
        log.write("2\n")
    bucket.send(run)
    assert bucket.read(place / "log.jsonl") == b"1\n2\n"
    assert {*bucket.sizes(place)} == {"config.json", "log.jsonl", "checkpoints/1/x", "tensorboard/x", "lock"}
    bucket.write(place / "log.jsonl", b"of another process")
    bucket.fetch(run)
    assert (run / "log.jsonl").read_bytes() == b"of another process"


def test_each_copy_is_of_one_run(place: Any) -> None:
    """By which saves on a host's disk are found again."""
    bucket.write(place / "meta.json", b"{}")
    one, two = (run_id(bucket.opened(str(place))) for _ in range(2))
    bucket.write(place / "again" / "meta.json", b"{}")
    assert one == two != run_id(bucket.opened(str(place / "again")))


def test_a_run_in_a_file_system_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    bucket.fetch(tmp_path)
    bucket.send(tmp_path)
    assert bucket.opened(str(tmp_path)) == bucket.home(tmp_path) == tmp_path and bucket.named(tmp_path) == str(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_one_run_at_a_time(place: Any) -> None:
    said: list[str] = []
    run = bucket.opened(str(place))
    held = RunLock(run, said.append, beat=0.1)
    with pytest.raises(UserError, match=rf"run {place}: process {os.getpid()} on .* is at work on it"):
        RunLock(bucket.opened(str(place)), said.append)
    held.release()
    assert bucket.sizes(place) == {}
    bucket.create(place / "lock", json.dumps({"host": locks.socket.gethostname(), "pid": 1, "born": "then"}).encode())
    RunLock(run, said.append).release()
    assert any("took away the lock of process 1" in line for line in said)


def test_who_comes_second_leaves_the_lock_of_the_first(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen the lock of a process that is gone; the first has its own there before the second removes it."""
    stale = {"host": locks.socket.gethostname(), "pid": 1, "born": "then", "id": "stale"}
    bucket.write(place / "lock", json.dumps(stale).encode())
    run = bucket.opened(str(place))
    generation, first = bucket.generation, []

    def seen(path: Any) -> str:
        monkeypatch.setattr(bucket, "generation", generation)
        number = generation(path)
        first.append(RunLock(run, print, beat=0.1))
        return number

    monkeypatch.setattr(bucket, "generation", seen)
    with pytest.raises(UserError, match="is at work on it"):
        RunLock(run, print)
    assert json.loads(bucket.read(place / "lock"))["id"] == first[0]._own["id"]
    first[0].release()


def test_a_holder_outlives_a_bucket_that_does_not_answer(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held, read = RunLock(bucket.opened(str(place)), print, beat=0.05), bucket.read
    asked = []

    def silent(path: Any) -> bytes:
        asked.append(path)
        raise bucket.Unreachable("no answer")

    monkeypatch.setattr(bucket, "read", silent)
    until(lambda: len(asked) > 2)
    monkeypatch.setattr(bucket, "read", read)
    count = held._count
    until(lambda: held._count > count)
    held.release()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs://a/b: .* pip install 'gptjax\[bucket\]'"):
        open_run("gs://a/b")


@pytest.fixture(scope="module")
def small(plain: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    train = replace(plain.train, ramp_start=0, total_tokens=4 * STEP, save_interval=2, log_interval=1, eval_batches=0)
    return as_file(replace(plain, train=train), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def here(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in a file system."""
    run = tmp_path_factory.mktemp("runs") / "here"
    assert cli.run(["train", small, "--run", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def there(small: str, server: Server) -> str:
    """The same in a bucket, in two starts."""
    address = "gs://small/there"
    assert cli.run(["train", small, "--run", address, "--train.total_tokens", str(2 * STEP)]) == 0
    assert cli.run(["train", "--resume", address, "--train.total_tokens", str(4 * STEP)]) == 0
    return address


@pytest.fixture
def copied(there: str, server: Server, request: pytest.FixtureRequest) -> str:
    """A copy of that run in the bucket, to be harmed."""
    folder = request.node.name
    with server.lock:
        for (name, key), stored in [*server.objects.items()]:
            if key.startswith("there/"):
                server.objects[name, f"{folder}{key.removeprefix('there')}"] = stored
    return f"gs://small/{folder}"


def meta(checkpoint: Any) -> dict[str, Any]:
    return dict(json.loads((checkpoint / "meta" / "metadata").read_bytes()))


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_in_a_file_system(here: Path, there: str, server: Server) -> None:
    home = bucket.at(there)
    assert saved_steps(home / "checkpoints") == saved_steps(here / "checkpoints")
    assert meta(home / "checkpoints" / "4")["arrays"] == meta(here / "checkpoints" / "4")["arrays"]  # fingerprints
    run, config = open_run(there)
    assert config.run == there
    losses = [[(r["step"], r["loss"]) for r in read_log(f / "log.jsonl") if r["kind"] == "train"] for f in (run, here)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    kinds = [r["kind"] for r in read_log(run / "log.jsonl")]
    assert kinds.count("start") == kinds.count("end") == 2
    assert len((run / "history.jsonl").read_text().splitlines()) == 2
    assert not [name for name in server.names("small/there") if name.endswith("/lock")]


@pytest.mark.slow
def test_verbs_read_it(here: Path, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["checkpoint", "verify"], ["checkpoint", "inspect"], ["checkpoint", "ls"], ["report"]):
        assert cli.run([*words, there]) == 0, words
    out = capsys.readouterr().out
    assert "step 4: whole" in out and f"{there}/report.html" in out and "4     1,024" in out
    assert b"<h2>Starts</h2>" in bucket.read(bucket.at(f"{there}/report.html"))
    far, near = gptjax.load(there), gptjax.load(f"{here}/checkpoints/4")
    jax.tree.map(np.testing.assert_array_equal, far.params, near.params)
    assert run_and_step(f"{there}/checkpoints/4") == (there, 4)


@pytest.mark.slow
def test_what_is_half_or_damaged_is_not_gone_on_from(
    copied: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """A save that was cut off has no last file; of one with a byte changed the one before it is taken."""
    name = copied.removeprefix("gs://small/")
    steps = saved_steps(bucket.at(f"{copied}/checkpoints"))
    newest = f"{name}/checkpoints/{steps[0]}"
    half = server.objects["small", f"{newest}/meta/metadata"]
    server.objects["small", f"{name}/checkpoints/9/meta/metadata"] = half
    assert saved_steps(bucket.at(f"{copied}/checkpoints")) == steps
    with server.lock:
        key = ("small", f"{newest}/meta/metadata")
        data = server.objects[key].data
        server.objects[key] = replace(server.objects[key], data=data[:-9] + b"?" + data[-8:])
    assert cli.run(["checkpoint", "verify", copied]) == 1
    assert f"step {steps[0]}: damaged" in capsys.readouterr().out
    assert cli.run(["train", "--resume", copied, "--train.total_tokens", str(4 * STEP)]) == 0
    said = capsys.readouterr()
    assert f"{steps[0]} is damaged" in said.err and f"resumed at step {steps[1]}" in said.out
    there = server.names(f"small/{name}/checkpoints/")
    assert any(f"/{steps[0]}.damaged/" in each for each in there) and not any(
        "/checkpoints/9/" in each for each in there
    )


@pytest.mark.slow
def test_a_new_run_in_its_place(copied: str, small: str) -> None:
    with pytest.raises(UserError, match=f"run = {copied}: exists and is not empty; gptjax train --resume {copied}"):
        cli.run(["train", small, "--run", copied])
    words = ["--train.total_tokens", str(STEP), "--overwrite"]
    assert cli.run(["train", small, "--run", copied, *words]) == 0
    assert saved_steps(bucket.at(f"{copied}/checkpoints")) == [1]
    assert [r["step"] for r in read_log(open_run(copied)[0] / "log.jsonl") if r["kind"] == "train"] == [1]
