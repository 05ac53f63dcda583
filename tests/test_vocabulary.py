"""A tokenizer that is made of the text of its run. Run: pytest tests/test_vocabulary.py"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptjax import cli
from gptjax.config import Config, DataConfig
from gptjax.config.load import load_config
from gptjax.data import vocabulary
from gptjax.data.sources import build
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.train.run import open_run, saved_tokenizer


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(source=str(corpus / "*.txt"), cache_dir=str(tmp_path / "cache"), tokenizer="sentencepiece:400")


def test_made_once_of_the_training_split_alone(data, monkeypatch):
    text = build(data)
    made = vocabulary.open_tokenizer(data, text)
    assert made.vocab_size == 400 and made.lossless
    held_out = {record.text for record in text.split(data.eval_split, data.split_by)}
    seen: list[str] = []

    def train(texts, size, path):
        seen.extend(texts)
        raise UserError("asked again")

    monkeypatch.setattr(vocabulary, "train_sentencepiece", train)
    assert vocabulary.open_tokenizer(data, text).pieces == made.pieces  # from the cache
    for other in (replace(data, tokenizer="sentencepiece:401"), replace(data, train_split="train[:50%]")):
        with pytest.raises(UserError, match=r"data.tokenizer = sentencepiece:40[01]: asked again"):
            vocabulary.open_tokenizer(other, text)
    assert seen and not held_out & set(seen)
    vocabulary.model_file(data, text).write_bytes(b"half")
    with pytest.raises(UserError, match="asked again"):
        vocabulary.open_tokenizer(data, text)


def test_a_large_text_is_learned_from_in_parts(data, monkeypatch):
    monkeypatch.setattr(vocabulary, "MOST_CHARS", 3000)
    texts = [*vocabulary._texts(build(data).split("train", "document"))]
    assert sum(map(len, texts)) == 3000 and len(texts) > 2


@pytest.mark.slow
def test_a_run_with_its_own_vocabulary(plain: Config, file: str, tmp_path: Path, capsys):
    run = str(tmp_path / "run")
    words = ["--data.tokenizer", "sentencepiece:300", "--model.vocab_size", "300", "--train.total_tokens", "1280"]
    words += ["--data.cache_dir", str(tmp_path / "cache")]  # that of the session may have one
    assert cli.run(["train", file, *words, "--run", run, "--dry-run"]) == 0
    assert "sentencepiece:300: to be made of the text" in capsys.readouterr().out
    assert cli.run(["train", file, *words, "--run", run]) == 0
    folder, config = open_run(run)
    saved = saved_tokenizer(folder)
    assert config.data.tokenizer == "sentencepiece:300" and saved.vocab_size == 300
    model = vocabulary.model_file(config.data, build(config.data))
    assert saved.pieces == load_tokenizer(str(model)).pieces
    assert cli.run(["train", file, *words, "--run", run + "2", "--dry-run"]) == 0
    assert "sentencepiece:300: 300 ids" in capsys.readouterr().out
    model.unlink()
    assert cli.run(["train", "--resume", run, "--train.total_tokens", "1920"]) == 0
    assert not model.exists()  # the run has its own
    assert cli.run(["sample", run, "--tokens", "5"]) == 0
    np.testing.assert_array_equal(saved.encode("ab cd"), saved_tokenizer(folder).encode("ab cd"))


@pytest.mark.parametrize(
    ("spec", "size", "words"),
    [
        ("sentencepiece:many", 300, "must be sentencepiece:N with a number of pieces; nearest sentencepiece:300"),
        ("sentencepiece:", 300, "must be sentencepiece:N"),
        ("sentencepiece:0", 300, "must be sentencepiece:N"),
        ("sentencepiece:400", 300, "model.vocab_size is 300; nearest sentencepiece:300"),
    ],
)
def test_what_is_no_number_of_pieces_is_said_at_once(file, spec, size, words):
    with pytest.raises(UserError, match=f"data.tokenizer = {spec}: {words}"):
        load_config(file, ["--data.tokenizer", spec, "--model.vocab_size", str(size)])


@pytest.mark.parametrize(("size", "words"), [(20, "bytes and alphabet need at least"), (90_000, "fills at most")])
def test_a_number_that_the_text_cannot_fill(data, size, words):
    with pytest.raises(UserError, match=f"data.tokenizer = sentencepiece:{size}: .*{words}"):
        vocabulary.open_tokenizer(replace(data, tokenizer=f"sentencepiece:{size}"), build(data))
