"""From a body to what the engine is asked, and the text that is shown before."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from gptjax.data.chat import Message
from gptjax.errors import UserError
from gptjax.infer.request import Request
from gptjax.infer.text import TextStream
from gptjax.serve.errors import Refused, of_user
from gptjax.serve.protocol import MOST, Body, ChatBody, CompletionBody

if TYPE_CHECKING:
    from gptjax.api import Model

SHORT = 4096  # characters that are turned into tokens between two events; longer texts by another thread
Result = TypeVar("Result")


@dataclass(frozen=True)
class Asked:
    """`n` requests for each prompt, in their order."""

    requests: list[Request]
    echoes: list[str]
    """Of each request, what is shown of its prompt."""

    @property
    def prompt_tokens(self) -> int:
        """Of each prompt once, as clients count them."""
        return sum(len(request.prompt) for request in self.requests if request.sample == 0)


async def off_the_loop(length: int, work: Callable[[], Result]) -> Result:
    """Work on so many characters, where it may take as long as they need."""
    try:
        return work() if length <= SHORT else await asyncio.to_thread(work)
    except UserError as error:
        raise of_user(error) from None


def completion(model: "Model", body: CompletionBody) -> Asked:
    """Raises Refused or UserError for what cannot be asked."""
    if body.suffix is not None and body.echo:
        raise Refused(400, "echo and suffix: give one of them", param="echo")
    prompts = _prompts(body.prompt)
    count = body.n or 1
    if len(prompts) * count > MOST:
        raise Refused(400, f"n = {count} of {len(prompts)} prompts: at most {MOST} replies to a request", param="n")
    limit = 16 if body.max_tokens is None else body.max_tokens
    asks = body.logprobs is not None
    requests, echoes = [], []
    for prompt in prompts:
        ids = _ids(model, prompt, body.suffix)
        how = dict(max_tokens=limit, tops=body.logprobs or 0, prompt_logprobs=bool(body.echo and asks))
        requests += _requests(model, body, ids, count, how)
        echoes += [_shown(model, prompt) if body.echo else ""] * count
    return Asked(requests, echoes)


def chat(model: "Model", body: ChatBody) -> Asked:
    """Raises Refused or UserError for what cannot be asked."""
    if not model.chats:
        raise Refused(
            400,
            "messages: this model has not learned conversations; ask /v1/completions, or serve one of the stage sft",
            param="messages",
        )
    if body.top_logprobs and not body.logprobs:
        raise Refused(400, "top_logprobs: asks for logprobs = true as well", param="top_logprobs")
    given = [limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None]
    if len(set(given)) > 1:
        raise Refused(400, "max_tokens and max_completion_tokens: give one of them", param="max_tokens")
    messages = [Message(message.role, message.text) for message in body.messages]
    _require_short(model, "messages", "".join(message.content for message in messages))
    ids = model.stage.chat.prompt(messages).tolist()  # type: ignore[union-attr]
    limit = given[0] if given else max(1, model.context + 1 - len(ids))
    how = dict(max_tokens=limit, tops=body.top_logprobs or 0)
    requests = _requests(model, body, ids, body.n or 1, how)
    return Asked(requests, [""] * len(requests))


def _requests(model: "Model", body: Body, ids: list[int], count: int, how: dict[str, Any]) -> list[Request]:
    if body.stream_options is not None and not body.stream:
        raise Refused(400, "stream_options: only where stream is true", param="stream_options")
    limit, name = how["max_tokens"], "messages" if isinstance(body, ChatBody) else "prompt"
    if len(ids) + limit > model.context + 1:  # the last token needs no place
        raise Refused(
            400,
            f"{name}: {len(ids)} tokens, and max_tokens = {limit}; the context holds {model.context} together",
            param=name if len(ids) > model.context else "max_tokens",
            code="context_length_exceeded",
        )
    seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
    return [model.request(ids, seed, i, stop=body.stops, **how, **body.sampling) for i in range(count)]


def _prompts(given: str | list[Any] | None) -> list[str | list[int]]:
    if given is None or isinstance(given, str):
        return [given or ""]
    if not given:
        raise Refused(400, "prompt: empty; give a text or at least one token", param="prompt")
    return [given] if isinstance(given[0], int) else given


def _require_short(model: "Model", name: str, text: str) -> None:
    """Raises Refused for a text that is too long whatever its tokens are, before much time goes into them."""
    least = len(text) // max(map(len, model.tokenizer.pieces))
    if model.tokenizer.lossless and least > model.context:
        message = f"{name}: at least {least} tokens; the context holds {model.context}"
        raise Refused(400, message, param=name, code="context_length_exceeded")


def _ids(model: "Model", prompt: str | list[int], suffix: str | None) -> list[int]:
    for name, text in (("prompt", prompt), ("suffix", suffix)):
        if isinstance(text, str):
            _require_short(model, name, text)
    if suffix is not None:
        text = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
        return model.prompt(text, suffix)
    if isinstance(prompt, str):  # as it stands, also of a model that answers: /v1/chat/completions is for turns
        return [int(i) for i in model.tokenizer.prompt(prompt)] or model.before
    size = model.tokenizer.vocab_size
    if wrong := [i for i in prompt if i >= size]:
        raise Refused(400, f"prompt: token {wrong[0]} is outside the vocabulary, 0 to {size - 1}", param="prompt")
    return prompt


def _shown(model: "Model", prompt: str | list[int]) -> str:
    """A prompt as text. The beginning of a character at its end is the reply's, which completes it."""
    if isinstance(prompt, str):
        return prompt
    stream = TextStream(model.tokenizer)
    text = "".join(stream.add(token) for token in prompt)
    return text.removeprefix(" ") if model.tokenizer.blank_first else text
