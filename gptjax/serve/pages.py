"""The chat page, and what it asks for beyond OpenAI's API: how a model sees a text."""

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field

from gptjax.data.chat import Message
from gptjax.errors import UserError
from gptjax.html import headers, page
from gptjax.infer.look import described, encoded

if TYPE_CHECKING:
    from gptjax.serve.worker import Worker

    from gptjax.api import Model


class Turn(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: str
    content: str


class LookAt(BaseModel):
    """A text, or a conversation, perhaps with its last reply, and which head to show."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    """Any name: there is one model."""
    text: str | None = None
    messages: list[Turn] | None = None
    layer: Annotated[int, Field(ge=0)] = 0
    head: Annotated[int, Field(ge=0)] = 0


def router(model: "Model", worker: "Worker") -> APIRouter:
    """`GET /`, the page, and `POST /look`, which the engine's thread answers."""
    routes, text = APIRouter(), page("serve/chat.html")
    about = headers(text)

    @routes.get("/", include_in_schema=False)
    async def chat() -> HTMLResponse:
        return HTMLResponse(text, headers=about)

    @routes.post("/look")
    async def look(asked: LookAt) -> dict[str, Any]:
        """Tokens with their probabilities and runners-up, and where one head attends: base64 of a byte for each token
        that a token may see, row by row, 255 times the square root of its weight."""
        return await worker.call(looked_at, model, asked)

    return routes


def looked_at(model: "Model", asked: LookAt) -> dict[str, Any]:
    """What `/look` answers. Raises UserError for what cannot be looked at."""
    if (asked.text is None) == (asked.messages is None):
        raise UserError("text and messages: give one of them")
    model.require_head(asked.layer, asked.head)
    look = model.look(asked.text if asked.text is not None else _ids(model, asked.messages or []))
    one = look.attention[asked.layer : asked.layer + 1, asked.head : asked.head + 1]
    return described(look, model.tokenizer) | {"layer": asked.layer, "head": asked.head, "attention": encoded(one)}


def _ids(model: "Model", turns: list[Turn]) -> list[int]:
    """Of a conversation, as the model has it before it."""
    from gptjax.stages import SFT

    if not isinstance(model.stage, SFT):
        raise UserError("messages: the model has not learned conversations; give a text")
    messages, chat = [Message(turn.role, turn.content) for turn in turns], model.stage.chat
    replied = bool(messages) and messages[-1].role == "assistant"
    ids: list[int] = (chat.render(messages).ids if replied else chat.prompt(messages)).tolist()
    return ids
