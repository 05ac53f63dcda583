"""Continuous batching: requests take rows as they come and leave them when they end, and no other notices.

The host decides and the devices compute. A round admits what waits, puts a chunk of prompts into caches, and decodes a
few tokens in every row that goes; see `Engine.step`. What a request gives does not depend on what runs beside it.
"""

import bisect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from gptjax.config import ENCODER
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.infer.prepare import for_cpu
from gptjax.infer.programs import STOPS, Programs, Row, Scores, Slots, key_of
from gptjax.infer.request import Reply, Request
from gptjax.infer.sampling import Knobs
from gptjax.infer.text import TextStream
from gptjax.model.cache import ring_size
from gptjax.model.gpt import GPT
from gptjax.model.loss import IGNORED
from gptjax.parallel.network import EncoderDecoder
from gptjax.sharding.rules import Layout

SHARED = 16  # tokens that a prefix must have to be worth a copy
SIZES = (16, 64, 256)  # tokens of a prompt in one call; each is a program for 1, 4 and 16 prompts
WASTE = 1.25  # a larger call that is so little too large is better than two
FEW_SIZES = (64, 512)  # on accelerators, where padding is cheaper than another program


@dataclass(eq=False)
class _Taken:
    """A row in use."""

    reply: Reply
    filled: int
    """Tokens of the prompt that lie in its cache; all but the last go there, which the first draw feeds."""
    left: int
    """Tokens that it may draw."""
    mark: int
    """Where on its way its cache is copied for others; 0 for nowhere."""

    @property
    def goal(self) -> int:
        return len(self.reply.request.prompt) - 1

    @property
    def told(self) -> bool:
        """Whether the next tokens that go in have successors to be told of."""
        return self.reply.request.prompt_logprobs and self.filled >= self.reply.request.shared

    @property
    def end_of_call(self) -> int:
        """How far into the prompt the next call goes at most."""
        return min(at for at in (self.mark, self.reply.request.shared, self.goal) if at > self.filled)


class Engine:
    """Replies to requests by one model, in `slots` rows of up to `capacity` tokens.

    Give it `params` as they are trained; `params` may be set anew between two rounds. Not for several threads.
    """

    def __init__(
        self,
        model: GPT,
        params: Any,
        *,
        slots: int = 8,
        capacity: int = 0,
        steps: int = 4,
        chunk: int = 512,
        tokenizer: Tokenizer | None = None,
        layout: Layout | None = None,
        prefixes: int = 1,
        counts: Sequence[int] = (),
        encoder: EncoderDecoder | None = None,
    ) -> None:
        """capacity 0: the model's context; steps: tokens that are decoded between two looks at what came of them;
        chunk: tokens of prompts that go in beside them; prefixes: rows that keep what prompts share; counts: numbers of
        rows that there are programs for on a CPU, the most of them `slots`; every power of two where there are none;
        encoder: of an encoder-decoder both sides, of which `model` is one."""
        config = model.config
        self.capacity = min(capacity or config.seq_len, config.seq_len)
        self.slots, self.steps, self.chunk = slots, steps, chunk
        self.tokenizer, self.reuse = tokenizer, encoder is None  # a beginning means another thing beside another text
        ways = layout.ways(layout.rules["batch"]) if layout else 1
        rows = -(-(slots + prefixes) // ways) * ways
        self._on_cpu = jax.default_backend() == "cpu"
        self._arrange: Callable[[Any], Any] | None = None
        if self._on_cpu and layout is None:
            model, self._arrange = for_cpu(model)
        keep = self._unread = self._arrange is not None and encoder is None
        self.model, self.programs = model, Programs(model, rows, self.capacity, layout, keep, encoder)
        self._trained, self._params = params, self._arranged(params)
        self._bias = self._allowed()
        self._ring = min(ring_size(config, kind, self.capacity) for kind in config.attention_pattern)
        self._sizes = [size for size in (SIZES if self._on_cpu else FEW_SIZES) if size <= chunk] or [chunk]
        self._counts = tuple(counts)
        self._store = deque(range(slots, slots + prefixes))
        self.reused = 0
        """Tokens of prompts that lay in a cache when they were asked for."""
        self._taken: dict[int, _Taken] = {}
        self._waiting: deque[Reply] = deque()
        self._recent: deque[Request] = deque(maxlen=32)
        self.clear()

    def clear(self) -> None:
        """End all requests and give the memory of their caches back until the next one comes."""
        for reply in [*self._waiting, *(taken.reply for taken in self._taken.values())]:
            self._end(reply, "cancelled")
        self._waiting.clear()
        self._taken.clear()
        self._free = list(range(self.slots))
        self._slots: Slots | None = None
        self._held: list[list[int]] = [[] for _ in range(self.programs.rows)]  # the tokens in each row's cache
        self._stale: set[int] = set()  # rows that other parameters have a part in: nothing goes on from them

    @property
    def _state(self) -> Slots:
        if self._slots is None:
            empty = self.programs.empty()
            # Where the parameters are, and held there as what programs give back is: else they compile once more.
            there = None if self.programs.layout else jax.tree.leaves(self._params)[0].sharding
            self._slots = jax.device_put(empty, there) if there else empty
        return self._slots

    @_state.setter
    def _state(self, slots: Slots) -> None:
        self._slots = slots

    @property
    def params(self) -> Any:
        """As its programs read them, on a CPU a second copy."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        """Others from now on, also for what is half done. What prompts shared is forgotten."""
        self._trained, self._params = params, self._arranged(params)
        self._stale |= set(range(len(self._held)))

    def _arranged(self, params: Any) -> Any:
        if params is None:
            return None
        if self.programs.encoder:
            params = {name: part for name, part in params.items() if name != ENCODER}
        return self._arrange(params) if self._arrange else params

    @property
    def busy(self) -> bool:
        return bool(self._taken or self._waiting)

    @property
    def used(self) -> int:
        """Rows that requests have."""
        return len(self._taken)

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    def warm(self) -> Iterator[None]:
        """Have every program that requests may need, one by one, so that none of them waits for a compiler. For an
        engine at rest."""
        fill, decode, missing = self.programs.fill, self.programs.decode, np.int32(self.programs.rows)
        calls: list[tuple[Any, tuple[Any, ...]]] = []
        for tokens, read, asked in self._fills():
            numbers = np.full(len(tokens), missing)
            calls.append((fill, (tokens, numbers, np.zeros_like(numbers), asked, read)))
        calls += [(decode, call) for call in self._decodes()]
        self._unread = False
        if self.programs.keep:
            for program, args in calls:
                program.read_ahead(self._params, self._state, *args)
        for program, args in calls:
            if not (self.programs.keep and program.make(self._params, self._state, *args)):
                self._state, _ = program(self._params, self._state, *args)
            yield
        self._state = self.programs.copy(self._state, np.int32(0), np.int32(0))
        self.run([Request([0, 0], 1)])
        self._held = [[] for _ in self._held]

    def _fills(self) -> Iterator[tuple[np.ndarray, int, np.ndarray | None]]:
        """What `_fill` may ask for: tokens, slots to read, and targets."""
        for size in self._sizes:
            if size > max(WASTE * self.capacity, self._sizes[0]):
                continue
            most = max(1, min(self.chunk, self._sizes[-1]) // size)
            powers = [4**i for i in range(math.ceil(math.log(min(most, self.slots), 4)) + 1)]
            for count in powers if self._on_cpu else [max(1, self._sizes[-1] // size)]:
                tokens = np.zeros((count, size), np.int32)
                for read in (0,) if self._on_cpu else (1, self.capacity):
                    yield tokens, read, None
                    yield tokens, read, np.full_like(tokens, IGNORED)

    def _decodes(self) -> Iterator[tuple[np.ndarray | None, int, int]]:
        """What `_decode` may ask for."""
        lengths = *(1 << i for i in range(self.capacity.bit_length())), self.capacity
        reads = sorted({self._read(length) for length in lengths})
        every = [self._numbers([self.programs.rows] * (n + 1)) for n in range(self.slots)]
        rows = {len(numbers): numbers for numbers in every if numbers is not None}
        for numbers in rows.values() or [None]:
            yield from ((numbers, self.steps, read) for read in reads)

    def submit(self, request: Request) -> Reply:
        """Take a request. Raises UserError where it does not fit the context, or names a token that is not there."""
        length, size = len(request.prompt), self.model.config.vocab_size
        if length > self.capacity + (request.max_tokens == 0):  # the last is only looked at where nothing is drawn
            raise UserError(f"prompt: {length} tokens; the context holds {self.capacity}")
        self._require_source(request)
        named = *request.source, *request.prompt, *request.sampling.logit_bias, *request.stop_tokens
        wrong = [i for i in named if not 0 <= i < size]
        if wrong:
            raise UserError(f"token {wrong[0]}: outside the vocabulary, 0 to {size - 1}")
        if request.sampling.logit_bias and not np.isfinite(self._biases(request)).any():
            raise UserError("logit_bias: of -inf for every token; leave one that may be drawn")
        stream = TextStream(self.tokenizer, request.prompt, request.stop) if self.tokenizer else None
        if request.stop and stream is None:
            raise ValueError("stop strings need an engine with a tokenizer")
        request = replace(request, prompt=[int(i) for i in request.prompt])
        reply = Reply(request, stream=stream)
        self._recent.append(request)
        if request.max_tokens == 0 and not request.prompt_logprobs:
            self._end(reply, "length")
        else:
            self._waiting.append(reply)
        return reply

    def _require_source(self, request: Request) -> None:
        encoder = self.programs.encoder
        if encoder is None:
            if request.source:
                raise UserError("source: this model is a decoder alone, and reads no other text; leave it out")
            return
        room = encoder.config.encoder.seq_len
        if not 0 < len(request.source) <= room:
            raise UserError(f"source: {len(request.source)} tokens; the encoder reads 1 to {room}")

    def cancel(self, reply: Reply) -> None:
        """End a request wherever it is; its row is free at once."""
        if reply.reason:
            return
        self._end(reply, "cancelled")
        if reply in self._waiting:
            self._waiting.remove(reply)
        for number, taken in list(self._taken.items()):
            if taken.reply is reply:
                with self._whole():
                    self._rest(number)
                    self._release(number)

    def run(self, requests: Iterable[Request]) -> list[Reply]:
        """All of them, to their ends."""
        replies = [self.submit(request) for request in requests]
        while self.busy:
            self.step()
        return replies

    def stream(self, request: Request) -> Iterator[str]:
        """The text of one reply as it comes."""
        reply, shown = self.submit(request), 0
        try:
            while not reply.reason:
                self.step()
                yield reply.text[shown:]
                shown = len(reply.text)
        finally:
            self.cancel(reply)

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """One round. Rows that speak never wait for more than one call of prompts; rows that are yet to begin wait
        until all prompts that have a row are in, since a step costs little more for many rows than for one.

        `meanwhile` is called while the devices decode; not at all in a round in which nothing is decoded.
        """
        with self._whole():
            self._admit()
            if self._unread and self._taken:  # beside the program of prompts, a quarter of a second of the first answer
                self._unread = False
                self.programs.decode.read_ahead(self._params, self._state, *self._rows([*self._taken], 0))
            self._fill()
            self._admit()  # what waited for a prefix
            speaking = any(taken.reply.tokens for taken in self._taken.values())
            if speaking or all(taken.filled == taken.goal for taken in self._taken.values()):
                self._decode(meanwhile)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is cut off in the middle, as by Ctrl-C, may have given the caches away and got none back: everything
        ends then, and the engine begins anew."""
        try:
            yield
        except BaseException:
            self.clear()
            raise

    # Rows and prefixes

    def _admit(self) -> None:
        for reply in list(self._waiting):
            if not self._free:
                return
            prompt = reply.request.prompt
            source, shared = self._best(prompt[: reply.request.shared])
            if self._worth_waiting(prompt[: reply.request.shared], shared):
                continue
            self._waiting.remove(reply)
            number = source if source in self._free and shared else self._emptiest()
            self._free.remove(number)
            if shared and source != number:
                self._state = self.programs.copy(self._state, np.int32(source), np.int32(number))
            self._held[number] = list(prompt[:shared])
            self._stale.discard(number)
            self._take(number, reply, shared)

    def _emptiest(self) -> int:
        """The first free row whose cache nobody would miss, else the first."""
        empty = (number for number in self._free if not self._held[number] or number in self._stale)
        return next(empty, self._free[0])

    def _best(self, prompt: Sequence[int]) -> tuple[int, int]:
        """(row, tokens) of the longest beginning of a prompt that lies in a cache."""
        if not self.reuse or len(prompt) < SHARED:
            return -1, 0
        alike = [number for number, held in enumerate(self._held) if _alike(held, prompt)]
        found = [(self._usable(number, prompt), number) for number in alike]
        shared, number = max(found, key=lambda pair: (pair[0], -pair[1]), default=(0, -1))
        return (number, shared) if shared >= SHARED else (-1, 0)

    def _usable(self, number: int, prompt: Sequence[int]) -> int:
        """How many tokens of a row another prompt can go on from: of one in which a ring went round all or none."""
        held = [] if number in self._stale else self._held[number]
        shared = common(held, prompt)
        return shared if len(held) <= self._ring or shared == len(held) else 0

    def _worth_waiting(self, prompt: Sequence[int], shared: int) -> bool:
        """Whether a prompt that goes in right now will leave more of what this one may share in its cache."""
        if not self.reuse or len(prompt) < SHARED:
            return False
        for number, taken in self._taken.items():
            other, filling = taken.reply.request.prompt, taken.filled < taken.goal
            if filling and number not in self._stale and taken.reply.request.shared and _alike(other, prompt):
                will = common(other[: taken.goal], prompt)
                if self._ring < taken.goal != will:  # of a ring that goes round only copies can be gone on from
                    will = taken.mark if taken.filled < taken.mark <= will else 0
                if will > max(shared, SHARED - 1):
                    return True
        return False

    def _mark(self, prompt: Sequence[int], shared: int) -> int:
        """Where the beginning of a prompt is worth keeping for others: where that spares the most tokens. 0 where
        nothing does."""
        parts = self._parts(prompt, self._recent)
        ahead = [at for at in parts if shared < at < len(prompt) - 1]
        return max(ahead, key=lambda at: at * sum(other >= at for other in parts), default=0)

    def _parts(self, prompt: Sequence[int], others: Iterable[Request]) -> list[int]:
        """Tokens that a prompt has in common with each of the others, as far as those may share them."""
        there = [other for other in others if other.prompt is not prompt and _alike(other.prompt, prompt)]
        found = [min(common(other.prompt, prompt), other.shared) for other in there]
        return [at for at in found if at >= SHARED]

    def _take(self, number: int, reply: Reply, shared: int) -> None:
        request = reply.request
        self.reused += shared
        left = min(request.max_tokens, self.capacity - len(request.prompt) + 1)
        keeps = self.reuse and self._store and request.shared >= SHARED
        mark = self._mark(request.prompt, shared) if keeps else 0
        self._taken[number] = taken = _Taken(reply, shared, left, mark)
        self._read_source(number, request)
        if taken.filled == taken.goal:
            self._start(number, taken)
        else:
            self._rest(number)

    def _read_source(self, number: int, request: Request) -> None:
        """The encoder reads what a row looks at, once for all that it writes."""
        if self.programs.encoder is None:
            return
        tokens = np.zeros((1, self.programs.encoder.config.encoder.seq_len), np.int32)
        tokens[0, : len(request.source)] = request.source
        sizes = np.int32(number), np.int32(len(request.source))
        self._state = self.programs.encode(self._trained, self._state, tokens, *sizes)

    def _rest(self, number: int) -> None:
        """Tell the devices that a row draws nothing, and what lies in its cache."""
        self._state = self.programs.rest(self._state, np.int32(number), np.int32(len(self._held[number])))

    def _start(self, number: int, taken: _Taken) -> None:
        """Tell the devices whose row it is, once the prompt lies in the cache."""
        request, size = taken.reply.request, self.model.config.padded_vocab_size
        seen = np.zeros(size, bool)
        seen[list(request.prompt)] = True
        stops = np.full(STOPS, -1, np.int32)
        stops[: len(request.stop_tokens)] = request.stop_tokens
        row = Row(
            token=np.int32(request.prompt[-1]),  # type: ignore[arg-type]
            left=np.int32(taken.left),  # type: ignore[arg-type]
            key=key_of(request.seed, request.sample),  # type: ignore[arg-type]
            drawn=np.int32(request.drawn),  # type: ignore[arg-type]
            tops=np.bool_(request.tops > 0),  # type: ignore[arg-type]
            knobs=Knobs.of(request.sampling),
            bias=self._biases(request),  # type: ignore[arg-type]
            counts=np.zeros(size, np.int32),  # type: ignore[arg-type]
            seen=seen,  # type: ignore[arg-type]
            stops=stops,  # type: ignore[arg-type]
        )
        self._state = self.programs.admit(self._state, np.int32(number), row, np.int32(taken.filled))
        if taken.left == 0:
            self._end(taken.reply, "length")
            self._release(number)

    def _release(self, number: int) -> None:
        """What lies in its cache stays there for others until the row is wanted."""
        del self._taken[number]
        bisect.insort(self._free, number)

    # Prompts

    def _fill(self) -> None:
        """One call's worth of prompts, those that came first."""
        filling = [(number, taken) for number, taken in self._taken.items() if taken.filled < taken.goal]
        if not filling:
            return
        ends = {number: taken.end_of_call for number, taken in filling}
        size = self._size(ends[filling[0][0]] - filling[0][1].filled)
        scored = filling[0][1].told
        batch = [
            (number, taken) for number, taken in filling if taken.told == scored and ends[number] - taken.filled <= size
        ] or filling[:1]
        batch = batch[: max(1, min(self.chunk, self._sizes[-1]) // size)]
        if filling[0] not in batch:
            batch = filling[:1]
        count = 4 ** math.ceil(math.log(len(batch), 4)) if self._on_cpu else max(1, self._sizes[-1] // size)
        tokens, targets = np.zeros((count, size), np.int32), np.full((count, size), IGNORED, np.int32)
        numbers, counts = np.full(count, self.programs.rows, np.int32), np.zeros(count, np.int32)
        for i, (number, taken) in enumerate(batch):
            prompt, start = taken.reply.request.prompt, taken.filled
            end = min(start + size, ends[number])
            tokens[i, : end - start], targets[i, : end - start] = prompt[start:end], prompt[start + 1 : end + 1]
            numbers[i], counts[i] = number, end - start
        before = max(taken.filled for _, taken in batch)
        read = 0 if self._on_cpu else self.capacity if before else 1
        asked = targets if scored else None
        self._state, scores = self.programs.fill(self._params, self._state, tokens, numbers, counts, asked, read)
        scores = jax.device_get(scores)
        for i, (number, taken) in enumerate(batch):
            _note(taken.reply, scores, i, int(counts[i]))
            self._held[number] += tokens[i, : counts[i]].tolist()
            taken.filled += int(counts[i])
            self._keep(number, taken)
            if taken.filled == taken.goal:
                self._start(number, taken)

    def _size(self, tokens: int) -> int:
        """The size of a call for so many tokens of a prompt."""
        sizes = self._sizes
        most = max(WASTE * tokens, sizes[0]) if self._on_cpu else self.chunk
        fits = [size for size in sizes if tokens <= size <= most]
        return fits[0] if fits else max(size for size in sizes if size <= max(tokens, sizes[0]))

    def _keep(self, number: int, taken: _Taken) -> None:
        """A copy of a row at the point where its prompt parts from others; at its end from those that wait."""
        if not self.reuse or not self._store or taken.reply.request.shared < SHARED or number in self._stale:
            return
        waiting = [reply.request for reply in self._waiting] if taken.filled == taken.goal else []
        if taken.filled != taken.mark and taken.filled not in self._parts(taken.reply.request.prompt, waiting):
            return
        if all(self._held[kept] != self._held[number] or kept in self._stale for kept in self._store):
            self._store.rotate(-1)
            target = self._store[-1]
            self._state = self.programs.copy(self._state, np.int32(number), np.int32(target))
            self._held[target] = list(self._held[number])
            self._stale.discard(target)

    def _read(self, longest: int) -> int:
        """Slots that a program reads: of a few sizes, so that there are few programs. On a CPU it sees for itself."""
        return 0 if self._on_cpu else min(max(128, 1 << (longest - 1).bit_length()), self.capacity)

    # Replies

    def _decode(self, meanwhile: Callable[[], None]) -> None:
        going = {number: taken for number, taken in self._taken.items() if taken.filled == taken.goal}
        if not going:
            return
        longest = max(len(self._held[number]) for number in going)
        numbers, *sizes = self._rows(list(going), longest)
        self._state, drawn = self.programs.decode(self._params, self._state, numbers, *sizes)
        if not any(taken.reply.request.tops for taken in going.values()):
            drawn = drawn._replace(top_tokens=None, top_logprobs=None)
        meanwhile()
        drawn = jax.device_get(drawn)
        for i, (number, taken) in enumerate(going.items()):
            place = number if numbers is None else i
            self._take_in(number, taken, jax.tree.map(lambda x, place=place: x[:, place], drawn))

    def _rows(self, going: list[int], longest: int) -> tuple[np.ndarray | None, int, int]:
        """How rows are decoded of which the longest holds so many tokens: their numbers, steps, and slots to read."""
        return self._numbers(going), self.steps, self._read(min(longest + self.steps, self.capacity))

    def _numbers(self, going: list[int]) -> np.ndarray | None:
        """Rows that a program decodes: on a CPU, where each costs, those that go, up to a power of two; elsewhere,
        where a program more costs more, all."""
        if self._arrange is None:
            return None
        powers = 1 << (len(going) - 1).bit_length()
        count = min((each for each in self._counts if each >= len(going)), default=powers)
        return np.array(going + [self.programs.rows] * (count - len(going)), np.int32)

    def _take_in(self, number: int, taken: _Taken, drawn: Any) -> None:
        """What a row drew, each [steps]."""
        reply, request = taken.reply, taken.reply.request
        live = int(drawn.live.sum())
        last = (reply.tokens or request.prompt)[-1:]
        made = drawn.token[:live].tolist()
        self._held[number] += [*last, *made][:live]
        for i, token in enumerate(made):
            reply.tokens.append(token)
            reply.logprobs.append(float(drawn.logprob[i]))
            if request.tops:
                reply.tops.append(_pairs(drawn.top_tokens[i], drawn.top_logprobs[i], request.tops))
            if token in request.stop_tokens:
                self._end(reply, "stop")
            elif reply.stream:
                reply.stream.add(token)
                if reply.stream.stopped:
                    self._rest(number)
                    self._end(reply, "stop")
            if not reply.reason and len(reply.tokens) == taken.left:
                self._end(reply, "length")
            if reply.reason:
                self._release(number)
                return

    def _end(self, reply: Reply, reason: str) -> None:
        reply.reason = reason
        if reply.stream:
            reply.stream.end()

    def _biases(self, request: Request) -> np.ndarray:
        """float32 [V']: what a request adds to the logits."""
        bias = self._bias.copy()
        for token, value in request.sampling.logit_bias.items():
            bias[token] += value
        return bias

    def _allowed(self) -> np.ndarray:
        """float32 [V']: 0 for ids that may be drawn, -inf for those that stand for nothing."""
        config = self.model.config
        bias = np.zeros(config.padded_vocab_size, np.float32)
        bias[config.vocab_size :] = -np.inf
        if self.tokenizer:
            bias[: config.vocab_size][~self.tokenizer.possible] = -np.inf
        return bias


def _note(reply: Reply, scores: Scores | None, row: int, count: int) -> None:
    """Keep what a call says of a prompt's tokens."""
    if scores is None:
        return
    reply.prompt_logprobs += scores.logprob[row, :count].tolist()
    if reply.request.tops:
        for tokens, values in zip(scores.top_tokens[row, :count], scores.top_logprobs[row, :count], strict=True):
            reply.prompt_tops.append(_pairs(tokens, values, reply.request.tops))


def _pairs(tokens: Any, values: Any, count: int) -> list[tuple[int, float]]:
    """The first so many of a position's likeliest tokens, with their log-probabilities."""
    return [*zip(tokens[:count].tolist(), values[:count].tolist(), strict=True)]


def _alike(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two begin with the same SHARED ids: asked of every row for every prompt, a list's comparison is the
    cheapest answer there is."""
    return a[:SHARED] == b[:SHARED]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning of two lists."""
    low, high = 0, min(len(a), len(b)) + 1  # so many are the same, and so many are not, or not there
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
