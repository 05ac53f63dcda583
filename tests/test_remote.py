"""Text in a bucket: what is copied, and what is read of it. The bucket is a stand-in, fake_gcs."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptjax import bucket
from gptjax.config import CorpusConfig, DataConfig, LeaksConfig, NearConfig, OriginConfig, RulesConfig
from gptjax.corpus.build import build
from gptjax.data.files import absolute
from gptjax.data.sources import look, open_source
from gptjax.errors import UserError

pytest.importorskip("gcsfs", reason="needs the extra bucket")
from fake_gcs import Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def put(server: Server, name: str, *texts: str) -> None:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    server.write("text", name, gzip.compress(data) if name.endswith(".gz") else data)


def texts(source: str, cache_dir: Path) -> list[str]:
    found = open_source(DataConfig(source=source, cache_dir=str(cache_dir), train_split="train"), "train")
    return [found[i].text for i in range(len(found))]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("gs://text/{}/a.jsonl", ["one", "two"]),
        ("gs://text/{}", ["one", "two", "three", "four"]),
        ("gs://text/{}/*.jsonl", ["one", "two"]),
        ("gs://text/{0}/*.gz,gs://text/{0}/deep/**", ["three", "four"]),
        ("gs://text/{0}/a.jsonl,{1}", ["one", "two", "here"]),
    ],
)
def test_a_file_a_folder_and_a_glob_are_read(source: str, found: list[str], server: Server, tmp_path: Path) -> None:
    folder = tmp_path.name
    put(server, f"{folder}/a.jsonl", "one", "two")
    put(server, f"{folder}/b.jsonl.gz", "three")
    put(server, f"{folder}/deep/c.jsonl", "four")
    (tmp_path / "here.txt").write_text("here")
    assert texts(source.format(folder, tmp_path / "here.txt"), tmp_path / "cache") == found


def test_a_copy_is_made_once_and_follows_the_bucket(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []
    there = bucket.download
    monkeypatch.setattr(bucket, "download", lambda name, path: (copied.append(name), there(name, path)))
    put(server, "moves/a.jsonl", "one")
    put(server, "moves/b.jsonl", "two")
    assert texts("gs://text/moves", tmp_path) == texts("gs://text/moves", tmp_path) == ["one", "two"]
    assert sorted(copied) == ["text/moves/a.jsonl", "text/moves/b.jsonl"]
    put(server, "moves/a.jsonl", "six")  # as many bytes
    server.delete("text", "moves/b.jsonl")
    (tmp_path / "buckets/text/moves/.c.jsonl.7").write_text("another process copies this")
    assert look(DataConfig(source="gs://text/moves", cache_dir=str(tmp_path)))[1] is None
    assert (tmp_path / "buckets/text/moves/b.jsonl").exists()  # a look removes nothing
    assert texts("gs://text/moves", tmp_path) == ["six"]
    assert (tmp_path / "buckets/text/moves/.c.jsonl.7").exists()
    assert len(copied) == 3 and not (tmp_path / "buckets/text/moves/b.jsonl").exists()


def test_a_dry_look_copies_nothing(server: Server, tmp_path: Path) -> None:
    put(server, "look/a.jsonl", "one")
    said, corpus = look(DataConfig(source="gs://text/look", cache_dir=str(tmp_path / "cache")))
    assert "1 file(s), of which 1, 0.0 MB, are to be copied to" in said and corpus is None
    assert not (tmp_path / "cache").exists()


def test_a_copy_that_is_stopped_leaves_no_half_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(name: str, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    put(server, "full/a.jsonl", "one")
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "download", full)
        with pytest.raises(UserError, match=r"cannot write copies of gs://text/full \(No space left on device\); free"):
            texts("gs://text/full", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert texts("gs://text/full", tmp_path) == ["one"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("gs://text/none", "gs://text/none: no such file, nor one below it"),
        ("gs://text/none/*.jsonl", r"gs://text/none/\*\.jsonl: no such file"),
        ("gs://nobucket/a.jsonl", "gs://nobucket/a.jsonl: no such file"),
        (
            "s3://text/a.jsonl",
            "s3://text/a.jsonl: neither a path nor gs://BUCKET/FOLDER, the only buckets that are read",
        ),
    ],
)
def test_what_is_not_there_is_one_line(source: str, said: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        texts(source, tmp_path)


def test_names_that_lead_elsewhere_are_refused(server: Server, tmp_path: Path) -> None:
    put(server, "evil/../../up.jsonl", "one")
    with pytest.raises(UserError, match=r"\.\. is no name"):
        texts("gs://text/evil/*/*/*", tmp_path)


def test_a_data_set_is_built_from_a_bucket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(server, "raw/a.jsonl", "how many ships are there in the harbour of the town", "some other words")
    put(server, "evals/e.jsonl", "How many ships are there?")
    made = CorpusConfig(
        "far",
        (OriginConfig("web", "gs://text/raw/*.jsonl"),),
        rules=RulesConfig(quality=False, repetition=False),
        leaks=LeaksConfig(("gs://text/evals/e.jsonl",), ngram=5),
        near=NearConfig(on=False),
    )
    folder = build(made, tmp_path / "out")
    assert texts(f"tfds:{folder}", tmp_path / "cache") == ["some other words"]


def test_an_address_is_the_same_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("gs://text/run/a.jsonl, b.jsonl") == f"gs://text/run/a.jsonl,{tmp_path / 'b.jsonl'}"
