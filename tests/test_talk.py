"""`gptjax sample` and `gptjax chat` as they are typed, on models of random weights."""

import io
import json
import sys
from pathlib import Path

import jax
import pytest
from flax import linen as nn

from gptjax import api, cli
from gptjax.config import Config, SFTConfig
from gptjax.data.chat import with_chat
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.stages import SFT, Pretrain


@pytest.fixture(scope="module")
def base(tiny: Config) -> api.Model:
    stage = Pretrain(tiny, "cpu", tokenizer=Pretrain.fit_tokenizer(tiny, load_tokenizer("bytes")))
    return api.Model("base", stage, nn.unbox(stage.init(jax.random.key(0))), 2)


@pytest.fixture(scope="module")
def tuned_model(tuned: SFTConfig) -> api.Model:
    stage = SFT(tuned, "cpu", tokenizer=SFT.fit_tokenizer(tuned, with_chat(load_tokenizer("bytes"))))
    return api.Model("tuned", stage, nn.unbox(stage.init(jax.random.key(0))), 1)


class Terminal:
    """Types a line and reads what comes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, model: api.Model, line: str, stdin: bytes = b"") -> str:
        for name in ("load", "load_any"):
            self.monkeypatch.setattr(api, name, lambda *_, **__: model)
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), errors="surrogateescape"))
        assert cli.run(line.split(" ")) == 0
        return self.capsys.readouterr().out


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


def test_sample_gives_each_prompt_its_texts(base: api.Model, terminal: Terminal) -> None:
    line = "sample x --prompt ab --prompt c, --samples 2 --tokens 6 --seed 18446744073709551615"
    shown = terminal(base, line)
    rows = [json.loads(row) for row in terminal(base, f"{line} --json --logprobs 2").splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [("ab", 0), ("ab", 1), ("c,", 0), ("c,", 1)]
    assert shown == "\n---\n".join(row["prompt"] + row["text"] for row in rows) + "\n"
    for row in rows:
        assert len(row["tokens"]) == len(row["logprobs"]) == len(row["top_logprobs"]) == 6
        assert row["reason"] == "length"
    assert rows[0]["tokens"] != rows[1]["tokens"]


def test_prompts_from_files_and_standard_input(base: api.Model, terminal: Terminal, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    rows = terminal(base, f"sample x --file {file} --tokens 2 --json").splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == ["one", "two"]
    whole = json.loads(terminal(base, "sample x --file - --tokens 2 --json", "zwei\nZeilen é".encode()))
    assert whole["prompt"] == "zwei\nZeilen é"
    with pytest.raises(UserError, match="--file -: no UTF-8 at byte 1; convert it"):
        terminal(base, "sample x --file -", b"a\xff")
    with pytest.raises(UserError, match="--file nothing: No such file"):
        terminal(base, "sample x --file nothing")
    with pytest.raises(UserError, match="--prompt and --file: give one of them"):
        terminal(base, f"sample x --file {file} --prompt a")


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_temperature_that_is_none(value: str, base: api.Model, terminal: Terminal) -> None:
    with pytest.raises(UserError, match="--temperature"):
        terminal(base, f"sample x --temperature {value}")


def test_a_text_ends_with_the_context_unless_it_may_roll(base: api.Model, terminal: Terminal) -> None:
    line = "sample x --prompt abc --tokens 40 --json"
    ended, rolled = (json.loads(terminal(base, line + more)) for more in ("", " --roll"))
    assert (len(ended["tokens"]), ended["reason"]) == (14, "length")  # 3 + 13 places, and one that needs none
    assert len(rolled["tokens"]) == 40
    assert rolled["tokens"][:14] == ended["tokens"]
    with pytest.raises(UserError, match="prompt: 17 tokens; the context holds 16"):
        terminal(base, "sample x --prompt " + "a" * 17)
    long = json.loads(terminal(base, f"sample x --prompt {'a' * 17} --tokens 3 --roll --json"))
    assert len(long["tokens"]) == 3


def test_an_empty_prompt_starts_a_text(base: api.Model, terminal: Terminal) -> None:
    assert len(json.loads(terminal(base, "sample x --prompt= --tokens 3 --json"))["tokens"]) == 3


def test_a_conversation(tuned_model: api.Model, terminal: Terminal) -> None:
    """Lines of a pipe: the same words get the same reply after an empty line, and it is said what is forgotten."""
    shown = terminal(tuned_model, "chat x --tokens 4 --temperature 0", b"a\n\na\nb\nc\n").split("\n")
    assert shown[0] == shown[1]
    assert any(line.startswith("(forgot the oldest ") for line in shown)
    assert "(too long: a turn may take 12 of the context's 16 tokens)" in terminal(
        tuned_model, "chat x --tokens 4", b"aaaaaaaaaaaaaaaaaaaa\n"
    )


def test_chat_refuses_what_it_cannot_read(base: api.Model, tuned_model: api.Model, terminal: Terminal) -> None:
    with pytest.raises(UserError, match="x: has not learned conversations; try gptjax sample"):
        terminal(base, "chat x")
    with pytest.raises(UserError, match="standard input: no UTF-8"):
        terminal(tuned_model, "chat x", b"a\xffb\n")


def test_python_gives_what_the_terminal_gives(base: api.Model, terminal: Terminal) -> None:
    text = json.loads(terminal(base, "sample x --prompt ab --tokens 6 --seed 3 --json"))["text"]
    how = {"max_tokens": 6, "temperature": 0.8, "seed": 3}
    assert base.generate("ab", **how) == text
    assert base.generate(["ab", [97, 98]], **how) == [text, text]
    assert "".join(base.stream("ab", **how)) == text
    with pytest.raises(TypeError, match="temprature"):
        base.generate("ab", temprature=1)


def test_padding_on_either_side_changes_nothing(base: api.Model) -> None:
    ids, mask = [[5, 6, 7, 0, 0], [0, 0, 5, 6, 7]], [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]
    both = base.logits(ids, mask)
    alone = base.logits([5, 6, 7])
    assert (both[0, :3] == alone).all() and (both[1, 2:] == alone).all()
    assert alone.shape == (3, 261)
