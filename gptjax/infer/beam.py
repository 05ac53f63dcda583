"""Beam search: of each source the likeliest texts that a few running ones lead to.

Letters: B sources, W beams of each, N = B * W rows, V vocabulary, T tokens at most, K candidates of a source and step.
The rules are those of `transformers` 5. A text's length counts what was drawn, its end included and the start not. Of
the K likeliest continuations only the W first may end, and the others are there so that W go on. Scores that are equal
keep their order: what was found first, then the earlier beam, then the likelier token, then the lower id.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Step = Callable[[Any, Array, Array], tuple[Any, Any]]
"""(cache, tokens int32 [N], place int32) -> (logits [N, V], cache): each row's token goes in at that place, from 0."""
Reorder = Callable[[Any, Array], Any]
"""(cache, rows int32 [N]) -> cache in which row i is what row rows[i] was."""
EarlyStopping = bool | Literal["never"]


class Found(NamedTuple):
    """Texts of each source, the best first. Where there are fewer than W, the last have length 0 and score -inf."""

    tokens: Array
    """int32 [B, W, T], the end included; -1 behind it."""
    lengths: Array
    """int32 [B, W]: how many of them were drawn."""
    totals: Array
    """float32 [B, W]: nats, the sum of their log-probabilities."""
    scores: Array
    """float32 [B, W]: totals / lengths ** length_penalty."""


class _State(NamedTuple):
    place: Array
    """int32: tokens that each running text has."""
    going: Array
    """bool [B]: whether what is found may still change."""
    last: Array
    """int32 [B, W]: the token to feed."""
    tokens: Array
    """int32 [B, W, T], -1 from `place` on."""
    totals: Array
    """float32 [B, W], the highest first; -inf for a beam that holds no text."""
    found: Found
    cache: Any


class _Candidates(NamedTuple):
    """Continuations, the likeliest first."""

    beam: Array
    """int32 [B, K]: which running text each goes on from."""
    token: Array
    """int32 [B, K]."""
    totals: Array
    """float32 [B, K]."""


def beam_search(
    step: Step,
    reorder: Reorder,
    cache: Any,
    first: Array,
    *,
    beams: int,
    max_tokens: int,
    end: Array,
    length_penalty: Array | float,
    early_stopping: EarlyStopping,
    allowed: Array,
) -> Found:
    """The texts of highest score that begin behind `first` int32 [B]. To be traced inside a jit.

    cache: of N rows, those of a source side by side and alike. end: int32 [E] ids that end a text; one of -1 is none.
    allowed: float32 [V], added to the logits before they are normalised; -inf for an id that stands for nothing.
    length_penalty: above 0 favours long texts, below 0 short ones. early_stopping, once W texts are found: True ends a
    source; False does where the best running text, scored at its present length, is no better than the worst found;
    "never" scores it at T where long texts are favoured. One beam is greedy decoding and ends with its first text.
    """
    end, penalty = jnp.asarray(end, jnp.int32), jnp.asarray(length_penalty, jnp.float32)

    def advance(state: _State) -> _State:
        logits, cache = step(state.cache, state.last.reshape(-1), state.place)
        some = _candidates(state.totals, logits.astype(jnp.float32) + allowed, beams * (1 + len(end)))
        tokens = _pick(state.tokens, some.beam).at[:, :, state.place].set(some.token)
        length = state.place + 1
        ended = (some.token[:, :, None] == end).any(-1) | (length == max_tokens)
        fresh = ended & (jnp.arange(ended.shape[1]) < beams) & state.going[:, None]
        found = _merged(state.found, _texts(tokens, length, jnp.where(fresh, some.totals, -jnp.inf), penalty))
        totals, order = jax.lax.top_k(jnp.where(ended, -jnp.inf, some.totals), beams)
        beam, last, tokens = (_pick(value, order) for value in (some.beam, some.token, tokens))
        rows = (beam + beams * jnp.arange(len(beam))[:, None]).reshape(-1)
        farthest = jnp.where(penalty > 0, max_tokens, length) if early_stopping == "never" else length
        going = state.going & _improvable(found.scores, totals[:, 0], farthest, penalty, early_stopping)
        return _State(length, going, last, tokens, totals, found, reorder(cache, rows))

    def unfinished(state: _State) -> Array:
        return jnp.any(state.going) & (state.place < max_tokens)

    return jax.lax.while_loop(unfinished, advance, _start(cache, first, beams, max_tokens)).found


def at_least_greedy(found: Found, greedy: Found) -> Found:
    """With the text of greedy decoding first where it scores above all that is found, which then loses its last.

    A beam search may lose the greedy text on its way, and end with texts that are less likely. greedy: of one beam, the
    same sources and length penalty.
    """
    known = (found.tokens == greedy.tokens).all(-1).any(-1)  # its score may differ by the rounding of other shapes
    better = (greedy.scores[:, 0] > found.scores[:, 0]) & ~known

    def ahead(old: Array, new: Array) -> Array:
        moved = jnp.concatenate((new, old[:, :-1]), axis=1)
        return jnp.where(better.reshape(-1, *[1] * (old.ndim - 1)), moved, old)

    return jax.tree.map(ahead, found, greedy)


def _start(cache: Any, first: Array, beams: int, max_tokens: int) -> _State:
    shape = len(first), beams
    tokens, none = jnp.full((*shape, max_tokens), -1, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32)
    last = jnp.broadcast_to(first[:, None], shape).astype(jnp.int32)
    found = Found(tokens, jnp.zeros(shape, jnp.int32), none, none)
    # Beams that are alike would find every text W times: the first alone has one to go on from.
    return _State(jnp.int32(0), jnp.ones(len(first), bool), last, tokens, none.at[:, 0].set(0), found, cache)


def _candidates(totals: Array, logits: Array, count: int) -> _Candidates:
    """The likeliest of all beams, from running totals [B, W] and logits [N, V].

    First of each beam by its logits, then of all by their sums: two tokens that rounding makes equal in a long sum stay
    in order, and one beam draws what argmax does.
    """
    batch, beams = totals.shape
    values, tokens = jax.lax.top_k(logits, min(count, logits.shape[-1]))
    log_probs = values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    sums = (totals[:, :, None] + log_probs.reshape(batch, beams, -1)).reshape(batch, -1)
    sums, order = jax.lax.top_k(sums, min(count, sums.shape[1]))
    return _Candidates(order // values.shape[1], _pick(tokens.reshape(batch, -1), order), sums)


def _texts(tokens: Array, length: Array, totals: Array, penalty: Array) -> Found:
    return Found(tokens, jnp.full(totals.shape, length), totals, _score(totals, length, penalty))


def _merged(found: Found, more: Found) -> Found:
    """The best of both, as many as there were."""
    both = jax.tree.map(lambda old, new: jnp.concatenate((old, new), axis=1), found, more)
    _, order = jax.lax.top_k(both.scores, found.scores.shape[1])
    return jax.tree.map(lambda value: _pick(value, order), both)


def _improvable(scores: Array, best: Array, length: Array, penalty: Array, early_stopping: EarlyStopping) -> Array:
    """bool [B]: whether a running text of total `best` [B] may come among those found, of scores [B, W]."""
    worst = scores[:, -1]  # -inf while there are fewer than W
    if early_stopping is True or scores.shape[1] == 1:
        return (worst == -jnp.inf) & (best > -jnp.inf)
    return _score(best, length, penalty) > worst


def _score(totals: Array, length: Array, penalty: Array) -> Array:
    return totals / length.astype(jnp.float32) ** penalty


def _pick(values: Array, order: Array) -> Array:
    """[B, K, ...]: of each source those at `order` [B, K]."""
    return jnp.take_along_axis(values, order.reshape(*order.shape, *[1] * (values.ndim - 2)), axis=1)
