"""Pretraining: next-token prediction on packed rows of a text."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import Config
from gptjax.data.rows import Rows, next_token
from gptjax.data.sources import TextSource
from gptjax.data.stream import TokenStream, eval_batches, require_one_row
from gptjax.data.texts import Mixture, epochs, require_epochs, source_of, stream
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.tokenizer import INFILL
from gptjax.errors import UserError
from gptjax.model.loss import IGNORED, log_probs
from gptjax.stages.next_token import NextToken
from gptjax.train.processes import first


class Pretrain(NextToken):
    """Batches and evaluation of a decoder on rows of a text."""

    grows = False
    example_prompt = "def "

    @classmethod
    def fit_tokenizer(cls, config: Config, tokenizer: Tokenizer) -> Tokenizer:
        if not config.data.fim_rate:
            return super().fit_tokenizer(config, tokenizer)
        wanted = tokenizer.with_infill()
        fitted = super().fit_tokenizer(config, wanted)
        if not fitted.infills:
            needed = 1 + max(wanted.special[name] for name in INFILL)
            raise UserError(
                f"model.vocab_size = {config.model.vocab_size}: no room for the tokens of data.fim_rate, "
                f"{' '.join(INFILL)}; nearest {needed}"
            )
        return fitted

    @property
    def row(self) -> Rows:
        """The shapes of one row."""
        ids = jax.ShapeDtypeStruct((self.config.model.seq_len,), np.int32)
        return Rows(ids, ids, ids if self.config.separates else None)

    def random_rows(self, seed: int, lead: tuple[int, ...]) -> Rows:
        """Rows [*lead, T] of random ids, any of which will do for an end of text."""
        shape = (*lead, self.config.model.seq_len + 1)
        tokens = np.random.default_rng(seed).integers(0, self.config.model.vocab_size, shape, np.int32)
        return next_token(tokens, 0 if self.config.separates else None)

    def agree(self) -> None:
        """Has the first process make what is kept of the text, for those that share the cache."""
        if self.config.data.cache_tokens:
            first(self._keep_ids)

    def _keep_ids(self) -> str:
        source_of(self.config.data, self.training_text, self.known_tokenizer, self.report)
        return ""

    def check(self) -> None:
        """Raises UserError where a split has not enough text for a row."""
        for source in (self.training_text, *self._evaluated.values()):
            require_one_row(source, self.known_tokenizer, self.config.model.seq_len)
        c = self.config
        require_epochs(c.data, self.known_corpus, self.known_tokenizer, c.train.total_tokens)

    @property
    def epoch_tokens(self) -> int:
        """Tokens of the training split, which is read whole for it. Raises UserError for a mixture."""
        if isinstance(self.corpus, Mixture):
            raise UserError(
                f"train.epochs = {self.config.train.epochs:g}: the sources of a mixture end at different times; give "
                "train.total_tokens"
            )
        source, encode = self.training_text, self.known_tokenizer.encode
        total, done, size = 0, 0, source.num_bytes
        for number in range(len(source)):
            record = source[number]
            total += len(encode(record.text)) + record.last
            done += len(record.text.encode())
            self.report("counting tokens", done, size)
        return total

    def facts(self) -> str:
        """What it learns, in words."""
        text, corpus, c = f"{len(self.training_text):,} training records", self.corpus, self.config
        if not isinstance(corpus, Mixture):
            return text
        often = epochs(c.data, corpus, self.known_tokenizer, c.train.total_tokens)
        shares = zip(corpus.labels, corpus.weights, strict=True)
        return f"{text}: " + ", ".join(
            f"{label} {share:.1%} of the tokens, read {often[label]:.2f} times" for label, share in shares
        )

    def feed(self, positions: Sequence[int] | None, rows: Sequence[int]) -> TokenStream:
        c = self.config
        return stream(
            c.data,
            self.known_corpus,
            self.known_tokenizer,
            c.model.seq_len,
            micro_batch=c.micro_batch_size,
            rows=rows,
            positions=positions,
            separate=c.separates,
        )

    @cached_property
    def _evaluated(self) -> dict[str, TextSource]:
        """The evaluation split, of a mixture that of each text by its label."""
        data, corpus = self.config.data, self.corpus
        if not isinstance(corpus, Mixture):
            return {"": self.evaluation_text}
        return dict(zip(corpus.labels, corpus.splits(data.eval_split, data.split_by), strict=True))

    def evaluate(self, params: Any, place: Callable[[Rows], Rows], rows: Sequence[int]) -> dict[str, float]:
        """Loss in nats per token and bits per byte over the evaluation split, in order. Of a mixture, that of each
        text and what they are by the weights of the tokens that training begins with."""
        corpus = self.corpus
        weights = corpus.weights if isinstance(corpus, Mixture) else (1.0,)
        every = [self._sums(params, source, place, rows) for source in self._evaluated.values()]
        nats, size = (
            math.fsum(weight * each[of] / each[1] for weight, each in zip(weights, every, strict=True)) for of in (0, 2)
        )
        found = {"loss": nats, "bits_per_byte": nats / math.log(2) / size}
        return found | {
            f"loss_{label}": each[0] / each[1] for label, each in zip(self._evaluated, every, strict=True) if label
        }

    def _sums(
        self, params: Any, source: TextSource, place: Callable[[Rows], Rows], rows: Sequence[int]
    ) -> tuple[float, float, float]:
        """Nats, targets, and the UTF-8 bytes that these stand for, of one pass."""
        c = self.config
        batches = eval_batches(
            source_of(c.data, source, self.known_tokenizer),
            self.known_tokenizer,
            c.model.seq_len,
            c.micro_batch_size,
            rows=rows,
            separate=c.separates,
            limit=c.train.eval_batches,
        )
        sums = [self._evaluate_batch(params, place(batch)) for batch in batches]
        nats, targets, size = (math.fsum(column) for column in zip(*jax.device_get(sums), strict=True))
        return nats, targets, size

    @cached_property
    def _evaluate_batch(self) -> Callable[[Any, Rows], tuple[Array, Array, Array]]:
        """jit of (params, rows [b, T]) -> nats, targets, and the UTF-8 bytes that the targets stand for."""
        c, token_bytes = self.config.model, self.known_tokenizer.token_bytes()

        def sums(params: Any, rows: Rows) -> tuple[Array, Array, Array]:
            hidden, head, targets = self.network.before_head(params, rows, None)
            nats = -jnp.sum(log_probs(hidden, head, targets, c.vocab_size, c.loss_chunk))
            size = jnp.where(targets == IGNORED, 0, jnp.asarray(token_bytes)[jnp.maximum(targets, 0)])
            return nats, jnp.sum(targets != IGNORED, dtype=jnp.int32), jnp.sum(size)

        return jax.jit(sums)

    def prompt(self, text: str) -> np.ndarray:
        """The ids of a text; of none the end of another, after which a text begins."""
        ids = self.known_tokenizer.prompt(text)
        return ids if len(ids) else np.array([self.known_tokenizer.eot], np.int32)
