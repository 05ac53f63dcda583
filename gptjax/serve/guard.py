"""What stands before every route: who asks and from where, how much they send, and what is written down of it."""

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from gptjax.errors import UserError
from gptjax.serve.errors import Refused
from gptjax.serve.keys import Keys
from gptjax.serve.metrics import Metrics
from gptjax.serve.options import Options

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/metrics", "/openapi.json")  # what needs no key: it tells nothing secret
HEADERS = 32_768  # bytes of all headers and the path
LOCAL = ("localhost", "127.0.0.1", "::1")
NOTE = "gptjax.note"  # in a scope


@dataclass
class Note:
    """What becomes known of a request."""

    key: str = ""
    status: int = 499
    """Of the answer; 499 where nobody waited for one."""
    prompt_tokens: int = 0
    completion_tokens: Callable[[], int] = lambda: 0
    texts: Callable[[], dict[str, Any]] = field(default=lambda: {})
    """What was asked and answered, for those who keep that."""


class Guard:
    """An app behind these rules."""

    def __init__(self, app: App, options: Options, metrics: Metrics) -> None:
        """Raises UserError for a file of keys or an audit file that cannot be used."""
        self.app, self.options, self.metrics = app, options, metrics
        self.keys = Keys(options.api_key_file)
        self.audit = _appended(options.audit_file)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        note = scope[NOTE] = Note()

        async def noted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, noted, note)
        except Exception:
            note.status = 500
            raise
        finally:
            self._write_down(scope, note)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, note: Note) -> None:
        try:
            self._require(scope, Headers(scope=scope), note)
        except Refused as refused:
            await refused.response(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _require(self, scope: Scope, headers: Headers, note: Note) -> None:
        """Raises Refused for what does not get as far as a route."""
        size = len(scope["path"]) + sum(len(name) + len(value) for name, value in scope["headers"])
        if size + len(scope.get("query_string", b"")) > HEADERS:
            raise Refused(431, f"headers and path of {size:,} bytes; at most {HEADERS:,}")
        if self.options.loopback and not self.keys and not self.options.public:
            self._require_local(headers)
        if self.keys and scope["path"] not in OPEN:
            note.key = self.keys.name(headers.get("authorization", ""))
            self.keys.take(note.key)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.options.max_body:
            raise self._too_large

    def _require_local(self, headers: Headers) -> None:
        """A page of another site must not use a server that knows its users by where they are."""
        host = _host(f"//{headers.get('host', '')}")
        if host not in (*LOCAL, self.options.host):
            raise Refused(403, f"Host {host!r}: this server answers on {self.options.host} alone, or with --public")
        origin = headers.get("origin")
        if origin is None or origin in self.options.allow_origin or "*" in self.options.allow_origin:
            return
        if origin.partition("://")[2] != headers.get("host"):
            raise Refused(403, f"Origin {origin!r}: not allowed; --allow-origin names those that are")

    @property
    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self.options.max_body:,} bytes")

    def _limited(self, receive: Receive) -> Receive:
        """Raises Refused where more comes than may, whatever its headers said."""
        size = 0

        async def limited() -> MutableMapping[str, Any]:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.options.max_body:
                raise self._too_large
            return message

        return limited

    def _write_down(self, scope: Scope, note: Note) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(note.status)).inc()
        if self.audit is None or scope["path"] in OPEN:
            return
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "key": note.key,
            "route": route,
            "prompt_tokens": note.prompt_tokens,
            "completion_tokens": note.completion_tokens(),
            "status": note.status,
            **(note.texts() if self.options.audit_text else {}),
        }
        self.audit.write(json.dumps(line) + "\n")
        self.audit.flush()


def _host(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _appended(path: str) -> IO[str] | None:
    if not path:
        return None
    try:
        return open(path, "a")
    except OSError as error:
        raise UserError(f"--audit-file {path}: {error.strerror}; name a file that can be written") from None
