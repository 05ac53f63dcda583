"""What all stages share: a decoder on devices, the tokenizer and the text that it learns from."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from jax import Array

from gptjax.config import Config
from gptjax.data.sources import Corpus, TextSource
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.model.accounting import Reading, adapter_params, num_params, scalar_params
from gptjax.model.lora import is_adapter
from gptjax.parallel.network import Network
from gptjax.sharding.rules import Layout
from gptjax.train.step import ByGradient

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Base(ByGradient):
    """A decoder that learns from rows of a text."""

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
    apart: ClassVar[tuple[str, ...]] = ()
    """First parts of the names of what is trained beside the decoder, which whoever loads a run does without."""
    grows: ClassVar[bool]
    """Whether a model may have more ids than the weights that it starts from."""
    example_prompt: ClassVar[str]
    """For the command that samples; empty where there is nothing to sample."""

    @cached_property
    def network(self) -> Network:
        return Network(self.config, self.platform, self.layout)

    @property
    def beside(self) -> tuple[str, ...]:
        """First parts of the names of what stands beside the decoder in the tree of parameters."""
        return ()

    def agree(self) -> None:
        """What all processes look up together, before each of them checks the stage for itself."""

    @property
    def beside_text(self) -> dict[str, str]:
        """Field -> digest of what it names, which a run learns from beside its text; pinned as that is."""
        return {}

    @property
    def learning(self) -> tuple[Reading, ...]:
        """Who reads the rows of an update, the decoder first."""
        c = self.config
        return (Reading(c.model, sequences=c.row_sequences, lora=c.adapter, predicts=c.predicts),)

    @property
    def judging(self) -> tuple[Reading, ...]:
        """Who reads the rows of a step once before any is learned from."""
        return ()

    @property
    def num_params(self) -> int:
        """Numbers of the model, without padding; adapters, and a scalar head where it does not predict, among them."""
        c = self.config
        adapters = sum(adapter_params(c.model, c.adapter).values())
        return num_params(c.model) + adapters + (0 if c.predicts else scalar_params(c.model))

    @property
    def flops(self) -> dict[str, float]:
        """Model FLOPs of a step after the ramp, by its parts."""
        rows = self.config.updates * self.config.train.batch_size
        return {"updates": rows * sum(each.flops for each in self.learning)}

    @property
    def flops_per_token(self) -> float:
        """Of a step, for each token that it learns from."""
        return sum(self.flops.values()) / self.config.step_tokens

    def on(self, layout: Layout) -> Self:
        return replace(self, layout=layout)

    def init(self, key: Array) -> Any:
        return self.network.init(key)

    def is_frozen(self, name: str) -> bool:
        return False

    @classmethod
    def heads_of(cls, config: Config) -> frozenset[str]:
        """First parts of the names of what a run has trained beside its model that another may go on with."""
        return frozenset()

    def is_born(self, name: str) -> bool:
        """Whether a parameter stands beside those of the weights that a run starts from, which have none of its name:
        it is drawn."""
        return is_adapter(name)

    def of_weights(self, load: Callable[[Any], Any], places: Any) -> Any:
        """Parameters, where `places` says, of the weights that a run starts from: `load` gives those of a decoder."""
        return load(places)

    @staticmethod
    def decoder_at(config: Config) -> tuple[str, ...]:
        """Where the state of a run has what others load of it."""
        return ("params",)

    def keep(self, run: Path, step: int, figures: dict[str, Any]) -> None:
        """Nothing: the log has the figures."""

    def sample(self, params: Any) -> str:
        """A text that shows what the model can do; the config of one that writes none has no train.sample_interval."""
        raise NotImplementedError

    def pins(self, params: Any) -> dict[str, tuple[str, dict[str, str]]]:
        """Field -> its value and the fingerprints of what it names, which stays as it is beside what is trained and
        must be the same at every start."""
        return {}

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

    @cached_property
    def training_text(self) -> TextSource:
        return self._split(self.config.data.train_split)

    @cached_property
    def evaluation_text(self) -> TextSource:
        return self._split(self.config.data.eval_split)

    def _split(self, name: str) -> TextSource:
        return self.known_corpus.split(name, self.config.data.split_by)

    @property
    def known_corpus(self) -> Corpus:
        if self.corpus is None:
            raise ValueError("this stage was built without a text")
        return self.corpus

    @property
    def known_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this stage was built without a tokenizer")
        return self.tokenizer
