"""`gptjax chat PATH`."""

import sys
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from gptjax.commands.arguments import Positional
from gptjax.config.fields import Positive, frozen
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.api import Model
    from gptjax.data.chat import Message


@frozen
class Command:
    """Talk with a model that has learned conversations.

    A line is a turn; an empty one starts a new conversation; Ctrl-C ends a reply, Ctrl-D the talk. When a conversation
    no longer fits the context, its oldest turns are forgotten, two at a time, and it says so; the system text stays."""

    folder: Annotated[str, Positional("PATH")]
    """A run folder or a Hugging Face directory."""
    system: str = ""
    """What the assistant is told before everything."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: Annotated[int, Field(ge=-1)] = 50
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens up to this probability."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """The same seed and the same words give the same replies."""
    tokens: Positive = 256
    """Length of a reply; at most half of the context."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """How parameters are held; auto is the type that the model computes in."""

    def run(self) -> None:
        """Read turns from standard input and print replies as they come."""
        from gptjax import api
        from gptjax.data.chat import Message

        model = api.load(self.folder, weights=self.weights, slots=1)
        if not model.chats:
            raise UserError(f"{self.folder}: has not learned conversations; try gptjax sample, or the stage sft")
        first = [Message("system", self.system)] if self.system.strip() else []
        history, turn = list(first), 0
        while (words := self._read()) is not None:
            if not words.strip():
                history = list(first)
                continue
            history.append(Message("user", words))
            prompt = self._fit(model, history, len(first))
            if prompt is None:
                history.pop()
                continue
            reply = self._reply(model, prompt, turn)
            turn += 1
            if reply.strip():
                history.append(Message("assistant", reply))
            else:
                print("(no words)")
                history.pop()  # a conversation goes on from words alone

    def _read(self) -> str | None:
        """The next turn; None at the end."""
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: no UTF-8 ({error.reason}); convert it") from None
        if "\ufffd" in line or any("\ud800" <= c <= "\udfff" for c in line):
            raise UserError("standard input: no UTF-8; convert it")
        return line

    def _fit(self, model: "Model", history: "list[Message]", fixed: int) -> list[int] | None:
        """The ids of a conversation, whose oldest turns are forgotten until a reply has room; None where the last turn
        alone leaves none."""
        from gptjax.stages import SFT

        assert isinstance(model.stage, SFT)
        room, before = model.context - self._length(model), len(history)
        while len(prompt := model.stage.chat.prompt(history)) > room:
            if len(history) <= fixed + 1:
                print(f"(too long: a turn may take {room} of the context's {model.context} tokens)")
                return None
            del history[fixed : fixed + 2]
        if len(history) < before:
            print(f"(forgot the oldest {before - len(history)} turns)")
        return prompt.tolist()

    def _length(self, model: "Model") -> int:
        return min(self.tokens, model.context // 2)

    def _reply(self, model: "Model", prompt: list[int], turn: int) -> str:
        shown = ""
        pieces = model.stream(
            prompt,
            seed=self.seed,
            sample=turn,
            max_tokens=self._length(model),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
        try:
            for piece in pieces:
                shown += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
        print()
        return shown
