"""Sampling from a model with a KV cache. Simple on purpose: one prompt, one static shape, two loops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.errors import UserError
from gptjax.model.gpt import GPT, empty_cache, forward
from gptjax.model.loss import logits


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together hold this probability."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature}: must not be negative; nearest 0")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must not be negative; nearest 0 (keep all)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must lie in (0, 1]; nearest {1.0 if self.top_p > 1 else 0.01}")


def draw(scores: Array, key: Array, how: Sampling) -> Array:
    """scores float32 [B, V'] -> token ids [B]; top-p (Holtzman et al., arXiv 1904.09751) after top-k."""
    if how.temperature == 0:
        return jnp.argmax(scores, axis=-1)
    scores = scores / how.temperature
    if how.top_k:
        kth = jax.lax.top_k(scores, min(how.top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores < kth, -jnp.inf, scores)
    if how.top_p < 1:
        ordered = jnp.sort(scores, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        last = jnp.min(jnp.where(before < how.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores < last, -jnp.inf, scores)
    return jax.random.categorical(key, scores, axis=-1)


def generate(
    model: GPT,
    params: Any,
    prompt: Sequence[int] | np.ndarray,
    *,
    num_samples: int,
    num_tokens: int,
    how: Sampling,
    seed: int,
    possible: np.ndarray | None = None,
) -> np.ndarray:
    """Continue `prompt` num_samples times by num_tokens: int32 [num_samples, num_tokens]. `possible`, bool [V], says
    which ids may be drawn, those of the vocabulary that stand for something; None says all.

    The context is full after T tokens; then its later half starts the next one, so text of any length
    comes out. Raises UserError for an empty prompt.
    """
    if not len(prompt):
        raise UserError("--prompt: empty; give at least one character")
    length = model.config.seq_len
    fill = make_fill(model, how, possible)
    key = jax.random.key(seed)
    made = np.zeros((num_samples, 0), np.int32)
    context = np.tile(np.array(prompt[-(length - 1) :], np.int32), (num_samples, 1))
    while made.shape[1] < num_tokens:
        start = context.shape[1]
        key, part = jax.random.split(key)
        stop = min(length, start + num_tokens - made.shape[1])
        padded = np.pad(context, ((0, 0), (0, length - start)))
        context = np.asarray(fill(params, padded, np.int32(start), np.int32(stop), part))[:, :stop]
        made = np.concatenate([made, context[:, start:]], axis=1)
        context = context[:, -max(1, length // 2) :]
    return made


def make_fill(model: GPT, how: Sampling, possible: np.ndarray | None = None) -> Callable[..., Array]:
    """jit of (params, tokens [B, T], start, stop, key) -> tokens with positions start..stop-1 drawn; `possible` as for
    `generate`.

    One prefill over the padded context, then one token at a time; what the prefill cached beyond `start` is
    overwritten before any query can see it.
    """

    def scores(hidden: Array, embedding: Array) -> Array:
        made = logits(hidden, embedding, model.config.vocab_size)
        if possible is None:
            return made
        room = made.shape[-1] - len(possible)
        return jnp.where(np.pad(possible, (0, room)), made, -jnp.inf)

    @jax.jit
    def fill(params: Any, tokens: Array, start: Array, stop: Array, key: Array) -> Array:
        c = model.config
        cache = empty_cache(c, tokens.shape[0], model.dtype)
        hidden, embedding, cache = forward(model, params, tokens, cache=cache, start=jnp.int32(0))
        last = jax.lax.dynamic_slice_in_dim(hidden, start - 1, 1, axis=1)

        def more(carry: Any) -> Array:
            return carry[0] < stop

        def one(carry: Any) -> Any:
            at, tokens, last, cache, key = carry
            key, part = jax.random.split(key)
            token = draw(scores(last[:, 0], embedding), part, how).astype(jnp.int32)[:, None]
            tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token, at, axis=1)
            last, _, cache = forward(model, params, token, cache=cache, start=at)
            return at + 1, tokens, last, cache, key

        return jax.lax.while_loop(more, one, (start, tokens, last, cache, key))[1]

    return fill
