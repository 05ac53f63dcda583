"""Rows of tokens as a function of position: Grain gives the order, `reading` the tokens.

- The order of records is one shuffle per epoch, by seed, or that of a mixture (see `order`); record k of lane l is
  number k * lanes + l.
- A lane joins its records, with an end-of-text token after each document, and cuts rows of T+1
  tokens at stride T: a row's last token is the next row's first, so each is a target exactly once.
- A piece of a long document meets pieces of others in the shuffle. A cut follows it: an end of text to whoever reads
  on, so that documents stay apart, but no target, for the document does not end there.
- Row r of a micro-batch of b rows belongs to lane r // (b / lanes), so a process that holds some of the
  rows runs only the lanes they touch, and the sequence is the same for any number of processes.
- With `fim_rate` such a share of documents, drawn anew in each epoch, has its middle last (see `infill`).
- A lane's position is one integer, so a stream resumes anywhere, on any number of processes.
"""

import atexit
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import numpy as np

from gptjax.data.infill import rearranged
from gptjax.data.order import Order, shuffled
from gptjax.data.reading import Reader
from gptjax.data.rows import CUT, PADDING, Rows, next_token
from gptjax.data.store import Record
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError

X = TypeVar("X")

NOT_RUN = -1  # the position of a lane that another process runs


class Source(Protocol):
    """What a stream needs of `gptjax.data.sources.TextSource`: records by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


class TokenStream:
    """The endless training rows of one process.

    Of every `micro_batch` rows this process holds `rows`, in ascending order; None means all. `seed` None keeps the
    records in order. `separate` numbers the documents of each row. `positions` resumes: a position for each lane, such
    as `merge_positions` gives. `order` takes the place of the shuffle by seed; `told` gives what is to be logged after
    so many records. Raises UserError where the source has fewer than T+1 tokens, and ValueError where lanes do not
    divide `micro_batch`.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        lanes: int,
        seed: int | None,
        micro_batch: int,
        rows: Sequence[int] | None = None,
        separate: bool = False,
        threads: int = 1,
        positions: Sequence[int] | None = None,
        fim_rate: float = 0.0,
        order: Order | None = None,
        told: Callable[[int], Mapping[str, float]] | None = None,
    ):
        require_one_row(source, tokenizer, seq_len)
        if micro_batch % lanes:
            raise ValueError(f"{lanes} lanes must divide a micro-batch of {micro_batch}")
        start = [0] * lanes if positions is None else list(positions)
        if len(start) != lanes or min(start) < 0:
            raise ValueError(f"{lanes} lanes need {lanes} positions of 0 or more, got {start}")
        self.seq_len, self.lanes = seq_len, lanes
        self._eot = tokenizer.eot if separate else None
        self._per_lane = micro_batch // lanes
        mine = np.arange(micro_batch) if rows is None else np.array(rows)
        run, which = np.unique(mine // self._per_lane, return_inverse=True)
        take = which * self._per_lane + mine % self._per_lane  # of the rows of the lanes that are run
        self._take = None if np.array_equal(take, np.arange(len(run) * self._per_lane)) else take
        apart = seed is not None or lanes > 1  # else each piece is followed by its document's next one
        self._pool = _pool(threads)
        self._told = told
        in_order = order or shuffled(len(source), seed)

        def reader(lane: int) -> Reader:
            def made(place: int, record: Record) -> np.ndarray:
                rng = np.random.default_rng((seed or 0, lane, place)) if fim_rate and record.last else None
                return _encode(record, tokenizer, apart, rng if rng and rng.random() < fim_rate else None)

            def make(places: range) -> list[np.ndarray]:
                records = [source[number] for number in [in_order(place * lanes + lane) for place in places]]
                return [made(place, record) for place, record in zip(places, records, strict=True)]

            return Reader(make, start[lane] >> 32, None, self._pool, -(-2 * threads // len(run)))

        self._run = {lane: _Lane(reader(lane), start[lane]) for lane in run.tolist()}

    def batch(self, num_micro: int, _: object = None) -> Rows:
        """The next micro-batches [num_micro, rows of this process, T]; their number may change at each call."""
        count = num_micro * self._per_lane
        for lane in self._run.values():
            lane.reader.ahead(count * self.seq_len + 1)
        rows = [lane.rows(count, self.seq_len) for lane in self._run.values()]
        joined = np.concatenate([r.reshape(num_micro, self._per_lane, -1) for r in rows], axis=1)
        return next_token(joined if self._take is None else joined[:, self._take], self._eot)

    @property
    def positions(self) -> list[int]:
        """Where each lane stands after the last batch; NOT_RUN for the lanes of other processes."""
        return [self._run[lane].position if lane in self._run else NOT_RUN for lane in range(self.lanes)]

    @property
    def figures(self) -> Mapping[str, float]:
        """What is to be logged after the last batch, as far as this process has come."""
        return self._told(max(lane.record for lane in self._run.values()) * self.lanes) if self._told else {}

    def close(self) -> None:
        """Stop the reading threads."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


class _Lane:
    """One packed stream. Its position is `record << 32 | offset`: the first token of the next row."""

    def __init__(self, reader: Reader, position: int):
        self.record, self.offset = position >> 32, position & 0xFFFFFFFF
        self.reader = reader
        self.held: deque[np.ndarray] = deque()  # tokens of records `record`, `record + 1`, ...

    @property
    def position(self) -> int:
        return self.record << 32 | self.offset

    def rows(self, count: int, seq_len: int) -> np.ndarray:
        """The next `count` rows, int32 [count, seq_len + 1]."""
        tokens, filled = np.empty(count * seq_len + 1, np.int32), 0
        while True:
            if not self.held:
                self.held.append(next(self.reader))
            part = self.held[0][self.offset : self.offset + len(tokens) - filled]
            tokens[filled : filled + len(part)] = part
            filled, self.offset = filled + len(part), self.offset + len(part)
            if filled == len(tokens):
                break
            self.offset -= len(self.held.popleft())
            self.record += 1
        self.offset -= 1  # this row's last token is the next one's first
        self.reader.ahead(len(tokens))
        return cut_rows(tokens, seq_len)


def cut_rows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Tokens [N * seq_len + 1] as rows [N, seq_len + 1] that overlap by one token."""
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def merge_positions(every: Sequence[Sequence[int]]) -> list[int]:
    """The positions of all lanes, from the `positions` of all processes at the same step.

    Raises ValueError where no process runs a lane, or two that share one disagree.
    """
    merged = []
    for lane, values in enumerate(zip(*every, strict=True)):
        found = set(values) - {NOT_RUN}
        if len(found) != 1:
            raise ValueError(f"lane {lane}: the processes report positions {sorted(values)}")
        merged.append(found.pop())
    return merged


def eval_batches(
    source: Source,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    *,
    rows: Sequence[int] | None = None,
    separate: bool = False,
    limit: int = -1,
    threads: int = 1,
) -> Iterator[Rows]:
    """One pass in order: [rows of this process, T] for each batch of `batch_size` rows, of which this process holds
    `rows` (None means all).

    Every token but the split's first is a target exactly once; the rows of the last batch are filled up with PADDING.
    `limit` is the number of batches, -1 for all. Raises UserError where the source has fewer than T+1 tokens.
    """
    require_one_row(source, tokenizer, seq_len)
    mine = slice(None) if rows is None else list(rows)
    stride, eot = batch_size * seq_len, tokenizer.eot if separate else None
    pool = _pool(threads)

    def make(numbers: range) -> list[np.ndarray]:
        return [_encode(record, tokenizer, apart=False) for record in [source[number] for number in numbers]]

    reader = Reader(make, 0, len(source), pool, 2 * threads)
    held: list[np.ndarray] = []
    size = made = 0
    try:
        reader.ahead(stride)
        for tokens in reader:
            held.append(tokens)
            size += len(tokens)
            if size > stride:
                joined = np.concatenate(held)
                while len(joined) > stride and made != limit:
                    yield next_token(cut_rows(joined[: stride + 1], seq_len)[mine], eot)
                    joined, made = joined[stride:], made + 1
                held, size = [joined], len(joined)
                reader.ahead(stride)
            if made == limit:
                return
        if size > 1:  # a single token is left where full batches end the split: it was their last target
            padded = np.pad(np.concatenate(held), (0, stride + 1 - size), constant_values=PADDING)
            yield next_token(cut_rows(padded, seq_len)[mine], eot)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


class Prefetcher(Iterator[X], Generic[X]):
    """Calls `make` in a background thread, at most `depth` items ahead, and hands the items out in order.

    An exception of `make` reaches the consumer in the place of its item, and ends the thread;
    StopIteration ends the items. Close it, or use it in a `with`; at exit it closes itself.
    """

    def __init__(self, make: Callable[[], X], depth: int):
        self._make = make
        self._slots = threading.Semaphore(depth)
        self._items: queue.SimpleQueue[tuple[X | None, BaseException | None]] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()
        # A daemon that still talks to a device while the interpreter goes down would crash it.
        atexit.register(self.close)

    def _work(self) -> None:
        while self._slots.acquire() and not self._closed:
            try:
                self._items.put((self._make(), None))
            except BaseException as error:
                self._items.put((None, error))
                return

    def __next__(self) -> X:
        if self._closed:
            raise StopIteration
        item, error = self._items.get()
        if error is not None:
            self._items.put((None, error))  # for whoever asks again
            raise error
        self._slots.release()
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread and wait for the item it is making."""
        self._closed = True
        self._slots.release()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "Prefetcher[X]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pool(threads: int) -> ThreadPoolExecutor | None:
    """None for one thread, which is that of whoever asks for rows: Python runs one at a time, and what two of them say
    to each other takes a quarter of the time of GPT-2's tokenizer."""
    return ThreadPoolExecutor(threads, "tokens") if threads > 1 else None


def _encode(record: Record, tokenizer: Tokenizer, apart: bool, rng: np.random.Generator | None = None) -> np.ndarray:
    """One record's tokens, int32 [N], N > 0; `apart` puts a cut behind each that ends no document, `rng` draws where
    its middle is, which then comes last."""
    if record.ids is not None:
        tokens = record.ids
    else:
        tokens = rearranged(record.text, tokenizer, rng) if rng else tokenizer.encode(record.text)
    if record.last or ((apart or record.cut) and len(tokens)):
        text, tokens = tokens, np.empty(len(tokens) + 1, np.int32)
        tokens[:-1], tokens[-1] = text, tokenizer.eot if record.last else CUT - tokenizer.eot
    if not len(tokens):
        raise ValueError("a record without text that ends no document would stall the stream")
    return tokens


def require_one_row(source: Source, tokenizer: Tokenizer, seq_len: int) -> None:
    """Read just enough records to see that one row of T+1 tokens can be cut; raises UserError if none can."""
    total = 0
    for index in range(len(source)):
        total += len(_encode(source[index], tokenizer, apart=False))
        if total > seq_len:
            return
    raise UserError(
        f"model.seq_len = {seq_len}: the split has only {total} tokens, a row takes {seq_len + 1}; "
        f"lower it to {max(total - 1, 1)} or give more text"
    )
