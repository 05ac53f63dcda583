"""Beam search against `transformers`, token by token, and against all texts that there are.
Run: pytest tests/test_beam.py"""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.infer.beam import Found, at_least_greedy, beam_search

END, FIRST = 0, 1
V, T = 4, 4  # small enough to write down every text


def chain_step(cache: Any, tokens: Any, place: Any) -> Any:
    """Of a chain of second order: logits [V, V, V] of the token before (0 before the first), the last and the next."""
    table, before = cache
    return table[before, tokens], (table, tokens)


def chain_reorder(cache: Any, rows: Any) -> Any:
    table, before = cache
    return table, before[rows]


@partial(jax.jit, static_argnames=("beams", "early_stopping", "max_tokens"))
def search(
    tables: Any, penalty: Any = 0.0, *, beams: int, early_stopping: Any = False, max_tokens: int = T, end: Any = (END,)
) -> Found:
    """Of one source."""
    cache = (tables, jnp.zeros(beams, jnp.int32))
    first, allowed = jnp.array([FIRST]), jnp.zeros(tables.shape[-1])
    return beam_search(
        chain_step,
        chain_reorder,
        cache,
        first,
        beams=beams,
        max_tokens=max_tokens,
        end=jnp.array(end),
        length_penalty=penalty,
        early_stopping=early_stopping,
        allowed=allowed,
    )


def log_softmax(table: np.ndarray) -> np.ndarray:
    wide = table.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def total(table: np.ndarray, text: tuple[int, ...]) -> float:
    """Nats of a text."""
    path, log_probs = (0, FIRST, *text), log_softmax(table)
    return float(sum(log_probs[path[i : i + 3]] for i in range(len(text))))


def every_text(size: int, longest: int) -> list[tuple[int, ...]]:
    """Those that end, and those that are cut."""
    others = [token for token in range(size) if token != END]
    ended = [(*body, END) for n in range(longest) for body in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=longest))


def greedy_text(table: np.ndarray, longest: int) -> tuple[int, ...]:
    text: list[int] = []
    before, last = 0, FIRST
    while len(text) < longest and (not text or text[-1] != END):
        before, last = last, int(np.argmax(table[before, last]))
        text.append(last)
    return tuple(text)


def texts(found: Found, source: int = 0) -> list[tuple[int, ...]]:
    tokens, lengths = np.asarray(found.tokens[source]), np.asarray(found.lengths[source])
    for row, length in zip(tokens, lengths, strict=True):
        assert (row[:length] >= 0).all() and (row[length:] == -1).all()
    return [tuple(map(int, row[:length])) for row, length in zip(tokens, lengths, strict=True)]


def random_table(seed: int, size: int = V, spread: float = 2.0, ending: float = 0.0) -> np.ndarray:
    table = np.random.default_rng(seed).normal(0, spread, (size, size, size)).astype(np.float32)
    table[..., END] += ending
    return table


CHAINS = st.builds(random_table, st.integers(0, 2**32 - 1), ending=st.floats(-3, 3))


@settings(max_examples=40, deadline=None)
@given(CHAINS, st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0]))
def test_beams_for_every_text_rank_them_all(table: np.ndarray, penalty: float) -> None:
    possible = every_text(V, T)
    found = search(table, penalty, beams=128)
    assert len(possible) == 121 and (np.asarray(found.lengths[0]) > 0).sum() == 121
    scores = {text: total(table, text) / len(text) ** penalty for text in possible}
    ours = texts(found)
    assert set(ours[:121]) == set(possible) and set(ours[121:]) == {()}
    np.testing.assert_allclose(found.scores[0, :121], sorted(scores.values(), reverse=True), atol=1e-4)
    np.testing.assert_allclose(found.scores[0, :121], [scores[text] for text in ours[:121]], atol=1e-4)
    np.testing.assert_allclose(found.totals[0, :121], [total(table, text) for text in ours[:121]], atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(CHAINS, st.sampled_from([-1.0, 0.0, 2.0]), st.sampled_from([False, True, "never"]))
def test_one_beam_is_greedy(table: np.ndarray, penalty: float, early_stopping: Any) -> None:
    found = search(table, penalty, beams=1, early_stopping=early_stopping)
    text = greedy_text(table, T)
    assert texts(found) == [text]
    np.testing.assert_allclose(found.totals[0, 0], total(table, text), atol=1e-4)


def test_one_beam_is_greedy_where_a_long_sum_rounds() -> None:
    """Tokens a millionth of a nat apart, behind sums in which as much is lost: the last stays the likeliest."""
    table = np.broadcast_to(np.float32(1e-6) * np.arange(V, dtype=np.float32), (V, V, V)).copy()
    table[..., END] = -5
    text = greedy_text(table, 64)
    assert text == (V - 1,) * 64
    assert texts(search(table, beams=1, max_tokens=64)) == [text]


@settings(max_examples=40, deadline=None)
@given(CHAINS, st.sampled_from([0.0, 1.0]), st.integers(2, 3))
def test_what_is_found_is_told_right_and_never_below_greedy_where_asked(
    table: np.ndarray, penalty: float, beams: int
) -> None:
    found, greedy = search(table, penalty, beams=beams), search(table, penalty, beams=1)
    kept = at_least_greedy(found, greedy)
    assert kept.scores[0, 0] >= max(found.scores[0, 0], greedy.scores[0, 0]) - 1e-5
    for result in (found, kept):
        ours = texts(result)
        assert len(set(ours)) == beams
        assert (np.diff(result.scores[0]) <= 0).all()
        worth = [total(table, text) / len(text) ** penalty for text in ours]
        np.testing.assert_allclose(result.scores[0], worth, atol=1e-4)


def losing_table() -> np.ndarray:
    """A chain in which two beams leave greedy's prefix, 1 3, for 2 4 and 2 5, of which nothing likely comes."""
    table = np.full((6, 6, 6), 1e-9)
    table[:, :] = 1 / 6
    table[0, FIRST] = [0.1, 0.4, 0.35, 0.05, 0.05, 0.05]
    table[FIRST, 1] = [0.1, 0.1, 0.2, 0.4, 0.1, 0.1]
    table[FIRST, 2] = [1e-9, 1e-9, 1e-9, 1e-9, 0.5, 0.5]
    table[1, 3] = [1, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9]
    return np.log(table).astype(np.float32)


def test_a_beam_search_may_lose_to_greedy_unless_it_is_kept() -> None:
    table = losing_table()
    found, greedy = (search(table, beams=beams, max_tokens=3, early_stopping="never") for beams in (2, 1))
    assert texts(greedy) == [(1, 3, END)]
    assert (1, 3, END) not in texts(found) and found.scores[0, 0] < greedy.scores[0, 0]
    kept = at_least_greedy(found, greedy)
    assert texts(kept) == [(1, 3, END), texts(found)[0]]
    np.testing.assert_allclose(kept.scores[0], [greedy.scores[0, 0], found.scores[0, 0]])
    rounded = greedy._replace(scores=greedy.scores + 1e-6)  # as programs of other shapes may have it
    assert texts(at_least_greedy(kept, rounded)) == texts(kept)


def test_sources_do_not_mind_each_other_and_what_is_not_allowed_is_never_drawn() -> None:
    """Also several ids that end a text, and an end of -1, which is none."""
    tables = np.stack([random_table(seed, 7, ending=4.0 * (seed - 1)) for seed in range(3)])
    tables[0, ..., 5] -= 4
    tables[1, ..., 5] += 2
    allowed = jnp.where(jnp.arange(7) == 2, -jnp.inf, 0.0)
    how = dict(max_tokens=6, length_penalty=1.0, early_stopping=False, allowed=allowed, beams=3)

    @jax.jit
    def of(tables: Any, end: Any) -> Found:
        """Of sources whose tables lie row by row in what a step reads."""

        def step(cache: Any, tokens: Any, place: Any) -> Any:
            rows, before = cache
            return rows[jnp.arange(len(tokens)), before, tokens], (rows, tokens)

        cache = jnp.repeat(tables, 3, axis=0), jnp.zeros(3 * len(tables), jnp.int32)
        move = lambda cache, rows: jax.tree.map(lambda leaf: leaf[rows], cache)  # noqa: E731
        return beam_search(step, move, cache, jnp.full(len(tables), FIRST), end=end, **how)

    end = jnp.array([END, 5, -1])
    together = of(tables, end)
    lengths = np.asarray(together.lengths)
    assert lengths.min() == 1 and lengths.max() == 6
    assert 2 not in np.asarray(together.tokens) and (np.asarray(together.tokens) == 5).any()
    for source in range(3):
        alone = of(tables[source : source + 1], end)
        assert texts(alone) == texts(together, source)
        np.testing.assert_allclose(alone.scores[0], together.scores[source], rtol=1e-6)
        for text in texts(alone):
            assert not {END, 5} & set(text[:-1]) and (text[-1] in (END, 5) or len(text) == 6)
