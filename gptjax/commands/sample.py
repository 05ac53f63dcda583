"""`gptjax sample PATH`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from gptjax.commands.arguments import Positional, Repeated
from gptjax.config.fields import Count, Positive, frozen
from gptjax.errors import UserError

if TYPE_CHECKING:
    from gptjax.api import Model, Translator
    from gptjax.infer.request import Reply


@frozen
class Command:
    """Continue prompts with a trained model."""

    folder: Annotated[str, Positional("PATH")]
    """A run folder or a Hugging Face directory."""
    prompt: Annotated[tuple[str, ...], Repeated()] = ()
    """Text to continue, or for a model that has learned conversations what the user says, or for an encoder-decoder
    what it is to write of; may be given several times. An empty one starts a text of its own."""
    file: str = ""
    """A file with a prompt a line, or - for standard input, whole."""
    suffix: str = ""
    """What the text ends before, of a model that has learned to fill in (data.fim_rate)."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: Annotated[int, Field(ge=-1)] = 0
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens up to this probability."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Keep tokens of at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Makes tokens that were there less likely; 1 is none."""
    stop: Annotated[tuple[str, ...], Repeated()] = ()
    """A string that ends a text; may be given several times."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """The same seed gives the same texts."""
    beams: Count = 0
    """Of an encoder-decoder: search for the likeliest text with so many of them in sight, in place of drawing one; 0
    draws."""
    length_penalty: float | None = None
    """With --beams: a text's log-probability is divided by its length to this power; none is the run's
    writing.length_penalty."""
    samples: Positive = 1
    """How many of each prompt."""
    tokens: Positive = 200
    """Length of each."""
    roll: bool = False
    """When the context is full, go on from its later half; else a text ends there."""
    logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """With --json: the likeliest tokens beside each one."""
    json: bool = False
    """A line of JSON for each text: prompt, text, tokens, log-probabilities in nats, and why it ended."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """How parameters are held; auto is the type that the model computes in."""

    def run(self) -> None:
        """Print each prompt with its continuations, as they come."""
        if self.roll and self.suffix:
            raise UserError("--roll and --suffix: give one of them; what is filled in stands within one context")
        prompts = self._prompts()
        from gptjax import api

        model = api.load_any(self.folder, weights=self.weights, slots=min(api.SLOTS, len(prompts) * self.samples))
        if isinstance(model, api.Encoder):
            raise UserError(f"{self.folder}: {model.kind}, which writes nothing; {model.use}")
        if self.beams:
            return self._searched(model, prompts)
        show = self._lines if self.json else self._texts
        show(model, [(prompt, number) for prompt in prompts for number in range(self.samples)])

    def _searched(self, model: "Model | Translator", prompts: list[str]) -> None:
        from gptjax.api import Translator

        if not isinstance(model, Translator):
            raise UserError(f"--beams {self.beams}: for what an encoder-decoder writes; leave it out")
        room = min(self.tokens, model.context)
        found = model.write(prompts, beams=self.beams, length_penalty=self.length_penalty, max_tokens=room)
        for prompt, (text, score) in zip(prompts, found, strict=True):
            if self.json:
                print(json.dumps({"prompt": prompt, "text": text, "score": score}, ensure_ascii=False))
            else:
                print(f"{prompt}\n{text}\n")

    def _prompts(self) -> list[str]:
        if self.file and self.prompt:
            raise UserError("--prompt and --file: give one of them")
        if not self.file:
            return list(self.prompt) or ["\n"]
        try:
            data = sys.stdin.buffer.read() if self.file == "-" else Path(self.file).read_bytes()
            text = data.decode()
        except OSError as error:
            raise UserError(f"--file {self.file}: {error.strerror}; name a file with a prompt a line") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--file {self.file}: no UTF-8 at byte {error.start:,}; convert it") from None
        return [text] if self.file == "-" else text.splitlines()

    def _replies(self, model: "Model | Translator", asked: list[tuple[str, int]]) -> "list[Rolling]":
        return [Rolling(model, prompt, number, self) for prompt, number in asked]

    def _texts(self, model: "Model | Translator", asked: list[tuple[str, int]]) -> None:
        for i, rolling in enumerate(going := self._replies(model, asked)):
            print("\n---\n" * (i > 0) + model.stage.shown(rolling.prompt, ""), end="", flush=True)
            for piece in rolling.pieces(going):
                print(piece, end="", flush=True)
            print(self.suffix, end="")
        print()

    def _lines(self, model: "Model | Translator", asked: list[tuple[str, int]]) -> None:
        for rolling in (going := self._replies(model, asked)):
            text = "".join(rolling.pieces(going))
            print(json.dumps(rolling.about(text), ensure_ascii=False), flush=True)


class Rolling:
    """One text, over as many contexts as it takes."""

    def __init__(self, model: "Model | Translator", prompt: str, sample: int, how: Command) -> None:
        self.model, self.prompt, self.how, self.sample = model, prompt, how, sample
        self.parts: list[Reply] = []
        self._go_on(model.prompt(prompt, how.suffix or None), how.tokens)

    def _go_on(self, ids: list[int], tokens: int) -> None:
        if self.how.roll and len(ids) >= self.model.context:
            ids = ids[-max(1, self.model.context // 2) :]
        how = self.how
        request = self.model.request(
            ids,
            how.seed,
            self.sample,
            drawn=how.tokens - tokens,
            max_tokens=tokens,
            stop=how.stop,
            tops=how.logprobs,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            min_p=how.min_p,
            repetition_penalty=how.repetition_penalty,
        )
        self.parts.append(self.model.engine.submit(request))

    @property
    def over(self) -> bool:
        """Also starts the next context where one is full."""
        last = self.parts[-1]
        left = self.how.tokens - sum(len(part.tokens) for part in self.parts)
        if last.reason == "length" and left and self.how.roll:
            self._go_on([*last.request.prompt, *last.tokens], left)
        return bool(self.parts[-1].reason)

    def pieces(self, going: "list[Rolling]") -> Iterator[str]:
        """The text as it comes; the others go on beside it."""
        shown = ""
        while True:
            done = [rolling.over for rolling in going][going.index(self)]
            text = "".join(part.text for part in self.parts)
            yield text[len(shown) :]
            shown = text
            if done:
                return
            self.model.engine.step()

    def about(self, text: str) -> dict:
        """What a line of JSON says of it."""
        tokens = [token for part in self.parts for token in part.tokens]
        tops = [pairs for part in self.parts for pairs in part.tops]
        return {
            "prompt": self.prompt,
            "sample": self.sample,
            "text": text,
            "tokens": tokens,
            "logprobs": [value for part in self.parts for value in part.logprobs],
            **({"top_logprobs": tops} if tops else {}),
            "reason": self.parts[-1].reason,
        }
