"""Pages of the web: their text without menus and markup, and the archives that crawls write (WARC, WET)."""

import importlib
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

from gptjax.errors import UserError

PAGES = ("text/html", "application/xhtml+xml")


def page_text(data: bytes, charset: str = "") -> str:
    """What a page says: its main part, a paragraph a line. Empty where it has none. charset: as its server names it;
    else UTF-8 where it is that, or what its bytes look like."""
    extract = _library("resiliparse.extract.html2text").extract_plain_text
    text: str = extract(_decoded(data, charset), main_content=True, alt_texts=False)
    return text.encode(errors="replace").decode()


def _decoded(data: bytes, charset: str) -> str:
    for name in (charset, "utf-8"):
        with suppress(LookupError, UnicodeDecodeError, ValueError):
            return data.decode(name)
    encoding = _library("resiliparse.parse.encoding")
    page: str = encoding.bytes_to_str(data, encoding.detect_encoding(data, html5_compatible=True))
    return page


def archived(stream: IO[bytes]) -> Iterator[str]:
    """The text of each page of an archive: of WARC what a server answered, of WET the text that the crawler made.

    Raises OSError where it is cut short."""
    warc = _library("fastwarc.warc")
    kinds = warc.WarcRecordType.response | warc.WarcRecordType.conversion
    ending = _Ending(stream)
    for record in warc.ArchiveIterator(ending, record_types=kinds, parse_http=True, auto_decode="all"):
        data = record.reader.read()
        if record.record_type == warc.WarcRecordType.conversion:
            yield data.decode(errors="replace")
        elif (record.http_content_type or "") in PAGES:
            yield page_text(data, record.http_charset or "")
    if ending.last and ending.last.replace(b"\r", b"") != b"\n\n":
        raise OSError("cut short: it does not end with two empty lines, as records do")


class _Ending:
    """A stream, and the last bytes that were read of it: the library takes a record that is cut short for a whole one,
    and those behind it for none."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.last = stream, b""

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.last = (self.last + data[-4:])[-4:]
        return data

    def tell(self) -> int:
        return self._stream.tell()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError("data.source: pages of the web need the extra clean: pip install 'gptjax[clean]'") from None
