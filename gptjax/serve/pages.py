"""The chat page, and what it asks for beyond OpenAI's API: how a model sees a text."""

import asyncio
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from gptjax.data.chat import Message
from gptjax.errors import UserError
from gptjax.html import headers, page
from gptjax.infer.look import described, encoded
from gptjax.serve.asked import off_the_loop
from gptjax.serve.errors import JSON, Refused, of_user
from gptjax.serve.protocol import ChatMessage, Strict, Text, Token

if TYPE_CHECKING:
    from gptjax.api import Model
    from gptjax.serve.routes import Served


class LookBody(Strict):
    """POST /look"""

    model: str | None = None
    text: Text | None = None
    messages: list[ChatMessage] | None = None
    """Turns, perhaps with the reply to them; this or a text."""
    layer: Token = 0
    """Whose attention is told, from 0."""
    head: Token = 0


def pages(served: "Served") -> APIRouter:
    """The page, and the one route of its own."""
    router, model, text = APIRouter(), served.model, page("serve/chat.html")
    about = headers(text)

    @router.get("/", include_in_schema=False)
    async def chat() -> Response:
        """A page to talk with the model."""
        return HTMLResponse(text, headers=about)

    @router.post("/look")
    async def look(body: LookBody) -> Response:
        """How likely each token of a text or of a conversation was, and what came close, and where one head attends:
        base64 of a byte for each token that a token may see, row by row, 255 times the square root of its weight."""
        served.require_ready()
        served.require_name(body.model)
        ids = await off_the_loop(_length(body), lambda: looked_at(model, body))
        try:
            found = await served.worker.call(model.look, ids)
        except UserError as error:
            raise of_user(error) from None
        layer, head = body.layer, body.head
        attention = encoded(found.attention[layer : layer + 1, head : head + 1])
        told = await asyncio.to_thread(described, found, model.tokenizer)
        return JSON(told | {"layer": layer, "head": head, "attention": attention})

    return router


def looked_at(model: "Model", body: LookBody) -> list[int]:
    """The ids of what a body shows, as the model has them before it. Raises Refused or UserError for what cannot be
    looked at."""
    model.require_head(body.layer, body.head)
    if (body.text is None) == (body.messages is None):
        raise Refused(400, "text and messages: give one of them", param="messages")
    if body.text is not None:
        return [*model.before, *model.tokenizer.encode(body.text).tolist()]
    if not model.chats:
        raise Refused(400, "messages: this model has not learned conversations; give a text", param="messages")
    messages = [Message(message.role, message.text) for message in body.messages or []]
    replied, chat = bool(messages) and messages[-1].role == "assistant", model.stage.chat  # type: ignore[union-attr]
    ids: list[int] = (chat.render(messages).ids if replied else chat.prompt(messages)).tolist()
    return ids


def _length(body: LookBody) -> int:
    return len(body.text or "") + sum(len(message.text) for message in body.messages or [])
