"""An encoder: its states, how alike texts are, hidden words, and what it has learned to tell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.data.examples import stacked
from gptjax.data.rows import Rows
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.marks import framed, marks
from gptjax.errors import UserError
from gptjax.model.heads import TRANSFORM, transformed
from gptjax.model.loss import logits
from gptjax.stages import Classify, Masked


@dataclass(frozen=True)
class Encoder:
    """An encoder; make one with `load`."""

    path: str
    stage: Masked | Classify
    params: Any
    kind, use = "an encoder", "gptjax tell takes it"

    @property
    def tokenizer(self) -> Tokenizer:
        return self.stage.known_tokenizer

    def hidden(self, texts: Sequence[str]) -> list[np.ndarray]:
        """float32 [n, D] of each text: the last state of each of its tokens, those that stand around it among them."""
        found = []
        for text in texts:
            ids = framed(self.tokenizer, text)
            found.append(np.asarray(self._hidden(self.params, *self._row(ids)))[0, : len(ids)])
        return found

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, D], of length 1: the mean of each text's states, whose products say how alike texts are
        (Sentence-BERT, arXiv 1908.10084)."""
        means = np.stack([states.mean(0) for states in self.hidden(texts)])
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)

    def fill(self, text: str, count: int = 5) -> list[list[tuple[str, float]]]:
        """Of each [MASK] in a text, by the tokenizer's own name, the likeliest tokens and their probabilities."""
        stage = self.stage
        if TRANSFORM not in self.params or not isinstance(stage, Masked):
            raise UserError(f"{self.path}: has no head for hidden words; take a run of stage masked")
        mask = marks(self.tokenizer).mask
        ids = framed(self.tokenizer, text)
        asked = np.flatnonzero(ids == mask)
        if not len(asked):
            name = self.tokenizer.pieces[mask].decode()
            raise UserError(f"text: has no {name}; write it where a word is asked for")
        scores = np.asarray(self._scores(self.params, *self._row(ids)))[0, asked]
        tops = np.argsort(-scores, axis=-1)[:, :count]
        decode = self.tokenizer.decode
        return [
            [(decode([i], inside=True), float(row[i])) for i in top.tolist()]
            for row, top in zip(scores, tops, strict=True)
        ]

    def tell(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, float]] | list[float]:
        """Of each text, or pair of texts, the probability of each label; or the number, where it has learned one."""
        stage = self.stage
        if not isinstance(stage, Classify):
            raise UserError(f"{self.path}: tells no classes; fine-tune it (stage classify)")
        rows = [stage.unlabelled((text,) if isinstance(text, str) else text) for text in texts]
        scores = [np.asarray(self._told(self.params, stacked([row])))[0] for row in rows]
        names = stage.config.labels.names
        if not names:
            return [float(each[0]) for each in scores]
        shares = [np.exp(each - each.max()) / np.exp(each - each.max()).sum() for each in scores]
        return [dict(zip(names, share.tolist(), strict=True)) for share in shares]

    def _row(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[1, T'] of ids, and 0 where they are; of a few lengths, so that there are few programs."""
        most = self.stage.config.model.seq_len
        if len(ids) > most:
            raise UserError(f"{len(ids)} tokens: the context holds {most}")
        length = min(max(16, 1 << (len(ids) - 1).bit_length()), most)
        tokens, segments = np.zeros((1, length), np.int32), np.ones((1, length), np.int32)
        tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 0
        return tokens, segments

    @cached_property
    def _hidden(self) -> Callable[..., Any]:
        def hidden(params: Any, tokens: Any, segments: Any) -> Any:
            return self.stage.network.alone.hidden(params, Rows(tokens, None, segments), None)[0].astype(jnp.float32)

        return jax.jit(hidden)

    @cached_property
    def _scores(self) -> Callable[..., Any]:
        """jit of (params, tokens, segments [1, T]) -> probabilities [1, T, V]."""
        config = self.stage.config.model

        def scores(params: Any, tokens: Any, segments: Any) -> Any:
            hidden, head = self.stage.network.alone.hidden(params, Rows(tokens, None, segments), None)
            found = logits(transformed(config, params, hidden), head, config.vocab_size)
            return jax.nn.softmax(found)[..., : config.vocab_size]

        return jax.jit(scores)

    @cached_property
    def _told(self) -> Callable[..., Any]:
        stage = self.stage
        assert isinstance(stage, Classify)
        alone = replace(stage, layout=None)
        return jax.jit(lambda params, rows: alone.scores(params, rows, None))
