"""Data sets that were built: whole, damaged, or stopped on the way. Run: pytest tests/test_cache.py"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptjax import cli
from gptjax.config import DataConfig
from gptjax.data import cache
from gptjax.data.sources import build, open_source
from gptjax.errors import UserError

SLOW = """
import sys, time
from gptjax.config import DataConfig
from gptjax.data import sources
written = sources.cut
def slowly(document, max_chars):
    for record in written(document, max_chars):
        yield record
        print("one", flush=True)
        time.sleep(0.01)
sources.cut = slowly
sources.build(DataConfig(source=sys.argv[1], cache_dir=sys.argv[2], max_chars=1000))
"""


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "a.txt").write_text("0123456789" * 100_000)
    return DataConfig(source=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"), max_chars=1000)


def texts(config: DataConfig) -> str:
    source = open_source(config, "train")
    return "".join(source[i].text for i in range(len(source)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_stopped_build_leaves_goes_with_the_next(config, number):
    words = [sys.executable, "-c", SLOW, config.source, config.cache_dir]
    building = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert building.stdout and building.stdout.readline() == "one\n"
    (folder,) = cache.datasets(config.cache_dir).iterdir()
    assert folder.name.startswith(".") and cache.entries(config.cache_dir) == []  # being built, so not to be pruned
    assert cache.prune(config.cache_dir, 0) == [] and folder.is_dir()
    building.send_signal(number)
    assert building.wait(20) == -number
    building.stdout.close()
    assert [entry.state for entry in cache.entries(config.cache_dir)] == [cache.UNFINISHED]
    assert len(texts(config)) == 1_000_000
    assert [entry.state for entry in cache.entries(config.cache_dir)] == [cache.WHOLE]


@pytest.mark.parametrize("how", ["missing", "short", "no list", "half a list"])
def test_a_data_set_with_a_file_missing_or_cut_is_built_again(config, how):
    folder = build(config).folder
    records = next(folder.glob("*array_record*"))
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
    folder = build(config).folder
    records = next(folder.glob("*array_record*"))
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
    one = build(config).folder
    (tmp_path / "b.txt").write_text("another")
    other = build(DataConfig(source=str(tmp_path / "b.txt"), cache_dir=config.cache_dir)).folder
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
