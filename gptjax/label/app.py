"""The labelling page and its three answers: ranks, a skip, and one step back."""

import asyncio
from concurrent.futures import Future
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from pydantic import Field
from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, Response

from gptjax.errors import UserError
from gptjax.html import headers, page
from gptjax.label.session import Session, Shown
from gptjax.serve import errors
from gptjax.serve.errors import JSON, Refused
from gptjax.serve.guard import foreign
from gptjax.serve.protocol import Strict


class AnswerBody(Strict):
    """POST /answer"""

    prompt: str
    """As /next names it."""
    ranks: Annotated[list[Annotated[int, Field(ge=1, le=9)]], Field(max_length=9)]
    """Of each reply as it is shown, 1 the best, equal ones tied; none skips the prompt."""


def create_app(session: Session, host: str) -> FastAPI:
    """A session as an app, which answers this machine's own pages alone. Who waits for replies is sent away as soon as
    `app.state.ending` is set."""

    async def local(request: Request) -> None:
        if found := foreign(Headers(scope=request.scope), host):
            raise Refused(403, f"{found[0]} {found[1]!r}: this server is for pages of {host} alone")

    app, text = (
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(local)]),
        page("label/label.html"),
    )
    about, one_at_a_time = headers(text), asyncio.Lock()
    app.state.ending = asyncio.Event()

    async def shown() -> Shown | None:
        """What is to be ranked, None where all is done."""
        while (future := session.ask()) is not None:
            if (found := session.show(await _unless(app.state.ending, future))) is not None:
                return found
        return None

    errors.install(app)

    @app.get("/")
    async def label() -> Response:
        """The page."""
        return HTMLResponse(text, headers=about)

    @app.get("/next")
    async def following() -> Response:
        """The prompt that is to be ranked and its replies, when they are drawn."""
        async with one_at_a_time:
            return JSON(_told(session, await shown()))

    @app.post("/answer")
    async def answer(body: AnswerBody) -> Response:
        """Keep an answer; it is on the disk when this returns. The next prompt comes back."""
        async with one_at_a_time:
            asked = await shown()
            if asked is None or asked.number != body.prompt:
                raise Refused(409, "another prompt is being asked for; reload the page")
            _do(lambda: session.answer(asked, body.ranks))
            return JSON(_told(session, await shown()))

    @app.post("/undo")
    async def undo() -> Response:
        """Ask for the last answer once more."""
        async with one_at_a_time:
            _do(session.undo)
            return JSON(_told(session, await shown()))

    return app


async def _unless(ending: asyncio.Event, future: Future[list[str]]) -> list[str]:
    """What is drawn. Raises Refused where the server ends before it is."""
    drawn, ended = asyncio.wrap_future(future), asyncio.create_task(ending.wait())
    await asyncio.wait((drawn, ended), return_when=asyncio.FIRST_COMPLETED)
    ended.cancel()
    if not drawn.done():
        raise Refused(503, "the server is ending; start it again to go on")
    return drawn.result()


def _do(work: Any) -> None:
    try:
        work()
    except UserError as error:
        raise Refused(400, str(error)) from None
    except OSError as error:
        raise Refused(507, f"the answer is not kept: {error.strerror or error}") from None


def _told(session: Session, shown: Shown | None) -> dict[str, Any]:
    state = session.state()
    if shown is None:
        return state
    turns = [{"role": message.role, "content": message.content} for message in shown.prompt.messages]
    replies = [shown.replies[place] for place in shown.places]
    return state | {"prompt": shown.number, "turns": turns, "replies": replies}
