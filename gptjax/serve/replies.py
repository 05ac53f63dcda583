"""What came of requests, as OpenAI's clients read it: whole, or as server-sent events."""

import json
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from gptjax.data.tokenizers import Tokenizer
from gptjax.infer.request import Reply
from gptjax.serve.asked import Asked
from gptjax.serve.protocol import Body, ChatBody, CompletionBody
from gptjax.serve.worker import Piece

DONE = b"data: [DONE]\n\n"
LEAST = -9999.0  # what stands for a log-probability that JSON cannot say
Tops = Sequence[tuple[int, float]]


def event(value: Any) -> bytes:
    """A server-sent event."""
    return f"data: {compact(value)}\n\n".encode()


def compact(value: Any) -> str:
    """JSON without a blank, in ASCII."""
    return json.dumps(value, separators=(",", ":"))


class Form:
    """How the replies to one body are told. `whole` is asked when all are over, `chunks` as they come."""

    object: str
    prefix: str
    chunk: str

    def __init__(self, name: str, body: Body, asked: Asked, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
        self.asked, self.tokenizer, self.ends = asked, tokenizer, set(ends)
        self.about = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": name}
        self.usage_told = body.usage_told
        self.begun = [False] * len(asked.requests)
        head = compact({**self.about, "object": self.chunk})[:-1]
        self._head = f'data: {head},"choices":[{{"index":'
        self._tail = ',"usage":null}\n\n' if self.usage_told else "}\n\n"

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """All of it."""
        choices = [self.choice(i, reply) for i, reply in enumerate(replies)]
        return {**self.about, "object": self.object, "choices": choices, "usage": self.usage(replies)}

    def usage(self, replies: Sequence[Reply]) -> dict[str, int]:
        """Tokens of each prompt, once, and of all replies, those that ended them included."""
        prompt, made = self.asked.prompt_tokens, sum(len(reply.tokens) for reply in replies)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def chunks(self, pieces: Sequence[Piece], replies: Sequence[Reply]) -> bytes:
        """What a step gave, as events."""
        made = []
        for piece in pieces:
            if inner := self.inner(piece, replies[piece.choice]):
                reason = f'"{piece.reason}"' if piece.reason else "null"
                made.append(f'{self._head}{piece.choice},{inner},"finish_reason":{reason}}}]{self._tail}')
                self.begun[piece.choice] = True
        return "".join(made).encode()

    def end(self, replies: Sequence[Reply]) -> bytes:
        """The last events."""
        if not self.usage_told:
            return DONE
        return event({**self.about, "object": self.chunk, "choices": [], "usage": self.usage(replies)}) + DONE

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        """One reply, whole."""
        raise NotImplementedError

    def inner(self, piece: Piece, reply: Reply) -> str:
        """A part of one, as the inside of a JSON object; "" where there is nothing to tell."""
        raise NotImplementedError


class CompletionForm(Form):
    """Of /v1/completions."""

    object = chunk = "text_completion"
    prefix = "cmpl-"

    def __init__(self, name: str, body: CompletionBody, asked: Asked, tokenizer: Tokenizer, ends: Sequence[int]):
        super().__init__(name, body, asked, tokenizer, ends)
        self.echo, self.told = bool(body.echo), body.logprobs is not None
        self.places = [0] * len(asked.requests)

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        text = self.asked.echoes[index] + reply.text
        told = self._told(index, reply, reply.tokens, reply.logprobs, reply.tops, self.echo) if self.told else None
        return {"text": text, "index": index, "logprobs": told, "finish_reason": reply.reason}

    def inner(self, piece: Piece, reply: Reply) -> str:
        first = self.echo and not self.begun[piece.choice]
        text = self.asked.echoes[piece.choice] + piece.text if first else piece.text
        told = "null"
        if self.told:
            told = compact(self._told(piece.choice, reply, piece.tokens, piece.logprobs, piece.tops, first))
        if not text and not piece.reason and told == "null":
            return ""
        return f'"text":{json.dumps(text)},"logprobs":{told}'

    def _told(
        self, index: int, reply: Reply, ids: Sequence[int], values: Sequence[float], tops: Sequence[Tops], echo: bool
    ) -> dict[str, Any]:
        """OpenAI's lists. The first token of a prompt has no probability: nothing stands before it."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        given: list[tuple[int, float | None, Tops]] = []
        if echo:
            prompt = list(reply.request.prompt)
            known: Sequence[Tops] = reply.prompt_tops or [()] * len(reply.prompt_logprobs)
            given = [(prompt[0], None, ()), *zip(prompt[1:], reply.prompt_logprobs, known, strict=True)]
        given += zip(ids, values, tops or [()] * len(ids), strict=True)
        for token, value, top in given:
            lists["tokens"].append(word(self.tokenizer, token))
            lists["token_logprobs"].append(None if value is None else told(value))
            lists["top_logprobs"].append(None if value is None else self._top(token, value, top))
            lists["text_offset"].append(self.places[index])
            self.places[index] += characters(self.tokenizer.pieces[token])
        return lists

    def _top(self, token: int, value: float, top: Tops) -> dict[str, float]:
        """By the tokens' words, of two that have the same the likelier. The one that is there is always told, with the
        number that stands beside it: that it is the largest is how clients know a greedy choice."""
        found: dict[str, float] = {}
        for other, known in [*((i, v) for i, v in top if i != token), (token, value)]:
            name = word(self.tokenizer, other)
            found[name] = max(found.get(name, -math.inf), told(known))
        return found


class ChatForm(Form):
    """Of /v1/chat/completions."""

    object, chunk = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl-"

    def __init__(self, name: str, body: ChatBody, asked: Asked, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
        super().__init__(name, body, asked, tokenizer, ends)
        self.told = bool(body.logprobs)

    def choice(self, index: int, reply: Reply) -> dict[str, Any]:
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        told = self._told(reply.tokens, reply.logprobs, reply.tops) if self.told else None
        return {"index": index, "message": message, "logprobs": told, "finish_reason": reply.reason}

    def inner(self, piece: Piece, reply: Reply) -> str:
        told = compact(self._told(piece.tokens, piece.logprobs, piece.tops)) if self.told else "null"
        begun = self.begun[piece.choice]
        if begun and not piece.text and not piece.reason and told == "null":
            return ""
        role = "" if begun else '"role":"assistant",'
        return f'"delta":{{{role}"content":{json.dumps(piece.text)}}},"logprobs":{told}'

    def _told(self, ids: Sequence[int], values: Sequence[float], tops: Sequence[Tops]) -> dict[str, Any]:
        """The reply's own tokens, not the one that ends it."""
        content = []
        for token, value, top in zip(ids, values, tops or [()] * len(ids), strict=True):
            if token not in self.ends:
                others = [self._one(other, known) for other, known in top]
                content.append({**self._one(token, value), "top_logprobs": others})
        return {"content": content, "refusal": None}

    def _one(self, token: int, value: float) -> dict[str, Any]:
        return {
            "token": word(self.tokenizer, token),
            "logprob": told(value),
            "bytes": [*self.tokenizer.pieces[token]],
        }


def told(value: float) -> float:
    """A log-probability as JSON can say it."""
    return value if math.isfinite(value) else LEAST


def word(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is a part of a character by its bytes, as OpenAI names it."""
    text = tokenizer.decode([token], inside=True)
    if "\ufffd" in text and tokenizer.join is None:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.pieces[token])
    return text


def characters(piece: bytes) -> int:
    """Characters that begin in a piece."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)
