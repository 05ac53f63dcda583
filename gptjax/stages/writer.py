"""What the stages share whose model writes: a sample of it between steps."""

from functools import cached_property
from typing import Any

import numpy as np

from gptjax.infer.engine import Engine
from gptjax.infer.request import Request
from gptjax.infer.sampling import Sampling
from gptjax.stages.base import Base

SAMPLE_TOKENS = 200
SAMPLING = Sampling(temperature=0.8, top_k=50)


class Writer(Base):
    """A decoder that goes on from a prompt."""

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
