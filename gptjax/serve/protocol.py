"""Bodies of requests: every parameter that OpenAI documents for the two routes, its bounds, and what of it is served.

What is typed `None` or with one value is known and not offered: anything else is refused by its name, as is a name that
is not here. Nothing is taken and then ignored; `user`, `safety_identifier` and `metadata` change nothing by definition.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gptjax.data.chat import HALF
from gptjax.infer.programs import TOPS

MOST = 128  # replies of one request, over all of its prompts
STOPS = 4  # strings that end a reply


def whole(text: str) -> str:
    """Raises ValueError for what JSON can spell and no text can be."""
    if HALF.search(text):
        raise ValueError("half a character (a lone surrogate), which has no UTF-8 form")
    return text


Text = Annotated[str, AfterValidator(whole)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]]
BIASES = 1024  # tokens of one request
Stop = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(whole)]
Tokens = Annotated[int, Field(ge=0, lt=2**31)]
Tag = Annotated[str, Field(max_length=512)]


class Strict(BaseModel):
    """No value is turned into another type, and no name is passed over."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """Of a reply that comes piece by piece."""

    include_usage: bool | None = None
    """Whether the last piece counts tokens."""
    include_obfuscation: Literal[False] | None = None


class Body(Strict):
    """What both routes take."""

    model: str | None = None
    """The name of the served model, as /v1/models tells it; nothing is the same."""
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[Bias, Field(max_length=BIASES)] | None = None
    """Token id -> what is added to its logit."""
    n: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """Replies to each prompt."""
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    """The same seed gives the same reply, whatever is asked beside it."""
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: Tag | None = None
    metadata: dict[str, Tag] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Not of OpenAI: keep the k likeliest tokens; 0 or -1 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Not of OpenAI: keep tokens of at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    """Not of OpenAI: above 1, tokens that were there become less likely."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a reply."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_told(self) -> bool:
        """Whether a stream is to end with its counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def sampling(self) -> dict[str, Any]:
        """What was said of how tokens are drawn, as the engine takes it."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        given = {name: getattr(self, name) for name in (*names, "frequency_penalty")}
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        return {name: value for name, value in given.items() if value is not None} | {"logit_bias": bias}


class CompletionBody(Body):
    """POST /v1/completions"""

    prompt: Text | list[Text] | list[Token] | list[list[Token]] | None = None
    """A text, token ids, or several of either; without one a text begins."""
    suffix: Text | None = None
    """What the text ends before, of a model that has learned to fill in."""
    max_tokens: Tokens | None = None
    """16 unless given; 0 with `echo` only looks at the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=TOPS)] | None = None
    """How many of the likeliest tokens to tell beside each one, with log-probabilities of the full softmax."""
    echo: bool | None = None
    """Whether the prompt comes first."""
    best_of: Literal[1] | None = None


class TextPart(Strict):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: str
    """system, user or assistant"""
    content: Text | list[TextPart]
    name: None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(Strict):
    """The only form of a reply."""

    type: Literal["text"]


class ChatBody(Body):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    """The same by its newer name; all that the context has left unless given."""
    logprobs: bool | None = None
    """Whether to tell the log-probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=TOPS)] | None = None
    """How many of the likeliest beside it."""
    safety_identifier: Tag | None = None
    store: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    """Without tools there are no calls."""
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: None = None
    service_tier: Literal["auto", "default"] | None = None
    moderation: None = None
    prompt_cache_key: Tag | None = None
    """Prompts that begin alike share their cache anyway."""
    prompt_cache_retention: None = None
    web_search_options: None = None


class TokenizeBody(Strict):
    """POST /tokenize"""

    prompt: Text
    add_special_tokens: bool = True
    """Whether what stands before every text comes with it, as a prompt has it."""
    model: str | None = None


class DetokenizeBody(Strict):
    """POST /detokenize"""

    tokens: list[Token]
    model: str | None = None


class Error(Strict):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Strict):
    """The body of every refusal."""

    error: Error


BODIES = (CompletionBody, ChatBody, ChatMessage, StreamOptions, TokenizeBody, DetokenizeBody)
NAMES = tuple(dict.fromkeys(name for body in BODIES for name in body.model_fields))
"""Every parameter that there is."""
