"""What an engine is asked for, and what has come of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from gptjax.errors import UserError
from gptjax.infer.programs import STOPS, TOPS
from gptjax.infer.sampling import Sampling, require
from gptjax.infer.text import TextStream


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue. Raises UserError for what no engine can do."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_tokens: int = 16
    """No more are drawn; 0 only looks at the prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    sample: int = 0
    """Which of several replies to the same prompt: each has random numbers of its own."""
    drawn: int = 0
    """Tokens that were drawn before, of a reply that goes on in a context of its own."""
    stop: tuple[str, ...] = ()
    """Strings that end the reply and are no part of it."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end it."""
    tops: int = 0
    """How many of the likeliest tokens to tell beside each one."""
    prompt_logprobs: bool = False
    """Tell also what the prompt's own tokens were worth."""
    told_from: int = 1
    """The first of the prompt's tokens that is told of; those before it may come from what prompts share."""
    source: Sequence[int] = ()
    """Token ids of the text that an encoder-decoder writes of, its end among them."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise UserError("prompt: empty; give at least one token")
        require("max_tokens", self.max_tokens, 0, 2**31 - 1)
        require("seed", self.seed, 0, 2**64 - 1)
        require("logprobs", self.tops, 0, TOPS)
        require("told_from", self.told_from, 1, len(self.prompt))
        if len(self.stop_tokens) > STOPS:
            raise UserError(f"stop_tokens: {len(self.stop_tokens)} ids; at most {STOPS}")

    @property
    def shared(self) -> int:
        """Tokens of the prompt that may lie in a cache before: not the last, which the first draw feeds, and none with
        a successor that is to be told of."""
        return (self.told_from if self.prompt_logprobs else len(self.prompt)) - 1


@dataclass(eq=False)
class Reply:
    """What has come of a request so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    """Drawn, the one that ended it included."""
    logprobs: list[float] = field(default_factory=list)
    """Of each, float32 nats of the full softmax, before temperature and all the rest."""
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    """Of each, the likeliest tokens and their log-probabilities."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """Of the prompt's token `told_from`, the second unless asked, and all that follow."""
    prompt_tops: list[list[tuple[int, float]]] = field(default_factory=list)
    reason: str = ""
    """Why it is over: stop (a token or a string that ends it), length (its limit, or the context is full),
    cancelled; "" while it is not."""
    stream: TextStream | None = None

    @property
    def text(self) -> str:
        """What may be shown so far. Only of an engine with a tokenizer."""
        assert self.stream, "an engine without a tokenizer makes no text"
        return self.stream.text
