"""Data sets that were built: whole, damaged, or stopped on the way. Run: pytest tests/test_cache.py"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gptjax import cli
from gptjax.config import DataConfig
from gptjax.data import cache
from gptjax.data.sources import build, open_source
from gptjax.errors import UserError

SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background does not have
from gptjax.config import DataConfig
from gptjax.data import build, sources, store
build.PART_BYTES = 1 << 14
written = store.cut
def slowly(document, max_chars):
    for record in written(document, max_chars):
        yield record
        print("one", flush=True)
        time.sleep(0.01)
store.cut = slowly
sources.build(DataConfig(source=sys.argv[1], cache_dir=sys.argv[2], max_chars=1000), lambda what, *_: print(what))
"""


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "a.txt").write_text("0123456789" * 100_000)
    return DataConfig(source=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"), max_chars=1000)


def texts(config: DataConfig) -> str:
    source = open_source(config, "train")
    return "".join(source[i].text for i in range(len(source)))


def folders(config: DataConfig) -> list[Path]:
    return [path for path in cache.datasets(config.cache_dir).iterdir() if path.name != cache.KEYS]


def started(config: DataConfig, code: str = SLOW) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", code, config.source, config.cache_dir]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def said(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout
    while (found := process.stdout.readline()) != line + "\n":
        assert found, f"ended before it said {line}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_build_that_was_stopped_goes_on(tmp_path, number, monkeypatch):
    lines = [json.dumps({"text": f"document {i} " + "x" * 3000}) + "\n" for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    config = DataConfig(source=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"), max_chars=1000)
    building = started(config)
    said(building, "one")
    (folder,) = folders(config)
    assert folder.name.startswith(".") and cache.entries(config.cache_dir) == []  # being built, so not to be pruned
    assert cache.prune(config.cache_dir, 0) == [] and folder.is_dir()
    while not list(folder.glob("table-00003*")):
        time.sleep(0.01)
    building.send_signal(number)
    assert building.wait(20) == (-number if number != signal.SIGINT else -signal.SIGINT)
    building.stdout.close()
    assert [entry.state for entry in cache.entries(config.cache_dir)] == [cache.UNFINISHED]
    (folder,) = folders(config)
    before = {table.name: (folder / f"text-{table.name[6:11]}").stat().st_ino for table in folder.glob("table*")}
    assert len(before) >= 4
    monkeypatch.setattr("gptjax.data.build.PART_BYTES", 1 << 14)
    source = open_source(config, "train")
    after = {name: (source.store.folder / f"text-{name[6:11]}").stat() for name in before}
    assert {name: stat.st_ino for name, stat in after.items()} == before
    whole = replace(config, cache_dir=str(tmp_path / "other"))
    assert source.store.digest == build(whole).digest and [r.text for r in source] == [
        r.text for r in open_source(whole, "train")
    ]
    assert [entry.state for entry in cache.entries(config.cache_dir)] == [cache.WHOLE]


def test_of_two_builders_one_waits(config):
    one = started(config)
    said(one, "one")
    other = started(config)
    said(other, f"waiting for process {one.pid}, which builds it")
    assert other.wait(60) == 0 and one.wait(60) == 0
    assert [entry.state for entry in cache.entries(config.cache_dir)] == [cache.WHOLE]
    for process in (one, other):
        process.stdout.close()


@pytest.mark.parametrize("how", ["missing", "short", "no list", "half a list"])
def test_a_data_set_with_a_file_missing_or_cut_is_built_again(config, how):
    folder = Path(build(config).place)
    records = folder / "text-00000"
    if how == "missing":
        records.unlink()
    elif how == "short":
        os.truncate(records, 1000)
    elif how == "no list":
        (folder / cache.SIZES).unlink()
    else:
        os.truncate(folder / cache.SIZES, 9)
    assert [entry.state for entry in cache.entries(config.cache_dir)] == [cache.DAMAGED]
    assert len(texts(config)) == 1_000_000 and cache.flaw(folder) == ""


def test_a_flipped_byte_is_named_with_its_remedy(config, capsys):
    folder = Path(build(config).place)
    records = folder / "text-00000"
    data = bytearray(records.read_bytes())
    for place in (len(data) // 3, len(data) // 2):
        data[place] ^= 255
    records.write_bytes(data)
    with pytest.raises(UserError, match=f"damaged .*gptjax data --cache --remove {folder.name}, and it is built again"):
        texts(config)
    assert cli.run(["data", "--cache", "--remove", folder.name, *_cache_of(config)]) == 0
    assert not folder.exists() and len(texts(config)) == 1_000_000


def _cache_of(config: DataConfig) -> list[str]:
    return ["--cache-dir", config.cache_dir]


def test_the_cache_is_listed_and_pruned(config, tmp_path, capsys):
    one = Path(build(config).place)
    (tmp_path / "b.txt").write_text("another")
    other = Path(build(DataConfig(source=str(tmp_path / "b.txt"), cache_dir=config.cache_dir)).place)
    week = time.time() - 7 * cache.DAY
    os.utime(one / cache.SIZES, (week, week))
    assert cli.run(["data", "--cache", *_cache_of(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == [one.name, other.name, str(one.parent)]
    assert "whole" in lines[0] and "used   7.0 days ago" in lines[0]
    assert cli.run(["data", "--cache", "--prune", "5", *_cache_of(config)]) == 0
    assert capsys.readouterr().out.startswith(f"removed {one.name}, ")
    assert not one.exists() and other.exists()
    build(DataConfig(source=str(tmp_path / "b.txt"), cache_dir=config.cache_dir))  # a use
    for words, message in {
        ("--cache", "--remove", "nothing"): "--remove nothing: not in",
        (): "CONFIG is missing",
        ("x.py", "--prune", "3"): "go with --cache",
    }.items():
        with pytest.raises(UserError, match=message):
            cli.run(["data", *words, *(_cache_of(config) if "--cache" in words else [])])
