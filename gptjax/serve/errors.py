"""Refusals, as OpenAI's clients read them: a status, and a body that names the parameter."""

import difflib
import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gptjax.errors import UserError
from gptjax.serve.protocol import NAMES, ErrorBody

CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
}
WANTED = {
    "prompt": "expected a text, token ids, or a list of either",
    "stop": "expected a text, or a list of at most 4",
    "content": "expected a text, or a list of parts of type text",
}
"""Of parameters with several forms, of which pydantic would name one."""
SHOWN = 80  # characters of a wrong value that a message repeats

DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": "Refused"} for status in ("4XX", "5XX")
}

log = logging.getLogger("gptjax.serve")


class Refused(HTTPException):
    """What ends a request: `message` is for a person, `param` and `code` are for a program."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code or CODES.get(status, "server_error")

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> "JSON":
        return JSON(self.body, self.status_code, self.headers)


class JSON(Response):
    """Any value in ASCII: also text that has no UTF-8 form can be told of."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def of_user(error: UserError) -> Refused:
    """What the engine or the tokenizer refuses; where its first word is a parameter's name, that one is meant."""
    word = str(error).replace(":", " ").split()[0]
    return Refused(400, str(error), param=word if word in NAMES else None)


def install(app: FastAPI) -> None:
    """Every error of an app in this form, 400 in the place of 422."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return explained(error).response

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Refused):
            return error.response
        message = str(error.detail)
        if error.status_code == 404:
            message = f"{request.url.path}: no such path"
        if error.status_code == 405:
            message = f"{request.method} {request.url.path}: no such method here"
        return Refused(error.status_code, message, headers=dict(error.headers or {})).response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return Refused(500, "the server failed; its log says why").response


def explained(error: RequestValidationError) -> Refused:
    """The first thing that is wrong with a body, in one line; a name that is not there before a value."""
    found = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    place = [str(part) for part in found["loc"][1:] if not str(part).startswith(("function-", "lax-", "strict-"))]
    kind, value = found["type"], shown(found["input"])
    param = place[0] if place else None
    if kind == "json_invalid":
        return Refused(400, f"the body is no JSON: {found['ctx']['error']} at character {found['loc'][-1]}")
    if param is None:
        return Refused(400, "the body must be a JSON object, sent as Content-Type: application/json")
    if kind == "extra_forbidden":
        return Refused(400, f"{'.'.join(place)}: no such parameter{_near(place[-1])}", param=param)
    if kind == "missing":
        return Refused(400, f"{'.'.join(place)}: missing", param=param)
    if kind in ("none_required", "literal_error"):
        only = found.get("ctx", {}).get("expected")
        what = f"only {only} is offered here" if only else "not offered here"
        return Refused(400, f"{param} = {value}: {what}; leave it out", param=param)
    forms = next((WANTED[name] for name in reversed(place) if name in WANTED and kind.endswith("_type")), "")
    message = forms or (str(found["ctx"]["error"]) if kind == "value_error" else found["msg"])
    return Refused(400, f"{param} = {value}: {message[:1].lower()}{message[1:]}", param=param)


def shown(value: Any) -> str:
    """A value as a message repeats it, in ASCII and short."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _near(name: str) -> str:
    close = difflib.get_close_matches(name, NAMES, 1)
    return f"; did you mean {close[0]}?" if close else ""
