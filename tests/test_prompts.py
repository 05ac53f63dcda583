"""Prompts in every published form come back as messages and as ids to answer; what is none is one line. Run: pytest
tests/test_prompts.py"""

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

from gptjax.config import DialogueConfig, PromptConfig, RankingConfig
from gptjax.data.chat import ChatFormat, Message, chat_format
from gptjax.data.examples import ExampleFeed
from gptjax.data.prompted import Prompt, Prompts, open_prompts
from gptjax.data.prompts import Asking, parse
from gptjax.data.rankings import TRANSCRIPT, Ranking
from gptjax.data.rankings import parse as parse_ranking
from gptjax.data.sources import build
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError

Make = Callable[..., PromptConfig]
T = 64
HI = [["user", "Hi"]]
ASKED = [["user", "Hi"], ["assistant", "Hello"], ["user", "Well?"]]
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Well?\n\nAssistant:"


def messages(turns: list[list[str]], role: str = "role", content: str = "content") -> list[dict[str, str]]:
    return [{role: who, content: said} for who, said in turns]


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return chat_format(load_tokenizer("bytes"))


@pytest.fixture
def config(tmp_path: Path) -> Make:
    """PromptConfig of a file of these records, all of which are in its one split."""

    def make(rows: list[Any], name: str = "a.jsonl", **fields: Any) -> PromptConfig:
        if name.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        else:
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return PromptConfig(source=str(tmp_path / name), cache_dir=str(tmp_path / "cache"), **fields)

    return make


def opened(config: PromptConfig, chat: ChatFormat, seq_len: int = T) -> Prompts:
    return open_prompts(config, build(config).split("train", "document"), chat, seq_len)


# Records


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "Hi"}, HI, ""),
        ({"prompt": " Hi\n", "completion": "Yes"}, [["user", " Hi\n"]], ""),
        ({"prompt": messages(ASKED), "id": 7}, ASKED, ""),
        ({"prompt": [{"role": "system", "content": "Be kind."}, *messages(HI)]}, [["system", "Be kind."], *HI], ""),
        ({"prompt": HH}, ASKED, ""),
        ({"prompt": "Human: Hi"}, [["user", "Human: Hi"]], ""),
        ({"prompt": "2 + 2?", "answer": "4"}, [["user", "2 + 2?"]], "4"),
        ({"question": "2 + 2?", "answer": " 4\n"}, [["user", "2 + 2?"]], " 4\n"),
        ({"question": "2 + 2?"}, [["user", "2 + 2?"]], ""),
        ({"prompt": "Hi", "question": "Ho", "answer": None}, HI, ""),
        ({"messages": messages([*ASKED, ["assistant", "Yes"]])}, ASKED, ""),
        ({"messages": messages([*HI, ["assistant", "a"], ["assistant", "b"]]), "answer": "4"}, HI, "4"),
        ({"messages": messages(ASKED)}, ASKED, ""),
        ({"conversations": messages([["human", "Hi"], ["gpt", ""]], "from", "value")}, HI, ""),
        ({"conversations": {"role": ["user"], "content": ["Hi"]}}, HI, ""),
        ({"messages": "Human: Hi\n\nAssistant: Hello"}, HI, ""),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, [["user", "Add.\n\n2, 2"]], ""),
        ({"instruction": "Hi", "input": ""}, HI, ""),
        ({"instruction": "Hi", "input": None}, HI, ""),
        ({"prompt": "Hi", "replies": ["a", "b"], "ranks": [1, 1]}, HI, ""),
        ({"prompt": messages(ASKED), "chosen": "Yes", "rejected": "No"}, ASKED, ""),
        ({"prompt": HH, "chosen": "Yes", "rejected": "No"}, ASKED, ""),
        ({"prompt": None, "chosen": f"{HH} Yes", "rejected": f"{HH} No"}, ASKED, ""),
        ({"chosen": f"{HH} Yes", "rejected": f"{HH} No"}, ASKED, ""),
        ({"chosen": HH, "rejected": f"{HH} No"}, ASKED, ""),
        ({"chosen": messages([*HI, ["assistant", "Yes"]]), "rejected": []}, HI, ""),
    ],
)
def test_a_record_is_a_prompt_in_each_form(row: Any, prompt: list[list[str]], answer: str) -> None:
    assert json.loads(Asking((), "refuse").document(row, "here:1")) == [prompt, answer]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (("ask",), [HI, ""]),
        (("ask", "say"), [HI, "Yes"]),
        (("ask", "nothing"), [HI, ""]),
        (("ask", "nothing", "say"), [HI, "Yes"]),
        (("ask", "more.0.in", "say"), [[["user", "Hi\n\n2, 2"]], "Yes"]),
        (("talk",), [ASKED, ""]),
        (("more.0.text", "say"), [ASKED, "Yes"]),
    ],
)
def test_fields_name_prompt_and_answer(fields: tuple[str, ...], kept: Any) -> None:
    talk = messages([*ASKED, ["assistant", "Yes"]])
    more = [{"in": "2, 2", "text": HH}]
    row = {"ask": "Hi", "say": "Yes", "nothing": None, "answer": "no", "prompt": "no", "talk": talk, "more": more}
    assert json.loads(Asking(fields, "refuse").document(row, "here:1")) == kept


BAD: list[tuple[Any, str]] = [
    ({"prompt": " "}, "empty message"),
    ({"prompt": ""}, "empty message"),
    ({"prompt": []}, "no prompt"),
    ({"messages": messages([["assistant", "Hi"]])}, "no prompt"),
    ({"prompt": messages([["system", "Be kind."]])}, "ends with system"),
    ({"prompt": messages([["assistant", "Hi"], ["user", "Hello"]])}, "roles out of order: assistant first"),
    ({"prompt": messages([["tool", "Hi"]])}, "unknown role tool, nearest "),
    ({"prompt": f"{TRANSCRIPT} Hi{TRANSCRIPT} Hello"}, "roles out of order: user after user"),
    ({"prompt": "\ud800"}, "half a character (a lone surrogate)"),
    ({"question": "Hi", "answer": "\ud800"}, "half a character (a lone surrogate)"),
    ({"question": "Hi", "answer": 4}, "answer is int, not text"),
    ({"question": "Hi", "answer": ["4"]}, "answer is list, not text"),
    ({"prompt": 4}, "prompt is int, not text"),
    ({"prompt": ["Hi"]}, "a message without role and content, or from and value"),
    ({"messages": "Hi"}, "a text that does not begin with Human: or Assistant:, so no transcript"),
    ({"messages": 4}, "messages is int, neither messages nor text"),
    ({"instruction": "Hi", "input": 4}, "input is int, not text"),
    ({"chosen": "Yes", "rejected": "No"}, "a text that does not begin with Human: or Assistant:, so no transcript"),
    ({"prompt": None, "id": 1}, "no known form (set data.fields) among its fields prompt (null), id"),
    ({"promt": "Hi"}, "no known form (set data.fields) among its fields promt"),
    ({}, "no known form (set data.fields) among its fields none"),
    ([1], "list, not an object with fields"),
]


@pytest.mark.parametrize(("row", "why"), BAD)
def test_what_is_no_prompt_is_left_out_or_named_with_its_place(config: Make, row: Any, why: str) -> None:
    assert json.loads(Asking((), "drop").document(row, "here:1")).startswith(why)
    with pytest.raises(UserError, match=re.escape(f"a.jsonl:2: {why}")) as error:
        build(config([{"prompt": "Hi"}, row], invalid="refuse"))
    assert "mend it, or leave such records out with data.invalid drop" in str(error.value)
    assert "\n" not in str(error.value)


def test_fields_that_are_not_there_are_named(config: Make) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: no field asked \(data\.fields\) among ask; mend it"):
        build(config([{"ask": "Hi"}], fields=("asked",), invalid="refuse"))
    with pytest.raises(UserError, match="list, not an object with fields"):
        build(config([[1]], fields=("ask",), invalid="refuse"))
    with pytest.raises(UserError, match=r"data\.fields = asked: not in .*a\.parquet; nearest ask"):
        build(config([{"ask": "Hi"}], "a.parquet", fields=("asked",)))
    with pytest.raises(UserError, match=r"a\.parquet: no known form \(set data\.fields\) among its fields ask"):
        build(config([{"ask": "Hi"}], "a.parquet"))


def test_columns_of_a_table_that_are_null_in_a_row_are_not_there(config: Make, chat: ChatFormat) -> None:
    rows = [{"prompt": "One", "answer": "1"}, {"question": "Two"}, {"chosen": HH, "other": 3}, {"answer": "4"}]
    columns = dict.fromkeys(["prompt", "question", "answer", "chosen", "other"])
    found = opened(config([columns | row for row in rows], "a.parquet"), chat)
    assert [(prompt.text, prompt.answer) for prompt in found] == [("One", "1"), ("Two", ""), ("Well?", "")]
    nulls = "prompt (null), question (null), chosen (null)"
    assert [*found.left_out] == [f"no known form (set data.fields) among its fields {nulls}, answer"]


def test_nothing_but_dropped_records_is_an_error(config: Make) -> None:
    made = config([{"prompt": " "}] * 3)
    with pytest.raises(UserError, match="all of its 3 records are dropped, the first for: empty message; mend them"):
        build(made)


def test_the_same_file_is_another_data_set_as_prompts(config: Make) -> None:
    made = config([{"prompt": "Hi", "completion": "Yes", "chosen": "Yes", "rejected": "No"}])
    shared = {"source": made.source, "cache_dir": made.cache_dir}
    others = DialogueConfig(**shared), RankingConfig(**shared), replace(made, fields=("prompt", "completion"))
    texts = [build(each).store[0].text for each in (made, *others)]
    assert texts[0] == '[[["user","Hi"]],""]' and len({*texts}) == 4


# Examples


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TEXT = WORDS.filter(str.strip)
PROMPT = st.builds(
    lambda system, before, ask: [*system, *(turn for pair in before for turn in pair), ["user", ask]],
    st.lists(TEXT.map(lambda text: ["system", text]), max_size=1),
    st.lists(st.tuples(TEXT.map(lambda text: ["user", text]), TEXT.map(lambda text: ["assistant", text])), max_size=2),
    TEXT,
)


@settings(max_examples=100, deadline=None)
@given(PROMPT, TEXT, WORDS, st.sampled_from(["prompt", "messages", "conversations", "chosen"]))
def test_messages_come_back_as_they_were_written(turns: list[list[str]], reply: str, answer: str, form: str) -> None:
    said = messages(turns if form == "prompt" else [*turns, ["assistant", reply]])
    found = parse(Asking((), "refuse").document({form: said, "answer": answer}, "here:1"))
    assert found.prompt == [Message(*turn) for turn in turns] and found.answer == answer


@settings(max_examples=25, deadline=None)
@given(st.lists(PROMPT, min_size=1, max_size=8), st.integers(2, 60))
def test_ids_are_those_of_the_chat_format(
    chat: ChatFormat, tmp_path_factory: pytest.TempPathFactory, turns: list[list[list[str]]], most: int
) -> None:
    """Whole, or their end; or counted, where they are too long."""
    folder = tmp_path_factory.mktemp("prompts")
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": messages(each)}) + "\n" for each in turns))
    config = PromptConfig(source=str(path), cache_dir=str(folder / "cache"), max_prompt_tokens=most, too_long="cut")
    wanted = [chat.prompt([Message(*turn) for turn in each]) for each in turns]
    long = [len(ids) > most for ids in wanted]
    cut = opened(config, chat)
    assert len(cut) == len(turns) and cut.num_cut == sum(long) and not cut.left_out
    for prompt, ids, each in zip(cut, wanted, turns, strict=True):
        assert prompt.ids.dtype == np.int32 and np.array_equal(prompt.ids, ids[-most:])
        assert prompt.ids[-1] == chat.tokenizer.special["<|assistant|>"] and prompt.text == each[-1][1]
        assert prompt.messages == [Message(*turn) for turn in each] and prompt.answer == ""
    if all(long):
        with pytest.raises(UserError, match=f"no prompt to learn from in a split .{len(turns)} longer than {most} tok"):
            opened(replace(config, too_long="drop"), chat)
        return
    whole = opened(replace(config, too_long="drop"), chat)
    assert [p.ids.tolist() for p in whole] == [ids.tolist() for ids in wanted if len(ids) <= most]
    assert whole.num_cut == 0 and whole.left_out.total() == sum(long)


def asked(count: int) -> list[dict[str, str]]:
    return [{"question": "?" * (i + 1), "answer": str(i)} for i in range(count)]


def test_prompts_have_half_the_context_unless_told(config: Make, chat: ChatFormat) -> None:
    made = config([*asked(80), {"question": " "}, {"question": ""}])
    around = len(chat.prompt([Message("user", "?")])) - 1
    found = opened(made, chat)
    assert found.max_tokens == 32 and len(found) == 32 - around and max(len(p.ids) for p in found) == 32
    assert found.left_out == Counter({"longer than 32 tokens": 48 + around, "empty message": 2})
    assert len(opened(replace(made, max_prompt_tokens=T - 1), chat)) == T - 1 - around
    with pytest.raises(
        UserError, match=r"^data.max_prompt_tokens = 64: leaves a reply no room in model.seq_len = 64; nearest 63$"
    ):
        opened(replace(made, max_prompt_tokens=T), chat)


def test_lengths_are_measured_once(config: Make, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    made, heard = config(asked(20)), []
    source = build(made).split("train", "document")
    first = open_prompts(made, source, chat, T, lambda *words: heard.append(words))
    assert len(heard) == 20
    monkeypatch.setattr(ChatFormat, "prompt", None)
    for other in (made, replace(made, max_prompt_tokens=10)):
        again = open_prompts(other, source, chat, T, lambda *words: heard.append(words))
        assert len(heard) == 20 and len(again) <= len(first)


def test_an_epoch_asks_every_prompt_once(config: Make, chat: ChatFormat) -> None:
    found = opened(config(asked(20)), chat)
    feed = ExampleFeed(found, 0, 10, range(10), 0, 30)
    epochs = []
    for _ in range(2):
        rows = feed.batch(2)
        assert rows.tokens.shape == (2, 10, 32) and rows.length.shape == rows.index.shape == (2, 10)
        assert {leaf.dtype for leaf in rows} == {np.dtype(np.int32)}
        epochs.append(rows.index.reshape(-1).tolist())
        for tokens, length, index in zip(*(leaf.reshape(20, *leaf.shape[2:]) for leaf in rows), strict=True):
            ids = found[index].ids if index >= 0 else np.zeros(0)
            assert length == len(ids) and np.array_equal(tokens[:length], ids) and not tokens[length:].any()
    assert sorted(epochs[0]) == [*range(20)] and epochs[0] != epochs[1]
    assert epochs[1][10:] == [-1] * 10  # the feed ends in the middle of the second


# Published data


def test_published_pairs_have_the_prompts_of_their_rankings(shared: Path, tmp_path: Path, chat: ChatFormat) -> None:
    source = shared / "hh-harmless.jsonl"
    found = opened(PromptConfig(source=str(source), cache_dir=str(tmp_path), max_prompt_tokens=4095), chat, 4096)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    of_records = {int(number): index for index, number in enumerate(found.numbers)}
    compared = 0
    for number, row in enumerate(rows):
        ranking = Ranking("drop").document(row, "")
        if not ranking.startswith('"') and number in of_records:
            assert parse(found.source[number].text).prompt == parse_ranking(ranking).prompt
            compared += 1
    assert found.left_out["roles out of order: assistant after assistant"] == 3  # not at the end of the conversation
    assert compared > 1700 and len(found) + found.left_out.total() == len(rows)
    assert all(np.array_equal(found[i].ids, chat.prompt(found[i].messages)) for i in range(0, len(found), 50))


def test_published_questions_keep_their_answers(shared: Path, tmp_path: Path, chat: ChatFormat) -> None:
    source = shared / "gsm8k-train.jsonl"
    found = opened(PromptConfig(source=str(source), cache_dir=str(tmp_path)), chat, 2048)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    assert len(found) == len(rows) == 7473 and not found.left_out
    for index in range(0, len(rows), 25):
        prompt: Prompt = found[index]
        assert (prompt.text, prompt.answer) == (rows[index]["question"], rows[index]["answer"])
        assert prompt.messages == [Message("user", prompt.text)] and "#### " in prompt.answer
