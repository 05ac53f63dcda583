"""Pairs in every published form come back as they were written, and as ids to read and to write; what is none is one
line. Run: pytest tests/test_pairs.py"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gptjax.config import DataConfig, DialogueConfig, PairConfig, PromptConfig
from gptjax.data.examples import ExampleFeed, eval_batches, measure
from gptjax.data.paired import PairRows, Pairs, open_pairs
from gptjax.data.pairs import Pair, parse
from gptjax.data.rows import PADDING
from gptjax.data.sources import build
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.errors import UserError

Make = Callable[..., PairConfig]
START, END, LEAD = 300, 301, (302, 303)
S, T = 16, 12


def write(path: Path, rows: list[Any]) -> None:
    """By the ending of its name."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(out.getvalue(), newline="")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


@pytest.fixture
def config(tmp_path: Path) -> Make:
    """PairConfig of a file of these records, all of which are in its one split."""

    def make(rows: list[Any], name: str = "a.jsonl", **fields: Any) -> PairConfig:
        write(tmp_path / name, rows)
        return PairConfig(source=str(tmp_path / name), cache_dir=str(tmp_path / "cache"), **fields)

    return make


def opened(
    config: PairConfig, tokenizer: Tokenizer, lengths: tuple[int, int] = (S, T), lead: tuple[int, ...] = LEAD
) -> Pairs:
    return open_pairs(config, build(config).split("train", "document"), tokenizer, START, END, lead, *lengths)


# Records


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"source": " One ", "target": "Eins\n"}, ()),
        ({"document": " One ", "summary": "Eins\n", "id": 3}, ()),
        ({"article": " One ", "highlights": "Eins\n", "id": "x"}, ()),
        ({"input": " One ", "output": "Eins\n"}, ()),
        ({"text": " One ", "summary": "Eins\n", "title": "?"}, ()),
        ({"prompt": " One ", "completion": "Eins\n"}, ()),
        ({"completion": "no", "prompt": "no", "target": "Eins\n", "source": " One "}, ()),
        ({"output": "no", "text": " One ", "summary": "Eins\n"}, ()),
        ({"a": "Eins\n", "b": " One ", "source": "no", "target": "no"}, ("b", "a")),
        ({"translation": {"en": " One ", "de": "Eins\n"}}, ("translation.en", "translation.de")),
        ({"translation.de": "Eins\n", "x": [{"y": " One "}]}, ("x.0.y", "translation.de")),
        ({"en": b" One ", "de": b"Eins\n"}, ("en", "de")),
    ],
)
def test_a_record_is_a_pair_in_each_form(row: Any, fields: tuple[str, ...]) -> None:
    assert Pair(fields, "refuse").document(row, "here:1") == r'[" One ","Eins\n"]'


BAD: list[tuple[Any, str]] = [
    ({"source": "", "target": "a"}, "source is empty"),
    ({"source": "a", "target": " \n"}, "target is empty"),
    ({"source": None, "target": "a"}, "source is null, not text"),
    ({"source": "a", "target": 4}, "target is int, not text"),
    ({"source": ["a"], "target": "a"}, "source is list, not text"),
    ({"source": "\ud800", "target": "a"}, "source has half a character (a lone surrogate)"),
    ({"source": "a"}, "no known form (set data.fields) among its fields source"),
    ({"output": "a"}, "no known form (set data.fields) among its fields output"),
    ({}, "no known form (set data.fields) among its fields none"),
    ([1], "list, not an object with fields"),
]


@pytest.mark.parametrize(("row", "why"), BAD)
def test_what_is_no_pair_is_named_with_its_place_or_left_out(config: Make, row: Any, why: str) -> None:
    assert json.loads(Pair((), "drop").document(row, "here:1")) == why
    with pytest.raises(UserError, match=re.escape(f"a.jsonl:2: {why}; mend it, or leave such")) as error:
        build(config([{"source": "a", "target": "b"}, row]))
    assert "with data.invalid drop" in str(error.value) and "\n" not in str(error.value)


def test_fields_that_are_not_there_are_named(config: Make) -> None:
    row = {"translation": {"en": "One"}}
    with pytest.raises(UserError, match=r"a\.jsonl:1: no field translation\.de \(data\.fields\) among translation;"):
        build(config([row], fields=("translation.en", "translation.de")))
    with pytest.raises(UserError, match=r"data\.fields = de: not in .*a\.parquet; nearest en"):
        build(config([{"en": "One"}], "a.parquet", fields=("en", "de")))
    with pytest.raises(UserError, match=r"a\.csv: no known form \(set data\.fields\) among its fields en, de"):
        build(config([{"en": "One", "de": "Eins"}], "a.csv"))
    with pytest.raises(ValueError, match="give two fields, source,target"):
        config([row], fields=("translation",))


def test_dropped_records_are_counted_by_reason(config: Make, tokenizer: Tokenizer) -> None:
    made = config([{"source": "a", "target": "b"}, *(row for row, _ in BAD for _ in range(2))], invalid="drop")
    found = opened(made, tokenizer)
    assert len(found) == 1 and found.left_out == Counter({why: 2 for _, why in BAD})
    with pytest.raises(UserError, match="all of its 1 records are dropped, the first for: source is empty; mend them"):
        build(config([BAD[0][0]], "b.jsonl", invalid="drop"))


def test_the_same_file_is_another_data_set_as_pairs(config: Make) -> None:
    made = config([{"prompt": "Hi", "completion": "Yes"}])
    shared = {"source": made.source, "cache_dir": made.cache_dir}
    others = DialogueConfig(**shared), PromptConfig(**shared), replace(made, fields=("completion", "prompt"))
    texts = [build(each).store[0].text for each in (made, *others)]
    assert texts[0] == '["Hi","Yes"]' and texts[3] == '["Yes","Hi"]' and len({*texts}) == 4


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
PAIRS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(PAIRS, st.sampled_from(["jsonl", "parquet", "csv"]))
def test_pairs_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], ending: str
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    if ending == "csv":  # of which a NUL is no part
        pairs = [(a.replace("\0", "."), b.replace("\0", ".")) for a, b in pairs]
    write(folder / f"a.{ending}", [{"source": a, "target": b} for a, b in pairs])
    source = build(PairConfig(source=str(folder), cache_dir=str(folder / "cache"))).split("train", "document")
    assert [parse(source[number].text) for number in range(len(source))] == pairs


def test_two_languages_of_a_nested_table_and_of_the_catalogue(
    config: Make, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    texts = [("One", "Eins"), ("Two é", "Zwei ß"), ("Three", "Drei")]
    nested = config([{"translation": {"en": en, "de": de}} for en, de in texts], "a.parquet")
    nested = replace(nested, fields=("translation.en", "translation.de"))
    assert [opened(nested, tokenizer).pair(i) for i in range(3)] == texts

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    folder = tmp_path / "tfds" / "my_talks" / "1.0.0"
    folder.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity("my_talks", tfds.core.Version("1.0.0"), str(folder), __name__)
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.Translation(["en", "de"]))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [{"en": en, "de": de} for en, de in texts]})
    writer.close_all()
    prepared = replace(nested, source="tfds:my_talks", fields=("en", "de"))
    assert [opened(prepared, tokenizer).pair(i) for i in range(3)] == texts
    with pytest.raises(UserError, match=r"data\.fields = fr: not in tfds:my_talks; nearest .*"):
        build(replace(prepared, fields=("en", "fr")))


# Rows


def test_a_row_is_what_is_read_and_what_is_to_be_written(config: Make, tokenizer: Tokenizer) -> None:
    found = opened(config([{"source": "ab", "target": "xyz"}], prefix="P:"), tokenizer)
    assert found.pair(0) == ("P:ab", "xyz") and found.num_cut == 0
    row = found.row([0])
    assert row.source.tolist() == [*LEAD, *b"P:ab", END, *[0] * (S - 7)]
    assert row.source_segments.tolist() == [0] * 7 + [1] * (S - 7)
    assert row.tokens.tolist() == [START, *LEAD, *b"xyz", *[0] * (T - 6)]
    assert row.targets.tolist() == [*LEAD, *b"xyz", END, *[PADDING] * (T - 6)]
    assert row.segments.tolist() == [0] * 6 + [1] * (T - 6)
    empty = found.row(())
    assert {leaf.dtype for leaf in (*row, *empty)} == {np.dtype(np.int32)}
    assert [leaf.shape for leaf in empty] == [leaf.shape for leaf in row] == [(S,), (S,), (T,), (T,), (T,)]
    assert (empty.targets == PADDING).all() and empty.source_segments.all() and empty.segments.all()
    assert not empty.source.any() and not empty.tokens.any()


@settings(max_examples=25, deadline=None)
@given(PAIRS, st.integers(4, 30), st.integers(4, 30), st.sampled_from(["", "say: "]), st.sampled_from([(), LEAD]))
def test_ids_are_the_tokenizers_whole_cut_or_left_out(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[str, str]],
    source_len: int,
    target_len: int,
    prefix: str,
    lead: tuple[int, ...],
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    write(folder / "a.jsonl", [{"source": a, "target": b} for a, b in pairs])
    config = PairConfig(source=str(folder / "a.jsonl"), cache_dir=str(folder / "cache"), prefix=prefix)
    wanted = [([*lead, *(prefix + a).encode(), END], [*lead, *b.encode(), END]) for a, b in pairs]
    long = [len(read) > source_len or len(written) > target_len for read, written in wanted]
    found = opened(config, tokenizer, (source_len, target_len), lead)
    assert len(found) == len(pairs) and found.num_cut == sum(long)
    for i, (read, written) in enumerate(wanted):
        assert found.pair(i) == (prefix + pairs[i][0], pairs[i][1])
        row = found.row([i])
        cut = read if len(read) <= source_len else [*read[: source_len - 1], END]
        assert row.source[row.source_segments == 0].tolist() == cut
        cut = written if len(written) <= target_len else [*written[: target_len - 1], END]
        assert row.targets[row.segments == 0].tolist() == cut == row.targets[row.targets != PADDING].tolist()
        assert row.tokens[row.segments == 0].tolist() == [START, *cut[:-1]]
        assert (np.diff(row.source_segments) >= 0).all() and (np.diff(row.segments) >= 0).all()
    drop = replace(config, too_long="drop")
    if all(long):
        why = rf"no pair to learn from in a split \({len(pairs)} longer than its side of the model\); give more"
        with pytest.raises(UserError, match=why):
            opened(drop, tokenizer, (source_len, target_len), lead)
        return
    kept = [ids for ids, out in zip(wanted, long, strict=True) if not out]
    left = opened(drop, tokenizer, (source_len, target_len), lead)
    assert [tuple(ids.tolist() for ids in each) for each in left] == kept
    assert left.num_cut == 0 and left.left_out.total() == sum(long)


def test_a_side_without_room_is_one_line(config: Make, tokenizer: Tokenizer) -> None:
    made = config([{"source": "a", "target": "b"}])
    with pytest.raises(UserError, match=r"^encoder\.seq_len = 3: no room for a text .*; nearest 4$"):
        opened(made, tokenizer, (3, T))
    with pytest.raises(UserError, match=r"^model\.seq_len = 1: no room for a text .*; nearest 4$"):
        opened(made, tokenizer, (S, 1))
    assert len(opened(made, tokenizer, (4, 4))) == 1


def test_lengths_are_measured_once_for_a_prefix(
    config: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config([{"source": "a" * i, "target": "b"} for i in range(1, 21)])
    first = opened(made, tokenizer, (S, T))
    deaf = replace(tokenizer, encode=lambda text: pytest.fail("tokenised again"))
    assert len(opened(made, deaf)) == 20 and opened(made, deaf, (8, T), ()).num_cut > first.num_cut > 0
    assert opened(replace(made, prefix="say: "), tokenizer).num_cut == first.num_cut + 5


def test_texts_are_measured_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Also one that begins as the reason of a dropped record does."""
    write(tmp_path / "a.jsonl", [{"text": '"'}, {"text": '"no"'}, {"text": "ß"}])
    source = build(DataConfig(source=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path))).split("train", "document")

    def sizes(text: str) -> tuple[int, int]:
        return len(tokenizer.encode(text)), len(text)

    for _ in range(2):
        found = measure(str(tmp_path), source, tokenizer, "texts", sizes, dropped=lambda text: "")
        assert found.tolist() == [[1, 1], [4, 4], [2, 1]]
    assert len([*(tmp_path / "lengths").iterdir()]) == 1
    measure(str(tmp_path), source, tokenizer, "texts, otherwise", sizes, dropped=lambda text: "")
    assert len([*(tmp_path / "lengths").iterdir()]) == 2


def test_an_epoch_gives_every_pair_once(config: Make, tokenizer: Tokenizer) -> None:
    found = opened(config([{"source": f"{i:02}", "target": f"{i:02}!"} for i in range(20)]), tokenizer)
    rows = ExampleFeed(found, 0, 10, range(10), 0, 20).batch(2)
    assert isinstance(rows, PairRows) and rows.source.shape == (2, 10, S) and rows.targets.shape == (2, 10, T)
    read, written = rows.source.reshape(20, S)[:, 2:4], rows.targets.reshape(20, T)[:, 2:4]
    assert np.array_equal(read, written) and len({*map(tuple, read.tolist())}) == 20
    batches = [*eval_batches(found, 8, range(8), -1)]
    counts = [int((batch.segments[:, 0] == 0).sum()) for batch in batches]
    assert counts == [8, 8, 4]
