"""Fine-tuning of an encoder to tell classes of texts, or a number, by what it makes of the first token."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.classes import of_classes, of_numbers
from gptjax.config import ClassifyConfig, Config
from gptjax.data.classed import LabelledRows, LabelledTexts, frame, labelled_row, open_labelled
from gptjax.data.examples import eval_batches
from gptjax.data.sources import TextSource
from gptjax.data.tokenizers.marks import marks
from gptjax.model.accounting import Reading
from gptjax.model.heads import CLASSIFIER, POOLER, pooled, told
from gptjax.stages.encoder import WithHeads, encoded

HEAD_NAMES = (POOLER, CLASSIFIER)


class Classify(WithHeads[LabelledTexts]):
    """Batches and evaluation of an encoder on labelled texts."""

    config: ClassifyConfig
    grows = True
    apart = HEAD_NAMES

    @classmethod
    def heads_of(cls, config: Config) -> frozenset[str]:
        return frozenset(HEAD_NAMES)

    @property
    def classes(self) -> int:  # type: ignore[override]
        """Numbers that the classifier gives; one for regression."""
        return len(self.config.labels.names) or 1

    @property
    def learning(self) -> tuple[Reading, ...]:
        return (Reading(self.config.model, predicts=False, pooled=True),)

    # Rows

    @property
    def row(self) -> LabelledRows:
        """The shapes of one row."""
        ids = jax.ShapeDtypeStruct((self.config.model.seq_len,), np.int32)
        label = jax.ShapeDtypeStruct((), np.int32 if self.config.labels.names else np.float32)
        return LabelledRows(ids, ids, ids, label, jax.ShapeDtypeStruct((), np.float32))

    def random_rows(self, seed: int, lead: tuple[int, ...]) -> LabelledRows:
        """Rows [*lead, ...] of random ids and labels, full."""
        rng, c = np.random.default_rng(seed), self.config
        tokens = rng.integers(0, c.model.vocab_size, (*lead, c.model.seq_len), np.int32)
        label = rng.integers(0, self.classes, lead, np.int32) if c.labels.names else rng.random(lead, np.float32)
        return LabelledRows(tokens, np.zeros_like(tokens), np.zeros_like(tokens), label, np.ones(lead, np.float32))

    def _examples(self, source: TextSource) -> LabelledTexts:
        c, about = self.config, marks(self.known_tokenizer)
        how = c.labels.names, source, self.known_tokenizer, about.cls, about.sep, about.double_sep
        return open_labelled(c.data, *how, c.model.seq_len, self.report)

    def facts(self) -> str:
        """What it learns, in words."""
        found = self.training
        share = found.packing.efficiency(self.config.model.seq_len)
        return f"{len(found):,} training texts, {share:.1%} full{found.losses}"

    def unlabelled(self, texts: Sequence[str]) -> LabelledRows:
        """A row of one text, or of two, of which nothing is known."""
        c, about = self.config, marks(self.known_tokenizer)
        ids, types = frame(self.known_tokenizer, texts, about.cls, about.sep, about.double_sep, c.model.seq_len)
        return labelled_row(ids, types, c.model.seq_len, np.int32(0) if c.labels.names else np.float32(0))

    # Loss

    def counts(self, rows: LabelledRows) -> Array:
        """The number of texts."""
        return jnp.sum(rows.weight)

    def loss(self, params: Any, rows: LabelledRows, counts: Array, key: Array | None) -> Array:
        """rows [b, ...] -> their part in the mean nats of `counts` texts, or in their mean squared error; a key of None
        switches dropout off."""
        scores = self.scores(params, rows, key)
        with jax.named_scope("loss"):
            return jnp.sum(rows.weight * self._losses(scores, rows.label)) / counts

    def scores(self, params: Any, rows: LabelledRows, key: Array | None) -> Array:
        """float32 [b, classes]: logits, or the number."""
        hidden, _ = encoded(self.network, params, rows, key)
        return told(params, CLASSIFIER, pooled(params, hidden))

    def _losses(self, scores: Array, label: Array) -> Array:
        if not self.config.labels.names:
            return jnp.square(scores[:, 0] - label)
        return -jnp.take_along_axis(jax.nn.log_softmax(scores), label[:, None], axis=1)[:, 0]

    def evaluate(
        self, params: Any, place: Callable[[LabelledRows], LabelledRows], rows: Sequence[int]
    ) -> dict[str, float]:
        """loss as it is trained, and the figures of evaluate.classes."""
        c = self.config
        batches = eval_batches(self.evaluation, c.micro_batch_size, rows, c.train.eval_batches)
        found = jax.device_get([self._judged(params, place(batch)) for batch in batches])
        losses, scores, labels, weights = (np.concatenate(each) for each in zip(*found, strict=True))
        there = weights > 0
        figures = {"loss": float(losses[there].mean(dtype=np.float64))}
        if not c.labels.names:
            return figures | of_numbers(labels[there], scores[there, 0])
        return figures | of_classes(labels[there], scores[there].argmax(-1), len(c.labels.names))

    @cached_property
    def _judged(self) -> Callable[[Any, LabelledRows], tuple[Array, ...]]:
        """jit of (params, rows [b, ...]) -> losses, scores, labels and weights, whole on every process."""

        def judged(params: Any, rows: LabelledRows) -> tuple[Array, ...]:
            scores = self.scores(params, rows, None)
            return self._losses(scores, rows.label), scores, rows.label, rows.weight

        return jax.jit(judged, out_shardings=self.layout.sharding(()) if self.layout else None)
