"""What the stages share that learn from examples, each of which is seen once an epoch."""

from collections.abc import Sequence
from functools import cached_property
from typing import Generic, TypeVar

from gptjax.data.chat import ChatFormat, chat_format, with_chat
from gptjax.data.examples import ExampleFeed, ExampleSet
from gptjax.data.sources import TextSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.stages.base import Base

Kind = TypeVar("Kind", bound=ExampleSet)


class FromExamples(Base, Generic[Kind]):
    """A model that learns from examples."""

    def check(self) -> None:
        """Raises UserError where a split has no example to learn from."""
        assert self.training and self.evaluation

    @cached_property
    def training(self) -> Kind:
        return self._examples(self.training_text)

    @cached_property
    def evaluation(self) -> Kind:
        return self._examples(self.evaluation_text)

    def _examples(self, source: TextSource) -> Kind:
        """Those of a split. Raises UserError where it has none."""
        raise NotImplementedError

    @property
    def epoch_tokens(self) -> int:
        """Places for tokens in the rows of an epoch."""
        return self.training.num_rows * self.config.row_tokens

    def feed(self, positions: Sequence[int] | None, rows: Sequence[int]) -> ExampleFeed:
        c, found = self.config, self.training
        end = round(c.train.epochs * found.num_rows) if c.train.epochs else None
        (start,) = positions or (0,)
        return ExampleFeed(found, c.data.seed, c.micro_batch_size, rows, start, end, c.data.threads)


class FromChat(FromExamples[Kind]):
    """A decoder that learns from conversations in our chat format, or from what is said of them."""

    grows = True

    @staticmethod
    def own_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
        """With our chat template. Raises UserError where the model has no room for the chat tokens."""
        return with_chat(chat_format(tokenizer).tokenizer)

    @cached_property
    def chat(self) -> ChatFormat:
        return chat_format(self.known_tokenizer)
