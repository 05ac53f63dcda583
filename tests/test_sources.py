"""Records come back, mistakes are one line, nothing is half-written. Run: pytest tests/test_sources.py"""

import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data.cache import SIZES
from gptjax.data.sources import open_source
from gptjax.data.store import Record, cut
from gptjax.errors import UserError


@pytest.fixture
def config(tmp_path):
    """DataConfig of a source in tmp_path; `files` are written first."""

    def make(source: str, files: dict[str, bytes] | None = None, **fields) -> DataConfig:
        for name, data in (files or {}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        source = source if source == "stdlib" or source.startswith("tfds:") else str(tmp_path / source)
        return DataConfig(**{"source": source, "cache_dir": str(tmp_path / "cache")} | fields)

    return make


def read(config: DataConfig, split: str = "train") -> list[Record]:
    source = open_source(config, split)
    return [source[i] for i in range(len(source))]


def fails(config: DataConfig, *words: str, split: str = "train") -> None:
    """Opening raises a one-line UserError with these words, and leaves nothing in the cache."""
    cache = Path(config.cache_dir) / "datasets"
    before = set(cache.rglob("*"))
    with pytest.raises(UserError) as error:
        open_source(config, split)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert set(cache.rglob("*")) - {cache} == before - {cache}


@given(st.lists(st.text(max_size=20)), st.integers(1, 9))
def test_cut_keeps_the_text_and_marks_one_last(blocks, max_chars):
    records = list(cut(blocks, max_chars))
    text = "".join(blocks)
    assert "".join(r.text for r in records) == text
    assert [r.last for r in records] == [False] * (len(records) - 1) + [True] * bool(text)
    assert [len(r.text) for r in records[:-1]] == [max_chars] * (len(records) - 1)
    assert all(1 <= len(r.text) <= max_chars for r in records)


def test_text_files_in_order_exactly(config):
    files = {"b.txt": "β\r\n\0\tend".encode(), "a.txt": b"first", "c/d.md": b"deep", "e.txt": b""}
    made = config("**/*.*", files)
    assert read(made) == [Record("first", True), Record("β\r\n\0\tend", True), Record("deep", True)]


def test_a_long_file_in_pieces_and_its_slices(config):
    text = "".join(f"{i:04d}é" for i in range(1000))
    made = config("long.txt", {"long.txt": text.encode()}, max_chars=50)
    records = read(made)
    assert records == [Record(text[i : i + 50], i == 4950) for i in range(0, 5000, 50)]
    by_position = config("long.txt", max_chars=50, split_by="position")
    first = read(by_position, "train[:90%]")
    assert first == [*records[:89], replace(records[89], cut=True)] and read(by_position, "train[90%:]") == records[90:]
    assert [r.text for r in read(by_position, "train[7%:9.5%]")] == [r.text for r in records[7:9]]
    with pytest.raises(IndexError):
        open_source(made, "train")[100]


def test_multibyte_characters_across_blocks(config, monkeypatch):
    monkeypatch.setattr("gptjax.data.formats.BLOCK_BYTES", 7)
    text = "a😀é東" * 20
    assert read(config("x.txt", {"x.txt": text.encode()})) == [Record(text, True)]
    fails(config("y.txt", {"y.txt": text.encode() + b"\xff tail"}), "y.txt", f"byte {len(text.encode())};")
    fails(config("z.txt", {"z.txt": text.encode() + "é".encode()[:1]}), "z.txt", f"byte {len(text.encode())};")


def test_jsonl_and_parquet(config, tmp_path):
    texts = ["one\n", "two " * 9, "drei ß"]
    lines = "\n\n".join(json.dumps({"body": text, "id": 1}) for text in texts)
    assert read(config("a.jsonl", {"a.jsonl": lines.encode()}, text_field="body")) == [Record(t, True) for t in texts]
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"body": texts, "id": [1, 2, 3]}), tmp_path / "a.parquet"
    )
    made = config("a.parquet", text_field="body", max_chars=20)
    assert read(made) == [r for text in texts for r in cut([text], 20)]
    fails(config("a.parquet", text_field="bodi"), "data.text_field = bodi", "a.parquet", "nearest body")
    fails(config("a.parquet", text_field="id"), "a.parquet row 0", "id is int")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{oops", ["a.jsonl:2", "not JSON"]),
        (b"[1]", ["a.jsonl:2", "not a JSON object"]),
        (b'{"txt": "x", "z": 1}', ["data.text_field = text", "a.jsonl:2", "nearest txt"]),
        (b'{"text": null}', ["a.jsonl:2", "text is null"]),
        (b'{"text": "\\ud800"}', ["a.jsonl:2", "surrogate"]),
        (b'{"text": "\xff"}', ["a.jsonl:2", "not JSON"]),
    ],
)
def test_broken_jsonl(config, line, words):
    fails(config("a.jsonl", {"a.jsonl": b'{"text": "fine"}\n' + line}), *words)


def test_files_that_are_missing_empty_or_broken(config, tmp_path):
    fails(config("none.txt"), "none.txt", "no such file")
    fails(config("none*.txt"), "none*.txt", "glob")
    fails(config("empty.txt", {"empty.txt": b""}), "empty.txt", "no text in 1 file")
    (tmp_path / "hollow").mkdir()
    fails(config("hollow"), "hollow: an empty folder")
    fails(config("bad.parquet", {"bad.parquet": b"junk"}), "bad.parquet", "not readable as parquet")


def test_splits_that_are_empty_or_unknown(config):
    made = config("one.txt", {"one.txt": b"a b c"})
    assert len(read(made, "train")) == 1
    fails(made, "split train[5%:2%]: empty, as", "1 document(s) of 1 record(s)", "split_by", split="train[5%:2%]")
    made = config("one.txt", split_by="position")
    fails(made, "split train[95%:]: empty", "a lower data.max_chars", split="train[95%:]")
    for split in ("valid", "train[", "train[5:9]", "train[:99999]", "train[:200%]", "train[:-5%]", "train[5%]"):
        fails(made, f"split {split}:", "in percent such as train[:95%]", split=split)


def test_splits_are_fair_samples_of_whole_documents(config):
    """Of four languages in four files, with each text twice: one side has both, and a part of every language."""
    files = {
        f"{language}.jsonl": "".join(
            json.dumps({"text": f"{language} {i // 2} " + "x" * (i % 4 // 2 * 90)}) + "\n" for i in range(1000)
        ).encode()
        for language in ("de", "en", "fr", "ru")
    }
    made = config("*.jsonl", files, max_chars=40)
    parts = {split: read(made, split) for split in ("train", "train[:90%]", "train[90%:]", "train[99.5%:]")}
    documents = {
        split: "".join(r.text + "\n" * r.last for r in records).splitlines() for split, records in parts.items()
    }
    left, right = documents["train[:90%]"], documents["train[90%:]"]
    assert sorted(left + right) == sorted(documents["train"]) and not set(left) & set(right)
    assert not any(r.cut for r in parts["train[:90%]"])
    for language in ("de", "en", "fr", "ru"):
        assert 60 <= sum(text.startswith(language) for text in right) <= 140  # 100 and 4 standard deviations
    assert 0 < len(documents["train[99.5%:]"]) < 50
    added = config("*.jsonl", {"it.jsonl": b'{"text": "nuovo"}'}, max_chars=40)
    assert {r.text for r in parts["train[90%:]"]} <= {r.text for r in read(added, "train[90%:]")}


def test_standard_library(config):
    source = open_source(config("stdlib"), "train[:3%]")
    assert len(source) > 5 and source.name == "stdlib"
    rest = open_source(config("stdlib"), "train")
    assert len(rest) > 10 * len(source)
    assert {source[i].text for i in range(len(source))} < {rest[i].text for i in range(len(rest))}


def test_built_once_until_a_file_or_a_setting_changes(config, tmp_path):
    made = config("a.txt", {"a.txt": b"some text"})
    cache = tmp_path / "cache" / "datasets"
    read(made)
    (folder,) = cache.glob("[!.]*")
    stamp = folder.stat().st_mtime_ns, [f.stat().st_mtime_ns for f in folder.iterdir() if f.name != SIZES]
    read(made)
    assert stamp == (folder.stat().st_mtime_ns, [f.stat().st_mtime_ns for f in folder.iterdir() if f.name != SIZES])
    assert read(config("a.txt", {"a.txt": b"some texts"})) == [Record("some texts", True)]
    assert read(config("a.txt", max_chars=5)) == [Record("some ", False), Record("texts", True)]
    assert len(list(cache.glob("[!.]*"))) == 3


def test_builders_at_the_same_time_agree(config):
    made = config("a.txt", {"a.txt": b"0123456789" * 2000}, max_chars=10)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(read(made)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2000] * 4
    assert len(list((Path(made.cache_dir) / "datasets").glob("[!.]*"))) == 1


def python(code: str, *args: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("limit", [500, 8_000, 100_000])
def test_a_full_disk_leaves_nothing(config, limit):
    # A file-size limit fails the same writes as a full disk: the metadata, the last chunk, or any chunk.
    made = config("a.txt", {"a.txt": os.urandom(150_000).hex().encode()}, max_chars=15_000)
    if limit == 8_000:
        made = config("a.txt", {"a.txt": os.urandom(9_000).hex().encode()})
    code = """
import resource, sys
from gptjax.config import DataConfig
from gptjax.data.sources import open_source
from gptjax.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    open_source(DataConfig(source=sys.argv[1], cache_dir=sys.argv[2]), "train")
except UserError as error:
    print(error)
"""
    out = python(code, made.source, made.cache_dir, str(limit))
    assert out.startswith(f"data.cache_dir = {made.cache_dir}: cannot write") and out.count("\n") == 1, out
    assert list((Path(made.cache_dir) / "datasets").iterdir()) == []
    assert len("".join(r.text for r in read(made))) in (300_000, 18_000)


@pytest.fixture
def catalogue(tmp_path, monkeypatch):
    """TFDS's own data folder, empty."""
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def prepare(folder: Path, **splits: list[bytes]) -> None:
    """A data set of TFDS's own, as its writers leave it."""
    import tensorflow_datasets as tfds

    folder.mkdir(parents=True)
    version = tfds.core.Version(folder.name)
    identity = tfds.core.dataset_info.DatasetIdentity(folder.parent.name, version, str(folder), __name__)
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "about": {"body": tfds.features.Text()}})
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2, file_format="array_record")
    writer.initialize_splits([*splits])
    for split, texts in splits.items():
        writer.add_examples({split: [{"text": text, "about": {"body": b"<" + text + b">"}} for text in texts]})
    writer.close_all()


def test_prepared_tfds_data_set(config, catalogue, monkeypatch):
    prepare(catalogue / "my_corpus" / "1.0.0", train=[b"one", b"two" * 9, b"three"], test=["vier é".encode()])
    made = config("tfds:my_corpus", max_chars=20, eval_split="test")
    assert read(made) == [Record("one", True), *cut(["two" * 9], 20), Record("three", True)]
    assert read(made, "test") == [Record("vier é", True)]
    halves = [read(made, "train[:50%]"), read(made, "train[50%:]")]
    assert sorted(r.text for half in halves for r in half) == sorted(r.text for r in read(made))
    nested = config("tfds:my_corpus", text_field="about.body")
    assert [r.text for r in read(nested)] == ["<one>", f"<{'two' * 9}>", "<three>"]
    monkeypatch.setattr("gptjax.data.build.PART_BYTES", 8)  # a part for each row
    again = config("tfds:my_corpus", max_chars=20, eval_split="test", cache_dir=made.cache_dir + "2")
    assert open_source(again, "test").store.digest == open_source(made, "test").store.digest
    fails(config("tfds:my_corpus", text_field="txt"), "data.text_field = txt", "tfds:my_corpus", "nearest text")
    assert len(read(config("tfds:my_corpus"))) == 3
    fails(config("tfds:my_corpus"), "split valid", "give train", split="valid")
    fails(config("tfds:my_corpus", eval_split="valid"), "split valid", "give train or test")


def test_tfds_text_that_is_not_utf8_is_said_before_a_run(config, catalogue):
    prepare(catalogue / "my_corpus" / "1.0.0", train=[b"one", b"t\xffwo", b"three"])
    fails(config("tfds:my_corpus"), "tfds:my_corpus train record 1", "text is not UTF-8 at byte 1")


def test_tfds_names(config, catalogue):
    fails(config("tfds:lm1"), "data.source = tfds:lm1", "nearest tfds:lm1b")
    fails(config("tfds:lm1b/no_such"), "data.source = tfds:lm1b/no_such")
    fails(config("tfds:lm1b", text_field="txt"), "data.text_field = txt", "nearest text")
    fails(config("tfds:mnist", text_field="label"), "data.text_field = label", "a ClassLabel, not text")
    fails(config("tfds:squad", text_field="answers"), "data.text_field = answers", "Sequence, not text")
    fails(config("tfds:squad", text_field="context.x"), "data.text_field = context.x", "not in tfds:squad")


def test_tfds_without_network(config, catalogue, monkeypatch):
    """Said at the first look-up: TFDS itself retries for minutes."""

    def offline(host, *_):
        raise socket.gaierror(f"{host}: name or service not known\nlong story")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    fails(config("tfds:lm1b"), "data.source = tfds:lm1b", "name or service not known", "network", str(catalogue))


@pytest.mark.slow
def test_memory_is_flat_over_a_large_file(config, tmp_path):
    line = "".join(f"{i} bottles of beer on the wall\n" for i in range(33_000)).encode()  # 1 MB
    with (tmp_path / "big.txt").open("wb") as file:
        for _ in range(200):
            file.write(line)
    made = config("big.txt")
    code = """
import resource, sys
from gptjax.config import DataConfig
from gptjax.data.sources import open_source
from gptjax.data.stream import TokenStream
from gptjax.data.tokenizers import load_tokenizer
import grain
open_source(DataConfig(source=sys.argv[3], cache_dir=sys.argv[2]), "train")  # all that is imported late
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_source(DataConfig(source=sys.argv[1], cache_dir=sys.argv[2]), "train")
stream = TokenStream(source, load_tokenizer("bytes"), 1024, lanes=4, seed=0, micro_batch=1024)
for _ in range(200):
    stream.batch(1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    (tmp_path / "small.txt").write_text("small")
    grown = float(python(code, made.source, made.cache_dir, str(tmp_path / "small.txt")))
    print(f"{grown:.0f} MB more for 200 MB of text")
    assert grown < 150
