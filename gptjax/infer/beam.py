"""Beam search over any decoder: of each source the likeliest texts that were found, several kept in sight at once.

What counts as length, which of the candidates may end and when a search is over are as in `transformers` 5, token for
token: of 2 W candidates a step those of the first W that end are finished, and the best W others go on.

Letters beside the model's: B sources, W beams of each, N = B W rows, M tokens of a text at most.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Step = Callable[[Any, Array, Array], tuple[Array, Any]]
"""(cache, tokens int32 [N], how many came before) -> (logits [N, V], cache)."""
Reorder = Callable[[Any, Array], Any]
"""(cache, int32 [N]) -> the cache whose row i is row [i] of this one."""
NEVER = -1e9  # finite: a difference of two is a number
NOTHING = -1  # in the place of a token behind the end of a text


class Found(NamedTuple):
    """What a search gives, of each source the best first."""

    tokens: Array
    """int32 [B, W, M], the one that ended each among them; behind it NOTHING."""
    scores: Array
    """float32 [B, W]: the sum of log-probabilities, nats, over the number of tokens to the power of the penalty."""
    lengths: Array
    """int32 [B, W]; 0 where fewer than W texts were found."""


class _State(NamedTuple):
    """Between two steps."""

    written: Array
    """int32: tokens of what goes on."""
    tokens: Array
    """int32 [B, W, M] of texts that go on, and the sums of their log-probabilities [B, W]."""
    logprobs: Array
    found: Found
    hopeful: Array
    """bool [B]: whether a text that goes on may still be better than the worst that was found."""
    over: Array
    """bool: whether all candidates of the last step had to end."""
    cache: Any


def beam_search(
    step: Step,
    reorder: Reorder,
    cache: Any,
    first: Array,
    *,
    beams: int,
    max_tokens: int,
    end: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    allowed: Array | None = None,
) -> Found:
    """Search from the ids `first` int32 [B], which begin the texts and are no part of them; the cache has N rows, those
    of a source one after another. `end` ends a text; `allowed` float32 [V] is added to log-probabilities. To be part of
    a program.

    early_stopping: True ends as soon as W texts are found; False where, at its length of now, no text that goes on can
    be better than the worst of them; never where it cannot be at any length. One beam is the likeliest token each time.
    """
    count = len(first)
    empty = jnp.full((count, beams, max_tokens), NOTHING, jnp.int32)
    start = _State(
        written=jnp.int32(0),
        tokens=empty,
        logprobs=jnp.where(jnp.arange(beams) == 0, 0.0, NEVER) * jnp.ones((count, 1)),
        found=Found(empty, jnp.full((count, beams), NEVER), jnp.zeros((count, beams), jnp.int32)),
        hopeful=jnp.ones(count, bool),
        over=jnp.bool_(False),
        cache=cache,
    )

    def goes_on(state: _State) -> Array:
        full = (state.found.lengths > 0).all() & (early_stopping is True)
        return state.hopeful.any() & ~full & ~state.over

    def body(state: _State) -> _State:
        before = jax.lax.dynamic_index_in_dim(state.tokens, jnp.maximum(state.written - 1, 0), axis=2, keepdims=False)
        last = jnp.where(state.written == 0, first[:, None], before)
        scores, cache = step(state.cache, last.reshape(-1), state.written)
        each = jax.nn.log_softmax(scores.astype(jnp.float32)) + (0 if allowed is None else allowed)
        size = each.shape[-1]
        sums = (each.reshape(count, beams, size) + state.logprobs[..., None]).reshape(count, -1)
        values, place = jax.lax.top_k(sums, 2 * beams)
        parent, token = place // size, (place % size).astype(jnp.int32)
        longer = _pick(state.tokens, parent).at[:, :, state.written].set(token)
        length = state.written + 1
        ends = (token == end) | (length == max_tokens)
        logprobs, kept = jax.lax.top_k(jnp.where(ends, values + NEVER, values), beams)
        found = _finished(state, values, longer, ends, length)
        whose = _pick(parent, kept)
        rows = (whose + beams * jnp.arange(count)[:, None]).reshape(-1)
        best = logprobs[:, 0] / _lengths(
            jnp.where(jnp.bool_(early_stopping == "never") & (length_penalty > 0), max_tokens, length)
        )
        worst = jnp.where(found.lengths > 0, found.scores.min(1, keepdims=True), NEVER)
        hopeful = state.hopeful & (best[:, None] > worst).any(1)
        return _State(length, _pick(longer, kept), logprobs, found, hopeful, ends.all(), reorder(cache, rows))

    def _finished(state: _State, values: Array, longer: Array, ends: Array, length: Array) -> Found:
        """With the candidates that end; of no more use are those of a search that is full or has no hope."""
        full = (state.found.lengths > 0).all(1) & (early_stopping is True)
        mine = ends & (jnp.arange(2 * beams) < beams)
        scores = values / _lengths(length) + NEVER * (full | ~state.hopeful)[:, None] + NEVER * ~mine
        both = jnp.concatenate([state.found.scores, scores], axis=1)
        merged, place = jax.lax.top_k(both, beams)
        tokens = _pick(jnp.concatenate([state.found.tokens, longer], axis=1), place)
        lengths = jnp.concatenate([state.found.lengths, jnp.where(mine, length, 0)], axis=1)
        return Found(tokens, merged, _pick(lengths, place))

    def _lengths(length: Array) -> Array:
        return length.astype(jnp.float32) ** length_penalty

    return jax.lax.while_loop(goes_on, body, start).found


def _pick(values: Array, place: Array) -> Array:
    """values [B, A, ...] at place [B, C] -> [B, C, ...]."""
    return jnp.take_along_axis(values, place.reshape(*place.shape, *[1] * (values.ndim - 2)), axis=1)


def better(one: Found, other: Found) -> Found:
    """Of each source the texts of the search whose best has the higher score, of as many beams as the first has: a beam
    search may lose sight of what the likeliest token each time leads to."""
    wider = [(0, 0), (0, one.scores.shape[1] - other.scores.shape[1])]
    padded = Found(
        jnp.pad(other.tokens, [*wider, (0, 0)], constant_values=NOTHING),
        jnp.pad(other.scores, wider, constant_values=NEVER),
        jnp.pad(other.lengths, wider),
    )
    wins = other.scores[:, 0] > one.scores[:, 0]
    return jax.tree.map(lambda a, b: jnp.where(wins.reshape(-1, *[1] * (a.ndim - 1)), b, a), one, padded)
