"""Text is built on all cores, and their number changes nothing but the time. Run: pytest tests/test_build.py"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gptjax import terminal
from gptjax.config import DataConfig
from gptjax.data import build as builds
from gptjax.data import cache, pool, sources
from gptjax.data.files import TextFile
from gptjax.data.formats import TextField, documents, in_spans
from gptjax.data.sources import build, open_source
from gptjax.data.store import Record, cut
from gptjax.errors import UserError
from gptjax.terminal import Progress

LINES = st.lists(
    st.one_of(st.just(""), st.just("  "), st.text(max_size=30).map(lambda text: json.dumps({"text": text}))),
    max_size=12,
)


@pytest.fixture
def many(tmp_path: Path) -> DataConfig:
    """300 KB in files of three kinds, large and small, one of them compressed."""
    texts = [f"{i} " + "word " * (i * 7919 % 300) for i in range(400)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(lines[:300]))
    parquet.write_table(pyarrow.table({"text": texts[300:380]}), folder / "b.parquet", row_group_size=9)
    for i in range(380, 400):
        (folder / f"c{i}.txt").write_text(texts[i])
    return DataConfig(source=str(folder), cache_dir=str(tmp_path / "cache"), max_chars=700)


def texts_of(config: DataConfig) -> list[Record]:
    source = open_source(config, "train")
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("part_bytes", [1 << 10, 1 << 15])
def test_parts_and_cores_change_nothing(many, monkeypatch, tmp_path, cores, part_bytes):
    plain = texts_of(many)
    assert plain == [
        record for i in range(400) for record in cut([f"{i} " + "word " * (i * 7919 % 300)], many.max_chars)
    ]
    monkeypatch.setattr(builds, "PART_BYTES", part_bytes)
    monkeypatch.setattr(pool, "ALONE_BYTES", 0)
    monkeypatch.setattr(sources, "cores", lambda: cores)
    heard = []
    other = replace(many, cache_dir=str(tmp_path / "other"))
    made = build(other, lambda *words: heard.append(words))
    assert texts_of(other) == plain and Path(made.place).name == Path(build(many).place).name
    assert len([*Path(made.place).glob("text-*")]) > (20 if part_bytes < 1 << 15 else 3)
    assert {what for what, _, _ in heard} == {"building"} and all(a[1] <= b[1] for a, b in pairwise(heard))
    assert 0.9 < heard[-1][1] / heard[-1][2] <= 1


@settings(max_examples=200, deadline=None)
@given(LINES, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 60), st.booleans())
def test_lines_in_spans_are_the_lines(tmp_path_factory, lines, ending, ends, span_bytes, mark):
    path = tmp_path_factory.getbasetemp() / "spans.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + (ending.join(lines) + ending * ends).encode())
    spans = in_spans(TextFile(path, "jsonl"), span_bytes)
    assert sum(size for _, size in spans) == path.stat().st_size
    found = [text for span, _ in spans for (text,) in documents(span, TextField("text"))]
    assert found == [json.loads(line)["text"] for line in lines if line.strip()]


def test_a_mistake_is_named_with_its_line_whatever_the_span(tmp_path, monkeypatch):
    lines = [json.dumps({"text": "x" * (i * 31 % 90)}) for i in range(100)]
    for wrong in (0, 1, 50, 99):
        path = tmp_path / f"{wrong}.jsonl"
        path.write_text("\n".join([*lines[:wrong], "{oops", *lines[wrong + 1 :]]))
        for span_bytes in (7, 64, 500, 10_000):
            with pytest.raises(UserError, match=rf"{wrong}\.jsonl:{wrong + 1}: not JSON"):
                for span, _ in in_spans(TextFile(path, "jsonl"), span_bytes):
                    list(documents(span, TextField("text")))
    parquet.write_table(pyarrow.table({"text": [*["x"] * 40, None]}), tmp_path / "a.parquet", row_group_size=5)
    with pytest.raises(UserError, match=r"a\.parquet row 40: text is null"):
        for span, _ in in_spans(TextFile(tmp_path / "a.parquet", "parquet"), 100):
            list(documents(span, TextField("text")))


@pytest.fixture
def processes(monkeypatch):
    """Two of them, and small parts."""
    monkeypatch.setattr(builds, "PART_BYTES", 1 << 14)
    monkeypatch.setattr(pool, "ALONE_BYTES", 0)
    monkeypatch.setattr(sources, "cores", lambda: 2)


def test_the_first_mistake_of_several_is_said_and_nothing_left(many, processes, tmp_path):
    folder = Path(many.source)
    (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text() + "{oops\n")
    (folder / "c399.txt").write_bytes(b"\xff")
    for _ in range(3):
        with pytest.raises(UserError, match=r"a\.jsonl:301: not JSON"):
            build(many)
    assert [path.name for path in cache.datasets(many.cache_dir).iterdir()] == []


def test_a_process_that_dies_is_said_and_the_next_build_goes_on(many, processes, monkeypatch):
    ask = pool._ask

    def killed(worker, task, heard):
        if task.number == 5:
            worker.kill()
        ask(worker, task, heard)

    monkeypatch.setattr(pool, "_ask", killed)
    with pytest.raises(UserError, match=r"process that built part 5 of it ended with status -9.*goes on from there"):
        build(many)
    (entry,) = cache.entries(many.cache_dir)
    assert entry.state == cache.UNFINISHED and [*entry.folder.glob("table-*")]
    monkeypatch.setattr(pool, "_ask", ask)
    assert len(texts_of(many)) >= 400
    assert [entry.state for entry in cache.entries(many.cache_dir)] == [cache.WHOLE]


WITHOUT_GUARD = """
import resource, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background does not have
from gptjax import terminal
from gptjax.config import DataConfig
from gptjax.data import build, pool, sources
from gptjax.errors import UserError
from gptjax.terminal import Progress
build.PART_BYTES, pool.ALONE_BYTES, sources.cores = 1 << 20, 0, lambda: 2
if sys.argv[3] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    config = DataConfig(source=sys.argv[1], cache_dir=sys.argv[2])
    made = sources.build(config, lambda what, *_: print(what, flush=True))
    print(len(made.store))
except UserError as error:
    print(error)
"""


@pytest.fixture
def large(tmp_path: Path) -> DataConfig:
    line = json.dumps({"text": "some words " * 400}) + "\n"
    (tmp_path / "large.jsonl").write_text(line * 10_000)  # 44 MB
    return DataConfig(source=str(tmp_path / "large.jsonl"), cache_dir=str(tmp_path / "cache"))


def script(config: DataConfig, limit: int = 0) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", WITHOUT_GUARD, config.source, config.cache_dir, str(limit)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_full_disk_of_a_process_is_said(large):
    """A file-size limit, which the processes inherit, stands for the disk."""
    running = script(large, 500_000)
    out = running.communicate(timeout=60)[0]
    assert out.splitlines()[-1].startswith(f"data.cache_dir = {large.cache_dir}: cannot write the data set (File too")
    assert [*cache.datasets(large.cache_dir).iterdir()] == []


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.whole), signal.SIGINT]
)
def test_no_process_outlives_its_parent(large, number):
    running = script(large)
    assert running.stdout and running.stdout.readline() == "building\n"
    workers = children(running.pid)
    assert len(workers) == 2
    running.send_signal(number)
    assert running.wait(20) == -number
    end = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    (entry,) = cache.entries(large.cache_dir)
    assert entry.state == cache.UNFINISHED
    running.stdout.close()
    assert script(large).communicate(timeout=60)[0].splitlines()[-1] == "10000"
    assert os.listdir(cache.datasets(large.cache_dir) / cache.KEYS) != []


def test_progress_is_said_line_by_line_where_there_is_no_terminal(monkeypatch, capsys):
    with Progress() as quick:
        quick("building", 5_000_000, 5_000_000)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(terminal, "SHOW_AFTER", 0.0)
    monkeypatch.setattr(terminal, "SAY_EVERY", 0.0)
    with Progress() as progress:
        progress("waiting for process 7, which builds it", 0, 1)
        progress("building", 3_000_000, 4_000_000)
    waiting, building, built = capsys.readouterr().err.splitlines()
    assert waiting == "waiting for process 7, which builds it"
    assert building.startswith("building: 3 MB in 0 s, ") and building.endswith(" MB/s, 75%")
    assert built.startswith("building: 3 MB in 0 s, ")
