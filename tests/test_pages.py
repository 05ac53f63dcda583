"""The page on which one talks with a model, in a browser, on replies that are written down. Run: pytest
tests/test_pages.py"""

import base64
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import Browsed, axe_findings, browsing
from paged import HOSTILE, MARKDOWN, REPLIES, Script, Written, app, asked, figures, serving, tokens_of
from serving import Running, tuned_model
from serving import serving as serving_model

from gptjax.data.tokenizers import load_tokenizer
from gptjax.html import page as html_page
from gptjax.html import policy
from gptjax.infer.look import Look
from gptjax.infer.look import page as look_page
from gptjax.label.answers import Record
from gptjax.label.app import create_app
from gptjax.label.session import Session
from gptjax.serve.pages import LookBody, looked_at
from gptjax.serve.protocol import ChatMessage


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Script, str]]:
    script = Script()
    with serving(app(script)) as address:
        yield script, address


@pytest.fixture
def script(served: tuple[Script, str]) -> Script:
    served[0].__init__()  # type: ignore[misc]
    return served[0]


class Chat(Browsed):
    """Uses the page as a person does."""

    def write(self, words: str) -> None:
        self.page.fill("#words", words)
        self.page.press("#words", "Enter")

    def send(self, words: str) -> str:
        """The reply when it is over."""
        self.write(words)
        return self.over()

    def over(self) -> str:
        self.page.wait_for_selector("#send[aria-label=Send]")
        return self.text(-1)

    def wait_for_words(self, words: str) -> None:
        self.page.wait_for_function("words => document.querySelector('#turns').textContent.includes(words)", arg=words)

    def turn(self, i: int) -> Any:
        return self.page.locator("article.turn").nth(i)

    def text(self, i: int) -> str:
        return str(self.turn(i).locator(".body").text_content())

    def turns(self) -> list[str]:
        return [str(text) for text in self.page.locator("article.turn .body").all_text_contents()]

    def tool(self, i: int, name: str) -> None:
        self.turn(i).get_by_role("button", name=name, exact=True).click()

    def kept(self) -> list[dict[str, Any]]:
        """The conversations that the browser keeps."""
        entries = self.page.evaluate("Object.entries(localStorage)")
        return [json.loads(value) for name, value in entries if name.startswith("gptjax.chat.talk.")]


@pytest.fixture
def open_chat(browser: Any, served: tuple[Script, str], script: Script) -> Iterator[Callable[..., Chat]]:
    """A page in a browser of its own, which has to end without an error of its script and of the policy."""
    opened: list[Chat] = []

    def made(ready: bool = True, **how: Any) -> Chat:
        opened.append(chat := Chat(browser, served[1], **how))
        if ready:
            chat.page.wait_for_selector("#model option", state="attached")
        return chat

    yield made
    for chat in opened:
        chat.close()


@pytest.fixture
def chat(open_chat: Callable[..., Chat]) -> Chat:
    return open_chat()


def test_a_message_is_sent_and_answered(chat: Chat, script: Script) -> None:
    assert chat.send("Hello") == f"You said 'Hello', seed {script.asked[0]['seed']}."
    assert chat.page.input_value("#words") == "" and chat.page.input_value("#title") == "Hello"
    (body,) = script.asked
    assert body["messages"] == [{"role": "user", "content": "Hello"}] and body["stream"] and body["logprobs"]
    assert (body["temperature"], body["top_p"], body["top_k"], body["top_logprobs"]) == (0.8, 1, 50, 5)
    assert body["max_tokens"] == 32  # half of the context
    reply = chat.text(1)
    chat.send("And now?")
    assert [message["content"] for message in script.asked[1]["messages"]] == ["Hello", reply, "And now?"]
    assert chat.page.locator("#said").text_content() == chat.text(3)  # what a screen reader says


def test_a_reply_streams_and_stops(chat: Chat, script: Script) -> None:
    script.pause = 0.2  # 8 s in all
    chat.write("slow")
    chat.wait_for_words("one two")
    assert chat.page.locator("#send").get_attribute("aria-label") == "Stop" and script.open == 1
    chat.page.keyboard.press("Escape")
    text = chat.over()
    assert 0 < len(text) < len(REPLIES["slow"]) and REPLIES["slow"].startswith(text)
    assert chat.turn(1).locator(".state").text_content() == "stopped"
    for _ in range(40):
        if script.open:
            chat.page.wait_for_timeout(100)
    assert script.open == 0, "the server was not told"
    script.pause = 0
    chat.tool(1, "Regenerate")
    assert chat.over() == REPLIES["slow"]
    script.pause = 0.05
    chat.write("slow again")
    chat.page.wait_for_function("() => document.querySelectorAll('article.turn').length === 4")
    chat.page.click("#send")
    chat.over()
    assert chat.text(3) != REPLIES["slow"]


def test_another_reply_and_other_words(chat: Chat, script: Script) -> None:
    chat.send("first")
    chat.send("second")
    one = chat.text(3)
    chat.tool(3, "Regenerate")
    assert chat.over() != one and len(chat.turns()) == 4
    assert script.asked[1]["messages"] == script.asked[2]["messages"]
    chat.tool(0, "Edit")
    chat.page.get_by_label("Other words").fill("other")
    chat.page.keyboard.press("Enter")
    chat.over()
    assert len(chat.turns()) == 2 and chat.text(0) == "other" and "'other'" in chat.text(1)
    assert script.asked[3]["messages"] == [{"role": "user", "content": "other"}]
    chat.tool(1, "Edit")
    chat.page.get_by_label("Other words").fill("what it should have said")
    chat.page.get_by_role("button", name="Keep").click()
    chat.send("go on")
    assert script.asked[4]["messages"][1] == {"role": "assistant", "content": "what it should have said"}
    chat.tool(2, "Edit")
    chat.page.keyboard.press("Escape")
    assert chat.text(2) == "go on" and len(script.asked) == 5


def test_text_is_never_html(chat: Chat) -> None:
    text = chat.send("html <b>bold</b>")
    for part in ('<img src=x onerror="window.broken=1">', "<script>", "<i>bold</i>", "javascript:window.broken=1"):
        assert part in text
    assert chat.text(0) == "html <b>bold</b>" and chat.page.input_value("#title") == "html <b>bold</b>"
    inside = chat.page.locator("#turns")
    assert inside.locator("img, script, iframe, i, b, [onerror], [onload], [src], [style]").count() == 0
    assert inside.locator("a:not([href^='https:'])").count() == 0
    chat.page.reload()
    chat.wait_for_words("<script>")
    chat.tool(1, "Probabilities")
    chat.tool(1, "Attention")
    chat.page.wait_for_selector("#look[open]")
    assert chat.page.evaluate("window.broken") is None
    tokens = [token["text"] for token in [{"text": each} for each in tokens_of(HOSTILE)]]
    assert chat.page.locator(".body.tokens span").all_text_contents() == tokens


def test_no_other_script_runs(chat: Chat) -> None:
    """The policy, tried: an injected script, a handler in HTML, a text as a program, a picture and another server."""
    refused = chat.page.evaluate(
        """async () => {
          const refused = [];
          addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
          const script = document.createElement("script");
          script.textContent = "window.broken = 1";
          document.body.append(script);
          const box = document.createElement("div");
          box.innerHTML = "<p onclick='window.broken = 1' style='color: red'>x</p><img src='http://127.0.0.1:9/x.png'>";
          document.body.append(box);
          box.firstChild.click();
          setTimeout("window.broken = 1", 0);
          await fetch("http://127.0.0.1:9/").catch(() => {});
          await new Promise((done) => setTimeout(done, 100));
          return refused;
        }"""
    )
    chat.allowed = re.compile("Content Security Policy")
    kinds = {"script-src-elem", "script-src-attr", "script-src", "style-src-attr", "img-src", "connect-src"}
    assert set(refused) == kinds and chat.page.evaluate("window.broken") is None


def test_the_page_is_one_file_that_fetches_nothing() -> None:
    text = html_page("serve/chat.html")
    assert text.startswith("<!doctype html>") and "/* include" not in text
    outside = re.sub(r"http://www\.w3\.org/2000/svg|https\?:", "", text)
    assert not re.search(
        r"https?://\w|@import|url\(|innerHTML|insertAdjacentHTML|document\.write|outerHTML|eval\(", outside
    )
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=(?!\"data:)", text)
    assert "unsafe" not in policy(text) and text.count("<script") == text.count("<style") == 1


def test_markdown_as_elements(chat: Chat) -> None:
    chat.send("markdown")
    body = chat.turn(1).locator(".body")
    assert body.locator("h4").all_text_contents() == ["Sampling, in short"]
    assert body.locator("strong").text_content() == "probabilities" and body.locator("em").text_content() == "drawn"
    link = body.locator("a")
    assert [link.get_attribute(name) for name in ("href", "rel", "target")] == [
        "https://example.org/paper",
        "noopener noreferrer",
        "_blank",
    ]
    assert body.locator("ol > li").count() == 3 and body.locator("ol > li:nth-child(2) > ul > li").count() == 2
    assert (
        body.locator("tr").count() == 4
        and body.locator("td.right").count() == 6
        and body.locator("td.middle").count() == 3
    )
    fence = MARKDOWN.split("```")[1].removeprefix("python\n").removesuffix("\n")
    assert body.locator("pre code").text_content() == fence
    assert body.locator("blockquote, hr, del").count() == 3


CODE = '<figure class="code"><figcaption><span>text</span></figcaption><pre tabindex="0"><code>{}</code></pre></figure>'


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
        ("**a *b* c** __d__ _e_", "<p><strong>a <em>b</em> c</strong> <strong>d</strong> <em>e</em></p>"),
        ("snake_case_name 2 * 3 * 4 **", "<p>snake_case_name 2 * 3 * 4 **</p>"),
        ("`**a**` ``b`c``", "<p><code>**a**</code> <code>b`c</code></p>"),
        (r"\*a\* \[b\](c)", "<p>*a* [b](c)</p>"),
        ("[a](javascript:alert(1)) [b](data:x) [c](//d.e)", "<p>[a](javascript:alert(1)) [b](data:x) [c](//d.e)</p>"),
        ("[a](JaVaScRiPt:1) [b](\tjavascript:1)", "<p>[a](JaVaScRiPt:1) [b](    javascript:1)</p>"),
        ("![a](https://b.c/d)", '<p><a href="https://b.c/d" rel="noopener noreferrer" target="_blank">a</a></p>'),
        (
            "see https://b.c/d_e_f.",
            '<p>see <a href="https://b.c/d_e_f" rel="noopener noreferrer" target="_blank">https://b.c/d_e_f</a>.</p>',
        ),
        ("- a\n- b\n  - c", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li></ul>"),
        ("1. d\n\n1. e\n\n- f", "<ol><li><p>d</p></li><li><p>e</p></li></ol><ul><li><p>f</p></li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
        ("> a\nb\n> > c", "<blockquote><p>a<br>b</p><blockquote><p>c</p></blockquote></blockquote>"),
        ("# a\n####### b", "<h3>a</h3><p>####### b</p>"),
        ("a | b\nc", "<p>a | b<br>c</p>"),
        ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
        ("~~a~~ ~b~", "<p><del>a</del> ~b~</p>"),
        ("```\n<b>", CODE.format("&lt;b&gt;")),
        ("~~~\na\n```\n~~~\nb", CODE.format("a\n```") + "<p>b</p>"),
        ("", ""),
    ],
)  # fmt: skip
def test_markdown_of(text: str, html: str, plain: Chat) -> None:
    assert plain.page.evaluate(RENDER, text) == html


RENDER = "text => { const made = document.createElement('div'); markdown(text, made); return made.innerHTML; }"


@pytest.fixture(scope="module")
def plain(browser: Any, served: tuple[Script, str]) -> Iterator[Chat]:
    """A page that only renders."""
    chat = Chat(browser, served[1])
    yield chat
    chat.close()


def test_markdown_of_anything_keeps_the_words_and_comes_to_an_end(plain: Chat) -> None:
    marks = ["*", "_", "`", "~", "[", "](", ")", ">", "#", "|", "-", "1.", "\n", " ", "<", "\\", "!", "http://", "é"]
    hostile = [mark * 3000 for mark in marks] + [
        "> " * 500 + "x",
        "- " * 500 + "x",
        "**a " * 2000,
        "[a](" * 2000,
        "|a" * 2000 + "\n" + "|-" * 2000,
    ]
    mixed = [
        "w".join(marks[(i * step + j) % len(marks)] for j in range(400)) for i, step in enumerate((1, 2, 3, 5, 7, 11))
    ]
    for text in [*hostile, *mixed]:
        parsed = f"text => new DOMParser().parseFromString(({RENDER})(text), 'text/html').body.textContent"
        words = plain.page.evaluate(parsed, text)
        assert words.count("w") >= text.count("w")
    assert plain.page.evaluate("navigator.userAgent")


def test_it_asks_for_a_key(open_chat: Callable[..., Chat], script: Script) -> None:
    script.key = "right"
    chat = open_chat(ready=False)
    dialog = chat.page.locator("#key-dialog")
    dialog.wait_for()
    chat.page.fill("#key", "wrong")
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_function("() => document.querySelector('#key-why').textContent.includes('wrong or missing')")
    chat.page.fill("#key", "right")
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_selector("#model option", state="attached")
    assert not dialog.is_visible() and chat.send("Hello").startswith("You said")
    chat.page.reload()
    chat.page.wait_for_selector("#model option", state="attached")
    assert not dialog.is_visible() and "right" not in chat.page.evaluate("JSON.stringify(localStorage)")
    script.key = "changed"
    chat.write("Again")
    dialog.wait_for()
    chat.page.keyboard.press("Escape")
    assert "wrong or missing" in str(chat.page.locator(".failed").text_content())
    chat.page.get_by_role("button", name="Try again").click()
    dialog.wait_for()
    chat.page.fill("#key", "changed")
    chat.page.get_by_role("button", name="Use it").click()
    chat.wait_for_words("You said 'Again'")
    chat.allowed = re.compile("401")


def test_a_reload_in_the_middle_keeps_what_has_come(chat: Chat, script: Script) -> None:
    chat.send("Hello")
    script.pause = 0.05
    chat.write("slow")
    chat.wait_for_words("one two three")
    before = chat.text(3)
    chat.page.reload()
    chat.wait_for_words("one two three")
    text = chat.text(3)
    assert text.startswith(before.rstrip()) and REPLIES["slow"].startswith(text)
    assert chat.turn(3).locator(".state").text_content() == "cut off"
    assert chat.page.input_value("#title") == "Hello"
    script.pause = 0
    chat.tool(3, "Regenerate")
    assert chat.over() == REPLIES["slow"]


def test_a_browser_that_keeps_nothing(open_chat: Callable[..., Chat]) -> None:
    blocked = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    chat = open_chat(before=blocked)
    assert chat.send("Hello").startswith("You said")
    assert "keeps nothing" in str(chat.page.locator("#notice").text_content())
    chat.page.get_by_role("button", name="New conversation").click()
    chat.send("Another")
    assert chat.page.locator("#list li").count() == 2


def test_a_browser_whose_storage_is_full(open_chat: Callable[..., Chat]) -> None:
    """Probabilities of other conversations go first, then those of this one, then it is said."""
    limited = """
      window.room = Infinity;
      const set = Storage.prototype.setItem;
      Storage.prototype.setItem = function (name, value) {
        const others = Object.keys(this).filter((each) => each !== name).map((each) => this.getItem(each)).join("");
        const full = this === localStorage && others.length + value.length > window.room;
        if (full) throw new DOMException("full", "QuotaExceededError");
        set.call(this, name, value);
      };"""
    chat = open_chat(before=limited)
    chat.send("first")
    assert all(turn.get("tokens") for talk in chat.kept() for turn in talk["turns"] if turn["role"] == "assistant")
    used = chat.page.evaluate("Object.values(localStorage).join('').length")
    chat.page.click("#new")
    chat.page.evaluate(f"window.room = {1.6 * used}")
    chat.send("second")
    first, second = sorted(chat.kept(), key=lambda talk: talk["title"])
    assert "tokens" not in first["turns"][1] and second["turns"][1]["tokens"]
    chat.page.evaluate(f"window.room = {1.2 * used}")
    chat.send("third")
    assert not any("tokens" in turn for talk in chat.kept() for turn in talk["turns"])
    assert chat.page.locator("#notice").is_hidden()
    chat.page.evaluate("window.room = Object.values(localStorage).join('').length + 100")
    chat.send("fourth " * 60)
    assert "storage is full" in str(chat.page.locator("#notice").text_content())
    assert len(chat.turns()) == 6
    chat.allowed = re.compile("400")


def test_probabilities_of_each_token(chat: Chat) -> None:
    tokens = tokens_of(chat.send("Hello"))
    chat.tool(1, "Probabilities")
    spans = chat.turn(1).locator(".body.tokens span")
    assert spans.all_text_contents() == tokens
    card = chat.page.locator("#card")
    for i in (2, 0, 3):
        spans.nth(i).hover()
        value, tops = figures(i, tokens[i])
        assert f"probability {100 * math.exp(value):.3g}" in str(card.text_content())
        shown = [
            (str(line.locator("span").text_content()), str(line.locator("b").text_content()))
            for line in card.locator("li").all()
        ]
        signs = str.maketrans({" ": "␣", "\n": "↵"})
        assert [name for name, _ in shown] == [name.translate(signs) for name, _ in tops]
        assert [float(p.split()[0]) for _, p in shown] == pytest.approx([100 * math.exp(p) for _, p in tops], rel=5e-3)
        assert (
            card.locator("li.own").text_content()
            == f"{tokens[i].translate(signs)}{shown[[n for n, _ in tops].index(tokens[i])][1]}"
        )
    chat.page.mouse.move(5, 5)
    chat.page.keyboard.press("End")
    assert "seed" not in str(card.locator("code").text_content())  # the last one
    chat.page.keyboard.press("ArrowLeft")
    assert card.locator("code").text_content() == tokens[-2].replace(" ", "␣") and card.is_visible()
    chat.page.keyboard.press("Alt+KeyP")
    assert chat.page.locator(".body.tokens").count() == 0 and card.is_hidden()


PIXEL = """([i, j]) => {
  const map = document.querySelector("#look-map"), pen = map.getContext("2d");
  const margin = map.width - 22 * 13 - 2; // of thirteen tokens
  return [...pen.getImageData(margin + 22 * j + 11, margin + 22 * i + 11, 1, 1).data];
}"""


def test_the_heat_map_of_a_reply(chat: Chat, script: Script) -> None:
    chat.send("a b c d e")
    chat.tool(1, "Attention")
    chat.page.wait_for_selector("#look[open]")
    body = script.asked[-1]
    assert [m["role"] for m in body["messages"]] == ["user", "assistant"] and (body["layer"], body["head"]) == (0, 0)
    assert chat.page.locator("#layer option").all_text_contents() == ["0, banded, W = 3", "1, dense"]
    count = chat.page.locator("#look-text span").count()
    assert count == 13
    colours = {cell: chat.page.evaluate(PIXEL, list(cell)) for cell in [(5, 5), (5, 4), (5, 3), (5, 2), (2, 5), (2, 0)]}
    assert colours[5, 4] == colours[5, 3] == colours[2, 0], "a third each"
    assert colours[5, 2] == colours[2, 5] != colours[5, 3], "beyond the band as what comes later"
    chat.page.select_option("#layer", "1")
    chat.page.wait_for_function("() => document.querySelector('#look-map').ariaLabel.includes('layer 1')")
    assert script.asked[-1]["layer"] == 1
    assert chat.page.evaluate(PIXEL, [5, 2]) == chat.page.evaluate(PIXEL, [5, 0]) != colours[5, 2]
    chat.page.locator("#look-map").focus()
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft"):
        chat.page.keyboard.press(key)
    assert str(chat.page.locator("#look-cell").text_content()).startswith("11: ")
    assert "takes 8.4" in str(chat.page.locator("#look-cell").text_content())  # a twelfth, in 255 steps of its root
    chat.page.locator("#look-text span").nth(4).hover()
    assert "rank 4 of 50,257" in str(chat.page.locator("#look-about").text_content())
    chat.page.keyboard.press("Escape")
    assert chat.page.locator("#look").is_hidden()


def test_what_no_longer_fits_is_left_out_and_said(chat: Chat, script: Script) -> None:
    chat.page.click("#show-settings")
    chat.page.fill("#system", "Be brief.")
    for words in ("one", "two", "three"):
        chat.send(words)
    sent = script.asked[-1]["messages"]
    assert [m["content"] for m in sent if m["role"] != "assistant"] == ["Be brief.", "two", "three"]
    assert "The oldest 2 turns no longer fit the context of 64 tokens" in str(
        chat.page.locator(".left-out").text_content()
    )
    chat.send("four")
    assert "The oldest 4 turns" in str(chat.page.locator(".left-out").text_content()) and len(chat.turns()) == 8
    chat.tool(1, "Attention")
    chat.page.wait_for_selector("#look[open]")
    assert [m["content"] for m in script.asked[-1]["messages"]] == ["Be brief.", "one", chat.text(1)]
    chat.allowed = re.compile("400")


@pytest.mark.parametrize(("words", "message"), [("break", "The engine failed."), ("drop", "The connection ended")])
def test_what_fails_in_the_middle_is_one_line(words: str, message: str, chat: Chat, script: Script) -> None:
    chat.write(words)
    chat.wait_for_words(message)
    assert chat.text(1).startswith("You said") and chat.turn(1).locator(".state").text_content() == "stopped"
    chat.page.get_by_role("button", name="Try again").click()
    chat.wait_for_words(message)
    assert len(script.asked) == 2 and script.asked[0]["messages"] == script.asked[1]["messages"]
    assert len(chat.turns()) == 2


def test_a_refusal_is_one_line(chat: Chat, script: Script) -> None:
    chat.write("refuse")
    chat.wait_for_words("4 replies are under way. (again in 2 s)")
    assert chat.turns() == ["refuse"]
    chat.page.reload()
    chat.wait_for_words("4 replies are under way.")
    chat.send("Hello")
    assert script.asked[-1]["messages"] == [{"role": "user", "content": "Hello"}], "two turns of the user"
    assert chat.send("nothing") == "" and chat.turn(-1).locator(".state").text_content() == "no words"
    chat.send("Hello?")
    assert [m["content"] for m in script.asked[-1]["messages"]][::2] == ["Hello", "Hello?"]
    chat.allowed = re.compile("429")


def test_conversations_are_kept_named_deleted_and_exported(chat: Chat, tmp_path: Path) -> None:
    reply = chat.send("markdown, please")
    chat.page.fill("#title", "Über <knobs>")
    chat.page.click("#new")
    chat.send("Another")
    assert chat.page.locator("#list .open").all_text_contents() == ["Another", "Über <knobs>"]
    chat.page.reload()
    assert chat.page.input_value("#title") == "Another"
    chat.page.locator("#list .open").nth(1).click()
    assert chat.text(1) == reply
    chat.page.click("#show-settings")
    chat.page.fill("#system", "Be brief.")
    for name, ending in (("Export JSON", "json"), ("Export Markdown", "md")):
        with chat.page.expect_download() as download:
            chat.page.get_by_role("button", name=name).click()
        assert download.value.suggested_filename == f"über-knobs.{ending}"
        download.value.save_as(tmp_path / ending)
    made = json.loads((tmp_path / "json").read_text())
    assert made["title"] == "Über <knobs>" and made["model"] == "tiny"
    assert [m["role"] for m in made["messages"]] == ["system", "user", "assistant"]
    assert made["messages"][2]["content"] == MARKDOWN and made["messages"][2]["sampling"]["temperature"] == 0.8
    assert "".join(token for token, _, _ in made["messages"][2]["logprobs"]) == MARKDOWN
    assert (tmp_path / "md").read_text() == (
        f"# Über <knobs>\n\n## System\n\nBe brief.\n\n## You\n\nmarkdown, please\n\n## Reply\n\n{MARKDOWN}\n"
    )
    chat.page.get_by_role("button", name="Delete Über <knobs>").click()
    assert chat.page.locator("#list li").count() == 1 and len(chat.kept()) == 1
    chat.page.get_by_role("button", name="Undo").click()
    assert chat.text(1) == reply and len(chat.kept()) == 2


def test_sampling_is_what_the_sliders_say(chat: Chat, script: Script) -> None:
    chat.page.click("#show-settings")
    for name, key, presses in (
        ("temperature", "ArrowRight", 4),
        ("top_p", "ArrowLeft", 10),
        ("top_k", "Home", 1),
        ("max_tokens", "Home", 1),
    ):
        chat.page.focus(f"#{name}")
        for _ in range(presses):
            chat.page.keyboard.press(key)
    chat.page.fill("#seed", "12x3")
    one = chat.send("Hello")
    how = {name: script.asked[0][name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")}
    assert how == {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "max_tokens": 1, "seed": 123}
    chat.tool(1, "Regenerate")
    assert chat.over() == one
    chat.page.reload()
    chat.page.click("#show-settings")
    shown = [chat.page.locator(f"output[for={name}]").text_content() for name in ("temperature", "top_p", "top_k")]
    assert shown == ["1", "0.9", "0"] and chat.page.input_value("#seed") == "123"


def test_by_keys_alone(chat: Chat, script: Script) -> None:
    keys = chat.page.keyboard
    keys.type("one")
    keys.press("Shift+Enter")
    keys.type("two")
    keys.press("Enter")
    chat.over()
    assert script.asked[0]["messages"][0]["content"] == "one\ntwo"
    keys.press("Alt+KeyE")
    keys.type(" three")
    keys.press("Enter")
    chat.over()
    assert chat.text(0) == "one\ntwo three"
    keys.press("Alt+KeyR")
    chat.over()
    assert len(script.asked) == 3
    keys.press("Alt+KeyK")
    listed = chat.page.locator("#keys td:first-child").all_text_contents()
    assert chat.page.locator("#keys").is_visible() and "Alt + N" in listed
    keys.press("Escape")
    keys.press("Alt+KeyS")
    assert chat.page.locator("#settings").is_visible()
    keys.press("Alt+KeyC")
    assert chat.page.locator("#side").is_hidden()
    keys.press("Alt+KeyN")
    assert chat.turns() == [] and chat.page.evaluate("document.activeElement.id") == "words"


def test_a_model_that_has_not_learned_conversations_goes_on_with_a_text(
    open_chat: Callable[..., Chat], script: Script
) -> None:
    script.chats = False
    chat = open_chat()
    chat.page.wait_for_selector("body.continues")
    one = chat.send("Once *upon* a time")
    assert script.asked[0]["prompt"] == "Once *upon* a time" and script.asked[0]["logprobs"] == 5
    chat.page.press("#words", "Enter")
    chat.page.wait_for_function("() => document.querySelectorAll('article.turn').length === 3")
    chat.over()
    assert script.asked[1]["prompt"] == "Once *upon* a time" + one
    chat.tool(1, "Probabilities")
    assert chat.turn(1).locator(".body.tokens span").all_text_contents() == tokens_of(one)
    chat.tool(1, "Attention")
    chat.page.wait_for_selector("#look[open]")
    assert script.asked[-1]["text"] == "Once *upon* a time" + one


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_serious_stands_in_the_way_of_anybody(theme: str, open_chat: Callable[..., Chat]) -> None:
    wide = open_chat(theme=theme)
    wide.send("Hello")
    wide.send("markdown")
    wide.page.click("#show-settings")
    assert axe_findings(wide.page) == []
    wide.tool(1, "Probabilities")
    wide.turn(1).locator(".tokens span").nth(3).hover()
    assert axe_findings(wide.page) == []
    wide.tool(1, "Attention")
    wide.page.wait_for_selector("#look[open]")
    assert axe_findings(wide.page) == []
    narrow = open_chat(theme=theme, width=390, height=844)
    narrow.send("markdown")
    narrow.send("Hello")
    narrow.write("refuse")
    narrow.wait_for_words("under way")
    assert axe_findings(narrow.page) == []
    assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 390
    narrow.page.click("#show-side")
    assert axe_findings(narrow.page) == [] and narrow.page.locator("#side").is_visible()
    narrow.page.keyboard.press("Escape")
    assert narrow.page.locator("#side").is_hidden()
    narrow.allowed = re.compile("429")


def test_the_theme_is_a_choice_that_is_kept(open_chat: Callable[..., Chat]) -> None:
    chat = open_chat(theme="light")
    paper = lambda: chat.page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    light = paper()
    chat.page.get_by_role("button", name="Theme: as the system").click()
    assert paper() == light
    chat.page.get_by_role("button", name="Theme: light").click()
    dark = paper()
    assert dark != light
    chat.page.reload()
    assert paper() == dark
    chat.page.get_by_role("button", name="Theme: dark").click()
    assert paper() == light


def test_the_page_of_a_look(browser: Any, tmp_path: Path) -> None:
    """That of `gptjax look` draws by the same script: weights of each layer and head, and the edge of the band."""
    ids, size = [*b"abcdef"], 6
    even = np.tri(size) / np.arange(1, size + 1)[:, None]
    own = np.broadcast_to(np.eye(size), (1, 2, size, size))
    attention = np.concatenate([own, np.broadcast_to(even, (1, 2, size, size))])
    look = Look(ids, 1, np.zeros((size, 261), np.float32), attention, [1, None])
    path = tmp_path / "look.html"
    path.write_text(look_page(look, load_tokenizer("bytes").fit(261), "A <title>", layer=1, head=1), encoding="utf-8")
    shown = Browsed(browser, path.as_uri())
    assert shown.page.title() == "A <title>" and shown.page.locator("#text span").all_text_contents() == [*"abcdef"]
    for _ in range(4):
        shown.page.focus("#map")
        shown.page.keyboard.press("ArrowDown")
    cell = shown.page.locator("#cell")
    assert str(cell.text_content()).startswith("5: ‘f’ takes 16.6 % from 1: ‘b’")
    shown.page.select_option("#layer", "0")
    assert str(cell.text_content()).startswith("5: ‘f’ takes 100 % from 5: ‘f’")
    shown.page.keyboard.press("Tab")
    shown.page.locator("#text span").nth(2).hover()
    assert "probability 0.383 %, rank 1 of 261" in str(shown.page.locator("#about").text_content())
    assert axe_findings(shown.page) == []
    shown.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A model of random weights, with both kinds of layers, as `gptjax serve` serves it."""
    with serving_model(tuned_model(1), name="tiny") as running:
        yield running


@pytest.mark.slow
def test_a_model_that_is_served(server: Running, browser: Any) -> None:
    """The whole way: what the page shows is what the server answers to others."""
    chat, model = Chat(browser, server.url), server.served.model
    chat.page.click("#show-settings")
    chat.page.fill("#seed", "7")
    chat.page.fill("#system", "S")
    assert chat.page.get_attribute("#max_tokens", "max") == str(model.context // 2)
    chat.page.fill("#max_tokens", "12")  # half characters are three bytes each once they are text
    chat.send("Hi")
    assert chat.page.locator(".failed").all_text_contents() == []
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    how = {"max_tokens": 12, "temperature": 0.8, "top_k": 50, "seed": 7}
    answer = server.post("/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=5, **how)
    text = chat.kept()[0]["turns"][1]["text"]
    assert text == answer["choices"][0]["message"]["content"] != ""
    chat.tool(1, "Probabilities")
    spans = chat.turn(1).locator(".body.tokens span")
    told = answer["choices"][0]["logprobs"]["content"]
    assert spans.count() == len(told)
    for i in range(3):
        spans.nth(i).hover()
        said = str(chat.page.locator("#card p").text_content())
        assert float(said.split()[1]) == pytest.approx(100 * math.exp(told[i]["logprob"]), rel=1e-2)
    chat.tool(1, "Attention")
    chat.page.wait_for_selector("#look[open]")
    ids = looked_at(
        model, LookBody(messages=[ChatMessage(**m) for m in [*messages, {"role": "assistant", "content": text}]])
    )
    assert chat.page.locator("#look-text span").count() == len(ids)
    chat.page.select_option("#layer", "1")
    chat.page.select_option("#head", "3")
    chat.page.wait_for_function("() => document.querySelector('#look-map').ariaLabel.includes('layer 1, head 3')")
    shown = re.search(r"takes ([\d.]+) %", str(chat.page.locator("#look-cell").text_content()))
    weight = model.attention(ids, 1, 3)[-1, -1]
    assert shown and float(shown[1]) == pytest.approx(100 * weight, abs=100 * 2 / 255)
    chat.page.keyboard.press("Escape")
    for words in ("a" * 20, "b" * 20, "c" * 20):
        chat.send(words)
    assert "no longer fit the context of 96 tokens" in str(chat.page.locator(".left-out").text_content())
    chat.allowed = re.compile("400")
    chat.close()


@pytest.mark.slow
def test_a_look_over_http(server: Running) -> None:
    """What the map is drawn from, against the model's own figures; a byte is a step of 1/255 of the root."""
    model = server.served.model
    told = server.post("/look", text="Hello <b>", layer=1, head=2)
    ids = [*model.before, *b"Hello <b>"]
    weights, count = model.attention(ids, 1, 2), len(ids)
    got = np.frombuffer(base64.b64decode(told["attention"]), np.uint8) / 255
    np.testing.assert_allclose(got**2, weights[np.tril_indices(count)], atol=1 / 255)
    assert told["windows"] == [None, 24] and (told["layer"], told["head"], told["heads"]) == (1, 2, 4)
    scores = model.score("Hello <b>")
    assert [token["p"] for token in told["tokens"]] == [
        None,
        *(pytest.approx(math.exp(v), rel=1e-4) for _, v in scores),
    ]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for messages, ending in ((turns, "<|end|>"), (turns[:1], "<|assistant|>")):
        labels = [token["label"] for token in server.post("/look", messages=messages)["tokens"]]
        assert labels[:3] == ["<|user|>", "H", "i"] and labels[-1] == ending


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "text and messages: give one of them"),
        ({"text": "a", "messages": []}, 400, "text and messages: give one of them"),
        ({"text": ""}, 400, "text: empty"),
        ({"messages": []}, 400, "no message"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "roles out of order"),
        ({"text": "a", "layer": 2}, 400, "layer = 2: the model has 2, 0 to 1"),
        ({"text": "a", "head": -1}, 400, "head"),
        ({"text": "a" * 96}, 400, "97 tokens: the context holds 1 to 96"),
        ({"text": "\ud800"}, 400, "half a character"),
        ({"text": "a", "heads": 1}, 400, "heads: no such parameter"),
        ({"text": "a", "model": "other"}, 404, "not served here"),
    ],
)
def test_what_cannot_be_looked_at(body: dict[str, Any], status: int, message: str, server: Running) -> None:
    answer = server.client.post("/look", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status and message in answer.json()["error"]["message"]


class Labelling(Browsed):
    """Ranks as a person does."""

    def slots(self) -> dict[int, str]:
        """The letters at each rank; 0 are those without one."""
        found = self.page.locator(".slot").all()
        return {int(s.get_attribute("data-slot")): "".join(s.locator(".chip").all_text_contents()) for s in found}

    def note(self) -> str:
        return str(self.page.locator("#note").text_content())

    def middle(self, selector: str) -> tuple[float, float]:
        box = self.page.locator(selector).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag(self, letter: str, rank: int, at: str = "#slots .chip") -> None:
        """With the mouse, from a letter on the board or on its reply."""
        handle = f"{at}:has-text('{letter}')"
        self.page.mouse.move(*self.middle(handle))
        self.page.mouse.down()
        self.page.mouse.move(*self.middle(f"[data-slot='{rank}']"), steps=4)
        self.page.mouse.up()

    def touch(self, letter: str, rank: int) -> None:
        """With a finger."""
        session = self.context.new_cdp_session(self.page)
        points = [self.middle(f"#slots .chip:has-text('{letter}')"), self.middle(f"[data-slot='{rank}']")]
        (x0, y0), (x1, y1) = points
        way = [(x0 + (x1 - x0) * k / 4, y0 + (y1 - y0) * k / 4) for k in range(5)]
        for kind, (x, y) in zip(["touchStart", *["touchMove"] * 4], way, strict=True):
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def shown(self) -> list[str]:
        return [str(text) for text in self.page.locator(".reply p").all_text_contents()]

    def following(self, prompt: str) -> None:
        self.page.wait_for_function("text => document.querySelector('#turns').textContent.includes(text)", arg=prompt)


@pytest.fixture
def label(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Labelling]]:
    """A page of a session, which is over with the test."""
    with ExitStack() as stack:

        def made(texts: Sequence[str] = ("one", "two", "three"), name: str = "ann", **how: Any) -> Labelling:
            prompts = [asked(text) for text in texts]
            count = how.pop("count", 4)
            session = stack.enter_context(Session(prompts, Written(count), Record(tmp_path / "r.jsonl"), name))
            address = stack.enter_context(serving(create_app(session, "127.0.0.1")))
            page = Labelling(browser, address, **how)
            stack.callback(page.close)
            page.page.wait_for_selector("#main[aria-busy='false']")
            return page

        yield made


def rows(tmp_path: Path, name: str = "r.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def given(tmp_path: Path, page: Labelling, shown: list[str]) -> list[int]:
    """The ranks that were kept last, of the replies as they were shown."""
    row = rows(tmp_path)[-1]
    return [row["ranks"][row["replies"].index(text)] for text in shown]


def test_replies_are_ranked_with_the_mouse(label: Callable[..., Labelling], tmp_path: Path) -> None:
    page = label()
    shown = page.shown()
    assert sorted(shown) == [f"one: reply {i}" for i in range(4)] and page.slots()[0] == "ABCD"
    assert page.page.locator("#save").is_disabled()
    page.drag("C", 1)
    page.drag("A", 2, at=".reply .chip")
    page.drag("B", 2)
    page.drag("D", 4)
    assert page.slots() == {0: "", 1: "C", 2: "AB", 3: "", 4: "D"} and "All are ranked" in page.note()
    page.drag("D", 1)
    page.drag("D", 3)
    assert [card.get_attribute("aria-label") for card in page.page.locator(".reply").all()] == [
        "Reply A, rank 2, tied with B", "Reply B, rank 2, tied with A", "Reply C, rank 1", "Reply D, rank 3",
    ]  # fmt: skip
    page.page.mouse.move(*page.middle("#slots .chip:has-text('C')"))
    page.page.mouse.down()
    page.page.mouse.move(5, 300)
    page.page.mouse.up()  # nowhere
    page.page.mouse.move(*page.middle("#slots .chip:has-text('C')"))
    page.page.mouse.down()
    page.page.mouse.move(*page.middle("[data-slot='4']"))
    page.page.keyboard.press("Escape")
    page.page.mouse.up()
    assert page.slots()[1] == "C" and page.page.locator(".ghost").count() == 0
    page.page.click("#save")
    page.following("two")
    assert given(tmp_path, page, shown) == [2, 2, 1, 3] and page.page.locator("#far").text_content() == "1 of 3"


def test_replies_are_ranked_with_a_finger(label: Callable[..., Labelling], tmp_path: Path) -> None:
    page = label(width=390, height=844, has_touch=True, is_mobile=True)
    shown = page.shown()
    for letter, rank in (("A", 4), ("B", 1), ("C", 1)):
        page.touch(letter, rank)
    assert page.slots() == {0: "D", 1: "BC", 2: "", 3: "", 4: "A"}
    page.page.tap("#slots .chip:has-text('D')")
    page.page.tap("[data-slot='2'] .place")
    assert page.slots()[2] == "D" and page.page.evaluate("scrollY") == 0
    page.page.tap("#save")
    page.following("two")
    assert given(tmp_path, page, shown) == [3, 1, 1, 2]


def test_replies_are_ranked_with_keys(label: Callable[..., Labelling], tmp_path: Path) -> None:
    page = label()
    keys, shown = page.page.keyboard, page.shown()
    keys.press("Enter")
    assert page.note() == "Not ranked yet: A, B, C, D."
    for key in "3112":  # A, and then those that have no rank
        keys.press(key)
    assert page.slots() == {0: "", 1: "BC", 2: "D", 3: "A", 4: ""}
    keys.press("b")
    keys.press("ArrowRight")
    assert page.slots()[2] == "BD" and page.note().startswith("B: rank 2, tied with D.")
    keys.press("0")
    assert page.slots()[0] == "B"
    keys.press("ArrowLeft")
    keys.press("7")
    assert page.slots() == {0: "", 1: "BC", 2: "D", 3: "A", 4: ""}
    keys.press("Enter")
    page.following("two")
    assert given(tmp_path, page, shown) == [3, 1, 1, 2]


def test_skipped_and_taken_back(label: Callable[..., Labelling], tmp_path: Path) -> None:
    page = label()
    keys = page.page.keyboard
    assert page.page.locator("#undo").is_disabled()
    keys.press("s")
    page.following("two")
    assert rows(tmp_path) == [] and rows(tmp_path, "r.jsonl.aside")[0]["ranks"] == []
    for key in "1234":
        keys.press(key)
    keys.press("Enter")
    page.following("three")
    assert len(rows(tmp_path)) == 1
    keys.press("u")
    page.following("two")
    assert rows(tmp_path) == [] and page.slots()[0] == "ABCD"
    page.page.click("#undo")
    page.following("one")
    assert rows(tmp_path, "r.jsonl.aside") == []
    for _ in range(3):
        page.page.click("#skip")
        page.page.wait_for_function("() => document.querySelector('#main').getAttribute('aria-busy') === 'false'")
    assert "All prompts are done" in str(page.page.locator("#blank").text_content())
    page.page.click("#undo")
    page.following("three")


def test_a_reload_in_the_middle_of_a_ranking(label: Callable[..., Labelling], tmp_path: Path) -> None:
    page = label()
    shown = page.shown()
    page.page.keyboard.press("2")
    page.page.keyboard.press("1")
    page.page.reload()
    page.following("one")
    assert page.slots() == {0: "CD", 1: "B", 2: "A", 3: "", 4: ""} and page.shown() == shown
    other = label_again = page.context.new_page()
    other.goto(page.page.url)
    other.wait_for_selector(".reply")
    for key in "1234":
        other.keyboard.press(key)
    other.keyboard.press("Enter")
    label_again.wait_for_function("() => document.querySelector('#turns').textContent.includes('two')")
    page.page.keyboard.press("s")
    page.page.wait_for_selector("#note.alert")
    assert "another prompt is being asked for" in page.note() and len(rows(tmp_path)) == 1
    page.page.reload()
    page.following("two")
    page.allowed = re.compile("409")


def test_agreement_and_hostile_text(label: Callable[..., Labelling], tmp_path: Path) -> None:
    texts = [HOSTILE]
    (tmp_path / "r.jsonl").write_text(
        json.dumps(
            {
                "prompt": HOSTILE,
                "replies": [f"{HOSTILE}: reply {i}" for i in range(4)],
                "ranks": [1, 2, 3, 4],
                "labeller": "bob <b>",
            }
        )
        + "\n"
    )
    page = label(texts)
    assert page.page.locator("#turns").text_content() == HOSTILE
    assert page.page.locator("main img, main script, main i, main svg").count() == 0
    for text in page.shown():
        page.page.keyboard.press(str(1 + int(text[-1])))
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector(".blank .lead:has-text('done')")
    words = "ann and bob <b>: 1 prompts, the same order in 6 of 6 pairs (100%), Kendall's tau-b 1.00"
    assert words in str(page.page.locator("#blank").text_content()) and page.page.evaluate("window.broken") is None


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_serious_stands_in_the_way_of_labellers(theme: str, label: Callable[..., Labelling]) -> None:
    page = label(theme=theme, width=390, height=844, count=9)
    assert axe_findings(page.page) == [] and page.page.evaluate("document.documentElement.scrollWidth") <= 390
    page.page.set_viewport_size({"width": 1280, "height": 800})
    page.page.keyboard.press("1")
    page.page.keyboard.press("1")
    assert axe_findings(page.page) == []
    page.page.keyboard.press("?")
    assert page.page.locator("#keys").is_visible() and axe_findings(page.page) == []
