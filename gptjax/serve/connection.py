"""A client's connection, with the limits that uvicorn has none for: those who send or read too slowly, or endlessly."""

import json
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gptjax.serve.errors import Refused
from gptjax.serve.guard import HEADERS

LINGER = 1.0  # seconds in which a refusal can be read


class Connection(HttpToolsProtocol):
    """A request must have come, and what waits to be read must have gone, within so many seconds."""

    def __init__(self, seconds: float, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.seconds = seconds
        self._coming: TimerHandle | None = None
        self._going: TimerHandle | None = None
        self._head, self._in_head, self._refused = 0, True, False

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_came()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._coming is None and (self.cycle is None or self.cycle.response_complete):
            self._await_request()
        super().data_received(data)
        if self._in_head:
            self._head += len(data)
            if self._head > 2 * HEADERS:
                self._refuse(Refused(431, f"headers of more than {HEADERS:,} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._in_head = 0, True

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._request_came()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._going = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._going:
            self._going.cancel()
            self._going = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refused(400, msg))

    def _await_request(self) -> None:
        self._coming = self.loop.call_later(self.seconds, self._too_slow)

    def _request_came(self) -> None:
        if self._coming:
            self._coming.cancel()
            self._coming = None

    def _too_slow(self) -> None:
        if self.cycle and self.cycle.response_started and not self._in_head:  # answered, perhaps before all had come
            self.transport.abort()
        else:
            self._refuse(Refused(408, f"the request has not come in {self.seconds:g} s"))

    def _refuse(self, refused: Refused) -> None:
        """Answer past the app, and hang up; a moment later, for who is still sending would not hear the answer."""
        if self.transport.is_closing() or self._refused:
            return
        self._refused = True
        body = json.dumps(refused.body).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[refused.status_code] + head.encode() + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)
