"""Ids that are made once and kept beside the text. Run: pytest tests/test_ids.py"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encoded import refusal, train

from gptjax import cli
from gptjax.config import DataConfig
from gptjax.data import cache
from gptjax.data.ids import ENDS, IDS, ids_of, tokenized
from gptjax.data.store import Joined
from gptjax.data.stream import eval_batches
from gptjax.data.texts import build, source_of, stream
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.train.metrics import read_log

BYTES = load_tokenizer("bytes")
SPLITS = {"train_split": "train[:70%]", "eval_split": "train[70%:]"}


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Two texts with weights, whose longer documents are several records."""
    random = np.random.default_rng(0)
    for name, count in (("a", 60), ("b", 200)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                file.write(json.dumps({"text": name * int(random.integers(1, 400)) + "é"}) + "\n")
    source = f"{tmp_path / 'a.jsonl'}:0.5,{tmp_path / 'b.jsonl'}:0.5"
    return DataConfig(source=source, cache_dir=str(tmp_path / "cache"), max_chars=100, lanes=2, **SPLITS)


def rows(config: DataConfig, tokenizer=BYTES) -> np.ndarray:
    made = stream(config, build(config), tokenizer, 64, micro_batch=8, rows=None, positions=None)
    return np.stack([np.stack([*made.batch(2)[:2]]) for _ in range(9)])


@pytest.mark.parametrize("split_by", ["document", "position"])
def test_rows_are_those_of_the_text(config, split_by):
    """Cuts in the middle of a document, and pieces that another split has, among them."""
    config = replace(config, split_by=split_by)
    kept = replace(config, cache_tokens=True)
    assert (rows(kept) == rows(config)).all()
    one = replace(config, source=config.source.partition(":")[0])
    assert (rows(replace(one, cache_tokens=True)) == rows(one)).all()
    text = build(one).split(one.eval_split, split_by)
    ids = source_of(replace(one, cache_tokens=True), text, BYTES)
    plain, known = ([*eval_batches(each, BYTES, 32, 4)] for each in (text, ids))
    assert len(plain) == len(known) and all((a.tokens == b.tokens).all() for a, b in zip(plain, known, strict=True))


def test_they_are_made_once(config):
    text = build(config).split("train", "document")
    assert isinstance(text.store, Joined)
    first = tokenized(config.cache_dir, text, BYTES)
    wanted = [first[i].ids.tolist() for i in range(len(first))]
    assert wanted == [BYTES.encode(text[i].text).tolist() for i in range(len(text))]
    again = tokenized(config.cache_dir, text, replace(BYTES, encode=None))
    assert [again[i].ids.tolist() for i in range(len(again))] == wanted and len(again) == len(text)


def test_a_vocabulary_above_65536_takes_four_bytes(config, monkeypatch):
    store = build(replace(config, source=config.source.partition(":")[0])).store
    folder = ids_of(config.cache_dir, store, BYTES)
    assert (folder / IDS).stat().st_size == 2 * int(np.load(folder / ENDS)[-1]) == 2 * store.sizes.sum()
    cache.remove(folder)
    monkeypatch.setattr(type(BYTES), "least_vocab_size", property(lambda self: 70_000))
    again = ids_of(config.cache_dir, store, BYTES)
    assert (again / IDS).stat().st_size == 4 * store.sizes.sum()


def test_damage_is_seen_and_a_full_disk_is_one_line(config, monkeypatch):
    store = build(replace(config, source=config.source.partition(":")[0])).store
    folder = ids_of(config.cache_dir, store, BYTES)
    whole = (folder / IDS).read_bytes()
    (folder / IDS).write_bytes(whole[:-1])
    assert (ids_of(config.cache_dir, store, BYTES) / IDS).read_bytes() == whole
    cache.remove(folder)

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cannot write the ids of the text .*No space left.*leave out data"):
        ids_of(config.cache_dir, store, BYTES)
    assert not [path for path in cache.datasets(config.cache_dir).iterdir() if "ids_" in path.name]


def test_a_run_learns_the_same(plain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(plain, train=replace(plain.train, total_tokens=6 * 128, eval_interval=6))
    plain = train(config, tmp_path / "plain")
    kept = train(config, tmp_path / "kept", "--data.cache_tokens", "true", "--data.cache_dir", str(tmp_path / "cache"))
    first, second = (
        [r["loss"] for r in read_log(run / "log.jsonl") if r["kind"] in ("train", "eval")] for run in (plain, kept)
    )
    assert first == second
    assert cli.run(["data", "--cache", "--cache-dir", str(tmp_path / "cache")]) == 0
    assert "  ids_" in capsys.readouterr().out
    words = "--data.cache_tokens", "true", "--data.fim_rate", "0.5"
    assert "data.cache_tokens = true: documents are rearranged" in refusal(config, tmp_path / "c", *words)
