"""What is hidden from an encoder: whole units, as many as asked, never a special token, and 80, 10 and 10 of 100."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.masking import Unit, hidden, masked
from gptjax.data.rows import PADDING

MASK = 1000
DRAWN_FROM = np.arange(2000, 2050, dtype=np.int32)
TEXTS = st.lists(st.tuples(st.integers(0, 9).map(bool), st.booleans()), max_size=60)  # one of ten is special
UNITS = st.sampled_from(["tokens", "words", "spans"])
SEEDS = st.integers(0, 2**32 - 1)


def both(text: list[tuple[bool, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens may be hidden, and where words begin."""
    columns = np.array(text, bool).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def words(text: list[tuple[bool, bool]]) -> list[list[int]]:
    """The places of each word, told token by token."""
    found: list[list[int]] = []
    inside = False
    for place, (choosable, starts) in enumerate(text):
        if choosable and inside and not starts:
            found[-1].append(place)
        elif choosable:
            found.append([place])
        inside = choosable
    return found


def runs(chosen: np.ndarray) -> np.ndarray:
    edges = np.diff(np.concatenate([[0], chosen.astype(int), [0]]))
    return np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)


@given(TEXTS, UNITS, st.floats(0.01, 0.99), SEEDS)
def test_as_many_as_asked_and_never_a_special_token(
    text: list[tuple[bool, bool]], unit: Unit, rate: float, seed: int
) -> None:
    choosable, starts = both(text)
    chosen = hidden(choosable, starts, unit, rate, np.random.default_rng(seed))
    assert chosen.dtype == bool and chosen.shape == choosable.shape and not chosen[~choosable].any()
    np.testing.assert_array_equal(chosen, hidden(choosable, starts, unit, rate, np.random.default_rng(seed)))
    budget = max(1, round(rate * sum(choosable))) if choosable.any() else 0
    if unit == "tokens" or not budget:
        assert chosen.sum() == budget
        return
    found = words(text)
    taken = [word for word in found if chosen[word].any()]
    assert taken and all(chosen[word].all() for word in taken)
    left = budget - chosen.sum()
    if left < 0:
        assert len(taken) == 1 and min(map(len, found)) > budget
    else:
        assert all(len(word) > left for word in found if word not in taken)


@given(TEXTS, UNITS, SEEDS)
def test_the_text_comes_back(text: list[tuple[bool, bool]], unit: Unit, seed: int) -> None:
    choosable, starts = both(text)
    ids = np.arange(len(text), dtype=np.int32)
    rng = np.random.default_rng(seed)
    chosen = hidden(choosable, starts, unit, 0.3, rng)
    inputs, targets = masked(ids, chosen, MASK, DRAWN_FROM, rng)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(targets, np.where(chosen, ids, PADDING))
    np.testing.assert_array_equal(inputs[~chosen], ids[~chosen])
    assert all(new in (MASK, old, *DRAWN_FROM) for new, old in zip(inputs, ids, strict=True))


def test_eighty_ten_and_ten() -> None:
    count = 100_000
    ids = np.arange(count, dtype=np.int32) + 5000
    inputs, _ = masked(ids, np.ones(count, bool), MASK, DRAWN_FROM, np.random.default_rng(0))
    drawn = np.isin(inputs, DRAWN_FROM)
    for found, share in ((inputs == MASK, 0.8), (drawn, 0.1), (inputs == ids, 0.1)):
        assert abs(found.sum() - share * count) < 4 * (count * share * (1 - share)) ** 0.5
    each = np.bincount(inputs[drawn] - DRAWN_FROM[0], minlength=50)
    assert len(each) == 50 and (abs(each - count / 500) < 5 * (count / 500) ** 0.5).all()


@pytest.mark.parametrize("unit", ["tokens", "words", "spans"])
def test_every_place_has_its_turn(unit: Unit) -> None:
    """Places of words of two tokens far from the ends are hidden as often as the rate says."""
    rng = np.random.default_rng(1)
    starts = np.arange(200) % 2 == 0
    total = sum(hidden(np.ones(200, bool), starts, unit, 0.2, rng).astype(int) for _ in range(2000))
    assert total.sum() == 2000 * 40
    spread = (2000 * 0.2 * 0.8) ** 0.5
    assert (abs(total[20:-20] - 400) < 5 * spread).all()


def test_spans_have_the_lengths_of_the_paper() -> None:
    """Geometric with p = 0.2, of at most 10 words: 3.8 in the mean."""
    rng = np.random.default_rng(2)
    count = 100_000
    lengths = np.concatenate(
        [runs(hidden(np.ones(count, bool), np.ones(count, bool), "spans", 0.004, rng)) for _ in range(30)]
    )
    expected = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)
    assert abs(np.dot(expected, np.arange(1, 11)) - 3.8) < 0.01
    assert abs(lengths.mean() - 3.8) < 0.15
    found = np.bincount(lengths, minlength=11)[1:11]
    assert (abs(found - expected * len(lengths)) < 5 * (expected * len(lengths)) ** 0.5).all()
    assert (lengths > 10).mean() < 0.02  # two that happen to touch


def test_no_span_goes_across_a_special_token() -> None:
    """Of two tokens of 200 that stand in pairs, both are of one pair where a span of two or more words begins with its
    first; no span takes the second of a pair and the first of the next."""
    choosable = np.arange(300) % 3 != 2
    rng = np.random.default_rng(3)
    count = 2000
    found = [np.flatnonzero(hidden(choosable, choosable, "spans", 0.01, rng)) for _ in range(count)]
    assert {len(places) for places in found} == {2}
    steps = np.array([second - first for first, second in found])
    longer = 1 - 0.2 / (1 - 0.8**10)
    share = longer / 2 + (1 - longer / 2) / 199
    assert abs((steps == 1).sum() - share * count) < 4 * (count * share * (1 - share)) ** 0.5
    assert (steps == 2).mean() < 0.02


def test_a_word_that_would_be_too_much_is_left_out() -> None:
    """Words of 3, 2 and 1 tokens, of which 3 tokens may be hidden."""
    starts = np.array([True, False, False, True, False, True])
    draws = [hidden(np.ones(6, bool), starts, "words", 0.5, np.random.default_rng(seed)) for seed in range(60)]
    assert {tuple(np.flatnonzero(chosen).tolist()) for chosen in draws} == {(0, 1, 2), (3, 4, 5)}
