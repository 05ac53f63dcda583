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

from gptjax.data.sources import Record, cut
from gptjax.data.stream import NOT_RUN, PADDING, Prefetcher, TokenStream, eval_batches, merge_positions
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
        tokens += [*record.text.encode(), *[256] * record.last]
        while len(tokens) > T:
            yield tokens[: T + 1]
            tokens = tokens[T:]


def naive_batches(records: list[Record], seed: int | None, lanes: int, shapes: list[tuple[int, int]]):
    """Batches of shapes (num_micro, micro_batch) over all rows."""
    streams = [naive_lane(records, seed, lane, lanes) for lane in range(lanes)]
    for num_micro, micro_batch in shapes:
        yield [[next(s) for s in streams for _ in range(micro_batch // lanes)] for _ in range(num_micro)]


def streams(records, processes: int, **options):
    return [TokenStream(records, BYTES, T, share=(i, processes), **options) for i in range(processes)]


def global_batch(processes: list[TokenStream], shape: tuple[int, int]) -> np.ndarray:
    return np.concatenate([process.batch(*shape) for process in processes], axis=1)


@pytest.mark.parametrize(("lanes", "seed"), [(1, 3), (2, None), (4, 3), (8, 3)])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_any_number_of_processes_reads_the_naive_sequence(processes, lanes, seed):
    records = corpus(15)  # about 500 tokens, so these batches reach the fourth epoch at least
    shapes = [(1, 8), (2, 8), (1, 16), (3, 16), (2, 24)]
    running = streams(records, processes, lanes=lanes, seed=seed)
    for shape, expected in zip(shapes, naive_batches(records, seed, lanes, shapes), strict=True):
        batch = global_batch(running, shape)
        assert batch.dtype == np.int32 and batch.shape == (*shape, T + 1)
        assert batch.tolist() == expected
    for stream in running:
        stream.close()


def test_a_process_runs_only_the_lanes_it_touches():
    records = corpus(15)
    first, *_ = streams(records, 4, lanes=8, seed=0)
    assert [p == NOT_RUN for p in first.positions] == [False] * 2 + [True] * 6
    shared = streams(records, 8, lanes=2, seed=0)
    assert [p.positions.index(0) for p in shared] == [0] * 4 + [1] * 4
    uneven = streams(records, 3, lanes=2, seed=0)
    assert [[p >= 0 for p in s.positions] for s in uneven] == [[True, False], [True, True], [False, True]]
    expected = next(naive_batches(records, 0, 2, [(2, 6)]))
    assert global_batch(uneven, (2, 6)).tolist() == expected


@settings(max_examples=15, deadline=None)
@given(
    before=st.lists(st.sampled_from([(1, 8), (2, 8), (1, 16), (1, 40)]), max_size=4),
    lanes=st.sampled_from([1, 2, 4, 8]),
    first=st.sampled_from([1, 2, 4, 8]),
    second=st.sampled_from([1, 2, 4, 8]),
    seed=st.sampled_from([None, 0, 2**32 - 1]),
    threads=st.integers(1, 4),
)
def test_resume_on_another_number_of_processes_goes_on_exactly(before, lanes, first, second, seed, threads):
    records = corpus(9, seed=1)
    options = {"lanes": lanes, "seed": seed, "threads": threads}
    shapes = [*before, (2, 16), (1, 8)]
    expected = list(naive_batches(records, seed, lanes, shapes))
    started = streams(records, first, **options)
    for shape in before:
        global_batch(started, shape)
    positions = merge_positions([stream.positions for stream in started])
    resumed = streams(records, second, positions=positions, **options)
    assert merge_positions([stream.positions for stream in resumed]) == positions
    for shape, rows in zip(shapes[len(before) :], expected[len(before) :], strict=True):
        assert global_batch(resumed, shape).tolist() == rows
    for stream in started + resumed:
        stream.close()


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
    stream = TokenStream(records, BYTES, T, lanes=1, seed=5)
    epochs = [[BYTES.decode(row[:-2]) for row in stream.batch(1, size + 1)[0]] for _ in range(3)]
    assert stream.positions == [3 * (size + 1) << 32]
    for epoch in epochs:
        assert sorted(epoch) == sorted(record.text for record in records)
    if size > 7:
        assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != [r.text for r in records]


def test_resume_reads_no_record_twice_and_ahead_is_bounded():
    source = Counted([Record("y" * 99, True)] * 1000)
    position = 500 << 32 | 40
    stream = TokenStream(source, BYTES, T, lanes=1, seed=None, threads=2, positions=[position])
    source.reads[0] = 0  # the first records are read to see that the split is long enough
    stream.batch(1, 1)
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
            TokenStream(corpus(9), BYTES, T, lanes=2, seed=0, positions=positions)
    stream = TokenStream(corpus(9), BYTES, T, lanes=2, seed=0, share=(1, 3))
    for micro_batch in (3, 4):
        with pytest.raises(ValueError, match=f"must divide a micro-batch of {micro_batch}"):
            stream.batch(1, micro_batch)


@settings(max_examples=30, deadline=None)
@given(documents=st.integers(3, 30), batch_size=st.sampled_from([4, 8]), processes=st.sampled_from([1, 2, 4]))
def test_evaluation_counts_every_token_once(documents, batch_size, processes):
    records = [Record("z" * T, True), *corpus(documents, seed=documents)]
    tokens = [t for r in records for t in [*r.text.encode(), *[256] * r.last]]
    runs = [list(eval_batches(records, BYTES, T, batch_size, share=(i, processes))) for i in range(processes)]
    batches = [np.concatenate(parts) for parts in zip(*runs, strict=True)]
    assert {b.shape for b in batches} == {(batch_size, T + 1)} and batches[0].dtype == np.int32
    rows = np.concatenate(batches)
    targets = rows[:, 1:].ravel()
    assert targets[targets != PADDING].tolist() == tokens[1:]
    inputs = rows[:, :-1].ravel()[: len(tokens) - 1]
    assert inputs.tolist() == tokens[:-1]
    assert len(batches) == -(-(len(tokens) - 1) // (batch_size * T))
    assert [b.tolist() for b in eval_batches(records, BYTES, T, batch_size, limit=2)] == [
        b.tolist() for b in batches[:2]
    ]
    assert list(eval_batches(records, BYTES, T, batch_size, limit=0)) == []


def test_a_split_shorter_than_one_row():
    short = [Record("a" * (T - 1), True)]
    for make in (
        lambda records: TokenStream(records, BYTES, T, lanes=1, seed=0),
        lambda records: next(eval_batches(records, BYTES, T, 2)),
    ):
        with pytest.raises(UserError, match=rf"model.seq_len = {T}: .* only {T} tokens.* lower it to {T - 1} "):
            make(short)
        make([Record("a" * T, True)])
    with pytest.raises(ValueError, match="must divide a batch of 3"):
        next(eval_batches(corpus(9), BYTES, T, 3, share=(0, 2)))
    with pytest.raises(ValueError, match="stall"):
        TokenStream([Record("", False)], BYTES, T, lanes=1, seed=0)


def test_errors_of_a_source_reach_the_reader():
    class Broken(Counted):
        def __getitem__(self, index):
            if index == 3:
                raise UserError("record 3 is gone")
            return super().__getitem__(index)

    stream = TokenStream(Broken([Record("a" * 40, True)] * 9), BYTES, T, lanes=1, seed=None)
    with pytest.raises(UserError, match="record 3 is gone"):
        stream.batch(1, 20)


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
