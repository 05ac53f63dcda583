"""Labelled texts in every published form come back as they were written, and as rows of one or two texts; what is none
is one line. Run: pytest tests/test_labelled.py"""

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

from gptjax.config import LabelledConfig
from gptjax.data.classed import LabelledRows, LabelledTexts, open_labelled
from gptjax.data.examples import ExampleFeed, eval_batches
from gptjax.data.labelled import Labelled, Told, parse
from gptjax.data.sources import build
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.errors import UserError
from gptjax.recipe.topics import labelled as by_topic

Make = Callable[..., LabelledConfig]
CLS, SEP = 300, 301
T = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


@pytest.fixture
def config(tmp_path: Path) -> Make:
    """LabelledConfig of a file of these records, all of which are in its one split."""

    def make(rows: list[Any], name: str = "a.jsonl", **fields: Any) -> LabelledConfig:
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        elif name.endswith(".tsv"):
            lines = [[*rows[0]], *(map(str, row.values()) for row in rows)]
            (tmp_path / name).write_text("".join("\t".join(line) + "\n" for line in lines))
        else:
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return LabelledConfig(source=str(tmp_path / name), cache_dir=str(tmp_path / "cache"), **fields)

    return make


def opened(
    config: LabelledConfig, tokenizer: Tokenizer, *names: str, seq_len: int = T, double_sep: bool = False
) -> LabelledTexts:
    source = build(config).split("train", "document")
    return open_labelled(config, names, source, tokenizer, CLS, SEP, double_sep, seq_len)


def texts_of(config: LabelledConfig) -> list[Told]:
    source = build(config).split("train", "document")
    return [parse(source[number].text) for number in range(len(source))]


# Records


@pytest.mark.parametrize(
    ("row", "fields", "kept"),
    [
        ({"text": " Good\n", "label": "yes"}, (), [[" Good\n"], "yes"]),
        ({"idx": 3, "sentence": "Good", "label": 1}, (), [["Good"], "1"]),
        ({"sentence1": "a", "sentence2": "b", "label": 0}, (), [["a", "b"], "0"]),
        ({"label": -1, "hypothesis": "b", "premise": "a"}, (), [["a", "b"], "-1"]),
        ({"question1": "a", "question2": "b", "label": 1}, (), [["a", "b"], "1"]),
        ({"question": "a", "sentence": "b", "label": 0}, (), [["a", "b"], "0"]),
        ({"sentence1": "a", "sentence2": "b", "label": 3.5, "text": "no"}, (), [["a", "b"], "3.5"]),
        ({"text": "a", "label": 4.0}, (), [["a"], "4.0"]),
        ({"text": "a", "label": True}, (), [["a"], "true"]),
        ({"text": "a", "label": np.bool_(False)}, (), [["a"], "false"]),
        ({"text": b"a", "label": np.int64(2)}, (), [["a"], "2"]),
        ({"text": "a", "label": np.float32(3.2)}, (), [["a"], "3.2"]),
        ({"passage": "b", "ask": "a", "is": {"so": [1]}}, ("ask", "passage", "is.so.0"), [["a", "b"], "1"]),
        ({"review": "a", "text": "no", "label": "no", "stars": 5}, ("review", "stars"), [["a"], "5"]),
    ],
)
def test_a_record_is_a_labelled_text_in_each_form(row: Any, fields: tuple[str, ...], kept: Any) -> None:
    text = Labelled(fields, "refuse").document(row, "here:1")
    assert json.loads(text) == kept and ", " not in text and parse(text) == Told(*kept)


BAD: list[tuple[Any, str]] = [
    ({"text": " ", "label": 1}, "text is empty"),
    ({"premise": "a", "hypothesis": "", "label": 1}, "hypothesis is empty"),
    ({"text": None, "label": 1}, "text is null, not text"),
    ({"text": 4, "label": 1}, "text is int, not text"),
    ({"text": "\udc00", "label": 1}, "text has half a character (a lone surrogate)"),
    ({"text": "a", "label": None}, "label is null, neither text nor a number"),
    ({"text": "a", "label": [1]}, "label is list, neither text nor a number"),
    ({"text": "a", "label": float("nan")}, "label is nan, not a finite number"),
    ({"text": "a", "label": ""}, "label is empty"),
    ({"text": "a"}, "no known form (set data.fields) among its fields text"),
    ({}, "no known form (set data.fields) among its fields none"),
    ("a", "str, not an object with fields"),
]


@pytest.mark.parametrize(("row", "why"), BAD)
def test_what_is_no_example_is_named_with_its_place_or_left_out(config: Make, row: Any, why: str) -> None:
    assert json.loads(Labelled((), "drop").document(row, "here:1")) == why
    with pytest.raises(UserError, match=re.escape(f"a.jsonl:2: {why}; mend it, or leave such")) as error:
        build(config([{"text": "a", "label": 1}, row]))
    assert "with data.invalid drop" in str(error.value) and "\n" not in str(error.value)


def test_dropped_records_are_counted_by_reason(config: Make, tokenizer: Tokenizer) -> None:
    found = opened(config([{"text": "a", "label": 1}, *(row for row, _ in BAD)], invalid="drop"), tokenizer, "0", "1")
    assert len(found) == 1 and found.left_out == Counter(why for _, why in BAD)


def test_fields_that_are_not_there_are_named(config: Make) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: no field stars \(data\.fields\) among text, label;"):
        build(config([{"text": "a", "label": 1}], fields=("text", "stars")))
    with pytest.raises(UserError, match=r"data\.fields = labels: not in .*a\.parquet; nearest label"):
        build(config([{"text": "a", "label": 1}], "a.parquet", fields=("text", "labels")))
    with pytest.raises(ValueError, match="give text,label, or first,second,label"):
        config([], fields=("text",))


ROWS = [
    {"premise": "It rains", "hypothesis": "It is wet ß", "label": 0},
    {"premise": "a", "hypothesis": "b", "label": 2},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.tsv"])
def test_every_kind_of_file_gives_the_same(config: Make, name: str) -> None:
    assert texts_of(config(ROWS, name)) == [Told(["It rains", "It is wet ß"], "0"), Told(["a", "b"], "2")]
    one = replace(config(ROWS, name), fields=("hypothesis", "label"))
    assert texts_of(one) == [Told(["It is wet ß"], "0"), Told(["b"], "2")]


def test_a_class_of_the_catalogue_is_its_number(config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    folder = tmp_path / "tfds" / "my_nli" / "1.0.0"
    folder.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity("my_nli", tfds.core.Version("1.0.0"), str(folder), __name__)
    kinds = {"label": tfds.features.ClassLabel(names=["yes", "maybe", "no"]), "score": np.float32, "sure": np.bool_}
    features = {"premise": tfds.features.Text(), "hypothesis": tfds.features.Text(), **kinds}
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [row | {"score": 3.2, "sure": True} for row in ROWS]})
    writer.close_all()
    made = replace(config(ROWS), source="tfds:my_nli")
    assert texts_of(made) == texts_of(config(ROWS))
    scored = texts_of(replace(made, fields=("hypothesis", "score")))[1]
    assert scored.texts == ["b"] and np.float32(scored.label) == np.float32(3.2)
    assert texts_of(replace(made, fields=("hypothesis", "sure")))[1] == Told(["b"], "true")


# Rows


def test_a_row_is_one_text_or_two(config: Make, tokenizer: Tokenizer) -> None:
    row = opened(config([{"text": "abc", "label": "good"}]), tokenizer, "bad", "good").row([0])
    assert row.tokens.tolist() == [CLS, *b"abc", SEP, *[0] * (T - 5)]
    assert row.segments.tolist() == [0] * 5 + [1] * (T - 5) and not row.types.any()
    assert (row.label, row.label.dtype, row.weight, row.weight.dtype) == (1, np.int32, 1, np.float32)

    made = config([{"premise": "ab", "hypothesis": "xyz", "label": 3.5}], "b.jsonl")
    row = opened(made, tokenizer).row([0])
    assert row.tokens.tolist() == [CLS, *b"ab", SEP, *b"xyz", SEP, *[0] * (T - 8)]
    assert row.types.tolist() == [0] * 4 + [1] * 4 + [0] * (T - 8)
    assert row.segments.tolist() == [0] * 8 + [1] * (T - 8)
    assert (row.label, row.label.dtype, row.weight) == (3.5, np.float32, 1)

    found = opened(made, tokenizer, double_sep=True)
    row, empty = found.row([0]), found.row(())
    assert row.tokens.tolist() == [CLS, *b"ab", SEP, SEP, *b"xyz", SEP, *[0] * (T - 9)]
    assert row.segments.tolist() == [0] * 9 + [1] * (T - 9) and not row.types.any()
    assert [leaf.dtype for leaf in row] == [leaf.dtype for leaf in empty]
    assert empty.segments.all() and not empty.tokens.any() and empty.label == empty.weight == 0
    assert found.told(0) == Told(["ab", "xyz"], "3.5")


def loses_the_longer(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Token by token, as BERT was trained."""
    first, second = [*first], [*second]
    while len(first) + len(second) > room:
        (first if len(first) > len(second) else second).pop()
    return first, second


TEXT = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=24)
TEXTS = st.lists(st.lists(TEXT, min_size=1, max_size=2), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.integers(6, 40), st.booleans())
def test_the_longer_text_loses_its_end(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[list[str]],
    seq_len: int,
    double_sep: bool,
) -> None:
    folder = tmp_path_factory.mktemp("labelled")
    names = {1: ("text", "label"), 2: ("premise", "hypothesis", "label")}
    rows = [dict(zip(names[len(each)], [*each, i % 2], strict=True)) for i, each in enumerate(texts)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LabelledConfig(source=str(folder / "a.jsonl"), cache_dir=str(folder / "cache"))
    found = opened(config, tokenizer, "0", "1", seq_len=seq_len, double_sep=double_sep)
    around = [2 if len(each) == 1 else 4 if double_sep else 3 for each in texts]
    long = [sum(map(len, each)) + more > seq_len for each, more in zip(texts, around, strict=True)]
    assert len(found) == len(texts) and found.num_cut == sum(long) and not found.left_out
    for i, (each, more) in enumerate(zip(texts, around, strict=True)):
        first, second = loses_the_longer([*each[0].encode()], [*"".join(each[1:]).encode()], seq_len - more)
        wanted = [CLS, *first, SEP, *[SEP] * (double_sep and len(each) == 2), *second, *[SEP] * (len(each) - 1)]
        row = found.row([i])
        assert row.tokens[row.segments == 0].tolist() == wanted and not row.tokens[row.segments == 1].any()
        behind = 0 if double_sep or len(each) == 1 else len(second) + 1
        assert row.types[: len(wanted)].tolist() == [0] * (len(wanted) - behind) + [1] * behind
        assert row.label == i % 2 and not row.types[len(wanted) :].any()
    if not all(long):
        left = opened(replace(config, too_long="drop"), tokenizer, "0", "1", seq_len=seq_len, double_sep=double_sep)
        assert left.num_cut == 0 and [left.told(i).texts for i in range(len(left))] == [
            each for each, out in zip(texts, long, strict=True) if not out
        ]
        assert left.left_out.total() == sum(long)


def test_labels_that_are_not_expected_are_listed_with_the_remedy(config: Make, tokenizer: Tokenizer) -> None:
    made = config([{"text": "a", "label": each} for each in (0, 1, 2, -1, 2)])
    why = r"^labels\.names = 0,1: data\.source = .*a\.jsonl has other labels: \"2\" \(2\), \"-1\" \(1\); give every"
    with pytest.raises(UserError, match=why) as error:
        opened(made, tokenizer, "0", "1")
    assert str(error.value).endswith("labels.names, or leave such records out with data.invalid drop")
    assert len(opened(made, tokenizer, "0", "1", "2", "-1")) == 5
    left = opened(replace(made, invalid="drop"), tokenizer, "0", "1")
    assert len(left) == 2 and left.left_out == {"label that is none of labels.names": 3}

    words = config([{"text": "a", "label": each} for each in ("1", "1e1", "good", "nan", "a\nb", "1e99")], "b.jsonl")
    why = (
        r'labels\.names is empty, so labels are numbers: .*"good" \(1\), "nan" \(1\), "a\\nb" \(1\), "1e99" \(1\); give'
    )
    with pytest.raises(UserError, match=why) as error:
        opened(words, tokenizer)
    assert "\n" not in str(error.value)
    numbers = opened(replace(words, invalid="drop"), tokenizer)
    assert [numbers.row([i]).label for i in range(2)] == [1, 10] and numbers.left_out.total() == 4

    long = config([{"text": "a", "label": "b" * 99}], "d.jsonl")
    with pytest.raises(UserError, match=r'has other labels: "b{40}\.\.\." \(1\); give'):
        opened(long, tokenizer, "0", "1")

    many = config([{"text": "a", "label": each} for each in range(30)], "c.jsonl")
    with pytest.raises(UserError, match=r'"19" \(1\) and 10 more; give'):
        opened(many, tokenizer, "no")
    with pytest.raises(UserError, match=r"no labelled text to learn from in a split \(30 label that is none of labels"):
        opened(replace(many, invalid="drop"), tokenizer, "no")


def test_a_context_without_room_is_one_line(config: Make, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^model\.seq_len = 5: no room for two texts .*; nearest 6$"):
        opened(config(ROWS), tokenizer, "0", "2", seq_len=5)


def test_labels_and_lengths_are_measured_once(config: Make, tokenizer: Tokenizer) -> None:
    made = config(ROWS)
    assert opened(made, tokenizer, "0", "2").num_cut == 1
    deaf = replace(tokenizer, encode=lambda text: pytest.fail("tokenised again"))
    assert opened(made, deaf, "0", "2", seq_len=40).num_cut == 0
    with pytest.raises(UserError, match="other labels"):
        opened(made, tokenizer, "0")


def test_an_epoch_gives_every_text_once(config: Make, tokenizer: Tokenizer) -> None:
    found = opened(config([{"text": f"{i}", "label": i} for i in range(20)]), tokenizer)
    rows = ExampleFeed(found, 0, 10, range(10), 0, 30).batch(4)
    assert isinstance(rows, LabelledRows) and rows.tokens.shape == (4, 10, T) and rows.label.shape == (4, 10)
    assert sorted(rows.label[:2].reshape(-1)) == [*range(20)]
    assert rows.weight.sum(1).tolist() == [10, 10, 10, 0]
    batches = [*eval_batches(found, 8, range(8), -1)]
    assert [int(batch.weight.sum()) for batch in batches] == [8, 8, 4]
    assert sorted(label for batch in batches for label in batch.label[batch.weight > 0]) == [*range(20)]


def test_sentences_of_the_longest_articles_are_labelled_by_them() -> None:
    """Headings within an article are no titles, and what stands before the first is nobody's."""
    about = {f"Article {i}": [f"This is sentence {j} of number {i} ." for j in range(20 - i)] for i in range(9)}
    text = "No article has this sentence at all .\n" + "\n".join(
        f" = {title} = \n\n {' '.join(found[:3])}\n = = Its <unk> = = \nToo short .\n{' '.join(found[3:])}"
        for title, found in about.items()
    )
    rows = by_topic(text)
    assert sorted(rows) == sorted((each, f"article-{i}") for i in range(8) for each in about[f"Article {i}"])
    assert rows == by_topic(text) != by_topic(text, seed=1)
