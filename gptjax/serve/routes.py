"""What can be asked of a model."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from gptjax.serve import asked as ask
from gptjax.serve.asked import Asked, off_the_loop
from gptjax.serve.errors import JSON, Refused
from gptjax.serve.guard import NOTE, Note, Receive, Scope, Send
from gptjax.serve.metrics import Metrics
from gptjax.serve.options import Options
from gptjax.serve.protocol import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from gptjax.serve.replies import ChatForm, CompletionForm, Form, event
from gptjax.serve.worker import Stream, Worker

if TYPE_CHECKING:
    from gptjax.api import Model

EVENTS = "text/event-stream; charset=utf-8"
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""As the OpenAPI document tells of routes that give JSON, or events where `stream` is true."""


@dataclass
class Served:
    """What the routes of one app stand on."""

    model: "Model"
    options: Options
    worker: Worker
    metrics: Metrics
    since: int
    warm: bool = False
    draining: bool = False
    failure: BaseException | None = None

    @property
    def name(self) -> str:
        return self.options.called(self.model.path)

    def require_ready(self) -> None:
        """Raises Refused where nothing can be answered."""
        if self.draining or not self.warm:
            what = "going down" if self.draining else "starting; ask /health when it is ready"
            raise Refused(503, f"the server is {what}", code="unavailable", headers={"Retry-After": "2"})

    def require_name(self, name: str | None) -> None:
        """Raises Refused for a model that is not served here."""
        if name is not None and name != self.name:
            raise Refused(
                404, f"model {name!r}: not served here; {self.name!r} is", param="model", code="model_not_found"
            )


def routes(served: Served) -> APIRouter:
    """All of them."""
    router = APIRouter()
    model, worker = served.model, served.worker

    @router.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue prompts."""
        return await answered(request, body, ask.completion, CompletionForm)

    @router.post("/v1/engines/{engine:path}/completions", responses=STREAMED)
    async def engine_completions(engine: str, body: CompletionBody, request: Request) -> Response:
        """The same, as the first clients ask for it."""
        served.require_name(engine)
        return await answered(request, body, ask.completion, CompletionForm)

    @router.post("/v1/chat/completions", responses=STREAMED)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await answered(request, body, ask.chat, ChatForm)

    async def answered(request: Request, body: Any, read: Callable[..., Asked], form: type[Any]) -> Response:
        served.require_ready()
        served.require_name(body.model)
        asked = await off_the_loop(_length(body), lambda: read(model, body))
        told: Form = form(served.name, body, asked, model.tokenizer, model.stage.ends)
        stream = await worker.submit(asked.requests, live=bool(body.stream))
        _note(request.scope[NOTE], body, asked, stream)
        if body.stream:
            return Events(served, stream, told)
        async with under_way(served, stream, request.receive):
            async for _ in stream:
                pass
        return JSON(told.whole(stream.replies))

    @router.get("/v1/models")
    async def models() -> Response:
        """The one that is served."""
        return JSON({"object": "list", "data": [about()]})

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """What is known of it."""
        served.require_name(name)
        return JSON(about())

    def about() -> dict[str, Any]:
        who = {"id": served.name, "object": "model", "created": served.since, "owned_by": "gptjax"}
        return who | {"max_model_len": model.context}

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        """The ids of a text."""
        served.require_name(body.model)
        encode = model.tokenizer.prompt if body.add_special_tokens else model.tokenizer.encode
        ids = await off_the_loop(len(body.prompt), lambda: encode(body.prompt).tolist())
        return JSON({"tokens": ids, "count": len(ids), "max_model_len": model.context})

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of ids."""
        served.require_name(body.model)
        size = model.tokenizer.vocab_size
        if wrong := [i for i in body.tokens if i >= size]:
            raise Refused(400, f"tokens: {wrong[0]} is outside the vocabulary, 0 to {size - 1}", param="tokens")
        text = await off_the_loop(len(body.tokens), lambda: model.tokenizer.decode(body.tokens))
        return JSON({"prompt": text})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What stands at a text's ends, and how turns are written."""
        tokenizer = model.tokenizer
        names = {i: name for name, i in tokenizer.special.items()}
        begin = names.get(tokenizer.begin[0]) if tokenizer.begin else None
        template = model.stage.chat.template if model.chats else None  # type: ignore[union-attr]
        return JSON(
            {
                "eos_token": names[tokenizer.eot],
                "bos_token": begin,
                "pad_token": names[tokenizer.eot],
                "chat_template": template,
            }
        )

    @router.get("/health")
    async def health() -> Response:
        """200 where requests are answered, else 503."""
        status = "draining" if served.draining else "ok" if served.warm else "starting"
        return JSON({"status": status, "model": served.name}, 200 if status == "ok" else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


@asynccontextmanager
async def under_way(served: Served, stream: Stream, receive: Receive) -> AsyncIterator[None]:
    """Ends what is asked when nobody waits for it any more, or when it takes too long."""
    late = Refused(
        504,
        f"not done in {served.options.request_timeout:g} s",
        code="timeout",
        headers={"X-Should-Retry": "false"},
    )
    timer = asyncio.get_running_loop().call_later(served.options.request_timeout, stream.cancel, late)
    watch = asyncio.create_task(_gone(receive))
    watch.add_done_callback(lambda _: stream.cancel())
    try:
        yield
    finally:
        timer.cancel()
        watch.cancel()
        stream.cancel()
        served.metrics.observe(stream, time.perf_counter() - stream.began)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """A reply as it comes: one write a step, however many tokens it brought."""

    def __init__(self, served: Served, stream: Stream, form: Form) -> None:
        self.served, self.stream, self.form = served, stream, form
        self.background = None
        self.status_code = 200
        self.init_headers({"content-type": EVENTS, "cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream, form = self.stream, self.form
        async with under_way(self.served, stream, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for pieces in stream:
                    if chunk := form.chunks(pieces, stream.replies):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                last = form.end(stream.replies)
            except Refused as refused:
                last = event(refused.body)
            await send({"type": "http.response.body", "body": last})


def _length(body: Any) -> int:
    """Characters of a body's texts, or tokens."""
    if isinstance(body, ChatBody):
        return sum(len(message.text) for message in body.messages)
    given = body.prompt or ""
    texts = given if isinstance(given, list) else [given]
    return len(body.suffix or "") + sum(len(text) if isinstance(text, str | list) else 1 for text in texts)


def _note(note: Note, body: Body, asked: Asked, stream: Stream) -> None:
    note.prompt_tokens = asked.prompt_tokens
    note.completion_tokens = lambda: sum(len(reply.tokens) for reply in stream.replies)
    note.texts = lambda: {
        "asked": body.model_dump(mode="json", include={"prompt", "suffix", "messages"}, exclude_none=True),
        "answered": [reply.text for reply in stream.replies],
    }
