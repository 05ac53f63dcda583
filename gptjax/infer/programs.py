"""What runs on the devices: fill a row's cache with a prompt, decode some tokens in every row, copy what rows share;
and of an encoder-decoder, read the text that a row writes of.

Parameters are an argument like any other, so that others can take their place between two calls without a compile.

Letters beside the model's: N rows, B of them in a program, T tokens of a prompt in one call.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.infer.kept import Kept
from gptjax.infer.sampling import Knobs, draw
from gptjax.model.cache import AXES, At, Cache, copy_row, empty_cache, memory_of
from gptjax.model.gpt import GPT, forward
from gptjax.model.int8 import widened
from gptjax.model.loss import IGNORED, Head, log_probs, logits
from gptjax.parallel.network import EncoderDecoder
from gptjax.sharding.rules import Layout

STOPS = 16  # ids that may end a reply
TOPS = 20  # likeliest tokens that may be asked for
SCORED = 64  # positions of a prompt whose logits are in memory at once


class Row(NamedTuple):
    """A request as the devices see it, of one row; of all rows each with a leading N."""

    token: Array
    """int32: the next to be fed."""
    left: Array
    """int32: tokens that may still be drawn; 0 for a row that rests."""
    key: Array
    """uint32 [2]: of its seed and sample number."""
    drawn: Array
    """int32: tokens drawn so far."""
    tops: Array
    """bool: whether the likeliest tokens are asked for."""
    knobs: Knobs
    bias: Array
    """float32 [V']: what is added to the logits; -inf for ids that stand for nothing."""
    counts: Array
    """int32 [V']: times that a token was drawn."""
    seen: Array
    """bool [V']: whether a token is in the prompt."""
    stops: Array
    """int32 [STOPS]: ids that end it; -1 for none."""


class Slots(NamedTuple):
    """Everything that is kept between two calls."""

    cache: Cache
    start: Array
    """int32 [N]: tokens in each row's cache."""
    rows: Row
    memory: Array | None = None
    """int32 [N]: tokens of the text that each row looks at; None for a decoder alone."""


class Drawn(NamedTuple):
    """What steps of decoding gave, each [steps, B]."""

    token: Array
    live: Array
    """Whether the row was still going."""
    logprob: Array
    """float32, of the full softmax before temperature and all the rest."""
    top_tokens: Array
    """[steps, B, TOPS], the likeliest first, and their log-probabilities; zeros where no row asks."""
    top_logprobs: Array


class Scores(NamedTuple):
    """What a prompt's tokens were worth, each [B, T, ...]; see Drawn."""

    logprob: Array
    top_tokens: Array
    top_logprobs: Array


@dataclass(frozen=True)
class Programs:
    """Of a model, for `rows` texts of up to `capacity` tokens."""

    model: GPT
    rows: int
    capacity: int
    layout: Layout | None = None
    keep: bool = False
    """Whether the two that take long to trace are kept for another process; see kept."""
    encoder: EncoderDecoder | None = None
    """Of an encoder-decoder both sides, of which it reads by one."""

    @property
    def compiled(self) -> int:
        """Programs so far."""
        count: int = sum(jitted._cache_size() for jitted in (self.fill, self.decode, self.admit, self.copy))
        return count

    def empty(self) -> Slots:
        """Slots in which every row rests."""
        made: Slots = self._empty()
        return made

    @cached_property
    def _empty(self) -> Any:
        config, rows = self.model.config, self.rows
        wide = rows, config.padded_vocab_size

        def make() -> Slots:
            zeros = jnp.zeros(rows, jnp.int32)
            row = Row(
                token=zeros,
                left=zeros,
                key=jnp.zeros((rows, 2), jnp.uint32),
                drawn=zeros,
                tops=jnp.zeros(rows, bool),
                knobs=Knobs.empty(rows),
                bias=jnp.zeros(wide, jnp.float32),
                counts=jnp.zeros(wide, jnp.int32),
                seen=jnp.zeros(wide, bool),
                stops=jnp.full((rows, STOPS), -1, jnp.int32),
            )
            source = self.encoder.config.encoder.seq_len if self.encoder else 0
            cache = empty_cache(config, rows, self.capacity, self.model.dtype, source)
            return Slots(cache, zeros, row, zeros if source else None)

        return jax.jit(make, out_shardings=self._places)

    @cached_property
    def _places(self) -> Any:
        """Shardings of Slots: rows over data, heads over tensor, all else everywhere; None on one device."""
        if self.layout is None:
            return None
        everywhere = self.layout.sharding(())
        return Slots(self.layout.sharding(AXES), everywhere, everywhere, everywhere)  # type: ignore[arg-type]

    @property
    def _known(self) -> Any:
        """Of what the host reads: whole on every process."""
        return None if self.layout is None else self.layout.sharding(())

    def _kept(self, name: str, jitted: Any, statics: int, rest: Any) -> Any:
        model, how = self.model, self.model.parallelism
        about = name, asdict(model.config), str(model.dtype), how.merge_qkv, how.outputs_first, self.rows, self.capacity
        return Kept(jitted, about, statics, rest) if self.keep else jitted

    def _jit(self, function: Any, *outputs: Any, **how: Any) -> Any:
        places = None if self.layout is None else (self._places, *outputs) if outputs else self._places
        return jax.jit(function, out_shardings=places, **how)

    @cached_property
    def admit(self) -> Any:
        """jit of (slots, number, row, start): a request takes a row, in whose cache lie `start` of its tokens."""

        def admit(slots: Slots, number: Array, row: Row, start: Array) -> Slots:
            rows = jax.tree.map(lambda old, new: old.at[number].set(new), slots.rows, row)
            return slots._replace(rows=rows, start=slots.start.at[number].set(start))

        return self._jit(admit, donate_argnums=0)

    @cached_property
    def rest(self) -> Any:
        """jit of (slots, number, start): a row draws nothing; in its cache lie `start` tokens."""

        def rest(slots: Slots, number: Array, start: Array) -> Slots:
            rows = slots.rows._replace(left=slots.rows.left.at[number].set(0))
            return slots._replace(rows=rows, start=slots.start.at[number].set(start))

        return self._jit(rest, donate_argnums=0)

    @cached_property
    def copy(self) -> Any:
        """jit of (slots, source, target): one row's cache as another's."""

        def copy(slots: Slots, source: Array, target: Array) -> Slots:
            return slots._replace(cache=copy_row(slots.cache, source, target))

        return self._jit(copy, donate_argnums=0)

    @cached_property
    def encode(self) -> Any:
        """jit of (params, slots, tokens [1, S], number, count) -> slots: the text that a row looks at from now on, of
        which the first `count` are tokens. Takes parameters as they are trained."""

        def encode(params: Any, slots: Slots, tokens: Array, number: Array, count: Array) -> Slots:
            assert self.encoder
            padding = (jnp.arange(tokens.shape[1]) >= count).astype(jnp.int32)[None]
            hidden = self.encoder.alone.encode(params, tokens, padding, None)
            made = memory_of(self.encoder.config.model, params, hidden)
            cache = tuple(
                (*own[:2], *(old.at[:, number].set(new[:, 0]) for old, new in zip(own[2:], memory, strict=True)))
                for own, memory in zip(slots.cache, made, strict=True)
            )
            return slots._replace(cache=cache, memory=slots.memory.at[number].set(count))  # type: ignore[union-attr]

        return self._jit(encode, donate_argnums=1)

    @cached_property
    def fill(self) -> Any:
        """jit of (params, slots, tokens [B, T], numbers [B], count [B], targets [B, T] or None, read) -> (slots, Scores
        or None): tokens go into the caches of rows, of each the first `count`; the number of a row that is not there is
        N. Targets, the tokens that follow, are scored."""

        def fill(
            params: Any, slots: Slots, tokens: Array, numbers: Array, count: Array, targets: Array | None, read: int
        ) -> tuple[Slots, Scores | None]:
            model = self._model(read, len(tokens))
            here = jnp.where(numbers < self.rows, slots.start[numbers], 0)
            at = At(here, count, numbers, None if slots.memory is None else slots.memory[numbers])
            hidden, head, cache = forward(model, widened(params, model.dtype), tokens, cache=slots.cache, at=at)
            start = slots.start.at[numbers].add(count, mode="drop")
            scores = None if targets is None else self._scores(hidden, head, targets)
            return slots._replace(cache=cache, start=start), scores

        return self._kept("fill", self._jit(fill, self._known, donate_argnums=1, static_argnums=6), 1, Scores)

    def _scores(self, hidden: Array, head: Head, targets: Array) -> Scores:
        config = self.model.config
        values = log_probs(hidden, head, targets, config.vocab_size, SCORED)

        def one(part: Array) -> tuple[Array, Array]:  # [B, D] of one position
            return _tops(logits(part, head, config.vocab_size))

        tokens, tops = jax.lax.map(one, jnp.moveaxis(hidden, 1, 0), batch_size=SCORED)
        return Scores(jnp.where(targets == IGNORED, 0, values), jnp.moveaxis(tokens, 0, 1), jnp.moveaxis(tops, 0, 1))

    @cached_property
    def decode(self) -> Any:
        """jit of (params, slots, numbers [B] or None for all, steps, read) -> (slots, Drawn): that many tokens in each
        of these rows. The number of a row that is not there is N."""

        def decode(params: Any, slots: Slots, numbers: Array | None, steps: int, read: int) -> tuple[Slots, Drawn]:
            model = self._model(read, self.rows if numbers is None else len(numbers))
            some = slots if numbers is None else self._some(slots, numbers)
            one = partial(self._step, model, widened(params, model.dtype), numbers)
            after, drawn = jax.lax.scan(lambda now, _: one(now), some, length=steps)
            return after if numbers is None else _joined(slots, numbers, after), drawn

        return self._kept("decode", self._jit(decode, self._known, donate_argnums=1, static_argnums=(3, 4)), 2, Drawn)

    def _some(self, slots: Slots, numbers: Array) -> Slots:
        """With some of the rows alone, beside the cache of all."""
        rows, start, memory = jax.tree.map(lambda leaf: leaf[numbers], (slots.rows, slots.start, slots.memory))
        return Slots(slots.cache, start, rows._replace(left=jnp.where(numbers < self.rows, rows.left, 0)), memory)

    def _step(self, model: GPT, params: Any, numbers: Array | None, slots: Slots) -> tuple[Slots, Drawn]:
        config, start, rows = model.config, slots.start, slots.rows
        live, count = rows.left > 0, len(start)
        at = At(start, live.astype(jnp.int32), numbers, slots.memory)
        hidden, head, cache = forward(model, params, rows.token[:, None], cache=slots.cache, at=at)
        scores = logits(hidden[:, 0], head, config.vocab_size, model.parallelism.outputs_first)
        keys = jax.vmap(lambda key, number: jax.random.fold_in(jax.random.wrap_key_data(key), number))
        token = draw(scores, rows.knobs, rows.bias, rows.counts, rows.seen, keys(rows.key, rows.drawn))
        normal = scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        none = jnp.zeros((count, TOPS), jnp.int32), jnp.zeros((count, TOPS), normal.dtype)
        tops = jax.lax.cond(jnp.any(rows.tops & live), lambda: _tops(normal), lambda: none)
        number = jnp.arange(count)
        drawn = Drawn(token, live, normal[number, token], *tops)
        over = (rows.stops == token[:, None]).any(-1)
        after = rows._replace(
            token=jnp.where(live, token, rows.token),
            left=jnp.where(live & ~over, rows.left - 1, 0),
            drawn=rows.drawn + live,
            counts=rows.counts.at[number, token].add(live.astype(jnp.int32)),
        )
        return Slots(cache, start + live, after, slots.memory), drawn

    def _model(self, read: int, rows: int) -> GPT:
        how = replace(self.model.parallelism, read=read)
        if self.layout is not None:
            how = replace(how, constrain=_constrain(self.layout, rows))
        return self.model.clone(parallelism=how)


def _constrain(layout: Layout, rows: int) -> Any:
    """Activations of decoding: a token's axis is not cut, and rows only where they divide."""
    whole = dict.fromkeys(("length", "residual_length", "layers"), ())
    ways = layout.ways(layout.rules["batch"])
    batch = layout.rules["batch"] if rows % ways == 0 else ()
    return Layout(layout.mesh, layout.rules | whole | {"batch": batch, "rows": batch}).constrain


def _joined(slots: Slots, numbers: Array, some: Slots) -> Slots:
    """With what decoding changes in some of the rows."""
    rows = {
        name: getattr(slots.rows, name).at[numbers].set(getattr(some.rows, name), mode="drop")
        for name in ("token", "left", "drawn", "counts")
    }
    start = slots.start.at[numbers].set(some.start, mode="drop")
    return Slots(some.cache, start, slots.rows._replace(**rows), slots.memory)


def _tops(scores: Array) -> tuple[Array, Array]:
    """The likeliest tokens of logits [..., V'] and their log-probabilities, [..., TOPS]."""
    values, tokens = jax.lax.top_k(scores, min(TOPS, scores.shape[-1]))
    return tokens.astype(jnp.int32), values - jax.nn.logsumexp(scores, axis=-1, keepdims=True)


def key_of(seed: int, sample: int) -> np.ndarray:
    """uint32 [2]: the random numbers of a request's sample, with which each token's place is then mixed."""
    words = np.random.SeedSequence(seed, spawn_key=(sample,)).generate_state(2)
    return words.astype(np.uint32)
