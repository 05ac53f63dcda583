"""Replies that a policy draws, as rows to learn from: the feed of the stages that learn from their own replies."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from gptjax.data.rows import PADDING
from gptjax.data.stream import TokenStream
from gptjax.infer.engine import Engine
from gptjax.infer.request import Reply, Request
from gptjax.infer.sampling import Sampling
from gptjax.rl.control import minibatches


class Drawn(NamedTuple):
    """Replies with their prompts, E of them, in rows of T places."""

    tokens: Any
    """int32 [E, T]: prompt and reply, from the left; behind them 0."""
    targets: Any
    """int32 [E, T]: the id that was drawn after each place, PADDING where none was."""
    last: Any
    """int32 [E]: the place of the last token, where a score is read."""


@dataclass(frozen=True)
class Rollout:
    """What an engine gave."""

    drawn: Drawn
    ended: np.ndarray
    """bool [E]: whether the policy ended its reply, and not a limit."""
    logprobs: np.ndarray
    """float32 [E, T]: of each target by the engine, in nats of the full softmax; 0 elsewhere."""
    texts: list[str]


class Iterated(Protocol):
    """What such a stage supplies."""

    def iteration(self, params: Any, start: int, /) -> tuple[Any, dict[str, float]]:
        """Rows [episodes, ...] of the episodes from number `start` on, drawn from params, and figures of them."""
        ...


class Rollouts:
    """The feed: an iteration's replies are drawn where the last one's have been learned from."""

    def __init__(
        self,
        stage: Iterated,
        *,
        seed: int,
        episodes: int,
        epochs: int,
        size: int,
        micro: int,
        done: int,
        rows: Sequence[int],
        text: TokenStream | None = None,
    ):
        """size: rows of an update; micro: of a micro-batch, of which `rows` are this process's; done: episodes that
        were drawn before; text: rows that go beside them, as many for each."""
        self._stage, self._seed, self._episodes, self._epochs, self._size = stage, seed, episodes, epochs, size
        self._micro, self._done, self._rows, self._text = micro, done, list(rows), text
        self.figures: dict[str, float] = {}

    def batch(self, num_micro: int, params: Any, /) -> Any:
        """The iteration's rows, once for each epoch, in the order of its updates."""
        iteration = self._done // self._episodes
        rows, self.figures = self._stage.iteration(params, self._done)
        about = {"seed": self._seed, "iteration": iteration, "episodes": self._episodes, "size": self._size}
        order = np.concatenate([minibatches(epoch=epoch, **about).ravel() for epoch in range(self._epochs)])
        self._done += self._episodes
        places = order.reshape(num_micro, self._micro)[:, self._rows]
        made = jax.tree.map(lambda leaf: np.asarray(leaf)[places], rows)
        if self._text is None:
            return made
        lead = *places.shape, -1
        text = jax.tree.map(lambda leaf: leaf.reshape(*lead, leaf.shape[-1]), self._text.batch(num_micro))
        return made._replace(ptx=text)

    @property
    def positions(self) -> list[int]:
        return [self._done, *(self._text.positions if self._text else ())]

    def close(self) -> None:
        if self._text:
            self._text.close()


def draw(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    ends: Sequence[int],
    sampling: Sampling,
    seed: int,
    start: int,
    most: int,
) -> Rollout:
    """A reply to each prompt. The reply of episode `start` + i has random numbers of its own, which depend on `seed`
    and that number alone; most: tokens of a reply, less where the context has no room for them."""
    length = engine.capacity
    replies = engine.run(requests(length, prompts, ends, sampling, seed, start, most))
    tokens, targets = np.zeros((len(replies), length), np.int32), np.full((len(replies), length), PADDING, np.int32)
    logprobs, last = np.zeros((len(replies), length), np.float32), np.zeros(len(replies), np.int32)
    for i, reply in enumerate(replies):
        before = len(reply.request.prompt)
        said = slice(before - 1, before - 1 + len(reply.tokens))
        ids = [*reply.request.prompt, *reply.tokens]
        tokens[i, : len(ids)], last[i] = ids, len(ids) - 1
        targets[i, said], logprobs[i, said] = reply.tokens, reply.logprobs
    ended = np.array([bool(reply.tokens) and reply.tokens[-1] in ends for reply in replies])
    return Rollout(Drawn(tokens, targets, last), ended, logprobs, [_text(reply) for reply in replies])


def requests(
    capacity: int,
    prompts: Sequence[np.ndarray],
    ends: Sequence[int],
    sampling: Sampling,
    seed: int,
    start: int,
    most: int,
) -> list[Request]:
    """What `draw` asks of an engine of that capacity."""

    def request(i: int, ids: np.ndarray) -> Request:
        room = min(most, capacity - len(ids))
        return Request(ids.tolist(), room, sampling, seed=seed, sample=start + i, stop_tokens=tuple(ends))

    return [request(i, ids) for i, ids in enumerate(prompts)]


def _text(reply: Reply) -> str:
    return reply.text if reply.stream else ""


class Stopwatch:
    """Seconds of the parts of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """What went by since the last one was spent on `name`."""
        now = time.perf_counter()
        self.seconds[name] = now - self._since
        self._since = now
