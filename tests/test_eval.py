"""Evaluation against `transformers`, float64 loops and lm-evaluation-harness itself. Run: pytest tests/test_eval.py"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import api, cli
from gptjax.config import Config, DataConfig, LayoutConfig
from gptjax.convert.tokenizer import write_tokenizer
from gptjax.data.rows import PADDING
from gptjax.data.sources import open_source
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.evaluate import harness, page, results
from gptjax.evaluate.figures import Figure, Measure, classification, mean, ratio
from gptjax.evaluate.perplexity import perplexity
from gptjax.evaluate.score import Scorer
from gptjax.evaluate.tasks.functions import number
from gptjax.evaluate.windows import packed, windows

T, V, EOT = 16, 261, 256
TEXTS = (
    "a",
    "of 15 letters..",
    "it has 16 letter",
    "seventeen letters",
    "Größe 東京 😀. " * 6,
    "nothing of this is here twice: 0123456789 ABCDEFGHIJKLMNOPQRSTU",  # equal windows confuse the harness's cache
)
WORDS = ("alpha", "bravo", "delta", "gamma", "omega", "sigma")


@pytest.fixture(scope="module")
def torch() -> Any:
    found = pytest.importorskip("torch", reason="needs the peers extra")
    found.set_num_threads(1)  # tiny models: threads only wait for each other
    return found


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="needs the peers extra")


@pytest.fixture(scope="module")
def folders(torch: Any, transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random GPT-2 and GPT-Neo over bytes, as transformers writes them."""
    common = {"vocab_size": V, "bos_token_id": EOT, "eos_token_id": EOT}
    configs = {
        "gpt2": transformers.GPT2Config(n_positions=T, n_embd=32, n_layer=2, n_head=4, **common),
        "neo": transformers.GPTNeoConfig(
            max_position_embeddings=T,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
            **common,
        ),
    }
    root = tmp_path_factory.mktemp("peers")
    for name, config in configs.items():
        torch.manual_seed(1)
        peer = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in peer.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
        peer.save_pretrained(root / name)
        write_tokenizer(load_tokenizer("bytes"), root / name, V, T)
    return {name: root / name for name in configs}


@pytest.fixture(scope="module")
def gpt2(folders: dict[str, Path]) -> Iterator[api.Model]:
    """On one device; the command's tests are on eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield api.load(str(folders["gpt2"]))


@pytest.fixture(scope="module")
def scorer(gpt2: api.Model) -> Scorer:
    return Scorer(gpt2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents shorter and longer than the context."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def source(tiny: Config, file: Path) -> Any:
    return open_source(DataConfig(source=str(file), cache_dir=tiny.data.cache_dir), "train")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WikiText and a GSM8K of a few lines."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = [" = Greek = \n"]
    for i in range(24):
        words = rng.choice(WORDS, 9)
        lines += [f" {' '.join(words)} . \n", f" = Letter {i} = \n"][: 1 + (i % 6 == 5)]
    (folder / "wikitext.txt").write_text("\n".join(lines))
    sums = [{"question": f"{i} and 1?", "answer": f"It is {i}+1.\n#### {i + 1}"} for i in range(12)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return folder


# Windows


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(2, 12), st.data())
def test_every_token_is_a_target_once_with_the_context_that_the_stride_leaves(
    size: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    ids = np.arange(1, size + 1, dtype=np.int32)
    seen = []
    for _, tokens, targets in windows(0, ids, [0], length, stride):
        assert len(tokens) == len(targets) <= length
        for at in np.flatnonzero(targets != PADDING):
            place = int(targets[at])  # an id is its place, and what stands before it is all that came before
            assert tokens[: at + 1].tolist() == list(range(place - at - 1, place))
            assert at + 1 >= min(place, length - stride)
            seen.append(place)
    assert seen == ids.tolist()


def test_windows_side_by_side_are_those_of_the_harness() -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="needs the eval extra")
    for size in (1, 7, 8, 9, 23, 24, 25):
        ids = list(range(1, size + 1))
        theirs = [
            ([*context, *targets][:-1], targets)
            for context, targets in map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, 0, 8, 1))
        ]
        ours = [(w.tokens.tolist(), w.targets[w.targets != PADDING].tolist()) for w in windows(0, ids, [0], 8, 8)]
        assert ours == theirs


def test_packing_keeps_windows_whole_and_apart() -> None:
    found = [w for owner, size in enumerate((3, 9, 20, 1, 5, 8)) for w in windows(owner, np.arange(size), [99], 8, 4)]
    batches = list(packed(found, 2, 8))
    assert all(rows.tokens.shape == (2, 8) for rows, _ in batches)
    counted = [pair for rows, owners in batches for pair in zip(owners.flat, rows.targets.flat, strict=True)]
    made = sorted((int(owner), int(target)) for owner, target in counted if target != PADDING)
    assert made == [(owner, i) for owner, size in enumerate((3, 9, 20, 1, 5, 8)) for i in range(size)]
    for rows, _ in batches:
        for tokens, segments, positions in zip(rows.tokens, rows.segments, rows.positions, strict=True):
            for each in range(segments.max()):
                here = segments == each
                assert positions[here].tolist() == list(range(here.sum())) and len(tokens[here]) <= 8


# Perplexity


def slow(torch: Any, transformers: Any, folder: Path, stride: int) -> tuple[np.ndarray, ...]:
    """Nats, hits, tokens of TEXTS by a float64 loop over tokens, each alone with its context."""
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    made = []
    for text in TEXTS:
        ids = [EOT, *text.encode()]
        nats = hits = 0.0
        end = 0  # the last token that the current window scores
        for place in range(1, len(ids)):
            if place > end:
                end = min(end + (stride if end else T), len(ids) - 1)
            start = max(end - T, 0)
            with torch.no_grad():
                scores = peer(torch.tensor([ids[start:place]])).logits[0, -1]
            nats -= torch.log_softmax(scores, -1)[ids[place]].item()
            hits += scores.argmax().item() == ids[place]
        made.append((nats, hits, len(ids) - 1))
    return tuple(np.array(column) for column in zip(*made, strict=True))


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_perplexity_equals_a_float64_loop(
    torch: Any, transformers: Any, tiny: Config, folders: dict[str, Path], gpt2: api.Model, scorer: Scorer, texts: Path,
    stride: int,
) -> None:  # fmt: skip
    nats, hits, tokens = slow(torch, transformers, folders["gpt2"], stride)
    measure = perplexity(gpt2, source(tiny, texts), 0 if stride == 8 else stride, scorer)
    found = {name: figure.value for name, figure in measure.figures.items()}
    size = sum(len(text.encode()) for text in TEXTS)
    assert found["loss"] == pytest.approx(nats.sum() / tokens.sum(), rel=2e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats.sum() / tokens.sum()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats.sum() / size / math.log(2), rel=2e-6)
    assert found["accuracy"] == hits.sum() / tokens.sum()
    assert (measure.about["documents"], measure.about["tokens"], measure.about["bytes"]) == (6, tokens.sum(), size)
    loss = measure.figures["loss"]
    assert loss.low is not None and loss.low < loss.value < (loss.high or 0)
    assert scorer._judge._cache_size() == 1  # type: ignore[attr-defined]


def test_a_split_sequence_and_local_attention_give_the_same(
    torch: Any, transformers: Any, tiny: Config, folders: dict[str, Path], texts: Path
) -> None:
    nats, hits, tokens = slow(torch, transformers, folders["neo"], 8)
    model = api.load(str(folders["neo"]), layout=LayoutConfig(data=2, fsdp=1, context=2, tensor=2))
    measure = perplexity(model, source(tiny, texts))
    assert measure.figures["loss"].value == pytest.approx(nats.sum() / tokens.sum(), rel=2e-6)
    assert measure.figures["accuracy"].value == hits.sum() / tokens.sum()


def test_one_document_has_no_interval(tiny: Config, gpt2: api.Model, scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one document " * 20)
    measure = perplexity(gpt2, source(tiny, tmp_path / "one.txt"), 0, scorer)
    assert measure.figures["loss"].low is None and measure.about["interval"].startswith("none")


# Figures


def test_the_ratio_estimator_covers_the_truth_and_equals_student_where_documents_are_equal() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    values = rng.normal(3, 1, 20)
    same = ratio(values * 50, np.full(20, 50.0))
    assert (same.low, same.high) == pytest.approx(stats.t.interval(0.95, 19, values.mean(), stats.sem(values)))
    covered = 0
    for _ in range(400):
        sizes = rng.integers(5, 200, 30).astype(float)
        figure = ratio(sizes * rng.normal(3, 0.5, 30), sizes)
        covered += figure.low < 3 < figure.high
    assert 0.92 < covered / 400 < 0.98


def test_shares_of_zero_and_one_have_wilsons_interval() -> None:
    none = mean([0.0] * 10)
    assert (none.value, none.low) == (0, pytest.approx(0)) and none.high == pytest.approx(0.2775, abs=1e-3)


def test_classes_equal_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the eval extra")
    rng = np.random.default_rng(0)
    truth, chosen = rng.integers(0, 4, 200), rng.integers(0, 3, 200)  # one class is never chosen
    measure = classification(truth.tolist(), chosen.tolist(), ["a", "b", "c", "d"])
    for average in (None, "macro"):
        theirs = metrics.precision_recall_fscore_support(truth, chosen, average=average, zero_division=0)
        for kind, values in zip(("precision", "recall", "f1"), theirs, strict=False):
            if average:
                figure = measure.figures[f"macro_{kind}"]
                assert figure.value == pytest.approx(values) and figure.low < values < figure.high
            else:
                assert [row[kind] for row in measure.classes["rows"].values()] == pytest.approx(values.tolist())
    assert [row["count"] for row in measure.classes["rows"].values()] == np.bincount(truth).tolist()


# The harness


@pytest.fixture(scope="module")
def peer(torch: Any, transformers: Any, folders: dict[str, Path]) -> Any:
    """The harness's own model class on the same weights."""
    pytest.importorskip("lm_eval", reason="needs the eval extra")
    models = pytest.importorskip("lm_eval.models.huggingface")
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["gpt2"]).eval()
    return models.HFLM(
        model, tokenizer=transformers.AutoTokenizer.from_pretrained(folders["gpt2"]), batch_size=16, device="cpu"
    )


@pytest.fixture(scope="module")
def ours(peer: Any, gpt2: api.Model, scorer: Scorer) -> Any:
    from gptjax.evaluate.adapter import EngineLM

    return EngineLM(gpt2, scorer)


def asked(kind: str, *arguments: tuple) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i, ("t", i, 1)) for i, each in enumerate(arguments)]


PAIRS = [
    ("one two ", "three"),
    ("one two three four", " five"),
    ("one two three four", " six"),
    ("", "begin"),
    ("a context that is longer than what it holds", " end"),
    ("12345678901", "23456"),  # T + 1 tokens, as many as can be scored
    ("x", "y"),
]


@pytest.mark.parametrize("sharing", [False, True])
def test_log_likelihoods_equal_those_of_transformers(
    ours: Any, peer: Any, sharing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(ours), "_worth_sharing", lambda *_: sharing)
    found = ours.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    expected = peer.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([nats for nats, _ in found], [nats for nats, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_what_is_greedy_is_said_to_be(ours: Any, gpt2: api.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = gpt2.engine.run([gpt2.request([104, 105], max_tokens=4, temperature=0)])[0].tokens
    other = [*ids[:-1], (ids[-1] + 1) % 256]
    for sharing in (False, True):
        monkeypatch.setattr(type(ours), "_worth_sharing", lambda *_, s=sharing: s)
        found = ours._loglikelihood_tokens([(("", ""), [104, 105], each) for each in (ids, other, [])])
        assert [greedy for _, greedy in found] == [True, False, True] and found[2][0] == 0


def test_whole_texts_equal_those_of_transformers(ours: Any, peer: Any) -> None:
    requests = [(text,) for text in (*TEXTS, "")]
    found = ours.loglikelihood_rolling(asked("loglikelihood_rolling", *requests), disable_tqdm=True)
    expected = peer.loglikelihood_rolling(asked("loglikelihood_rolling", *requests[:-1]), disable_tqdm=True)
    np.testing.assert_allclose(found, [*expected, 0], atol=1e-3)


def test_replies_equal_those_of_transformers_and_end_before_the_stop_string(ours: Any, peer: Any) -> None:
    how = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    contexts = ("one two", "three", "a context that is longer than what it holds")
    ask = [(context, how) for context in contexts]
    found = ours.generate_until(asked("generate_until", *ask), disable_tqdm=True)
    assert found == peer.generate_until(asked("generate_until", *ask), disable_tqdm=True)
    letter = found[0][2]
    cut = ours.generate_until(asked("generate_until", (contexts[0], how | {"until": letter})), disable_tqdm=True)
    assert cut == [found[0].split(letter)[0]]
    drawn = {"temperature": 1.0, "do_sample": True, "max_gen_toks": 6}
    twice = ours.generate_until(asked("generate_until", *[("one", drawn)] * 2), disable_tqdm=True)
    assert twice[0] != twice[1]
    assert twice == ours.generate_until(asked("generate_until", *[("one", drawn)] * 2), disable_tqdm=True)
    with pytest.raises(UserError, match="num_beams"):
        ours.generate_until(asked("generate_until", ("one", {"num_beams": 4})), disable_tqdm=True)


def test_tasks_score_as_with_transformers(ours: Any, peer: Any, gpt2: api.Model, scorer: Scorer, data: Path) -> None:
    from lm_eval.evaluator import evaluate

    tasks = harness.load_tasks(["local_cloze", "local_wikitext"], str(data), 0)
    made = harness.run_tasks(gpt2, tasks, scorer=scorer)
    theirs = evaluate(peer, tasks, bootstrap_iters=0, log_samples=False)["results"]
    cloze, wikitext = made["local_cloze"], made["local_wikitext"]
    assert cloze.figures["acc"].value == theirs["local_cloze"]["acc,none"] and cloze.about["questions"] > 20
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        figure = wikitext.figures[name]
        assert figure.value == pytest.approx(theirs["local_wikitext"][f"{name},none"], rel=1e-4)
        assert figure.low is not None and figure.low < figure.value and figure.better == "lower"
    assert {"macro_precision", "macro_recall", "macro_f1"} < set(cloze.figures)
    assert cloze.classes["what"].startswith("a place") and len(cloze.classes["rows"]) == 4


def test_sums_are_right_where_the_last_number_is(gpt2: api.Model, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="needs the eval extra")
    from gptjax.evaluate.adapter import EngineLM

    def replies(self: Any, requests: list[Any]) -> list[str]:
        return [f" It is 0, or {int(r.args[0].split()[-4]) + i % 2}" for i, r in enumerate(requests)]

    monkeypatch.setattr(EngineLM, "generate_until", replies)
    measure = harness.run_tasks(gpt2, harness.load_tasks(["local_gsm8k"], str(data), 2), limit=3)["local_gsm8k"]
    assert measure.figures["exact_match"].value == pytest.approx(1 / 3) and measure.about["questions"] == 3
    assert measure.about["shots"] == 2


def test_the_number_that_counts() -> None:
    assert number("so 2+3=5.\n#### 1,234") == 1234 and number("It is 3 or 4.5 dollars.") == 4.5
    assert number("#### -7 apples, not 8") == -7 and number("none") is None


def test_tasks_are_made_of_the_text_that_lies_at_hand(shared: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the eval extra")
    tasks = harness.load_tasks(["local_cloze", "local_wikitext", "local_gsm8k"], str(shared))["tasks"]
    assert len(tasks["local_wikitext"].eval_docs) == 60 and len(tasks["local_gsm8k"].eval_docs) > 7000
    docs = list(tasks["local_cloze"].eval_docs)
    assert len(docs) > 1000 and all(len(set(doc["words"])) == 4 for doc in docs)
    assert 0.2 < np.mean([doc["right"] == 0 for doc in docs]) < 0.3


# The command


@pytest.fixture(scope="module")
def cached(tiny: Config) -> tuple[str, ...]:
    return "--cache-dir", tiny.data.cache_dir


def test_models_are_compared_on_one_page(
    folders: dict[str, Path], texts: Path, data: Path, cached: tuple[str, ...], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("lm_eval", reason="needs the eval extra")
    out = tmp_path / "out"
    words = ["eval", *map(str, folders.values()), "--text", str(texts), "--out", str(out), *cached]
    assert cli.run(words) == 0
    said = capsys.readouterr().out
    assert "perplexity" in said and "texts.jsonl: 6 documents" in said
    first = results.load(out / "gpt2.json")
    tasks = ["--tasks", "local_cloze", "--data", str(data), "--limit", "8", "--out", str(out)]
    assert cli.run(["eval", str(folders["gpt2"]), *tasks]) == 0
    again = results.load(out / "gpt2.json")
    assert again.measures["texts.jsonl"] == first.measures["texts.jsonl"]  # kept beside what is new
    shown = (out / "index.html").read_text()
    assert shown.count("<th>gpt2<") == 1 and shown.count("<th>neo<") == 1
    assert "not measured" in shown and "local_cloze (first 8)" in shown and "http" not in shown


def test_a_run_and_the_directory_it_is_made_of_are_worth_the_same(
    folders: dict[str, Path], texts: Path, cached: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli.run(["convert", str(folders["neo"]), str(run)]) == 0
    assert cli.run(["eval", str(run / "checkpoints" / "0"), str(folders["neo"]), "--text", str(texts), *cached]) == 0
    ours, theirs = (results.load(tmp_path / "eval" / name) for name in ("run-0.json", "neo.json"))
    assert (ours.name, ours.model["step"], theirs.model["step"]) == ("run step 0", 0, None)
    for name, figure in ours.measures["texts.jsonl"].figures.items():
        assert figure.value == pytest.approx(theirs.measures["texts.jsonl"].figures[name].value, rel=1e-6)
    with pytest.raises(UserError, match="no checkpoint 7; it has 0"):
        cli.run(["eval", str(run / "checkpoints" / "7"), "--text", str(texts), *cached])
    for file in (run / "checkpoints" / "0").rglob("d/*"):
        file.write_bytes(b"no")
    with pytest.raises(UserError, match="damaged"):
        cli.run(["eval", str(run), "--text", str(texts), *cached])


def test_the_page_escapes_names_and_points_out_only_what_compares() -> None:
    def result(name: str, vocab: int, loss: float) -> results.Result:
        model = {"path": "/x", "step": None, "parameters": 10, "context": 16, "vocab_size": vocab, "dtype": "float32"}
        figures = {name: Figure(loss, better="lower") for name in ("loss", "bits_per_byte")}
        return results.Result(name, model, {"<i>": Measure({"interval": "none"}, figures)})

    same = page.page([result("<b>", 5, 1.0), result("c", 5, 2.0)])
    assert "<b>" not in same and "<i>" not in same and same.count('class="best"') == 2
    other = page.page([result("b", 5, 1.0), result("c", 6, math.inf)])
    assert other.count('class="best"') == 0 and "∞" in other
    assert page.page([result("b", 5, 1.0), result("c", 6, 2.0)]).count('class="best"') == 1


Said = Callable[[list[str]], str]


@pytest.fixture
def refused(folders: dict[str, Path], cached: tuple[str, ...], tmp_path: Path) -> Said:
    def said(words: list[str]) -> str:
        with pytest.raises(UserError) as caught:
            cli.run(["eval", str(folders["gpt2"]), "--out", str(tmp_path / "out"), *cached, *words])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return said


def test_what_cannot_be_measured_is_one_line(
    refused: Said, texts: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nothing to measure; give --text" in refused([])
    assert "--stride 17: the context holds 16 tokens; nearest 16" in refused(["--text", str(texts), "--stride", "17"])
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in refused(["--text", str(tmp_path / "empty.txt")])
    assert "no such" in refused(["--text", str(tmp_path / "gone.txt")]).lower()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "gpt2.json").write_text("{}")
    assert "gpt2.json" in refused(["--text", str(texts)])
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install 'gptjax[eval]'" in refused(["--tasks", "local_cloze"])


def test_tasks_that_are_not_there_are_one_line(refused: Said, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the eval extra")
    assert "local_clothes: no such task; nearest local_cloze" in refused(["--tasks", "local_clothes"])
    with pytest.raises(UserError, match="nearest hellaswag;"):
        harness.require_known("helaswag", ["arc_easy", "hellaswag", "winogrande"])
    assert "--data: empty" in refused(["--tasks", "local_cloze"])
    assert "no gsm8k*.jsonl" in refused(["--tasks", "local_gsm8k", "--data", str(tmp_path)])
