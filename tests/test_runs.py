"""A run folder belongs to one run, and that run is what it was: locks, claims, what is pinned and what may change."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import environment
from shipped import PATHS, shipped, start_words, target

from gptjax import cli
from gptjax.config import Config, to_json
from gptjax.data.sources import build
from gptjax.errors import UserError
from gptjax.stages.pretrain import Pretrain
from gptjax.train import run as folders
from gptjax.train.lock import NAME, RunLock
from gptjax.train.metrics import read_log

STEP = 16 * 16  # tokens of a step after the ramp


@pytest.fixture(scope="module")
def small(plain: Config, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """`plain` without a ramp, on text of its own that a test may change."""
    text = tmp_path_factory.mktemp("text") / "corpus"
    shutil.copytree(corpus, text)
    train = replace(plain.train, ramp_start=0, total_tokens=4 * STEP, save_interval=4, log_interval=1, eval_batches=0)
    return replace(plain, train=train, data=replace(plain.data, source=str(text / "*.txt")))


@pytest.fixture(scope="module")
def written(small: Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("config") / "small.py"
    file.write_text(
        f"from gptjax.config import from_json\n\n\ndef config():\n    return from_json({to_json(small)!r})\n"
    )
    return str(file)


@pytest.fixture(scope="module")
def trained(written: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, for tests to copy."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert cli.run(["train", written, "--run", str(run)]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def resume(run: Path, *words: str) -> int:
    return cli.run(["train", "--resume", str(run), *words])


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_log(run / "log.jsonl") if record["kind"] == "train"]


MORE = ("--train.total_tokens", str(6 * STEP))


@pytest.fixture(scope="module")
def longer(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run, two steps on."""
    copy = tmp_path_factory.mktemp("longer") / "run"
    shutil.copytree(trained, copy)
    assert resume(copy, *MORE) == 0
    return losses(copy)


# The lock and the claim


def _hold(folder: str, beat: float, ready: Any, end: Any) -> None:
    try:
        lock = RunLock(Path(folder), print, patience=3.0, beat=beat)
    except UserError as error:
        ready.put(str(error))
        return
    ready.put("held")
    end.wait()
    lock.release()


def test_of_many_starts_at_once_one_has_the_folder(tmp_path: Path) -> None:
    """Also where a dead run's lock lies there first, which all of them find stale."""
    spawn = multiprocessing.get_context("spawn")
    dead = {"host": socket.gethostname(), "pid": 2**22 - 1, "born": "1", "id": "x", "beat": 3}
    (tmp_path / NAME).write_text(json.dumps(dead))
    ready, end = spawn.Queue(), spawn.Event()
    starts = [spawn.Process(target=_hold, args=(str(tmp_path), 0.2, ready, end)) for _ in range(4)]
    for start in starts:
        start.start()
    answers = sorted(ready.get(timeout=200) for _ in starts)
    end.set()
    for start in starts:
        start.join()
    assert answers[0] == "held" and all("is at work on it" in answer for answer in answers[1:])
    pids = {start.pid for start in starts}
    assert all(f"on {socket.gethostname()}" in answer and any(str(p) in answer for p in pids) for answer in answers[1:])
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("beats", [True, False])
def test_a_lock_of_another_host_holds_while_it_beats(beats: bool, tmp_path: Path) -> None:
    """What another host's process would write stands in for it here."""
    said: list[str] = []
    other = {"host": "elsewhere", "pid": 7, "born": "1", "id": "x"}
    (tmp_path / NAME).write_text(json.dumps(other | {"beat": 1}))
    if beats:
        again = f"open({str(tmp_path / NAME)!r}, 'w').write({json.dumps(other | {'beat': 2})!r})"
        subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(0.5); {again}"])
        with pytest.raises(UserError, match="process 7 on elsewhere is at work on it"):
            RunLock(tmp_path, said.append, patience=5.0)
        return
    lock = RunLock(tmp_path, said.append, patience=0.5)
    assert any("took over the lock of process 7 on elsewhere" in line for line in said)
    lock.release()


def test_a_lock_that_a_full_disk_cut_short_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next start would watch for half a minute whether it beats."""

    def full(lock: RunLock) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunLock, "_text", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        RunLock(tmp_path, print)
    assert not (tmp_path / NAME).exists()


def test_a_process_that_lost_its_lock_ends(tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from gptjax.train.lock import RunLock; "
        f"RunLock(Path({str(tmp_path)!r}), print, beat=0.1); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    (tmp_path / NAME).write_text(json.dumps({"host": "elsewhere", "id": "y"}))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert errors == f"error: lost the lock of run {tmp_path} to another process; ending\n"


@pytest.mark.slow
def test_a_live_run_is_not_resumed_by_another_start(run: Path) -> None:
    """Both are real processes; the first one goes on unharmed."""
    command = [sys.executable, "-m", "gptjax", "train", "--resume", str(run), "--train.total_tokens"]
    first = subprocess.Popen([*command, "1e9"], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 400
        while len(losses(run)) < 8 and time.monotonic() < end:
            time.sleep(0.2)
        before = len(losses(run))
        second = subprocess.run([*command, "1e8"], env=environment(), capture_output=True, text=True)
        assert second.returncode == 1
        assert f"process {first.pid} on {socket.gethostname()} is at work on it" in second.stderr
        assert "Traceback" not in second.stderr
        while len(losses(run)) < before + 5 and time.monotonic() < end:
            time.sleep(0.2)
        assert len(losses(run)) >= before + 5 and first.poll() is None
    finally:
        first.terminate()
        errors = first.communicate()[1]
    assert first.returncode == 143, errors
    assert json.loads((run / "config.json").read_text())["train"]["total_tokens"] == 10**9


def _claim(config: Config, answers: Any, end: Any) -> None:
    folder, lock = folders.claim(config, False, print)
    answers.put(str(folder))
    end.wait()
    lock.release()


def test_starts_at_once_claim_folders_of_their_own(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spawn = multiprocessing.get_context("spawn")
    answers, end = spawn.Queue(), spawn.Event()
    starts = [spawn.Process(target=_claim, args=(small, answers, end)) for _ in range(3)]
    for start in starts:
        start.start()
    got = {answers.get(timeout=200) for _ in starts}
    end.set()
    for start in starts:
        start.join()
    assert got == {f"runs/plain{suffix}" for suffix in ("", "-2", "-3")}


# What a refused start leaves


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layout.fsdp", "3"], "layout.fsdp = 3"),
        (["--layout.fsdp", "1", "--layout.tensor", "8", "--model.num_heads", "4"], "layout.tensor = 8"),
        (["--model.attention", "splash"], "model.attention = splash"),
        (["--model.vocab_size", "200"], "model.vocab_size = 200"),
        (["--data.train_split", "train[:0]"], "split train[:0]"),
        (["--init_from", "nowhere"], "nowhere"),
    ],
)
def test_a_refused_start_leaves_no_folder(words: list[str], message: str, written: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        cli.run(["train", written, "--run", str(tmp_path / "a" / "b"), *words])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_a_run_path_that_cannot_be_a_folder(written: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be made"):
            cli.run(["train", written, "--run", str(path)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        cli.run(["train", written, "--run", str(tmp_path / "mine")])
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"thesis.txt"}


def test_a_start_that_fails_before_its_first_step_gives_the_name_back(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr("gptjax.train.loop._compile", out_of_memory)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        cli.run(["train", written, "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_resume_auto_starts_then_goes_on(written: str, tmp_path: Path, longer: list[float]) -> None:
    """As a pod that is restarted types it; also after a start that was killed before it had written the config."""
    run = tmp_path / "run"
    run.mkdir()
    (run / NAME).write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 - 1, "born": "1", "id": "x"}))
    (run / "meta.json").write_text("{")
    line = ["train", written, "--run", str(run), "--resume", "auto"]
    assert cli.run(line) == 0
    assert len(losses(run)) == 4
    assert cli.run([*line, *MORE]) == 0
    assert losses(run) == longer
    assert not (run / NAME).exists()


# What is pinned


def test_what_a_resume_changes_stays_changed(run: Path, longer: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Extend, stop, and type the printed command."""
    monkeypatch.setattr("gptjax.train.signals.StopFlag.agreed", lambda self: setattr(self, "number", 15) or True)
    assert resume(run, *MORE) == 143
    assert len(losses(run)) == 5
    monkeypatch.undo()
    assert resume(run) == 0
    assert losses(run) == longer
    starts = read_log(run / "history.jsonl")
    assert [start.get("changed", {}).get("train.total_tokens") for start in starts] == [
        None,
        [4 * STEP, 6 * STEP],
        None,
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("--model.remat", "full", "--model.attention", "reference", "--model.loss_chunk", "5"),
        ("--train.micro_batch_size", "16", "--layout", "tp"),
    ],
)
def test_what_changes_rounding_alone_is_taken_with_a_line(
    words: tuple[str, ...], run: Path, longer: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(run, *MORE, *words) == 0
    np.testing.assert_allclose(losses(run), longer, rtol=1e-5)
    said = capsys.readouterr().err
    for name in (word.removeprefix("--") for word in words[::2]):
        assert (f"{name}: the run has" in said) == (name != "layout")


def test_another_folder_for_a_run_that_goes_on_is_refused(run: Path) -> None:
    with pytest.raises(
        UserError, match=r"--run elsewhere with --resume .*: a run stays in its folder; leave --run out"
    ):
        resume(run, "--run", "elsewhere")


def test_a_ramp_goes_on_with_another_micro_batch(plain: Config) -> None:
    """The batches stay what they were: fewer chips than a micro-batch needs can go on in the middle of a ramp."""
    from gptjax.train.schedule import steps

    saved = folders.pinned(plain)
    given = replace(plain, train=replace(plain.train, micro_batch_size=4))
    config, (change,) = folders.going_on(saved, given, Path("run"))
    assert str(change) == "train.micro_batch_size: the run has 8, given 4"
    assert [*steps(config, 0, 0)] == [*steps(saved, 0, 0)]
    assert {size for _, _, size in steps(saved, 0, 0)} == {8, 16}


def test_a_decay_that_ends_with_the_training_goes_on_by_the_same_config(plain: Config) -> None:
    """The run knows the token at which that was; the config that it was started by, --resume auto's, says 0."""
    given = replace(plain, optimizer=replace(plain.optimizer, decay_tokens=0, warmup_tokens=0))
    saved = folders.pinned(replace(given, optimizer=replace(given.optimizer, decay_tokens=4096)))
    config, noted = folders.going_on(saved, given, Path("run"))
    assert (config, noted) == (saved, [])


def test_another_text_is_refused_and_the_same_elsewhere_is_not(
    run: Path, small: Config, longer: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(small.data.source).parent
    text = tmp_path / "moved"
    shutil.copytree(source, text)
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert resume(copy, *MORE, "--data.source", "moved/*.txt") == 0
    assert losses(copy) == longer
    for file in text.iterdir():
        file.write_text(file.read_text()[::-1])
    with pytest.raises(UserError, match=r"not the text that the run was trained on \(digest .*--new-data"):
        resume(run, *MORE, "--data.source", "moved/*.txt")
    before = (run / "config.json").read_text()
    assert resume(run, *MORE, "--data.source", "moved/*.txt", "--new-data") == 0
    assert losses(run)[:4] == longer[:4] and losses(run)[4:] != longer[4:]
    assert before != (run / "config.json").read_text()
    assert resume(run, "--train.total_tokens", str(7 * STEP)) == 0  # the new text is the run's now
    shutil.rmtree(text)
    with pytest.raises(UserError, match="no such file"):
        resume(run, "--train.total_tokens", str(8 * STEP))


@pytest.mark.slow
def test_a_run_goes_on_from_another_folder(
    small: Config, written: str, longer: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(small.data.source).parents[1])
    assert cli.run(["train", written, "--run", str(tmp_path / "run"), "--data.source", "corpus/*.txt"]) == 0
    monkeypatch.chdir(tmp_path)
    assert resume(Path("run"), *MORE) == 0
    assert losses(tmp_path / "run") == longer


def test_a_file_that_is_touched_does_not_reach_a_run(small: Config, tmp_path: Path) -> None:
    shutil.copytree(Path(small.data.source).parent, tmp_path / "text")
    data = replace(small.data, source=str(tmp_path / "text" / "*.txt"))
    task = Pretrain(replace(small, data=data), "cpu", corpus=build(data))
    first = task.evaluation_text[0].text
    for file in (tmp_path / "text").iterdir():
        file.write_text("nothing of this\n")
    assert task.evaluation_text[0].text == first
    assert build(data).digest != task.corpus.digest


def test_the_digest_is_of_content(small: Config, tmp_path: Path) -> None:
    """Not of paths and times; and of the borders between documents, too."""

    def digest(**files: str) -> str:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.txt").write_text(text)
        return build(replace(small.data, source=str(folder / "*.txt"))).digest

    same = digest(a="one two", b="three")
    assert same == digest(x="one two", y="three")
    assert len({same, digest(a="one two three"), digest(a="one twothree"), digest(a="one", b=" twothree")}) == 4


@pytest.mark.parametrize("name", ["config.json", "meta.json", "data.json"])
@pytest.mark.parametrize("cut", [0, 20])
def test_a_file_of_the_run_that_is_cut_short_is_one_line(name: str, cut: int, run: Path) -> None:
    (run / name).write_text((run / name).read_text()[:cut])
    with pytest.raises(UserError, match=rf"{name}: .*not whole JSON.*; ") as error:
        resume(run, *MORE)
    assert "\n" not in str(error.value)


def test_another_tokenizer_of_the_same_name_is_refused(run: Path, shared: Path) -> None:
    with pytest.raises(UserError, match="not the tokenizer of"):
        resume(run, *MORE, "--data.tokenizer", f"gpt2:{shared / 'gpt2-bpe'}")


# The dry run


def test_a_dry_run_writes_nothing_and_says_what_is_wrong(
    written: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = ["--data.cache_dir", str(tmp_path / "cache"), "--train.compile_cache", str(tmp_path / "xla")]
    assert cli.run(["train", written, "--dry-run", *cache]) == 0
    text = capsys.readouterr().out
    for word in (
        "runs/plain, new",
        "60 file(s)",
        "to be built in",
        "blockwise",
        "1 process(es) of 8 device(s)",
        "GB a",
    ):
        assert word in text
    assert cli.run(["train", written, "--dry-run", "--layout.fsdp", "3", "--model.vocab_size", "9", *cache]) == 1
    text = capsys.readouterr().out
    assert "WRONG: layout.fsdp = 3" in text and "WRONG: model.vocab_size = 9" in text and "60 file(s)" in text
    assert [*tmp_path.iterdir()] == []


def test_a_dry_run_of_a_resume(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert resume(run, "--dry-run", "--model.remat", "full") == 0
    text = capsys.readouterr().out
    assert "from step 4" in text and "model.remat: the run has 'none', given 'full'" in text
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("file", PATHS, ids=lambda file: file.stem)
def test_every_shipped_config_would_start_on_its_hardware(
    file: Path, corpus: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real process numbers of the pod that its header names, and GPT-2's own tokenizer (bytes for those
    whose own is not at hand)."""
    pod, _ = target(file)
    place = [] if pod.startswith("cpu") else ["--topology", pod]
    if place:
        from gptjax.planner.compile import available

        platform = "gpu" if pod.startswith("h100") else "tpu"
        if not available(platform):
            pytest.skip(f"needs the compiler of a {platform}: the extra tpu or cuda-aot")
    else:
        place = ["--layout.fsdp", "1", "--layout.data", "-1"] if "cpu" in file.stem else ["--layout.fsdp", "8"]
    words = ["--data.source", str(corpus / "*.txt")]
    if file.stem == "classify_cpu":
        sentences = tmp_path / "sentences.jsonl"
        names = shipped(file.stem, tmp_path).labels.names  # type: ignore[attr-defined]
        rows = [json.dumps({"text": f"a {i}", "label": names[i % len(names)]}) for i in range(200)]
        sentences.write_text("\n".join(rows) + "\n")
        words = [*start_words(file.stem, tmp_path), "--data.source", str(sentences)]
    elif start := start_words(file.stem, tmp_path):
        ranked = file.stem in ("reward", "dpo") or file.stem.startswith("ppo")
        data = "hh-harmless" if ranked else "gsm8k-train"
        words = [*start, "--data.source", str(shared / f"{data}.jsonl")]
    elif "gpt" in file.stem:
        words += ["--data.tokenizer", f"gpt2:{shared / 'gpt2-bpe'}"]
    elif file.stem in ("transformer_base", "translation_cpu"):
        words = ["--data.source", str(shared / "gsm8k-train.jsonl"), "--data.fields", "question,answer"]
    if file.stem.startswith(("llama", "bert", "roberta", "t5", "trans")):
        words += ["--data.tokenizer", "bytes"]
    if file.stem == "shakespeare_cpu":
        words += ["--train.batch_size", "24", "--data.lanes", "8", "--train.micro_batch_size", "24"]  # 8 devices here
    assert cli.run(["train", str(file), "--dry-run", *place, *words]) == 0, capsys.readouterr().out
    text = capsys.readouterr().out
    assert "a run would start" in text


@pytest.mark.parametrize(
    ("name", "pod", "slices", "layout", "hosts"),
    [  # what `gptjax plan` recommends
        ("gpt3_175b", "v5p-1024", 1, {"pipeline": 4, "fsdp": 8, "tensor": 16}, 128),
        ("gpt3_13b", "v5p-128", 2, {"replica": 2, "data": 1, "fsdp": 64, "tensor": 1}, 32),
    ],
)
def test_a_dry_run_of_a_layout_that_the_plan_recommends(
    name: str,
    pod: str,
    slices: int,
    layout: dict[str, int],
    hosts: int,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every host has its rows, and together they have all, each as often as the layout copies it."""
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    words = ["--layout.sequence_sharding", "true", "--data.source", str(corpus / "*.txt"), "--data.tokenizer", "bytes"]
    words += [word for axis, size in layout.items() for word in (f"--layout.{axis}", str(size))]
    words += ["--train.batch_size", "1024", "--train.micro_batch_size", "512", "--train.ramp_start", "512"]
    file = next(file for file in PATHS if file.stem == name)
    assert cli.run(["train", str(file), "--dry-run", "--topology", pod, "--slices", str(slices), *words]) == 0
    shares = re.findall(r"rows ([\d, -]+): process\(es\) ([\d, -]+)", capsys.readouterr().out)
    assert sorted(process for _, processes in shares for process in numbers(processes)) == [*range(hosts)]
    assert sorted(row for rows, _ in shares for row in numbers(rows)) == [*range(512)]


def numbers(spans: str) -> list[int]:
    """[0, 1, 2, 5] of 0-2, 5"""
    ends = [(part.split("-")[0], part.split("-")[-1]) for part in spans.split(", ")]
    return [number for first, last in ends for number in range(int(first), int(last) + 1)]


def test_where_there_is_no_git_the_environment_names_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container."""
    monkeypatch.delenv("GPTJAX_COMMIT", raising=False)
    here = folders.provenance()
    monkeypatch.setenv("PATH", str(tmp_path))
    there = folders.provenance()
    assert (there["commit"], there["modified"], there["code"]) == ("unknown", False, here["code"])
    monkeypatch.setenv("GPTJAX_COMMIT", "abc")
    assert folders.provenance()["commit"] == "abc"
