"""What every model that writes has in common."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gptjax.data.tokenizers import Tokenizer
from gptjax.infer.engine import Engine
from gptjax.infer.request import Request
from gptjax.infer.sampling import Sampling
from gptjax.parallel.network import EncoderDecoder


@dataclass(frozen=True)
class Writes:
    """What writes texts."""

    path: str
    stage: Any
    params: Any
    slots: int

    @property
    def tokenizer(self) -> Tokenizer:
        """`encode(text)`, `decode(ids)` and the table of pieces."""
        tokenizer: Tokenizer = self.stage.known_tokenizer
        return tokenizer

    @property
    def context(self) -> int:
        """Tokens T that it sees at most."""
        length: int = self.stage.config.model.seq_len
        return length

    @cached_property
    def engine(self) -> Engine:
        """What generates, shared by all calls."""
        network = self.stage.network
        encoder = network if isinstance(network, EncoderDecoder) else None
        how = {"tokenizer": self.tokenizer, "layout": self.stage.layout, "encoder": encoder}
        return Engine(network.decoder, self.params, slots=self.slots, **how)

    def prompt(self, text: str, suffix: str | None = None) -> list[int]:
        """The ids of a text that is continued, answered, or written of."""
        raise NotImplementedError

    def request(self, prompt: str | Sequence[int], seed: int = 0, sample: int = 0, **how: Any) -> Request:
        """A prompt as a request: a text as `prompt` reads it; token ids are taken as they are. `how` as for
        `generate`."""
        suffix = how.pop("suffix", None)
        ids = self.prompt(prompt, suffix) if isinstance(prompt, str) else [int(i) for i in prompt]
        own = {
            name: how.pop(name) for name in ("max_tokens", "stop", "tops", "prompt_logprobs", "drawn") if name in how
        }
        stop = own.pop("stop", ())
        words = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(**how)
        about = {"sampling": sampling, "seed": seed, "sample": sample, "stop": words, "stop_tokens": self.stage.ends}
        return self._asked(ids, about | own)

    def _asked(self, ids: list[int], how: dict[str, Any]) -> Request:
        return Request(ids, **how)

    def generate(self, prompt: str | Sequence[Any], *, seed: int = 0, **how: Any) -> Any:
        """The text that follows a prompt, or of several prompts (a list of texts or of token ids) a list of texts.

        max_tokens, 16 unless given; stop, a string or several; temperature (1; 0 takes the likeliest), top_k, top_p,
        min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias; suffix, a text that it ends before,
        of a model that has learned to fill in. The same seed gives the same text, whatever is asked beside it. Raises
        UserError for a prompt or a value that cannot be.
        """
        one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], (int, np.integer)))
        prompts = [prompt] if one else prompt
        texts = [reply.text for reply in self.engine.run([self.request(p, seed, **how) for p in prompts])]
        return texts[0] if one else texts

    def stream(self, prompt: str | Sequence[int], **how: Any) -> Iterator[str]:
        """The same text piece by piece, as it comes."""
        return self.engine.stream(self.request(prompt, **how))
