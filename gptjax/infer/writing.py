"""Texts that an encoder-decoder writes for many others at once: greedily, or by beam search."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.infer.beam import Found, at_least_greedy, beam_search
from gptjax.model.cache import At, empty_cache, memory_of
from gptjax.model.gpt import forward
from gptjax.model.loss import logits
from gptjax.parallel.network import EncoderDecoder


@dataclass(frozen=True, eq=False)
class Writing:
    """How texts are written."""

    network: EncoderDecoder
    start: int
    """Id before a text."""
    end: int
    """Id that ends it."""
    allowed: np.ndarray
    """bool [V]: ids that may be written."""
    beams: int = 1
    length_penalty: float = 1.0
    max_tokens: int = 0
    """Of a text, its end among them; 0 is what the decoder's context holds."""

    @cached_property
    def write(self) -> Any:
        """jit of (params, source [B, S], segments [B, S]) -> Found: each source is read once. With several beams no
        text has a lower score than the likeliest token each time leads to."""

        def write(params: Any, source: Array, segments: Array) -> Found:
            memory = self.network.alone.encode(params, source, segments, None)
            found = self.searched(params, memory, segments, self.beams)
            return at_least_greedy(found, self.searched(params, memory, segments, 1)) if self.beams > 1 else found

        return jax.jit(write)

    def searched(self, params: Any, memory: Array, segments: Array, beams: int) -> Found:
        """What so many beams find for sources of which an encoder made `memory` [B, S, D]; a part of a program."""
        config, rows = self.network.config.model, len(memory) * beams
        size = self.max_tokens or config.seq_len
        model = self.network.decoder
        model = model.clone(parallelism=replace(model.parallelism, read=size))
        looked_at = jnp.repeat(jnp.sum(segments == 0, axis=1, dtype=jnp.int32), beams)
        seen = jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=1), memory_of(config, params, memory))
        own = empty_cache(config, rows, size, model.dtype)
        cache = tuple((*keys_values, *theirs) for keys_values, theirs in zip(own, seen, strict=True))

        def step(cache: Any, tokens: Array, before: Array) -> tuple[Array, Any]:
            at = At(jnp.full(rows, before), jnp.ones(rows, jnp.int32), None, looked_at)
            hidden, head, cache = forward(model, params, tokens[:, None], cache=cache, at=at)
            return logits(hidden[:, 0], head, config.vocab_size), cache

        def reorder(cache: Any, order: Array) -> Any:
            """Rows of one source look at the same text."""
            return tuple((*(leaf[:, order] for leaf in block[:2]), *block[2:]) for block in cache)

        return beam_search(
            step,
            reorder,
            cache,
            jnp.full(len(memory), self.start, jnp.int32),
            beams=beams,
            max_tokens=size,
            end=jnp.array([self.end]),
            length_penalty=self.length_penalty,
            early_stopping=False,
            allowed=self._allowed,
        )

    @property
    def _allowed(self) -> Array:
        size = self.network.config.model.padded_vocab_size
        return jnp.where(jnp.pad(jnp.asarray(self.allowed), (0, size - len(self.allowed))), 0.0, -jnp.inf)

    def texts(
        self, params: Any, sources: Sequence[Sequence[int]], rows: int, tokenizer: Tokenizer
    ) -> list[tuple[str, float]]:
        """The best text of each of at most `rows` sources, and its score."""
        size = self.network.config.encoder.seq_len
        tokens, segments = np.zeros((rows, size), np.int32), np.ones((rows, size), np.int32)
        for number, ids in enumerate(sources):
            if not 0 < len(ids) <= size:
                raise UserError(f"source: {len(ids)} tokens; the encoder reads 1 to {size}")
            tokens[number, : len(ids)], segments[number, : len(ids)] = ids, 0
        segments[len(sources) :, 0] = 0  # rows that nobody asks for look at something
        found = jax.device_get(self.write(params, tokens, segments))
        return [
            (
                tokenizer.decode(text_of(found.tokens[i, 0], int(found.lengths[i, 0]), self.end)),
                float(found.scores[i, 0]),
            )
            for i in range(len(sources))
        ]


def text_of(tokens: np.ndarray, length: int, end: int) -> list[int]:
    """The ids of a text that was found, without its end."""
    ids: list[int] = tokens[:length].tolist()
    return ids[:-1] if ids and ids[-1] == end else ids
