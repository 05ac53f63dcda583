"""The thread that owns the engine, and what comes of requests on the event loop's side.

One thread alone touches the engine. What is asked of it is posted and done between two steps; what came of a step goes
to the event loop in one call for all requests, which keeps it until whoever reads it has time: a slow reader makes
nobody wait, and at most one reply's worth of text waits for it.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from gptjax.errors import UserError
from gptjax.infer.request import Reply, Request
from gptjax.serve.errors import Refused, log, of_user

if TYPE_CHECKING:
    from gptjax.api import Model

PAUSE = 0.003  # seconds without another request after which those that are there begin
GATHERING = 0.03  # seconds that they wait for each other at most
PACE = 0.03  # seconds between two pieces of a reply: more of them no eye follows, and each costs a write and a read
RETURNING = 0.25  # of a step's rows that must be free to be waited for: fewer are not worth the time
Result = TypeVar("Result")


class Piece(NamedTuple):
    """What a step added to one of a stream's replies."""

    choice: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    tops: list[list[tuple[int, float]]]
    reason: str
    """Why it is over; "" while it is not."""


class Stream:
    """What comes of the requests of one call. For the event loop alone."""

    def __init__(self, worker: "Worker", count: int, live: bool) -> None:
        """live: whether pieces are wanted as they come, and not only the end."""
        self.replies: list[Reply] = []
        """As they are in the engine: to be read when the stream is over, and of their prompts from the first piece."""
        self.live, self.left = live, count
        self.error: Refused | None = None
        self.began, self.first, self.last = time.perf_counter(), 0.0, 0.0
        """When it was asked, and when its first and last tokens came."""
        self._worker, self._came = worker, asyncio.Event()
        self._pieces: list[Piece] = []

    def take(self, pieces: list[Piece], tokens: int, ended: int) -> None:
        """A step's worth."""
        if self.error:
            return
        if tokens:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        self._pieces += pieces
        self._less(ended)
        if pieces or not self.left:
            self._came.set()

    def cancel(self, error: Refused | None = None) -> None:
        """End what still goes; its rows are free within a step. Whoever reads on gets the error."""
        if self.left:
            self.error = error or Refused(499, "cancelled")
            self._less(self.left)
            self._worker.post(lambda: self._worker.end(self))
            self._came.set()

    def _less(self, count: int) -> None:
        self.left -= count
        self._worker.open -= count
        if not self.left:
            self._worker.streams.discard(self)

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        """Everything that came since the last time, as long as something comes. Raises Refused where it was ended."""
        while True:
            if pieces := self._pieces:
                self._pieces = []
                yield pieces
            elif self.error:
                raise self.error
            elif not self.left:
                return
            else:
                await self._came.wait()
                self._came.clear()


class _Given:
    """How much of each reply the event loop has got."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.going = stream, list(range(len(stream.replies)))
        self.at = 0.0
        """When it got the last of it."""
        self.tokens, self.text = [0] * len(stream.replies), [0] * len(stream.replies)

    @property
    def ended(self) -> bool:
        """Whether a reply is over of which it does not know that yet."""
        return any(self.stream.replies[i].reason for i in self.going)

    def due(self, now: float) -> bool:
        """Whether it gets what there is, or waits for what the next step adds."""
        return now >= self.at + PACE or self.ended

    def pieces(self) -> tuple[list[Piece], int, int]:
        """(what is new, its tokens, replies that are over)"""
        found, count, ended = [], 0, 0
        for i in list(self.going):
            reply, known = self.stream.replies[i], self.tokens[i]
            made = len(reply.tokens)
            if made == known and not reply.reason:
                continue
            count += made - known
            if self.stream.live:
                text, shown = reply.text, self.text[i]
                values, tops = reply.logprobs[known:], reply.tops[known:]
                found.append(Piece(i, text[shown:], reply.tokens[known:], values, tops, reply.reason))
                self.text[i] = len(text)
            self.tokens[i] = made
            if reply.reason:
                self.going.remove(i)
                ended += 1
        return found, count, ended


class Worker:
    """Runs a model's engine on a thread of its own for an event loop."""

    def __init__(self, model: "Model", max_queue: int) -> None:
        """max_queue: replies that may wait for one of the model's rows."""
        self.model, self.most = model, model.slots + max_queue
        self.open = 0
        """Replies asked for that are not over."""
        self.streams: set[Stream] = set()
        self.waiting = self.used = self.prompt_tokens = self.completion_tokens = 0
        """Requests without a row, rows in use, and tokens so far, those of cancelled replies included."""
        self.programs = self.reused = 0
        """Programs compiled or read; tokens of prompts that lay in a cache."""
        self._posted: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._given: dict[Stream, _Given] = {}
        self._spoke, self._seconds, self._ended = 0, 0.0, 0.0
        """Rows of the last step, how long it took, and when it ended."""
        self._over = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """On the event loop that is to be spoken to."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End everything; returns when the thread has ended."""
        self.cancel_all()
        self._over = True
        self.post(lambda: None)  # it may wait for work
        await asyncio.to_thread(self._thread.join)

    def cancel_all(self) -> None:
        """Nobody is answered any more."""
        for stream in list(self.streams):
            stream.cancel(Refused(503, "the server is going down"))

    async def warm(self) -> None:
        """Have every program that requests may need."""

        def one_by_one() -> None:
            for _ in self.engine.warm():
                self._count()
                if self._over:
                    return

        await self.call(one_by_one)

    def post(self, work: Callable[[], None]) -> None:
        """Have something done on the thread, soon."""
        self._posted.put(work)

    async def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """What a function gives that runs on the thread, between two steps."""
        answer: asyncio.Future[Result] = self._loop.create_future()

        def work() -> None:
            try:
                self._tell(_set, answer, function(*args), None)
            except BaseException as error:
                self._tell(_set, answer, None, error)

        self.post(work)
        return await answer

    async def submit(self, requests: Sequence[Request], live: bool = True) -> Stream:
        """Have requests answered. Raises Refused where too many wait, or where the engine refuses one of them."""
        if self.open >= self.most:
            raise Refused(429, f"{self.open} replies are under way; try again", headers={"Retry-After": "1"})
        stream = Stream(self, len(requests), live)
        self.open += len(requests)
        self.streams.add(stream)
        try:
            await self.call(self._take, stream, requests)
        except UserError as error:
            stream.cancel()
            raise of_user(error) from None
        except BaseException:
            stream.cancel()
            raise
        return stream

    # On the thread

    def _run(self) -> None:
        while not self._over:
            self._do_posted()
            if self.engine.busy:
                self._guarded(self._step)
            self._count()

    @property
    def engine(self) -> Any:
        """For what is called on the thread."""
        return self.model.engine

    def _do_posted(self) -> None:
        idle = not self.engine.busy
        with suppress(Empty):
            self._guarded(self._posted.get(block=idle))
            while True:
                self._guarded(self._posted.get_nowait())
        self._gather(idle)

    def _gather(self, idle: bool) -> None:
        """Requests that come at once come one by one, and who has just got a reply may ask for the next: those that
        begin together share every step, and one that is a moment too early makes the others wait for a step of its
        own. Nobody is waited for longer than a step without the free rows would cost."""
        until = time.monotonic() + GATHERING
        with suppress(Empty):
            while (there := self.engine.used + self.engine.waiting) < self.model.slots:
                free = max(1 - there / self._spoke, 0.0) if time.monotonic() < self._ended + GATHERING else 0.0
                pause = max(free * self._seconds if free >= RETURNING else 0.0, PAUSE if idle else 0.0)
                if (left := min(pause, until - time.monotonic())) <= 0:
                    return
                self._guarded(self._posted.get(timeout=left))

    def _step(self) -> None:
        """What a step gave is told while the next one is computed: before that the event loop would take the time of
        this thread, which has to get the next one going. Who has got all may ask again, and is told at once."""
        self._spoke = min(self.engine.used + self.engine.waiting, self.model.slots)
        began = time.monotonic()
        self.engine.step(self._hand_out)
        self._ended = time.monotonic()
        self._seconds = self._ended - began
        if any(given.ended for given in self._given.values()):
            self._hand_out()

    def _guarded(self, work: Callable[[], None]) -> None:
        """What fails ends what is under way, and nothing else."""
        try:
            work()
        except Exception:
            log.exception("the engine failed: what it was at is lost, and it goes on with the next request")
            self.engine.clear()
            for stream in self._given:
                self._tell(stream.cancel, Refused(500, "the engine failed; the server's log says why"))
            self._given.clear()

    def _hand_out(self) -> None:
        made, now = [], time.monotonic()
        for stream, given in list(self._given.items()):
            if not given.due(now):
                continue
            pieces, tokens, ended = given.pieces()
            self.completion_tokens += tokens
            if not given.going:
                del self._given[stream]
            if tokens or ended:
                given.at = now
                made.append((stream, pieces, tokens, ended))
        if made:
            self._tell(_take_all, made)

    def _take(self, stream: Stream, requests: Sequence[Request]) -> None:
        for request in requests:
            stream.replies.append(self.engine.submit(request))
        self.prompt_tokens += sum(len(request.prompt) for request in requests if request.sample == 0)
        self._given[stream] = _Given(stream)
        if any(reply.reason for reply in stream.replies):  # those that draw nothing are over at once
            self._hand_out()

    def end(self, stream: Stream) -> None:
        """Cancel what a stream has in the engine."""
        self._given.pop(stream, None)
        for reply in stream.replies:
            self.engine.cancel(reply)

    def _count(self) -> None:
        engine = self.engine
        self.waiting, self.used = engine.waiting, engine.used
        self.programs, self.reused = engine.programs.compiled, engine.reused

    def _tell(self, function: Callable[..., Any], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def _set(answer: "asyncio.Future[Any]", value: Any, error: BaseException | None) -> None:
    if answer.done():  # whoever asked has gone
        return
    if error is None:
        answer.set_result(value)
    else:
        answer.set_exception(error)


def _take_all(made: list[tuple[Stream, list[Piece], int, int]]) -> None:
    for stream, pieces, tokens, ended in made:
        stream.take(pieces, tokens, ended)
