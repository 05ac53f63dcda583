"""Examples as rows to learn from: which there are and how long, how they share rows, and the rows themselves. Those of
conversations are here, those of ranked replies in `ranked`, of prompts in `prompted`, of pairs in `paired`, of labelled
texts in `classed`.

An example of n ids takes n - 1 places of a row, at each of which the next id is asked for. Ids that are asked of no one
are CUT - id in the targets, so that an evaluation can tell what was said from what is missing.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import DialogueConfig, SourceConfig
from gptjax.data.chat import ChatFormat, Rendered
from gptjax.data.dialogues import Dropped, parse, why_dropped
from gptjax.data.packing import Epoch, Packing, apart, pack
from gptjax.data.rows import CUT, PADDING, Rows
from gptjax.data.sources import TextSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.files import write_whole

MEASURED = 1  # raise it when the same conversations get other lengths
TOO_LONG = "longer than the context"
REPLY_ALONE = "of the part in the context all is reply"
Report = Callable[[str, int, int], None]
Sizes = Callable[[str], tuple[int, int]]
"""A record's text -> its tokens, and another number of what it holds."""


@dataclass(frozen=True, eq=False)
class ExampleSet:
    """What of a split is trained on, or evaluated, and the rows of its epochs."""

    source: TextSource
    seq_len: int
    """Tokens that an example has at most."""
    numbers: np.ndarray
    """int [examples]: their records."""
    packing: Packing
    left_out: Counter[str]
    """Records that are none, by reason."""
    num_cut: int
    """Examples that have lost what was too long of them."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def losses(self) -> str:
        """How many were cut and how many left out, in words that go on from others."""
        left_out = sum(self.left_out.values())
        return f", {self.num_cut:,} cut" * bool(self.num_cut) + f", {left_out:,} left out" * bool(left_out)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.packing.num_rows

    def epoch(self, seed: int, number: int) -> Epoch:
        return self._epochs(seed, number)

    @cached_property
    def _epochs(self) -> Callable[[int, int], Epoch]:
        return lru_cache(maxsize=2)(self.packing.epoch)

    def row(self, indices: Sequence[int]) -> Any:
        """One row of these examples, named arrays; none of them gives an empty one."""
        raise NotImplementedError

    def training_row(self, indices: Sequence[int], number: int) -> Any:
        """The same with no more than what training asks for; number: of the row in all epochs."""
        return self.row(indices)


@dataclass(frozen=True, eq=False)
class Examples(ExampleSet):
    """Conversations; those that were too long have lost their beginning."""

    chat: ChatFormat

    def __getitem__(self, index: int) -> Rendered:
        """An example, at most T + 1 ids of it: the last ones."""
        messages = parse(self.source[int(self.numbers[index])].text)
        assert not isinstance(messages, Dropped)
        whole = self.chat.render(messages)
        return Rendered(whole.ids[-self.seq_len - 1 :], whole.trained[-self.seq_len - 1 :])

    def training_row(self, indices: Sequence[int], number: int) -> Rows:
        """Its other targets are PADDING."""
        row = self.row(indices)
        return row._replace(targets=np.maximum(row.targets, PADDING))

    def row(self, indices: Sequence[int]) -> Rows:
        """One row [T] of these examples; none of them gives an empty one."""
        tokens, segments, positions = (np.zeros(self.seq_len, np.int32) for _ in range(3))
        targets = np.full(self.seq_len, PADDING, np.int32)
        start = 0
        for number, index in enumerate(indices):
            example = self[index]
            end = start + len(example.ids) - 1
            tokens[start:end] = example.ids[:-1]
            targets[start:end] = np.where(example.trained[1:], example.ids[1:], CUT - example.ids[1:])
            segments[start:end] = number
            positions[start:end] = np.arange(end - start)
            start = end
        segments[start:] = len(indices)
        return Rows(tokens, targets, segments, positions)


def open_examples(
    config: DialogueConfig, source: TextSource, chat: ChatFormat, seq_len: int, report: Report = lambda *_: None
) -> Examples:
    """The examples of a split. Raises UserError where there are none."""
    sizes = measure(config.cache_dir, source, chat.tokenizer, chat.template, lambda text: _sizes(text, chat), report)
    size, tail = sizes[:, 0] - 1, sizes[:, 1]
    there, long = sizes[:, 0] > 0, size > seq_len
    drop = config.too_long == "drop"
    lost = there & (long if drop else tail >= np.minimum(size, seq_len))
    why = TOO_LONG if drop else REPLY_ALONE
    numbers, left_out = select(config, source, "conversation", there, {why: lost})
    lengths = np.minimum(size[numbers], seq_len)
    packing = pack(lengths, seq_len) if config.packing else apart(lengths)
    return Examples(source, seq_len, numbers, packing, left_out, int((long & there & ~lost).sum()), chat)


def _sizes(text: str, chat: ChatFormat) -> tuple[int, int]:
    """The ids of a conversation, and how many at its end are trained, all in a row."""
    messages = parse(text)
    assert not isinstance(messages, Dropped)
    example = chat.render(messages)
    return len(example.ids), int(np.argmin(example.trained[::-1]))


def select(
    config: SourceConfig, source: TextSource, what: str, there: np.ndarray, lost: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, Counter[str]]:
    """The records of which examples are made, int [examples], and how many of the others there are by reason.

    there: bool [records], those that the data set did not drop; lost: for each reason bool [records], those of them
    that are left out for it, and for the first reason of several. Raises UserError where no example is left; `what` is
    one in a word.
    """
    left_out = Counter(why_dropped(source[int(number)].text) for number in np.flatnonzero(~there))
    kept = there
    for reason, those in lost.items():
        if count := int((kept & those).sum()):
            left_out[reason] = count
        kept = kept & ~those
    numbers = np.flatnonzero(kept)
    if not len(numbers):
        why = "; ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise UserError(f"data.source = {config.source}: no {what} to learn from in a split ({why}); give more")
    return numbers, left_out


def measure(
    cache_dir: str,
    source: TextSource,
    tokenizer: Tokenizer,
    about: str,
    sizes: Sizes,
    report: Report = lambda *_: None,
    dropped: Callable[[str], str] = why_dropped,
) -> np.ndarray:
    """int32 [records, 2]: the `sizes` of each, zeros for one that was dropped. They are a function of the records, of
    the tokenizer and of what `about` says alone. Records of plain text, of which any may begin as a reason does, are
    told from dropped ones by a `dropped` of their own.

    Known from before where the same was asked, for it takes as long as to tokenise all of it.
    """
    key = hashlib.sha256(json.dumps([MEASURED, source.store.digest, tokenizer.digest, about]).encode())
    key.update(source.chosen.tobytes())
    path = Path(cache_dir).expanduser() / "lengths" / f"{key.hexdigest()[:24]}.npy"
    try:
        known: np.ndarray = np.load(path)
        if known.shape == (len(source), 2):
            return known
    except (OSError, ValueError, EOFError):  # not there, or not whole
        pass
    found = np.array([*_measured(source, sizes, report, dropped)], np.int32).reshape(-1, 2)
    data = io.BytesIO()
    np.save(data, found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data.getvalue())
    except OSError as error:
        raise UserError(f"data.cache_dir = {cache_dir}: cannot write {path} ({error.strerror})") from None
    return found


def _measured(
    source: TextSource, sizes: Sizes, report: Report, dropped: Callable[[str], str]
) -> Iterator[tuple[int, int]]:
    done, total = 0, source.num_bytes
    for number in range(len(source)):
        text = source[number].text
        yield (0, 0) if dropped(text) else sizes(text)
        done += len(text.encode())
        report("measuring lengths", done, total)


class ExampleFeed:
    """The training rows of one process, from a row of an endless sequence of epochs on.

    Of every `micro_batch` rows this process holds `rows`. From row `end` on, if there is one, they are empty.
    """

    def __init__(
        self,
        examples: ExampleSet,
        seed: int,
        micro_batch: int,
        rows: Sequence[int],
        start: int,
        end: int | None,
        threads: int = 1,
    ):
        self._examples, self._seed, self._end, self._row = examples, seed, end, start
        self._micro_batch, self._rows = micro_batch, list(rows)
        self._pool = ThreadPoolExecutor(threads, "rows") if threads > 1 else None

    def batch(self, num_micro: int, _: object = None) -> Any:
        """The next micro-batches [num_micro, rows of this process, ...]."""
        starts = range(self._row, self._row + num_micro * self._micro_batch, self._micro_batch)
        numbers = [start + row for start in starts for row in self._rows]
        every = [*self._pool.map(self._made, numbers)] if self._pool else [*map(self._made, numbers)]
        self._row += num_micro * self._micro_batch
        return stacked(every, (num_micro, len(self._rows)))

    def _made(self, number: int) -> Any:
        if self._end is not None and number >= self._end:
            return self._examples.training_row((), number)
        epoch, place = divmod(number, self._examples.num_rows)
        return self._examples.training_row(self._examples.epoch(self._seed, epoch).row(place), number)

    @property
    def positions(self) -> list[int]:
        """The next row."""
        return [self._row if self._end is None else min(self._row, self._end)]

    def close(self) -> None:
        """Stop the threads."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def stacked(rows: Sequence[Any], lead: tuple[int, ...] = (-1,)) -> Any:
    """Rows one above the other, in this order in the leading axes; what none of them has stays None."""

    def one(leaves: tuple[Any, ...]) -> Any:
        return None if leaves[0] is None else np.stack(leaves).reshape(*lead, *leaves[0].shape)

    return rows[0]._make(map(one, zip(*rows, strict=True)))


def eval_batches(examples: ExampleSet, batch_size: int, rows: Sequence[int], limit: int) -> Iterator[Any]:
    """One pass, always in the same order, of which any beginning is a fair sample: [rows of this process, ...] for each
    batch of `batch_size` rows, the last filled up with empty ones; `limit` is the number of batches, -1 for all."""
    epoch = examples.epoch(0, 0)
    count = -(-examples.num_rows // batch_size)
    for batch in range(count if limit < 0 else min(limit, count)):
        places = [batch * batch_size + row for row in rows]
        yield stacked([examples.row(epoch.row(place) if place < examples.num_rows else ()) for place in places])
