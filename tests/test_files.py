"""Files as people have them: kinds, compression, links, folders. Run: pytest tests/test_files.py"""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from gptjax.config import DataConfig
from gptjax.data import files
from gptjax.data.formats import TextField, documents
from gptjax.errors import UserError

TEXTS = ["one\n", 'two "quoted", and\r\na comma\t' * 3, "drei ß 東京 😀", "[1]", " x" * 90_000]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: b"".join(map(zstandard.compress, (data[: len(data) // 2], data[len(data) // 2 :]))),
}
"""Zstd in two frames, as pzstd and appending tools write it."""


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n\n" for i, text in enumerate(texts)).encode()


def table(texts: list[str], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue().encode()


def arrow(texts: list[str], new) -> bytes:
    out = io.BytesIO()
    columns = pyarrow.table({"id": range(len(texts)), "text": texts})
    with new(out, columns.schema) as writer:
        writer.write_table(columns, max_chunksize=2)
    return out.getvalue()


def rows(texts: list[str], **columns: object) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts} | columns), out, row_group_size=2)
    return out.getvalue()


KINDS = {
    "a.jsonl": lines,
    "a.ndjson": lines,
    "lines.json": lines,
    "pretty.json": lambda texts: json.dumps([{"text": text} for text in texts], indent=2).encode(),
    "objects.json": lambda texts: "\n".join(json.dumps({"text": t}, indent=1) for t in texts).encode(),
    "a.csv": lambda texts: table(texts, ","),
    "a.tsv": lambda texts: table(texts, "\t"),
    "a.parquet": rows,
    "stream.arrow": lambda texts: arrow(texts, pyarrow.ipc.new_stream),
    "file.arrow": lambda texts: arrow(texts, pyarrow.ipc.new_file),
}


def read(source: Path | str, **fields: str) -> list[str]:
    config = DataConfig(source=str(source), **fields)
    return [
        "".join(text) for file in files.find(config).files for text in documents(file, TextField(config.text_field))
    ]


def fails(source: Path | str, *words: str, **fields: str) -> None:
    with pytest.raises(UserError) as error:
        read(source, **fields)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_documents(tmp_path, name, ending):
    for each in (name + ending, (name + ending).upper()):
        path = tmp_path / each
        path.write_bytes(PACK[ending](KINDS[name](TEXTS)))
        assert read(path) == TEXTS
        path.unlink()


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_plain_text_is_one_document(tmp_path, name, ending):
    text = "é\r\n\0" * 400_000
    (tmp_path / (name + ending)).write_bytes(PACK[ending](text.encode()))
    assert read(tmp_path / (name + ending)) == [text]


@pytest.mark.parametrize("name", [*(name for name in KINDS if "arrow" not in name and "parquet" not in name), "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    data = KINDS[name](TEXTS) if name in KINDS else "one\ufeff".encode()
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
    assert read(tmp_path / name) == (TEXTS if name in KINDS else ["one\ufeff"])


def test_a_snapshot_of_links_is_read_by_its_names(tmp_path):
    """As Hugging Face's cache lays it out: blobs without endings, and two revisions that share one."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    for folder in (blobs, snapshot / "data", tmp_path / "snapshots" / "old"):
        folder.mkdir(parents=True)
    for name, link in {"a.jsonl": "data/train.jsonl", "a.parquet": "data/more.parquet"}.items():
        (blobs / name.replace(".", "")).write_bytes(KINDS[name](TEXTS))
        (snapshot / link).symlink_to(blobs / name.replace(".", ""))
    (tmp_path / "snapshots" / "old" / "same.jsonl").symlink_to(blobs / "ajsonl")
    assert read(snapshot) == TEXTS * 2
    assert read(tmp_path / "snapshots" / "**" / "*.jsonl") == TEXTS
    (snapshot / "data" / "gone.jsonl").symlink_to(blobs / "nothing")
    fails(snapshot, "gone.jsonl is a link to a file that is not there")


def test_what_describes_records_is_none_of_them(tmp_path):
    """A data set's card in a snapshot, and what `datasets` writes beside its tables; a folder of text keeps its own."""
    revision = tmp_path / "datasets--me--talk" / "snapshots" / ("a1" * 20)
    (revision / "data").mkdir(parents=True)
    (revision / "data" / "train.jsonl").write_bytes(KINDS["a.jsonl"](TEXTS))
    (revision / "README.md").write_text("---\nlicense: mit\n---\n")
    (revision / "data" / "state.json").write_text('{"_data_files": []}')
    found = files.find(DataConfig(source=str(revision)))
    assert read(revision) == TEXTS and found.name == "datasets__me__talk"
    assert found.note() == "2 file(s) left out: 1 README.md, 1 state.json"
    assert files.find(DataConfig(source=str(revision / "data" / "*.jsonl"))).name == "datasets__me__talk"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("read me")
    assert read(tmp_path / "docs") == ["read me"]
    assert len(read(f"{revision / 'README.md'},{revision}")) == len(TEXTS) + 1  # named, so meant


def test_lists_folders_and_globs_name_each_file_once(tmp_path):
    for name in ("b.txt", "a.txt", "c/d.md", "c/.hidden.txt", "e,f.txt", "g.PNG", "c/h.tar.gz", "c/Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c" / "up").symlink_to(tmp_path)
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "b.txt")
    assert read(tmp_path) == ["a.txt", "b.txt", "e,f.txt", "c/d.md"]
    assert read(f"{tmp_path}/b.txt, {tmp_path}/c,{tmp_path}/*.txt") == ["b.txt", "c/d.md", "a.txt", "e,f.txt"]
    assert read(tmp_path / "e,f.txt") == ["e,f.txt"]
    found = files.find(DataConfig(source=str(tmp_path)))
    assert found.left_out == {".png": 1, ".tar.gz": 1, "": 1}
    assert found.note() == "3 file(s) left out: 1 without ending, 1 .png, 1 .tar.gz"
    fails(tmp_path / "g.PNG", "g.PNG: not one of the kinds read (.txt .md .jsonl", "data.format")
    fails(tmp_path / "*.PNG", "1 .png", "read are .txt")
    assert read(tmp_path / "*.PNG", format="text") == ["g.PNG"]
    assert files.absolute("x.txt, ~/y") == f"{Path.cwd()}/x.txt,{Path.home()}/y"


def test_a_dotted_field_reaches_into_records(tmp_path):
    nested = [{"meta": {"body": text}} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, nested)))
    (tmp_path / "flat.jsonl").write_text("\n".join(json.dumps({"meta.body": text}) for text in TEXTS))
    parquet.write_table(pyarrow.Table.from_pylist(nested), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet", "flat.jsonl"):
        assert read(tmp_path / name, text_field="meta.body") == TEXTS
    fails(tmp_path / "a.jsonl", "data.text_field = meta.boddy", "a.jsonl:1", "nearest body", text_field="meta.boddy")
    fails(tmp_path / "a.jsonl", "meta.body.x: meta.body is str in", "a.jsonl:1", text_field="meta.body.x")
    fails(tmp_path / "a.jsonl", "a.jsonl:1: meta is dict, not text", text_field="meta")


def test_columns_of_other_types(tmp_path):
    texts = ["a", "ß"]
    for values in (
        pyarrow.array(texts, pyarrow.large_string()),
        pyarrow.array(texts).dictionary_encode(),
        pyarrow.array([text.encode() for text in texts]),
    ):
        (tmp_path / "a.parquet").write_bytes(rows(texts, text=values))
        assert read(tmp_path / "a.parquet") == texts
    for values, words in {
        (b"fine", b"\xff"): "row 1: text is not UTF-8 at byte 0",
        ("fine", None): "row 1: text is null",
        (1, 2): "row 0: text is int",
    }.items():
        (tmp_path / "a.parquet").write_bytes(rows(["", ""], text=list(values)))
        fails(tmp_path / "a.parquet", "a.parquet", words)


@pytest.mark.parametrize("ending", [ending for ending in PACK if ending])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_a_file_cut_short_or_disguised_is_named(tmp_path, name, ending):
    data = KINDS[name](TEXTS) if name in KINDS else "".join(TEXTS).encode()
    path = tmp_path / (name + ending)
    packed = PACK[ending](data)
    path.write_bytes(packed[: -len(packed) // 3])
    fails(path, str(path), f"not readable as {files.COMPRESSIONS[ending]}")
    path.write_bytes(data)
    fails(path, str(path), f"not {files.COMPRESSIONS[ending]}, which its ending says")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n' + b'{"a":' * 100_000, "a.jsonl:2: nested too deep"),
        ("a.json", b'[\n{"text": "x"},\n' + b"[" * 200_000, "a.json:3: nested too deep"),
        ("a.json", b'[\n{"text": "x"},\n{"text": ]', "a.json:3: not JSON"),
        ("a.json", b'[\n{"text": "x"},\n', "a.json:3: not JSON (an array without its end)"),
        ("a.json", b'{"text": "x"}\n\n3', "a.json:3: not a JSON object"),
        ("a.json", b'{"text": "x"}\n{"txt": "x"}', "a.json:2; nearest txt"),
        ("a.csv", b'id,text\n1,fine\n2,"open\n', "not csv"),
        ("a.csv", b"id,text\n1\n", "a.csv:2: not the 2 columns"),
        ("a.csv", b"id,text\n1,a,b\n", "a.csv:2: not the 2 columns"),
        ("a.csv", b"id,txt\n1,a\n", "nearest txt"),
        ("a.csv", b"id,text\n1,\xff\n", "not UTF-8"),
        ("a.parquet", b"PAR1 junk", "not readable as parquet"),
        ("a.arrow", b"ARROW1 junk", "not readable as arrow"),
        ("a.arrow", b"junk", "not readable as arrow"),
        ("a.txt", b"\xff\xfea\0", "not UTF-8 at byte 0"),
    ],
)
def test_what_is_no_document_is_named_with_its_place(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    fails(tmp_path / name, name, words)
