"""The page that shows a text as a model sees it: its numbers, and that no text becomes HTML. Run: pytest
tests/test_look.py"""

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import api, cli
from gptjax.config import Config, LayoutConfig, ModelConfig
from gptjax.convert.huggingface import write_directory
from gptjax.convert.tokenizer import write_tokenizer
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError
from gptjax.infer.look import SHOWN, Look, label, packed, page, require_room, written
from gptjax.infer.request import Request
from gptjax.stages.weights import on_device

WINDOW = 5
MODEL = ModelConfig(
    2,
    4,
    32,
    seq_len=48,
    vocab_size=261,
    attention_pattern=("banded", "dense"),
    window=WINDOW,
    qkv_bias=False,
    scale_scores=False,
)
TEXT = "def f(x):\n\treturn <b>é</b>"
BYTES = load_tokenizer("bytes").fit(261)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a model with both kinds of layers."""
    folder = tmp_path_factory.mktemp("look") / "model"
    folder.mkdir()
    rng = np.random.default_rng(0)
    abstract = on_device(Config("x", replace(MODEL, scan_layers=False)), jax.devices()[0])
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract)
    params["embedding"][MODEL.vocab_size :] = 0
    write_directory(folder, {"model": replace(MODEL, scan_layers=False)}, params, BYTES.eot)
    write_tokenizer(load_tokenizer("bytes"), folder, MODEL.vocab_size, MODEL.seq_len)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> api.Model:
    return api.load(str(folder), layout=LayoutConfig(fsdp=1), slots=1)


@pytest.fixture(scope="module")
def look(model: api.Model) -> Look:
    return model.look(TEXT)


class Parts(HTMLParser):
    """Elements of a page, and the text in each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.title = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data
        elif self.tags and self.tags[-1][0] == "title":
            self.title += data


def data_of(text: str) -> dict[str, Any]:
    parts = Parts(text)
    return dict(json.loads(parts.scripts[0]))


def unpacked(data: dict[str, Any], layers: int) -> np.ndarray:
    """[L, H, T, T], as the page's script reads it."""
    count = len(data["tokens"])
    values = np.frombuffer(base64.b64decode(data["attention"]), np.uint8) / 255
    made = np.zeros((layers, data["heads"], count, count))
    made[..., *np.tril_indices(count)] = values.reshape(layers, data["heads"], -1) ** 2
    return made


def test_attention_sums_to_one_and_is_zero_beyond_the_band(look: Look, model: api.Model) -> None:
    weights, count = look.attention, len(look.ids)
    assert weights.shape == (2, 4, count, count) and look.windows == [WINDOW, None] and count > 2 * WINDOW
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    distance = np.arange(count)[:, None] - np.arange(count)
    assert not weights[:, :, distance < 0].any() and not weights[0][:, distance >= WINDOW].any()
    assert weights[0][:, (distance >= 0) & (distance < WINDOW)].all() and weights[1][:, distance >= 0].all()
    for layer in range(2):
        for head in range(4):
            np.testing.assert_array_equal(model.attention(look.ids, layer, head), weights[layer, head])


def test_attention_of_the_first_layer_is_a_softmax_in_float64(look: Look, model: api.Model) -> None:
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params)
    block = params["unit_0"]["block_0"]
    x = params["embedding"][look.ids] + params["positions"][: len(look.ids)]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * block["norm_attention"]["scale"] + block["norm_attention"]["bias"]
    q, k, _ = np.moveaxis(np.einsum("td,dchk->tchk", x, block["qkv"]["kernel"]), 1, 0)
    scores = np.einsum("thk,shk->hts", q, k)
    distance = np.arange(len(x))[:, None] - np.arange(len(x))
    scores = np.exp(np.where((distance >= 0) & (distance < WINDOW), scores, -np.inf))
    np.testing.assert_allclose(look.attention[0], scores / scores.sum(-1, keepdims=True), atol=1e-5)


def test_the_page_holds_what_score_and_the_engine_say(look: Look, model: api.Model) -> None:
    data = data_of(page(look, model.tokenizer, "name", layer=1, head=3))
    first, *tokens = data["tokens"]
    assert first["p"] is None and first["label"] == "<|endoftext|>"
    np.testing.assert_allclose([math.log(t["p"]) for t in tokens], [v for _, v in model.score(TEXT)], atol=2e-5)
    (reply,) = model.engine.run([Request(look.ids, 0, tops=SHOWN, prompt_logprobs=True)])
    for i, token, pairs in zip(look.ids[1:], tokens, reply.prompt_tops, strict=True):
        assert [name for name, _, _ in token["tops"]] == [label(BYTES, t) for t, _ in pairs]
        np.testing.assert_allclose([math.log(p) for _, p, _ in token["tops"]], [v for _, v in pairs], atol=2e-5)
        order = [t for t, _ in pairs]
        assert token["rank"] == 1 + order.index(i) if i in order else token["rank"] > SHOWN
        assert [own for _, _, own in token["tops"]] == [t == i for t in order]
    mean = -np.mean([math.log(t["p"]) for t in tokens])
    assert data["figures"] == f"{len(tokens)} tokens, {mean:.3f} nats each: perplexity {math.exp(mean):.1f}"
    assert (data["layer"], data["head"], data["heads"], data["windows"]) == (1, 3, 4, [WINDOW, None])
    # 255 steps of the square root: at most 1/255 of a weight of 1, and less of smaller ones.
    np.testing.assert_allclose(unpacked(data, 2), look.attention, atol=1 / 255)
    assert len(packed(look.attention)) == 2 * 4 * len(look.ids) * (len(look.ids) + 1) // 2


def test_the_page_is_one_file_that_fetches_nothing(look: Look, model: api.Model) -> None:
    text = page(look, model.tokenizer, "name")
    parts = Parts(text)
    assert text.startswith("<!doctype html>") and not re.search(r"https?://|@import|url\(", text)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in parts.tags)
    names = [attributes.get("id") for _, attributes in parts.tags]
    assert {"text", "about", "map", "layer", "head", "cell", "data"} <= set(names)
    assert "prefers-color-scheme: dark" in text and ("canvas", "0") in [(t, a.get("tabindex")) for t, a in parts.tags]
    assert "innerHTML" not in text and len(parts.scripts) == 2


HOSTILE = ["</script><script>alert(1)</script>", "<!--", "<script>", "<img src=x onerror=alert(1)>", "&lt;", '"', "\\"]


def test_no_text_becomes_html() -> None:
    """Tokens and titles with marks of HTML in them, also those of this page's own template."""
    names = [*HOSTILE, "<!--data-->", "<!--title-->", "\\1\\g<1>"]
    tokenizer = replace(BYTES, pieces=[name.encode() for name in names], special={})
    ids, size = list(range(len(names))), len(names)
    attention = np.broadcast_to(np.tri(size) / np.arange(1, size + 1)[:, None], (1, 1, size, size))
    made = page(Look(ids, 1, np.zeros((size, size), np.float32), attention, [None]), tokenizer, "".join(names))
    parts = Parts(made)
    assert parts.title.strip() == "".join(names) and len(parts.scripts) == 2
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in parts.tags)
    data = data_of(made)
    assert [token["text"] for token in data["tokens"]] == names
    assert "<" not in parts.scripts[0]


def test_what_would_not_be_seen_has_a_sign() -> None:
    pieces = ["\n", " a b", "\t", "\0", "\x1b[31m", "é", "\r\n\x7f"]
    tokenizer = replace(BYTES, pieces=[*(piece.encode() for piece in pieces), b"\xe6\x9d", b""])
    assert [written(tokenizer, i) for i in range(9)] == ["↵\n", " a b", "␉", "␀", "␛[31m", "é", "␍↵\n␡", "⟨e6 9d⟩", "∅"]
    assert [label(tokenizer, i) for i in (0, 1, 6, 7)] == ["↵", "␣a␣b", "␍↵␡", "⟨e6␣9d⟩"]


def test_the_verb_writes_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "page.html"
    assert cli.run(["look", str(folder), "--text", TEXT, "--layer", "1", "--head", "2", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    data = data_of(out.read_text(encoding="utf-8"))
    assert (data["layer"], data["head"]) == (1, 2) and len(data["tokens"]) == 1 + len(TEXT.encode())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--text is missing"),
        (["--text", "a", "--layer", "2"], "layer = 2: the model has 2, 0 to 1"),
        (["--text", "a", "--head", "4"], "head = 4: the model has 4, 0 to 3"),
        (["--text", "a" * 48], "49 tokens: the context holds 1 to 48"),
        (["--text", "a", "--out", "pyproject.toml/x.html"], r"--out pyproject.toml/x.html: .*; name a file"),
    ],
)
def test_what_cannot_be_shown_is_one_line(words: list[str], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        cli.run(["look", str(folder), *words])
    assert "\n" not in str(error.value)


def test_a_page_holds_some_hundred_tokens(model: api.Model) -> None:
    require_room(471, 12, 12)
    with pytest.raises(UserError, match="text: 472 tokens; a page holds 471, of 12 layers of 12 heads; shorten it"):
        require_room(472, 12, 12)
    require_room(512, 1, 1)
    with pytest.raises(UserError, match="513 tokens; a page holds 512"):
        require_room(513, 1, 1)
    with pytest.raises(UserError, match="text: empty"):
        model.look("")
