"""What the stages share whose model is an encoder with heads of its own beside it."""

from typing import Any

import jax
from jax import Array

from gptjax.config import Config
from gptjax.data.rows import Rows
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.marks import marks
from gptjax.model.accounting import head_params, num_params
from gptjax.model.heads import HEADS, init_heads, is_head
from gptjax.model.loss import Head
from gptjax.parallel.network import Network
from gptjax.stages.from_examples import FromExamples, Kind


class WithHeads(FromExamples[Kind]):
    """An encoder that learns from rows in which its heads are asked something."""

    classes = 0  # numbers that the classifier among them gives
    example_prompt = ""

    @classmethod
    def fit_tokenizer(cls, config: Config, tokenizer: Tokenizer) -> Tokenizer:
        fitted = super().fit_tokenizer(config, tokenizer.with_marks())
        marks(fitted)  # refused here where the model has no room for them
        return fitted

    @property
    def head_names(self) -> tuple[str, ...]:
        return tuple(name for name in HEADS if name in self.heads_of(self.config))

    def init(self, key: Array) -> Any:
        heads = init_heads(self.config.model, self.head_names, jax.random.fold_in(key, 1), self.classes)
        return super().init(key) | heads

    def is_born(self, name: str) -> bool:
        return is_head(name)

    @property
    def num_params(self) -> int:
        return num_params(self.config.model) + head_params(self.config.model, self.head_names, self.classes)


def encoded(network: Network, params: Any, rows: Any, key: Array | None) -> tuple[Array, Head]:
    """rows [b, T], which have tokens, segments and types -> the last hidden states [b, T, D], and the head over the
    vocabulary. A model of one type of token, or of none, is told no types: RoBERTa's texts differ in none."""
    types = rows.types if network.config.model.token_types > 1 else None
    return network.hidden(params, Rows(rows.tokens, None, rows.segments, types=types), key)
