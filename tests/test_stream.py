"""The stream against plain Python lists, on any number of processes. Run: pytest tests/test_stream.py"""

import subprocess
import sys
import time
from functools import cache
from itertools import count, islice
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.rows import CUT, PADDING, next_token
from gptjax.data.store import Record, cut
from gptjax.data.stream import NOT_RUN, Prefetcher, TokenStream, eval_batches, merge_positions
from gptjax.data.tokenizers import load_tokenizer
from gptjax.errors import UserError

BYTES = load_tokenizer("bytes")
T = 16


def corpus(documents: int, seed: int = 0) -> list[Record]:
    """Records of documents of 0 to 60 letters, in pieces of at most 25."""
    random = np.random.default_rng(seed)
    texts = ["".join(chr(97 + i) for i in random.integers(26, size=random.integers(0, 60))) for _ in range(documents)]
    return [record for text in texts for record in (list(cut([text], 25)) or [Record("", True)])]


@cache
def epoch_order(size: int, seed: int | None, epoch: int) -> list[int]:
    if seed is None:
        return list(range(size))
    shuffled = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
    return [shuffled[epoch * size + i] for i in range(size)]


def naive_order(records: list[Record], seed: int | None):
    """The endless order of records: one permutation an epoch."""
    for epoch in count():
        yield from (records[i] for i in epoch_order(len(records), seed, epoch))


def naive_lane(records: list[Record], seed: int | None, lane: int, lanes: int):
    """The endless rows of one lane, from one list of tokens."""
    tokens: list[int] = []
    for record in islice(naive_order(records, seed), lane, None, lanes):
        apart = seed is not None or lanes > 1
        tokens += [*record.text.encode(), *([256] if record.last else [CUT - 256] * apart)]
        while len(tokens) > T:
            yield tokens[: T + 1]
            tokens = tokens[T:]


def split(row: list[int]) -> tuple[list[int], list[int]]:
    """What a row of T+1 tokens is as an input, and what is asked for."""
    return [t if t >= 0 else CUT - t if t < PADDING else 0 for t in row[:-1]], [max(t, PADDING) for t in row[1:]]


def naive_batches(records: list[Record], seed: int | None, lanes: int, shapes: list[tuple[int, int]]):
    """Batches of shapes (num_micro, micro_batch) over all rows: inputs and targets of each."""
    streams = [naive_lane(records, seed, lane, lanes) for lane in range(lanes)]
    for num_micro, micro_batch in shapes:
        yield [[[*split(next(s))] for s in streams for _ in range(micro_batch // lanes)] for _ in range(num_micro)]


def ranges(micro_batch: int, processes: int) -> list[tuple[int, ...]]:
    """The rows of each process where they are consecutive."""
    each = micro_batch // processes
    return [tuple(range(i * each, (i + 1) * each)) for i in range(processes)]


@st.composite
def shares(draw, micro_batch: int) -> list[tuple[int, ...]]:
    """Any rows for each of 1 to 4 processes, in disjoint sets of one size, each held by one process or by two."""
    parts, holders = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1)]))
    order, each = draw(st.permutations(range(micro_batch))), micro_batch // parts
    sets = [tuple(sorted(order[i * each : (i + 1) * each])) for i in range(parts)]
    return draw(st.permutations(sets * holders))


class Processes:
    """The streams of several processes, put together as the devices would."""

    def __init__(self, records, rows: list[tuple[int, ...]], micro_batch: int, **options):
        self.micro_batch, self.rows = micro_batch, rows
        self.streams = [TokenStream(records, BYTES, T, micro_batch=micro_batch, rows=r, **options) for r in rows]

    def batch(self, num_micro: int) -> np.ndarray:
        whole = np.full((num_micro, self.micro_batch, 2, T), -1, np.int32)
        for rows, stream in zip(self.rows, self.streams, strict=True):
            tokens, targets, segments, *_ = stream.batch(num_micro)
            assert tokens.dtype == targets.dtype == np.int32 and segments is None
            batch = np.stack([tokens, targets], axis=2)
            assert (whole[:, rows] == -1).all() or (whole[:, rows] == batch).all()
            whole[:, rows] = batch
        return whole

    @property
    def positions(self) -> list[int]:
        return merge_positions([stream.positions for stream in self.streams])

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


@pytest.mark.parametrize(("lanes", "seed"), [(1, 3), (2, None), (4, 3), (8, 3)])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize(("micro_batch", "counts"), [(8, (1, 2, 1, 6, 3)), (24, (1, 3))])
def test_any_number_of_processes_reads_the_naive_sequence(micro_batch, counts, processes, lanes, seed):
    records = corpus(15)  # about 500 tokens, so these batches reach the fourth epoch at least
    shapes = [(num_micro, micro_batch) for num_micro in counts]
    running = Processes(records, ranges(micro_batch, processes), micro_batch, lanes=lanes, seed=seed)
    for (num_micro, _), expected in zip(shapes, naive_batches(records, seed, lanes, shapes), strict=True):
        assert running.batch(num_micro).tolist() == expected
    running.close()


def test_a_process_runs_only_the_lanes_it_touches():
    records = corpus(15)

    def run(rows: list[tuple[int, ...]], micro_batch: int, lanes: int) -> list[list[int]]:
        """The lanes of each process, and the batch is right."""
        made = Processes(records, rows, micro_batch, lanes=lanes, seed=0)
        ran = [[lane for lane, p in enumerate(s.positions) if p != NOT_RUN] for s in made.streams]
        assert made.batch(2).tolist() == next(naive_batches(records, 0, lanes, [(2, micro_batch)]))
        made.close()
        return ran

    assert run(ranges(8, 4), 8, 8) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert run(ranges(8, 8), 8, 2) == [[0]] * 4 + [[1]] * 4
    assert run(ranges(6, 3), 6, 2) == [[0], [0, 1], [1]]
    assert run([(0, 1, 4, 5), (2, 3, 6, 7)], 8, 4) == [[0, 2], [1, 3]]
    assert run([(0, 2, 4, 6), (1, 3, 5, 7)], 8, 4) == [[0, 1, 2, 3]] * 2


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    data=st.data(),
    before=st.lists(st.integers(1, 3), max_size=4),
    first=st.sampled_from([8, 16, 40]),
    second=st.sampled_from([8, 16, 40]),
    lanes=st.sampled_from([1, 2, 4, 8]),
    seed=st.sampled_from([None, 0, 2**32 - 1]),
    threads=st.integers(1, 4),
)
def test_resume_on_other_processes_goes_on_exactly(data, before, first, second, lanes, seed, threads):
    """With any rows to each process, and another micro-batch from there on."""
    records = corpus(9, seed=1)
    options = {"lanes": lanes, "seed": seed, "threads": threads}
    shapes = [*((num_micro, first) for num_micro in before), (2, second), (1, second)]
    expected = list(naive_batches(records, seed, lanes, shapes))
    started = Processes(records, data.draw(shares(first)), first, **options)
    for num_micro, rows in zip(before, expected, strict=False):
        assert started.batch(num_micro).tolist() == rows
    resumed = Processes(records, data.draw(shares(second)), second, positions=started.positions, **options)
    assert resumed.positions == started.positions
    for num_micro, rows in zip((2, 1), expected[len(before) :], strict=True):
        assert resumed.batch(num_micro).tolist() == rows
    started.close()
    resumed.close()


@given(st.lists(st.sampled_from([0, 7, 9, CUT - 9, PADDING]), min_size=2, max_size=20))
def test_rows_are_inputs_targets_and_documents(row):
    """9 ends a document, and belongs to it, also where the document was cut."""
    inputs, targets = split(row)
    segments = [inputs[:i].count(9) for i in range(len(inputs))]
    made = next_token(np.array([[row]], np.int32), eot=9)
    assert [leaf.tolist() for leaf in made[:3]] == [[[inputs]], [[targets]], [[segments]]] and made.positions is None
    assert next_token(np.array(row, np.int32)).segments is None


@pytest.mark.parametrize(("lanes", "seed"), [(1, 3), (2, None), (1, None)])
def test_pieces_of_different_documents_never_touch(lanes, seed):
    records = [record for letter in "ABC" for record in cut([letter * 100], 40)]
    stream = TokenStream(records, BYTES, T, lanes=lanes, seed=seed, micro_batch=60)
    tokens, targets, *_ = stream.batch(1)
    pairs = set(zip(tokens.ravel().tolist(), targets.ravel().tolist(), strict=True))
    text = {ord(letter) for letter in "ABC"}
    assert all(a == b for a, b in pairs if a in text and b in text)
    assert (PADDING in targets) == (seed is not None or lanes > 1)  # in order nothing is cut


class Counted:
    """Records that count how often each is read."""

    def __init__(self, records):
        self.records, self.reads = records, [0] * len(records)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.records[index]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_each_epoch_has_every_record_once_in_a_new_order(size):
    # Records of T letters, the last always an end-of-text, so each record is one row.
    records = [Record(f"{i:0{T - 1}d}", True) for i in range(size)] + [Record("x" * (T - 1), True)]
    stream = TokenStream(records, BYTES, T, lanes=1, seed=5, micro_batch=size + 1)
    epochs = [[BYTES.decode(row[:-1]) for row in stream.batch(1).tokens[0]] for _ in range(3)]
    assert stream.positions == [3 * (size + 1) << 32]
    for epoch in epochs:
        assert sorted(epoch) == sorted(record.text for record in records)
    if size > 7:
        assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != [r.text for r in records]


def test_resume_reads_no_record_twice_and_ahead_is_bounded():
    source = Counted([Record("y" * 99, True)] * 1000)
    position = 500 << 32 | 40
    stream = TokenStream(source, BYTES, T, lanes=1, seed=None, micro_batch=1, threads=2, positions=[position])
    source.reads[0] = 0  # the first records are read to see that the split is long enough
    stream.batch(1)
    stream.close()
    read = [index for index, times in enumerate(source.reads) if times]
    assert read[0] == 500 and max(read) <= 506 and max(source.reads) == 1


def test_positions_that_do_not_fit():
    assert merge_positions([[5, NOT_RUN], [NOT_RUN, 7], [5, 7]]) == [5, 7]
    for wrong in ([[NOT_RUN]], [[1], [2]], [[1], [1, 2]]):
        with pytest.raises(ValueError):
            merge_positions(wrong)
    for positions in ([0], [0, NOT_RUN]):
        with pytest.raises(ValueError, match="2 lanes need 2 positions"):
            TokenStream(corpus(9), BYTES, T, lanes=2, seed=0, micro_batch=2, positions=positions)
    with pytest.raises(ValueError, match="2 lanes must divide a micro-batch of 3"):
        TokenStream(corpus(9), BYTES, T, lanes=2, seed=0, micro_batch=3)


@settings(max_examples=30, deadline=None)
@given(documents=st.integers(3, 30), rows=shares(8))
def test_evaluation_counts_every_token_once(documents, rows):
    batch_size = 8
    records = [Record("z" * T, True), *corpus(documents, seed=documents)]
    tokens = [t for r in records for t in [*r.text.encode(), *[256] * r.last]]
    batches = list(eval_batches(records, BYTES, T, batch_size))
    for mine in rows:
        for whole, part in zip(batches, eval_batches(records, BYTES, T, batch_size, rows=mine), strict=True):
            for one, all_of_it in zip(part[:2], whole[:2], strict=True):
                assert one.tolist() == all_of_it[list(mine)].tolist()
    assert {b.tokens.shape for b in batches} == {(batch_size, T)} and batches[0].tokens.dtype == np.int32
    targets = np.concatenate([b.targets for b in batches]).ravel()
    assert targets[targets != PADDING].tolist() == tokens[1:]
    inputs = np.concatenate([b.tokens for b in batches]).ravel()[: len(tokens) - 1]
    assert inputs.tolist() == tokens[:-1]
    assert len(batches) == -(-(len(tokens) - 1) // (batch_size * T))
    limited = list(eval_batches(records, BYTES, T, batch_size, limit=2))
    assert [b.targets.tolist() for b in limited] == [b.targets.tolist() for b in batches[:2]]
    assert list(eval_batches(records, BYTES, T, batch_size, limit=0)) == []


def test_a_split_shorter_than_one_row():
    short = [Record("a" * (T - 1), True)]
    for make in (
        lambda records: TokenStream(records, BYTES, T, lanes=1, seed=0, micro_batch=1),
        lambda records: next(eval_batches(records, BYTES, T, 2)),
    ):
        with pytest.raises(UserError, match=rf"model.seq_len = {T}: .* only {T} tokens.* lower it to {T - 1} "):
            make(short)
        make([Record("a" * T, True)])
    with pytest.raises(ValueError, match="stall"):
        TokenStream([Record("", False)], BYTES, T, lanes=1, seed=0, micro_batch=1)


def test_errors_of_a_source_reach_the_reader():
    class Broken(Counted):
        def __getitem__(self, index):
            if index == 3:
                raise UserError("record 3 is gone")
            return super().__getitem__(index)

    stream = TokenStream(Broken([Record("a" * 40, True)] * 9), BYTES, T, lanes=1, seed=None, micro_batch=20)
    with pytest.raises(UserError, match="record 3 is gone"):
        stream.batch(1)


def test_prefetcher_keeps_order_depth_and_errors():
    made = []

    def make():
        made.append(len(made))
        if len(made) == 5:
            raise UserError("the fifth")
        return len(made)

    with Prefetcher(make, depth=2) as items:
        time.sleep(0.1)
        assert len(made) == 2  # no further than its depth
        assert [next(items) for _ in range(4)] == [1, 2, 3, 4]
        for _ in range(2):
            with pytest.raises(UserError, match="the fifth"):
                next(items)
    assert list(Prefetcher(iter("abc").__next__, depth=9)) == ["a", "b", "c"]


def test_prefetcher_closes_in_the_middle_and_at_exit():
    items = Prefetcher(lambda: time.sleep(0.01), depth=3)
    next(items)
    items.close()
    items.close()
    assert not items._thread.is_alive()
    assert list(items) == []

    code = "from gptjax.data.stream import Prefetcher; p = Prefetcher(dict, 2); next(p); next(p)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, cwd=Path(__file__).parents[1])
