"""Ranked replies as rows to read: each row is a prompt with all its replies, a sequence for each."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import RankingConfig
from gptjax.data.chat import ChatFormat
from gptjax.data.examples import TOO_LONG, ExampleSet, Report, measure, select
from gptjax.data.packing import apart
from gptjax.data.rankings import parse
from gptjax.data.sources import TextSource
from gptjax.errors import UserError


class RankedRows(NamedTuple):
    """Prompts with up to K replies: arrays of numpy, of JAX, or of shapes."""

    tokens: Any
    """int32 ids [..., K, T] of prompt and reply, from the left; behind them, and where there is no reply, 0."""
    first: Any
    """int32 [..., K]: the place of each reply's first token; 0 where that is cut off."""
    last: Any
    """int32 [..., K]: the place of each reply's last token, where its score is read."""
    ranks: Any
    """int32 [..., K] from 1, the best; equal ones are ties; 0 where there is no reply."""


@dataclass(frozen=True, eq=False)
class Rankings(ExampleSet):
    """Prompts with ranked replies, one a row; a prompt and a reply that are longer than T together have lost their
    beginning."""

    chat: ChatFormat
    max_replies: int
    num_replies: int

    def row(self, indices: Any) -> RankedRows:
        tokens = np.zeros((self.max_replies, self.seq_len), np.int32)
        first, last, ranks = np.zeros((3, self.max_replies), np.int32)
        for index in indices:  # one, or none
            found = parse(self.source[int(self.numbers[index])].text)
            prompt = self.chat.prompt(found.prompt)
            for k, (reply, rank) in enumerate(zip(found.replies, found.ranks, strict=True)):
                said = self.chat.reply(reply)
                ids = np.concatenate([prompt, said])[-self.seq_len :]
                tokens[k, : len(ids)], ranks[k] = ids, rank
                first[k], last[k] = max(len(ids) - len(said), 0), len(ids) - 1
        return RankedRows(tokens, first, last, ranks)


def open_rankings(
    config: RankingConfig, source: TextSource, chat: ChatFormat, seq_len: int, report: Report = lambda *_: None
) -> Rankings:
    """The rankings of a split. Raises UserError where there are none, or one has more replies than a row."""
    sizes = measure(config.cache_dir, source, chat.tokenizer, chat.template, lambda text: _sizes(text, chat), report)
    size, replies = sizes.T
    there, long = replies > 0, size > seq_len
    if (most := replies.max()) > config.max_replies:
        raise UserError(f"data.max_replies = {config.max_replies}: a prompt has {most} replies; nearest {most}")
    numbers, left_out = select(config, source, "ranking", there, {TOO_LONG: long & (config.too_long == "drop")})
    counts = chat, config.max_replies, int(replies[numbers].sum())
    return Rankings(source, seq_len, numbers, apart(replies[numbers]), left_out, int(long[numbers].sum()), *counts)


def _sizes(text: str, chat: ChatFormat) -> tuple[int, int]:
    """The ids of a prompt with its longest reply, and its replies."""
    found = parse(text)
    return len(chat.prompt(found.prompt)) + max(len(chat.reply(each)) for each in found.replies), len(found.replies)
