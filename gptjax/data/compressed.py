"""Files as they were before gzip, zstd, xz or bzip2: every member and frame of them, and an error where one is cut
short."""

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\0", "bzip2": b"BZh"}
CHUNK = 1 << 20


@contextmanager
def open_plain(path: Path, compression: str, heard: Callable[[int], None]) -> Iterator[IO[bytes]]:
    """The bytes behind a compression of `files.COMPRESSIONS`; an empty name is none. `heard` is told of the bytes that
    were read of the file.

    Opening or reading raises what `broken()` lists where the file is cut short, or is not what its ending says.
    """
    with io.BufferedReader(_Heard(path, heard), CHUNK) as file:
        if not compression:
            yield file
            return
        start = file.peek(len(MAGIC[compression]))[: len(MAGIC[compression])]
        if start != MAGIC[compression]:
            raise ValueError(f"not {compression}, which its ending says")
        if compression == "zstd":
            yield io.BufferedReader(_Zstd(file), CHUNK)
            return
        library = importlib.import_module({"gzip": "gzip", "xz": "lzma", "bzip2": "bz2"}[compression])
        with library.open(file) as plain:
            yield plain


def broken() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises beside OSError."""
    import lzma
    import zlib

    import zstandard

    return EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError


class _Heard(io.FileIO):
    """A file that says how much was read of it."""

    def __init__(self, path: Path, heard: Callable[[int], None]):
        super().__init__(path)
        self._heard = heard

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer) or 0
        self._heard(size)
        return size


class _Zstd(io.RawIOBase):
    """Frame by frame: the library's own readers take a file that is cut short for a whole one."""

    def __init__(self, file: IO[bytes]):
        import zstandard

        self._file = file
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._held, self._input = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            if not self._input:
                self._input = self._file.read(CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._new()
            self._held = self._frame.decompress(self._input)
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._held))
        buffer[:size], self._held = self._held[:size], self._held[size:]
        return size
