"""A client of the server that costs as little as a client can: it shares the machine with what it measures.

It writes a request into a socket, notes when bytes come back, and reads them only when all are there.
"""

import asyncio
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 300.0
"""Seconds until an answer that does not come is taken for lost."""
READ = 1 << 16
IN_PROGRESS = r"^(gptjax_(?:queue_length|slots_used|replies_open)) (\S+)$"

Pause = Callable[[], float]
"""Seconds to wait before the next bytes are read."""


@dataclass
class Answer:
    """What came back, and when, in seconds since the request was sent."""

    status: int = 0
    """0: the connection ended before there was one."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, bytes of the whole answer that had come by then)"""
    seconds: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What a stream said, without its [DONE]. Raises ValueError where that is not its end."""
        lines = [line for line in self.body.decode().split("\n\n") if line]
        if not lines or lines.pop() != "data: [DONE]":
            raise ValueError("a stream without an end")
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    @property
    def text(self) -> str:
        """Of the first choice of a completion, streamed or not."""
        if "event-stream" not in self.headers.get("content-type", ""):
            return str(self.json["choices"][0]["text"])
        return "".join(event["choices"][0]["text"] for event in self.events if event["choices"])

    @property
    def tokens(self) -> int:
        """Those that were drawn, as the usage says."""
        whole = self.events[-1] if "event-stream" in self.headers.get("content-type", "") else self.json
        return int(whole["usage"]["completion_tokens"])


@dataclass(frozen=True)
class Server:
    """Where the server listens."""

    host: str
    port: int

    async def post(self, path: str, body: Any, pause: Pause | None = None) -> Answer:
        """The answer to a JSON body, or to bytes as they are."""
        return await self.ask(self.posted(path, body), pause=pause)

    def posted(self, path: str, body: Any) -> bytes:
        """The request that `post` sends."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._head("POST", path, f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n") + data

    async def get(self, path: str) -> Answer:
        return await self.ask(self._head("GET", path))

    async def in_progress(self) -> dict[str, float]:
        """What /metrics says of work that is not over. Raises LookupError where it says nothing."""
        text = (await self.get("/metrics")).body.decode()
        found = {name: float(value) for name, value in re.findall(IN_PROGRESS, text, re.MULTILINE)}
        if not found:
            raise LookupError(f"no gauges in {text[:200]!r}")
        return found

    def _head(self, method: str, path: str, more: str = "") -> bytes:
        return f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{more}Connection: close\r\n\r\n".encode()

    async def ask(
        self, request: bytes, leave_after: float = math.inf, within: float | None = None, pause: Pause | None = None
    ) -> Answer:
        """Send a request as it is, and read to the end. It breaks the connection off where so many bytes have come, or
        so many seconds have passed; what was read until then is an answer, too, as where the server does. Raises
        TimeoutError where nothing ends it."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        started, parts, arrivals, size = time.perf_counter(), list[bytes](), list[tuple[float, int]](), 0
        try:
            async with asyncio.timeout(PATIENCE if within is None else within):
                writer.write(request)
                while size < leave_after:
                    if pause:
                        await asyncio.sleep(pause())
                    if not (part := await reader.read(READ)):
                        break
                    parts.append(part)
                    size += len(part)
                    arrivals.append((time.perf_counter() - started, size))
        except ConnectionError:
            pass
        except TimeoutError:
            if within is None:
                raise
        finally:
            writer.transport.abort()
        return _read(b"".join(parts), arrivals, time.perf_counter() - started)


def _read(data: bytes, arrivals: list[tuple[float, int]], seconds: float) -> Answer:
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return Answer(seconds=seconds, arrivals=arrivals)
    status, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    arrivals = [(when, size) for when, size in arrivals if size > len(head) + 4]
    whole = _joined(body) if headers.get("transfer-encoding") == "chunked" else body
    return Answer(int(status.split()[1]), headers, whole, arrivals, seconds)


def _joined(body: bytes) -> bytes:
    """The parts of a chunked body, as far as they are there."""
    parts = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        if not (count := int(size or b"0", 16)):
            break
        parts.append(rest[:count])
        body = rest[count + 2 :]
    return b"".join(parts)
