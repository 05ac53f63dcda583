"""Pages of the web, and the archives of crawls, as their publishers write them. Run: pytest tests/test_web.py"""

import gzip
from pathlib import Path

import pytest

from gptjax.config import DataConfig
from gptjax.data.sources import open_source
from gptjax.errors import UserError

pytest.importorskip("resiliparse", reason="needs the clean extra")

PAGE = """<html><head><title>Title</title><script>var x = 1;</script></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About us</a></li></ul></nav>
<main><article><h1>A harbour</h1><p>The first paragraph has a café, &amp; a <b>bold</b> word.</p>
<p>The second is short.</p></article></main><footer>Copyright 2026</footer></body></html>"""
TEXT = "A harbour\n\nThe first paragraph has a café, & a bold word.\n\nThe second is short."


def record(kind: str, body: bytes, content: str = "application/http; msgtype=response") -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Date: 2026-01-01T00:00:00Z\r\nContent-Type: {content}\r\n"
    head += f"WARC-Record-ID: <urn:uuid:12345678-1234-1234-1234-123456789012>\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body + b"\r\n\r\n"


def answer(body: bytes, kind: str = "text/html", more: str = "") -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return record("response", head.encode() + body)


ARCHIVE = [
    record("warcinfo", b"software: test\r\n", "application/warc-fields"),
    record("request", b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "application/http; msgtype=request"),
    answer(PAGE.encode()),
    answer(PAGE.encode("latin-1"), "text/html; charset=ISO-8859-1"),
    answer(gzip.compress(PAGE.encode()), more="Content-Encoding: gzip\r\n"),
    answer(b"\x89PNG\r\n\x1a\n", "image/png"),
    answer(PAGE.encode(), "application/xhtml+xml; charset=nonsense"),
]


def texts(path: Path, tmp_path: Path) -> list[str]:
    source = open_source(DataConfig(source=str(path), cache_dir=str(tmp_path / "cache")), "train")
    return [source[i].text for i in range(len(source))]


@pytest.mark.parametrize("members", [True, False])
def test_the_pages_of_an_archive_are_read(members: bool, tmp_path: Path) -> None:
    """Each record its own member, as crawls write, or all in one."""
    path = tmp_path / "CC-MAIN-2026.warc.gz"
    path.write_bytes(b"".join(map(gzip.compress, ARCHIVE)) if members else gzip.compress(b"".join(ARCHIVE)))
    assert texts(path, tmp_path) == [TEXT] * 4
    path.with_name("plain.warc").write_bytes(b"".join(ARCHIVE))
    assert texts(path.with_name("plain.warc"), tmp_path) == [TEXT] * 4


def test_the_text_of_an_archive_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "CC-MAIN-2026.warc.wet.gz"
    some = ["Just téxt.\nTwo lines.", "Another <b>page</b>."]
    every = [ARCHIVE[0], *(record("conversion", text.encode(), "text/plain") for text in some)]
    path.write_bytes(b"".join(map(gzip.compress, every)))
    assert texts(path, tmp_path) == some


def test_pages_are_files_like_others(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(PAGE)
    (tmp_path / "b.htm").write_bytes(PAGE.encode("latin-1").replace(b"<head>", b'<head><meta charset="latin-1">'))
    assert texts(tmp_path, tmp_path) == [TEXT] * 2


@pytest.mark.parametrize("left", [-1, -6, -150, -2 * len(ARCHIVE[-1]) + 20, 30])
def test_a_plain_archive_that_is_cut_short_is_said(left: int, tmp_path: Path) -> None:
    """In a record's end, its body, its head, at any other, in the first."""
    (tmp_path / "cut.warc").write_bytes(b"".join(ARCHIVE)[:left])
    with pytest.raises(UserError, match=r"cut\.warc: not readable as warc \(cut short.*download it again"):
        texts(tmp_path / "cut.warc", tmp_path)


def test_an_archive_that_is_cut_short_is_said(tmp_path: Path) -> None:
    path = tmp_path / "cut.warc.gz"
    path.write_bytes(gzip.compress(b"".join(ARCHIVE))[:-20])
    with pytest.raises(UserError, match=r"cut\.warc\.gz: not readable as gzip"):
        texts(path, tmp_path)
