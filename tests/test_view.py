"""What `gptjax data view` shows is what the stream gives. Run: pytest tests/test_view.py"""

import json
import re
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from encoded import file_of, masked_config
from hypothesis import given
from hypothesis import strategies as st

from gptjax import cli
from gptjax.config import Config, DataConfig
from gptjax.data.rows import CUT, next_token
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.stages.view import documents_of

TOKENIZER = load_tokenizer("bytes")


@given(st.lists(st.sampled_from([*b"abc", -1, -2]), min_size=2, max_size=30), st.booleans())
def test_every_token_is_shown_once_in_its_document(ids: list[int], apart: bool) -> None:
    """-1 stands for the end of a text, -2 for one that is no target."""
    end = TOKENIZER.eot
    stream = np.array([{-1: end, -2: CUT - end}.get(i, i) for i in ids], np.int32)
    row = next_token(stream, end if apart else None)
    found = list(documents_of(row, TOKENIZER))
    assert [begins for begins, _, _ in found] == [0, *(ends for _, ends, _ in found[:-1])]
    assert found[-1][1] == len(ids) - 1
    for begins, ends, parts in found:
        inside = row.tokens[begins:ends].tolist()
        assert "".join(text for text, _ in parts) == TOKENIZER.decode(inside, inside=True)
        assert end not in inside[:-1], "a document goes on behind its end"
        asked = (row.targets[begins:ends] >= 0).tolist()
        assert [there for _, there in parts] == [there for there, _ in groupby(asked)]


@pytest.fixture
def text(tiny: Config, tmp_path: Path) -> Config:
    """Documents that say which they are, each a record."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"<{i:03} says nothing more>"}) + "\n" for i in range(200)))
    data = DataConfig(source=str(path), cache_dir=str(tmp_path / "cache"), lanes=2, seed=3)
    return replace(tiny, data=data, train=replace(tiny.train, micro_batch_size=8))


def shown(config: Config, folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(["data", "view", file_of(config, folder), *words]) == 0
    return capsys.readouterr().out


def test_a_row_is_shown_from_its_record_on(text: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lane's fourth record, from its third token; the next row goes on where the first ends; another lane has other
    documents."""
    out = shown(text, tmp_path, capsys, "--at", "4:3", "--lane", "1", "--rows", "4")
    whole = shown(text, tmp_path, capsys, "--at", "4", "--lane", "1", "--rows", "4")
    assert re.match(r"<\d{3} says nothing more><\|endoftext\|><", flat(whole))
    assert flat(out)[:-3] == flat(whole)[3:]
    assert f"row 0, {text.model.seq_len} tokens" in out and "[tokens 0 to " in out and "row 3," in out
    assert flat(shown(text, tmp_path, capsys, "--at", str(4 << 32 | 3), "--lane", "1", "--rows", "4")) == flat(out)
    other = shown(text, tmp_path, capsys, "--at", "4", "--rows", "4")
    assert not {*re.findall(r"<(\d{3})", flat(other))} & {*re.findall(r"<(\d{3})", flat(whole))}


def flat(out: str) -> str:
    """The text alone."""
    lines = [line for line in out.split("\n")[1:-3] if not re.match(r"\[tokens |row \d", line)]
    return "".join(lines).replace("[[", "").replace("]]", "")


def test_wrong_places_are_one_line(text: Config, tiny: Config, tmp_path: Path) -> None:
    file = file_of(text, tmp_path)
    for words, said in (
        (("--at", "x"), "--at x: give a number, or RECORD:TOKEN such as 12:300"),
        (("--lane", "2"), r"--lane 2: there are 2 \(data.lanes\); nearest 1"),
        (("--rows", "5"), "--rows 5: a micro-batch has 4 of a lane; nearest 4"),
    ):
        with pytest.raises(UserError, match=said):
            cli.run(["data", "view", file, *words])
    other = file_of(masked_config(tiny, tmp_path / "a.jsonl"), tmp_path / "other")
    with pytest.raises(UserError, match="stage masked has rows of another kind; take pretrain or sft"):
        cli.run(["data", "view", other])
