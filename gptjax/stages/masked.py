"""Masked-language modelling: an encoder learns the words that are hidden from it, which of two texts follow each other
(BERT, arXiv 1810.04805), and what a larger encoder, its teacher, thinks of both (DistilBERT, arXiv 1910.01108)."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import Config, MaskedConfig
from gptjax.data.examples import eval_batches
from gptjax.data.masked import MaskedRows, MaskedWindows, num_hidden, open_masked
from gptjax.data.rows import PADDING, Rows
from gptjax.data.sources import TextSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.marks import marks
from gptjax.model.accounting import head_flops, head_params, num_params
from gptjax.model.heads import NEXT_SENTENCE, POOLER, TRANSFORM, init_heads, is_head, pooled, told, transformed
from gptjax.model.loss import IGNORED, Head, cross_entropy, judged
from gptjax.stages.from_examples import FromExamples

Heard = tuple[Array, Head, Array]
"""What the head over the vocabulary reads [b, M, D], that head, and the last hidden states [b, T, D]."""


class Masked(FromExamples[MaskedWindows]):
    """Batches and evaluation of an encoder on texts with hidden words."""

    config: MaskedConfig
    grows = False
    apart = (TRANSFORM, POOLER, NEXT_SENTENCE)
    example_prompt = ""

    @classmethod
    def fit_tokenizer(cls, config: Config, tokenizer: Tokenizer) -> Tokenizer:
        fitted = super().fit_tokenizer(config, tokenizer.with_marks())
        marks(fitted)  # refused here where the model has no room for them
        return fitted

    # Parameters

    @classmethod
    def heads_of(cls, config: Config) -> frozenset[str]:
        return frozenset(cls(config, "cpu").head_names)  # type: ignore[arg-type]

    @property
    def head_names(self) -> tuple[str, ...]:
        return (TRANSFORM, POOLER, NEXT_SENTENCE) if self.config.masking.next_sentence else (TRANSFORM,)

    def init(self, key: Array) -> Any:
        return super().init(key) | init_heads(self.config.model, self.head_names, jax.random.fold_in(key, 1))

    def is_born(self, name: str) -> bool:
        return is_head(name)

    # Rows

    @property
    def row(self) -> MaskedRows:
        """The shapes of one row."""
        length, room = self.config.model.seq_len, num_hidden(self.config.masking, self.config.model.seq_len)
        ids, hidden = (jax.ShapeDtypeStruct((size,), np.int32) for size in (length, room))
        return MaskedRows(ids, ids, ids, hidden, hidden, jax.ShapeDtypeStruct((), np.int32))

    def random_rows(self, seed: int, lead: tuple[int, ...]) -> MaskedRows:
        """Rows [*lead, ...] of random ids, full, with as many hidden as may be."""
        rng, c, row = np.random.default_rng(seed), self.config, self.row
        length, room = row.tokens.shape[0], row.places.shape[0]
        tokens, targets = (rng.integers(0, c.model.vocab_size, (*lead, n), np.int32) for n in (length, room))
        places = np.argsort(rng.random((*lead, length)), axis=-1)[..., :room].astype(np.int32)
        zeros = np.zeros((*lead, length), np.int32)
        second = np.broadcast_to(np.arange(length) >= length // 2, zeros.shape) & c.masking.next_sentence
        foreign = rng.integers(0, 2, lead, np.int32) if c.masking.next_sentence else np.full(lead, PADDING, np.int32)
        return MaskedRows(tokens, zeros, (zeros + second * (c.model.token_types > 1)), places, targets, foreign)

    def _examples(self, source: TextSource) -> MaskedWindows:
        c = self.config
        about = c.model.seq_len, c.model.token_types > 1, self.report
        return open_masked(c.data, c.masking, source, self.known_tokenizer, *about)

    def facts(self) -> str:
        """What it learns, in words."""
        found = self.training
        share = found.packing.efficiency(self.config.model.seq_len)
        return f"{len(found):,} training windows in {found.num_rows:,} rows, {share:.1%} full"

    # Loss

    def counts(self, rows: MaskedRows) -> dict[str, Array]:
        """The hidden tokens, and the rows of which is asked whether their texts follow each other."""
        asked = {"masked": rows.targets != IGNORED}
        if self.config.masking.next_sentence:
            asked["pairs"] = rows.foreign != IGNORED
        return {name: jnp.sum(each, dtype=jnp.float32) for name, each in asked.items()}

    def loss(self, params: Any, rows: MaskedRows, counts: Any, key: Array | None) -> Array:
        """rows [b, ...] -> their part in the mean nats of hidden tokens, plus that of pairs."""
        return self.loss_and_figures(params, rows, counts, key)[0]

    def loss_and_figures(
        self, params: Any, rows: MaskedRows, counts: Any, key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        c = self.config.model
        read, head, hidden = self.heard(params, rows, key)
        with jax.named_scope("loss"):
            parts = {"masked_loss": cross_entropy(read, head, rows.targets, c.vocab_size, c.loss_chunk)}
            parts["masked_loss"] /= counts["masked"]
            if self.config.masking.next_sentence:
                parts["next_loss"] = jnp.sum(_next_nats(params, hidden, rows)[0]) / counts["pairs"]
            return sum(parts.values(), jnp.zeros(())), parts

    def heard(self, params: Any, rows: MaskedRows, key: Array | None) -> Heard:
        """rows [b, ...]; a key of None switches dropout off."""
        types = rows.types if self.config.model.token_types else None
        inputs = Rows(rows.tokens, None, rows.segments, types=types)
        hidden, head = self.network.hidden(params, inputs, key)
        at_places = jnp.take_along_axis(hidden, rows.places[..., None], axis=1)
        return transformed(self.config.model, params, at_places), head, hidden

    @property
    def num_params(self) -> int:
        return num_params(self.config.model) + head_params(self.config.model, self.head_names)

    @property
    def flops(self) -> dict[str, float]:
        c = self.config
        heads = c.train.batch_size * head_flops(c.model, self.row.places.shape[0], self.head_names)
        return {"updates": super().flops["updates"] + heads}

    # Evaluation

    def evaluate(self, params: Any, place: Callable[[MaskedRows], MaskedRows], rows: Sequence[int]) -> dict[str, float]:
        """loss: nats of a hidden token, and of a pair where that is asked, as it is trained; masked_loss and
        masked_accuracy, next_loss and next_accuracy of each; the same words are hidden each time."""
        c = self.config
        batches = eval_batches(self.evaluation, c.micro_batch_size, rows, c.train.eval_batches)
        sums = [self._evaluate_batch(params, place(batch)) for batch in batches]
        each = {name: math.fsum(part[name] for part in jax.device_get(sums)) for name in sums[0]}
        found = {f"masked_{name}": each[f"masked_{name}"] / each["masked"] for name in ("loss", "accuracy")}
        if c.masking.next_sentence:
            found |= {f"next_{name}": each[f"next_{name}"] / each["pairs"] for name in ("loss", "accuracy")}
        return {"loss": sum(found[name] for name in found if name.endswith("loss"))} | found

    @cached_property
    def _evaluate_batch(self) -> Callable[[Any, MaskedRows], dict[str, Array]]:
        """jit of (params, rows [b, ...]) -> sums of nats and of right answers, and counts."""
        c = self.config.model

        def sums(params: Any, rows: MaskedRows) -> dict[str, Array]:
            read, head, hidden = self.heard(params, rows, None)
            values, right = judged(read, head, rows.targets, c.vocab_size, c.loss_chunk)
            found = {"masked_loss": -values, "masked_accuracy": right}
            if self.config.masking.next_sentence:
                found["next_loss"], found["next_accuracy"] = _next_nats(params, hidden, rows)
            return self.counts(rows) | {name: jnp.sum(each, dtype=jnp.float32) for name, each in found.items()}

        return jax.jit(sums)

    def sample(self, params: Any) -> str:
        """An encoder writes nothing, and its config has no train.sample_interval."""
        raise NotImplementedError


def _next_nats(params: Any, hidden: Array, rows: MaskedRows) -> tuple[Array, Array]:
    """Nats [b] of the answer whether two texts follow each other, and whether it is right; 0 where it is not asked."""
    scores = jax.nn.log_softmax(told(params, NEXT_SENTENCE, pooled(params, hidden)))
    asked, answer = rows.foreign != IGNORED, jnp.maximum(rows.foreign, 0)
    nats = -jnp.take_along_axis(scores, answer[:, None], axis=1)[:, 0]
    return jnp.where(asked, nats, 0), asked & (jnp.argmax(scores, axis=1) == answer)
