"""Replies for a person to rank: different ones, drawn before they are asked for."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptjax.data.prompted import Prompt

if TYPE_CHECKING:
    from gptjax.api import Model

TRIES = 3  # times as many draws as replies, where some are equal
AHEAD = 2  # prompts that replies are drawn for before they are asked for


@dataclass(frozen=True)
class How:
    """How replies are drawn."""

    replies: int
    seed: int
    tokens: int
    temperature: float
    top_k: int
    top_p: float


def draw(model: "Model", prompt: Sequence[int], how: How) -> list[str]:
    """`how.replies` different texts with words in them, in the order in which they were drawn, or as many as there are
    in `TRIES` times as many draws. A function of model, prompt and `how`."""
    found: dict[str, None] = {}
    for first in range(0, TRIES * how.replies, how.replies):
        requests = [
            model.request(
                prompt,
                how.seed,
                sample,
                max_tokens=how.tokens,
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
            )
            for sample in range(first, first + how.replies)
        ]
        found |= dict.fromkeys(reply.text for reply in model.engine.run(requests) if reply.text.strip())
        if len(found) >= how.replies or not how.temperature:
            break
    return list(found)[: how.replies]


class Drawn:
    """The replies to prompts by a thread that alone uses the model."""

    def __init__(self, model: "Model", how: How) -> None:
        self._model, self._how = model, how
        self._thread = ThreadPoolExecutor(1, "engine")
        self._futures: dict[bytes, Future[list[str]]] = {}

    def __call__(self, prompts: Sequence[Prompt]) -> Future[list[str]]:
        """Those to the first; those to the next few are on their way after it."""
        for prompt in prompts[: 1 + AHEAD]:
            ids = prompt.ids.tobytes()
            if ids not in self._futures:
                self._futures[ids] = self._thread.submit(draw, self._model, prompt.ids.tolist(), self._how)
        return self._futures[prompts[0].ids.tobytes()]

    def close(self) -> None:
        """Give up what is not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)
