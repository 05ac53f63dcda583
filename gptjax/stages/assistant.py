"""What the stages share whose model answers a user."""

import numpy as np

from gptjax.data.chat import Message
from gptjax.stages.from_examples import FromChat, Kind
from gptjax.stages.writer import Writer


class Assistant(FromChat[Kind], Writer):
    """A decoder that learns what to say in our chat format."""

    example_prompt = "Hello!"

    def prompt(self, text: str) -> np.ndarray:
        """What the user says, for the assistant to answer."""
        return self.chat.prompt([Message("user", text)])

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.chat.end, self.known_tokenizer.eot)

    def shown(self, prompt: str, reply: str) -> str:
        return f"{prompt}\n{reply}"
