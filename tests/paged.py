"""A stand-in for the server, whose replies are written down: what the pages are tried on."""

import asyncio
import base64
import json
import math
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from gptjax.data.chat import Message
from gptjax.data.prompted import Prompt
from gptjax.html import headers, page

HOSTILE = (
    '<img src=x onerror="window.broken=1"><script>window.broken=1</script> [click](javascript:window.broken=1) '
    "![x](data:text/html,1) `<b>` **<i>bold</i>** <svg/onload=window.broken=1>"
)
MARKDOWN = """\
## Sampling, in short

A model gives **probabilities**; what is *drawn* from them is another matter. Three knobs shape it, see \
[the paper](https://example.org/paper) and `sampling.py`:

1. Temperature divides the logits.
2. Top-k keeps the likeliest few:
   - 1 is greedy,
   - 50 is usual.
3. Top-p keeps a share.

| knob | from | to | default |
| :--- | ---: | ---: | :---: |
| temperature | 0 | 2 | 0.8 |
| top-p | 0.05 | 1 | 1 |
| top-k | 0 | 200 | 50 |

> Whatever is kept, what is told is the log-probability of the full softmax.

```python
def draw(logits: Array, key: Array, temperature: float = 1.0) -> Array:
    \"\"\"One token of each row; a line that is long enough to need a scroll bar: sorted, masked, cut, drawn.\"\"\"
    kept = jnp.where(logits < threshold(logits), -jnp.inf, logits)
    return jax.random.categorical(key, kept / temperature, axis=-1)
```

---

That is all; ~~more~~ less would be wrong.
"""
REPLIES = {
    "html": HOSTILE,
    "markdown": MARKDOWN,
    "slow": "one two three four five six seven eight nine ten " * 4,
    "nothing": "",
}
FITS = 4  # messages that the context holds


def asked(text: str) -> Prompt:
    return Prompt(np.frombuffer(text.encode(), np.uint8).astype(np.int32), [Message("user", text)], "")


class Written:
    """Replies that are written down, in the place of a model's."""

    def __init__(self, count: int = 4) -> None:
        self.count, self.closed = count, False

    def __call__(self, prompts: Any) -> "Future[list[str]]":
        text = prompts[0].messages[-1].content
        made: Future[list[str]] = Future()
        made.set_result([f"{text}: reply {i}" for i in range(1 if "same" in text else self.count)])
        return made

    def close(self) -> None:
        self.closed = True


class Script:
    """What it answers, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.key = ""
        self.chats = True
        self.pause = 0.0
        """Seconds before each token of a slow reply."""
        self.context = 64
        self.open = 0
        """Streams that go on."""

    def reply(self, body: dict[str, Any]) -> str:
        last = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        found = next((REPLIES[word] for word in REPLIES if word in last), None)
        return f"You said {last!r}, seed {body.get('seed')}." if found is None else found


def tokens_of(text: str) -> list[str]:
    """Words with the blank before them."""
    made, held = [], ""
    for character in text:
        if character in " \n" and held.strip():
            made, held = [*made, held], ""
        held += character
    return [*made, held] if held else made


def figures(i: int, token: str) -> tuple[float, list[tuple[str, float]]]:
    """A log-probability for a place, and five likeliest tokens, of which it is one or none."""
    p = (0.9, 0.5, 0.2, 0.04, 0.0005)[i % 5]
    rest = [
        (other, math.log((1 - p) * share)) for other, share in ((" a", 0.6), (" the", 0.2), ("\n", 0.1), (" of", 0.05))
    ]
    return math.log(p), sorted([(token, math.log(p)), *rest], key=lambda pair: -pair[1])


def refusal(status: int, message: str, code: str = "invalid_request", **more: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": code}}, status, headers=more)


def app(script: Script) -> FastAPI:
    """The routes that the chat page knows."""
    made = FastAPI()
    text = page("serve/chat.html")

    @made.middleware("http")
    async def guard(request: Request, go_on: Any) -> Response:
        wanted = request.url.path not in ("/", "/health") and script.key
        if wanted and request.headers.get("authorization") != f"Bearer {script.key}":
            return refusal(401, "The key is wrong or missing.", "invalid_api_key")
        return await go_on(request)

    @made.get("/")
    async def chat() -> HTMLResponse:
        return HTMLResponse(text, headers=headers(text))

    @made.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": script.context}]}

    @made.get("/tokenizer_info")
    async def tokenizer() -> Any:
        return {"chat_template": "…" if script.chats else None}

    @made.post("/v1/chat/completions")
    @made.post("/v1/completions")
    async def complete(request: Request) -> Any:
        body = await request.json()
        script.asked.append(body)
        last = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if "refuse" in last:
            return refusal(429, "4 replies are under way.", "rate_limit_exceeded", **{"Retry-After": "2"})
        if len([m for m in body.get("messages", []) if m["role"] != "system"]) > FITS:
            return refusal(400, f"messages: too many; the context holds {script.context}", "context_length_exceeded")
        return StreamingResponse(_events(script, body, last), media_type="text/event-stream")

    @made.post("/look")
    async def look(request: Request) -> Any:
        body = await request.json()
        script.asked.append(body)
        if body["head"] > 1:
            return refusal(400, "head = 2: the model has 2, 0 to 1")
        text = body.get("text") or "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in body["messages"])
        return _look(tokens_of(text)[:48], body["layer"], body["head"])

    return made


async def _events(script: Script, body: dict[str, Any], last: str) -> AsyncIterator[str]:
    script.open += 1
    try:
        words = tokens_of(script.reply(body))
        for i, token in enumerate(words):
            if "slow" in last:
                await asyncio.sleep(script.pause)
            if i == 3 and "break" in last:
                yield 'data: {"error": {"message": "The engine failed.", "code": "server_error"}}\n\n'
                return
            if i == 3 and "drop" in last:
                return
            reason = None if i + 1 < len(words) else "length" if "length" in last else "stop"
            yield f"data: {json.dumps(_chunk(body, i, token, reason))}\n\n"
        if not words:
            yield f"data: {json.dumps(_chunk(body, 0, '', 'stop'))}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        script.open -= 1


def _chunk(body: dict[str, Any], i: int, token: str, reason: str | None) -> dict[str, Any]:
    value, tops = figures(i, token)
    if "messages" not in body:
        told = {"tokens": [token], "token_logprobs": [value], "top_logprobs": [dict(tops)], "text_offset": [0]}
        return {"choices": [{"index": 0, "text": token, "logprobs": told, "finish_reason": reason}]}
    likely = [{"token": top, "logprob": p, "bytes": None} for top, p in tops]
    told = {"content": [{"token": token, "logprob": value, "bytes": None, "top_logprobs": likely}] if token else []}
    return {"choices": [{"index": 0, "delta": {"content": token}, "logprobs": told, "finish_reason": reason}]}


def _look(tokens: list[str], layer: int, head: int) -> dict[str, Any]:
    """Layer 0 sees 3 tokens; head 0 looks back evenly, head 1 at what is near."""
    weights = bytearray()
    for i in range(len(tokens)):
        shares = [0.0 if layer == 0 and i - j >= 3 else 1.0 if head == 0 else 0.5 ** (i - j) for j in range(i + 1)]
        weights += bytes(round(255 * math.sqrt(share / sum(shares))) for share in shares)
    about = [{"text": tokens[0], "label": tokens[0], "p": None}]
    for i, token in enumerate(tokens[1:]):
        value, tops = figures(i, token)
        listed = [(top.replace(" ", "␣").replace("\n", "↵"), math.exp(p), top == token) for top, p in tops]
        label = token.replace(" ", "␣").replace("\n", "↵")
        about.append({"text": token, "label": label, "p": math.exp(value), "rank": 1 + i % 5, "tops": listed})
    return {
        "figures": f"{len(tokens)} tokens", "tokens": about, "vocabulary": 50_257, "windows": [3, None], "heads": 2,
        "layer": layer, "head": head, "attention": base64.b64encode(bytes(weights)).decode(),
    }  # fmt: skip


@contextmanager
def serving(served: FastAPI) -> Iterator[str]:
    """Its address, on a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        config = uvicorn.Config(served, log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
