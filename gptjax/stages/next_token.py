"""What the stages that predict the next token share: pretraining and supervised fine-tuning differ in their rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.config import Config
from gptjax.data.rows import Rows
from gptjax.data.sources import Corpus, TextSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.infer.engine import Engine, Request
from gptjax.infer.sampling import Sampling
from gptjax.model.loss import IGNORED, cross_entropy
from gptjax.parallel.network import Network
from gptjax.sharding.rules import Layout

Report = Callable[[str, int, int], None]
SAMPLE_TOKENS = 200
SAMPLING = Sampling(temperature=0.8, top_k=50)


@dataclass(frozen=True)
class NextToken:
    """A decoder that learns the targets of rows [T]."""

    config: Config
    platform: str
    """Where it computes: cpu, gpu or tpu."""
    layout: Layout | None = None
    """None on a single device."""
    tokenizer: Tokenizer | None = None
    """As `fit_tokenizer` gives it. None where only shapes and the loss are wanted."""
    corpus: Corpus | None = None
    """The text, opened once: what becomes of its files does not reach a run. None as for the tokenizer."""
    report: Report = lambda *_: None
    """Told how far something is that takes long."""

    on_policy = False
    grows: ClassVar[bool]
    """Whether a model may have more ids than the weights that it starts from."""
    example_prompt: ClassVar[str]
    """For the command that samples."""

    @cached_property
    def network(self) -> Network:
        return Network(self.config, self.platform, self.layout)

    def init(self, key: Array) -> Any:
        return self.network.init(key)

    def is_frozen(self, name: str) -> bool:
        return False

    @staticmethod
    def own_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
        """A tokenizer as a run of the stage keeps it."""
        return tokenizer

    @classmethod
    def fit_tokenizer(cls, config: Config, tokenizer: Tokenizer) -> Tokenizer:
        """The stage's own tokenizer with the model's vocabulary: ids beyond the tokenizer's stand for nothing, and chat
        tokens beyond the model's are absent.

        Raises UserError if text can yield an id that the model does not have.
        """
        size, needed = config.model.vocab_size, tokenizer.least_vocab_size
        if size < needed:
            name = f"the tokenizer {config.data.tokenizer or 'of ' + config.init_from}"
            raise UserError(f"model.vocab_size = {size}: {name} needs {needed}; nearest {needed}")
        return cls.own_tokenizer(tokenizer.fit(size))

    def counts(self, rows: Rows) -> Array:
        """The number of targets."""
        return jnp.sum(rows.targets != IGNORED, dtype=jnp.float32)

    def loss(self, params: Any, rows: Rows, counts: Array, key: Array | None) -> Array:
        """rows [b, T] -> their part in the mean nats of `counts` targets; a key of None switches dropout off."""
        hidden, embedding, targets = self.network.before_head(params, rows, key)
        with jax.named_scope("loss"):
            c = self.config.model
            return cross_entropy(hidden, embedding, targets, c.vocab_size, c.loss_chunk) / counts

    def sample(self, params: Any) -> str:
        """One text from train.sample_prompt on, the same seed each time so that samples compare."""
        prompt, engine = self.config.train.sample_prompt, self._engine
        ids = self.prompt(prompt)[-self.config.model.seq_len :].tolist()
        engine.params = params
        (reply,) = engine.run([Request(ids, SAMPLE_TOKENS, SAMPLING, stop_tokens=self.ends)])
        engine.clear()
        return self.shown(prompt, reply.text)

    def prompt(self, text: str) -> np.ndarray:
        """Ids that the model is to go on from, int32 [N]."""
        raise NotImplementedError

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end what it says."""
        return (self.known_tokenizer.eot,)

    def shown(self, prompt: str, reply: str) -> str:
        """What a user is shown of both."""
        return prompt + reply

    @cached_property
    def _engine(self) -> Engine:
        """One row, without parameters."""
        network, tokenizer = self.network, self.known_tokenizer
        return Engine(network.decoder, None, slots=1, prefixes=0, tokenizer=tokenizer, layout=self.layout)

    @cached_property
    def training_text(self) -> TextSource:
        return self._split(self.config.data.train_split)

    @cached_property
    def evaluation_text(self) -> TextSource:
        return self._split(self.config.data.eval_split)

    def _split(self, name: str) -> TextSource:
        if self.corpus is None:
            raise ValueError("this stage was built without a text")
        return self.corpus.split(name, self.config.data.split_by)

    @property
    def known_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this stage was built without a tokenizer")
        return self.tokenizer
