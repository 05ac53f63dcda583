"""Conversations in every published form come back as messages; what is none is one line. Run: pytest
tests/test_dialogues.py"""

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gptjax.config import DataConfig, DialogueConfig
from gptjax.data import build as builds
from gptjax.data import cache, pool, sources
from gptjax.data.chat import Message
from gptjax.data.dialogues import Dialogue, Dropped, parse
from gptjax.data.sources import AnySource, build, dropped, left_out, look
from gptjax.errors import UserError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
Turns = list[tuple[str, str]]

TALKS: list[Turns] = [
    [(USER, "Hi"), (ASSISTANT, " Hello,\n\nßweet 東京 😀 ")],
    [(SYSTEM, "Be kind."), (USER, "One"), (ASSISTANT, "Two"), (USER, "Three\n"), (ASSISTANT, '"Four"')],
]
PAIRS: list[Turns] = [[(USER, "2 + 2?"), (ASSISTANT, "It is\n\n4. ")], [(USER, " ß\n"), (ASSISTANT, "東京")]]


def as_messages(talk: Turns, role: str = "role", content: str = "content", names: dict[str, str] | None = None) -> Any:
    return [{role: (names or {}).get(who, who), content: said} for who, said in talk]


SHAREGPT = {USER: "human", ASSISTANT: "gpt"}
FORMS: dict[str, tuple[list[dict[str, Any]], list[Turns], dict[str, Any]]] = {
    "messages": ([{"id": 1, "messages": as_messages(talk)} for talk in TALKS], TALKS, {}),
    "sharegpt": ([{"conversations": as_messages(talk, "from", "value", SHAREGPT)} for talk in TALKS], TALKS, {}),
    "named": ([{"talk": as_messages(talk)} for talk in TALKS], TALKS, {"fields": ("talk",)}),
    "nested": ([{"a": {"talk": as_messages(talk)}} for talk in TALKS], TALKS, {"fields": ("a.talk",)}),
    "lists": ([{"talk": [{"turns": as_messages(talk)}]} for talk in TALKS], TALKS, {"fields": ("talk.0.turns",)}),
    "chosen": ([{"chosen": as_messages(talk), "rejected": as_messages(TALKS[0])} for talk in TALKS], TALKS, {}),
    "joined": (
        [{"prompt": as_messages(talk[:-1]), "completion": as_messages(talk[-1:])} for talk in TALKS],
        TALKS,
        {},
    ),
}
FLAT: dict[str, tuple[list[dict[str, Any]], list[Turns], dict[str, Any]]] = {
    "completion": ([{"prompt": p, "completion": r} for (_, p), (_, r) in PAIRS], PAIRS, {}),
    "response": ([{"response": r, "id": "7", "prompt": p} for (_, p), (_, r) in PAIRS], PAIRS, {}),
    "question": ([{"question": p, "answer": r} for (_, p), (_, r) in PAIRS], PAIRS, {}),
    "named": ([{"in": p, "out": r} for (_, p), (_, r) in PAIRS], PAIRS, {"fields": ("in", "out")}),
    "instruction": (
        [
            {"instruction": "Add.", "input": "2, 2", "output": "4"},
            {"instruction": " Add ", "input": "", "output": " 5"},
        ],
        [[(USER, "Add.\n\n2, 2"), (ASSISTANT, "4")], [(USER, " Add "), (ASSISTANT, " 5")]],
        {},
    ),
    "no input": ([{"instruction": p, "output": r} for (_, p), (_, r) in PAIRS], PAIRS, {}),
    "three": (
        [{"do": "Add.", "with": "2, 2", "done": "4"}],
        [[(USER, "Add.\n\n2, 2"), (ASSISTANT, "4")]],
        {"fields": ("do", "with", "done")},
    ),
    "transcript": (
        [{"chosen": "\n\nHuman: Hi \n\nAssistant: A\n\nB Human: C\n\nHuman:D\n\nAssistant: E\n", "rejected": "x"}],
        [[(USER, "Hi"), (ASSISTANT, "A\n\nB Human: C"), (USER, "D"), (ASSISTANT, "E")]],
        {},
    ),
}


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, [*rows[0]])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def columns(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=1)
    return out.getvalue()


def stream(rows: list[dict[str, Any]]) -> bytes:
    out, made = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(out, made.schema) as writer:
        writer.write_table(made)
    return out.getvalue()


NESTED = {"jsonl": lines, "json": lambda rows: json.dumps(rows, indent=1).encode(), "parquet": columns, "arrow": stream}
WRITERS = NESTED | {"csv": table}


@pytest.fixture
def config(tmp_path):
    """DialogueConfig of one file, or of a source of that name where there is no data."""

    def make(name: str, data: bytes | None = None, **fields: Any) -> DialogueConfig:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        source = name if name.startswith("tfds:") or name == "stdlib" else str(tmp_path / name)
        return DialogueConfig(**{"source": source, "cache_dir": str(tmp_path / "cache")} | fields)

    return make


def read(config: DialogueConfig) -> list[list[Message] | Dropped]:
    source = build(config).split("train", "document")
    return [parse(source[number].text) for number in range(len(source))]


def said(talks: list[Turns]) -> list[list[Message]]:
    return [[Message(*turn) for turn in talk] for talk in talks]


def fails(config: DialogueConfig, *words: str) -> None:
    """Building raises a one-line UserError with these words, and leaves nothing in the cache."""
    root = cache.datasets(config.cache_dir)
    before = {*root.rglob("*")}
    with pytest.raises(UserError) as error:
        build(config)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert {*root.rglob("*")} - {root} == before - {root}


@pytest.mark.parametrize("ending", NESTED)
@pytest.mark.parametrize("form", FORMS)
def test_messages_in_every_kind_of_file(config, form, ending):
    rows, talks, fields = FORMS[form]
    assert read(config(f"a.{ending}", NESTED[ending](rows), **fields)) == said(talks)


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("form", FLAT)
def test_texts_in_every_kind_of_file(config, form, ending):
    rows, talks, fields = FLAT[form]
    assert read(config(f"a.{ending}", WRITERS[ending](rows), **fields)) == said(talks)


def test_a_record_of_lists_is_a_list_of_records(config):
    """As `datasets` writes a Sequence of records."""
    rows = [{"messages": {"role": [who for who, _ in talk], "content": [text for _, text in talk]}} for talk in TALKS]
    assert read(config("a.parquet", columns(rows))) == said(TALKS)
    assert read(config("a.jsonl", lines(rows))) == said(TALKS)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
TALK = st.builds(
    lambda system, pairs: [*system, *(turn for ask, say in pairs for turn in ((USER, ask), (ASSISTANT, say)))],
    st.lists(TEXT.map(lambda text: (SYSTEM, text)), max_size=1),
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(TALK, min_size=1, max_size=5), st.sampled_from(["jsonl", "json", "parquet", "arrow"]))
def test_messages_come_back_as_they_were_written(tmp_path_factory, talks, ending):
    folder = tmp_path_factory.mktemp("talks")
    (folder / f"a.{ending}").write_bytes(NESTED[ending]([{"messages": as_messages(talk)} for talk in talks]))
    assert read(DialogueConfig(source=str(folder), cache_dir=str(folder / "cache"))) == said(talks)


ROW = {"messages": [{"role": USER, "content": "Hi"}, {"role": ASSISTANT, "content": "Hello"}]}
BAD: list[tuple[Any, str]] = [
    ({"messages": []}, "no message"),
    ({"messages": None}, "messages is null, neither messages nor text"),
    ({"messages": "Hi"}, "a text that does not begin with Human: or Assistant:, so no transcript"),
    ({"messages": {"role": ["user"], "content": []}}, "messages is dict, neither messages nor text"),
    ({"messages": ["Hi"]}, "a message without role and content, or from and value"),
    ({"messages": [{"role": "user", "text": "Hi"}]}, "a message without role and content, or from and value"),
    ({"messages": [{"role": "user", "content": None}]}, "content is null, not text"),
    ({"messages": [{"role": 3, "content": "Hi"}]}, "role is int, not text"),
    ({"messages": as_messages([(USER, "Hi")])}, "no assistant turn"),
    ({"messages": as_messages([(USER, "Hi"), (ASSISTANT, "Hello"), (USER, "?")])}, "ends with user"),
    ({"messages": as_messages([(USER, "Hi"), (USER, "?")])}, "roles out of order: user after user"),
    ({"messages": as_messages([(ASSISTANT, "Hi")])}, "roles out of order: assistant first"),
    ({"messages": as_messages([(USER, "\n"), (ASSISTANT, "Hello")])}, "empty message"),
    ({"messages": as_messages([(USER, "Hi"), (ASSISTANT, "\ud800")])}, "half a character"),
    ({"messages": as_messages([(USER, "Hi"), ("tool", "?")])}, "unknown role tool"),
    ({"messages": as_messages([(USER, "Hi"), ("\ud800", "?")])}, "unknown role"),
    ({"prompt": "Hi", "completion": None}, "completion is null, not text"),
    ({"prompt": "Hi", "completion": ""}, "empty message"),
    ({"prompt": "Hi", "txt": "Hello"}, "no known form (set data.fields) among its fields prompt, txt"),
    ({}, "no known form (set data.fields) among its fields none"),
    ([1], "list, not an object with fields"),
    ({"chosen": "Human: Hi\n\nAssistant: Hello\n\nAssistant: ?"}, "roles out of order: assistant after assistant"),
    ({"chosen": "See.\n\nHuman: Hi\n\nAssistant: Hello"}, "a text that does not begin with Human: or Assistant:"),
    ({"a\nb" * 99: 1}, "no known form (set data.fields) among its fields a ba"),
]


@pytest.mark.parametrize(("row", "why"), BAD)
def test_what_is_no_conversation_is_named_with_its_place(config, row, why):
    fails(config("a.jsonl", lines([ROW, row])), "a.jsonl:2: " + why, "data.invalid drop")
    kept, left = read(config("a.jsonl", invalid="drop"))
    assert kept == [Message(USER, "Hi"), Message(ASSISTANT, "Hello")]
    assert isinstance(left, Dropped) and left.reason.startswith(why) and len(left.reason) <= 200


def test_dropped_rows_are_counted_by_reason(config):
    made = config("a.jsonl", lines([*(row for row, _ in BAD for _ in range(3)), ROW]), invalid="drop")
    corpus = build(made)
    counts = dropped(corpus.split("train", "document"))
    assert counts.total() == 3 * len(BAD) and counts["empty message"] == 6 and len(corpus.store) == 3 * len(BAD) + 1
    halves = [dropped(corpus.split(name, "document")) for name in ("train[:50%]", "train[50%:]")]
    assert halves[0] + halves[1] == counts


def test_a_text_that_says_a_reason_is_no_reason(config):
    rows = [{"prompt": '"', "completion": '"empty message"'}]
    corpus = build(config("a.jsonl", lines(rows), invalid="drop"))
    assert dropped(corpus.split("train", "document")) == Counter()


def test_nothing_but_dropped_rows_is_an_error(config):
    made = config("a.jsonl", lines([{"promt": "Hi"}] * 3), fields=("prompt", "completion"), invalid="drop")
    for _ in range(2):  # also of the data set that is there
        with pytest.raises(UserError, match=r"all of its 3 records are dropped, the first for: no field prompt "):
            build(made)


@pytest.mark.parametrize("invalid", ["refuse", "drop"])
def test_mistakes_of_a_file_are_errors_in_any_case(config, invalid):
    drop = {"invalid": invalid}
    fails(config("a.jsonl", lines([ROW]) + b"{oops", **drop), "a.jsonl:2: not JSON")
    fails(config("b.jsonl", lines([ROW]) + b'{"prompt": "\xff"}', **drop), "b.jsonl:2: not JSON")
    fails(config("a.csv", b"prompt,completion\nHi\n", **drop), "a.csv:2: not the 2 columns")
    fails(config("a.parquet", b"junk", **drop), "a.parquet: not readable as parquet")
    bad = columns([{"prompt": b"Hi", "completion": b"Hello"}, {"prompt": b"Hi", "completion": b"\xff"}])
    fails(config("b.parquet", bad, **drop), "b.parquet row 1: a text is not UTF-8 at byte 0")
    fails(config("c.parquet", columns([{"id": 1, "txt": "x"}]), **drop), "c.parquet: no known form", "fields id, txt")
    some = columns([{"prompt": "Hi", "reply": "x"}])
    fails(config("d.parquet", some, fields=("prompt", "repl"), **drop), "data.fields = repl", "nearest reply")
    fails(config("b.csv", b"prompt,txt\nHi,x\n", **drop), "b.csv: no known form", "among its fields prompt, txt")


def test_plain_text_is_no_conversation(config, tmp_path):
    fails(config("a.txt", b"Hi"), "a.txt: not one of the kinds read (.jsonl .ndjson .json")
    fails(config("*.txt"), "1 .txt; read are .jsonl")
    fails(config("stdlib"), "stdlib")
    (tmp_path / "talks").mkdir()
    (tmp_path / "talks" / "a.jsonl").write_bytes(lines([ROW]))
    (tmp_path / "talks" / "notes.md").write_text("about them")
    made = config("talks")
    assert len(read(made)) == 1 and left_out(made) == "1 file(s) left out: 1 .md"


def test_a_conversation_is_one_record_however_long(config):
    long = [{"prompt": "é" * 200_000, "completion": "y" * 300_000}] * 3
    made = config("a.jsonl", lines(long))
    assert "to be built" in look(made)[0]
    corpus = build(made)
    assert len(corpus.store) == len(corpus.store.documents) == 3
    with pytest.raises(UserError, match=r"of 3 record\(s\); take other splits$"):
        corpus.split("train[1%:1.0001%]", "document")
    there = look(made)[1]
    assert there and there.digest == corpus.digest


def test_parts_and_cores_change_nothing(config, monkeypatch):
    rows = [{"prompt": f"{i} " * (i % 40 + 1), "completion": "" if i % 7 == 0 else f"say {i}"} for i in range(900)]
    made = config("a.jsonl", lines(rows), invalid="drop")
    plain, digest = read(made), build(made).digest
    assert sum(isinstance(each, Dropped) for each in plain) == 129
    monkeypatch.setattr(builds, "PART_BYTES", 1 << 12)
    monkeypatch.setattr(pool, "ALONE_BYTES", 0)
    for ending in ("jsonl", "parquet"):
        again = config(f"b.{ending}", WRITERS[ending](rows), invalid="drop")
        assert build(again, processes=2).digest == digest and read(again) == plain


def test_settings_make_another_data_set(config):
    made = config("a.jsonl", lines([ROW | {"other": "Human: 1\n\nAssistant: 2"}]))
    assert read(made) == [[Message(USER, "Hi"), Message(ASSISTANT, "Hello")]]
    assert read(config("a.jsonl", fields=("other",))) == [[Message(USER, "1"), Message(ASSISTANT, "2")]]
    assert read(config("a.jsonl", invalid="drop")) == read(made)
    fails(config("a.jsonl", fields=("othre",)), "a.jsonl:1: no field othre (data.fields) among messages, other")


def test_text_that_was_built_before_is_found():
    """Keys of the version before conversations came."""
    keys: list[tuple[AnySource, Any, str]] = [
        (DataConfig(source="x"), [["/a.jsonl", "jsonl", 7, 1.5]], "dd90d42275c2df20"),
        (DataConfig(source="x", text_field="meta.body", max_chars=1000), ["id", ["train"]], "10100f7916f160f6"),
    ]
    for config, what, key in keys:
        assert sources._key(config, what) == key


def prepare(folder: Path, features: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A data set of TFDS's own, as its writers leave it."""
    import tensorflow_datasets as tfds

    folder.mkdir(parents=True)
    version = tfds.core.Version(folder.name)
    identity = tfds.core.dataset_info.DatasetIdentity(folder.parent.name, version, str(folder), __name__)
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": rows})
    writer.close_all()


def test_tfds_data_sets(config, tmp_path, monkeypatch):
    from tensorflow_datasets import features
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    turn = {"role": features.Text(), "content": features.Text()}
    rows, talks, _ = FORMS["messages"]
    prepare(
        tmp_path / "tfds" / "talks" / "1.0.0",
        {"messages": features.Sequence(turn), "id": features.Scalar(np.int64)},
        rows,
    )
    made = {"eval_split": "train"}
    assert read(config("tfds:talks", **made)) == said(talks)
    rows, talks, _ = FLAT["completion"]
    spec = {"prompt": features.Text(), "completion": features.Text()}
    prepare(tmp_path / "tfds" / "pairs" / "1.0.0", spec, [*rows, {"prompt": "Hi", "completion": ""}])
    fails(config("tfds:pairs", **made), "tfds:pairs train record 2: empty message", "data.invalid drop")
    assert read(config("tfds:pairs", invalid="drop", **made)) == [*said(talks), Dropped("empty message")]
    assert read(config("tfds:talks", fields=("messages.0.content", "messages.1.content"), **made))[0] == said(TALKS)[0]
    monkeypatch.setattr("gptjax.data.catalogue.prepare", None)  # said before anything is prepared
    fails(config("tfds:pairs", fields=("promt", "completion"), **made), "data.fields = promt: not in tfds:pairs")
    fails(config("tfds:mnist", **made), "tfds:mnist: no known form", "among its fields image, label")


def test_real_files_are_read_whole(shared, tmp_path):
    def found(name: str, **fields: Any) -> list[list[Message] | Dropped]:
        return read(DialogueConfig(source=str(shared / name), cache_dir=str(tmp_path), **fields))

    def rows(name: str) -> list[Any]:
        return [json.loads(line) for line in (shared / name).read_text().splitlines()]

    sums = [[Message(USER, row["question"]), Message(ASSISTANT, row["answer"])] for row in rows("gsm8k-train.jsonl")]
    assert found("gsm8k-train.jsonl") == sums and len(sums) == 7473

    tasks = []
    for row in rows("alpaca-seed-tasks.jsonl"):
        more, reply = row["instances"][0]["input"], row["instances"][0]["output"]
        ask = row["instruction"] + (f"\n\n{more}" if more else "")
        tasks.append([Message(USER, ask), Message(ASSISTANT, reply)])
    fields = ("instruction", "instances.0.input", "instances.0.output")
    assert found("alpaca-seed-tasks.jsonl", fields=fields) == tasks and len(tasks) == 175

    talks = found("hh-harmless.jsonl", invalid="drop")
    expected: Counter[str] = Counter()
    for row, talk in zip(rows("hh-harmless.jsonl"), talks, strict=True):
        names = re.findall(r"\n\n(Human|Assistant):", row["chosen"])
        texts = re.split(r"\n\n(?:Human|Assistant):", row["chosen"])[1:]
        in_turn = names == ["Human", "Assistant"] * (len(names) // 2)
        expected["kept" if in_turn and all(map(str.strip, texts)) else "order" if not in_turn else "empty"] += 1
        if isinstance(talk, list):
            assert [message.content for message in talk] == [text.strip() for text in texts]
    reasons = Counter("kept" if isinstance(talk, list) else talk.reason for talk in talks)
    assert expected == {"kept": 1791, "order": 5, "empty": 4} and reasons["kept"] == expected["kept"]
    assert reasons["empty message"] == expected["empty"]
    assert sum(count for why, count in reasons.items() if why.startswith("roles out of order")) == expected["order"]
    with pytest.raises(UserError, match=r"hh-harmless\.jsonl:\d+: (empty message|roles out of order)"):
        found("hh-harmless.jsonl")


def test_the_text_of_a_record_is_as_it_is_documented():
    made = Dialogue((), "drop")
    assert made.document({"prompt": "Hi", "completion": "Ölo\n"}, "here") == r'[["user","Hi"],["assistant","Ölo\n"]]'
    assert made.document({"prompt": "Hi", "completion": " "}, "here") == '"empty message"'
