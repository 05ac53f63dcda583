"""Prompts as rows to answer, one a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import PromptConfig
from gptjax.data.chat import ChatFormat, Message
from gptjax.data.examples import ExampleSet, Report, measure, select
from gptjax.data.packing import apart
from gptjax.data.prompts import parse
from gptjax.data.sources import TextSource
from gptjax.errors import UserError


class PromptRows(NamedTuple):
    """Prompts of up to P tokens: arrays of numpy, of JAX, or of shapes."""

    tokens: Any
    """int32 ids [..., P], from the left; behind them 0."""
    length: Any
    """int32 [...]: ids of the prompt; 0 where there is none."""
    index: Any
    """int32 [...]: its place in the `Prompts`, which know its text and its answer; -1 where there is none."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a policy is to answer, and what a reward may look at."""

    ids: np.ndarray
    """int32 [N], <|assistant|> the last."""
    messages: list[Message]
    answer: str
    """As the record has it; empty where it has none."""

    @property
    def text(self) -> str:
        """What the user says last."""
        return self.messages[-1].content


@dataclass(frozen=True, eq=False)
class Prompts(ExampleSet):
    """Prompts of at most P = `max_tokens` tokens; those that were longer have lost their beginning."""

    chat: ChatFormat
    max_tokens: int

    def __getitem__(self, index: int) -> Prompt:
        found = parse(self.source[int(self.numbers[index])].text)
        return Prompt(self.chat.prompt(found.prompt)[-self.max_tokens :], found.prompt, found.answer)

    def row(self, indices: Sequence[int]) -> PromptRows:
        tokens = np.zeros(self.max_tokens, np.int32)
        length, place = np.int32(0), np.int32(-1)
        for index in indices:  # one, or none
            ids = self[index].ids
            tokens[: len(ids)], length, place = ids, np.int32(len(ids)), np.int32(index)
        return PromptRows(tokens, length, place)


def open_prompts(
    config: PromptConfig, source: TextSource, chat: ChatFormat, seq_len: int, report: Report = lambda *_: None
) -> Prompts:
    """The prompts of a split. Raises UserError where there are none, or they leave a reply no room in the context."""
    most = config.max_prompt_tokens or (seq_len + 1) // 2
    if most >= seq_len:
        given = f"data.max_prompt_tokens = {config.max_prompt_tokens}"
        raise UserError(f"{given}: leaves a reply no room in model.seq_len = {seq_len}; nearest {seq_len - 1}")
    sizes = measure(config.cache_dir, source, chat.tokenizer, chat.template, lambda text: _sizes(text, chat), report)
    size, messages = sizes.T
    there, long = messages > 0, size > most
    lost = long & (config.too_long == "drop")
    numbers, left_out = select(config, source, "prompt", there, {f"longer than {most:,} tokens": lost})
    packing, num_cut = apart(np.minimum(size[numbers], most)), int(long[numbers].sum())
    return Prompts(source, seq_len, numbers, packing, left_out, num_cut, chat, most)


def _sizes(text: str, chat: ChatFormat) -> tuple[int, int]:
    """The ids of a prompt, and its messages."""
    prompt = parse(text).prompt
    return len(chat.prompt(prompt)), len(prompt)
