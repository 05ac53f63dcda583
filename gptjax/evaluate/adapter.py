"""Our engine as a model of lm-evaluation-harness. Imports lm_eval: only `harness` imports it, where it is wanted."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from gptjax.api import Model
from gptjax.data.rows import PADDING
from gptjax.errors import UserError
from gptjax.evaluate.perplexity import Strides
from gptjax.evaluate.score import Scorer
from gptjax.evaluate.windows import Window
from gptjax.infer.engine import common
from gptjax.infer.request import Reply, Request
from gptjax.infer.sampling import Sampling

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the same thing in several words
DRAWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
REPLY = 256  # tokens of a reply to a task that does not say
AHEAD = 4  # requests that wait for each row of the engine
# A request to the engine takes about 7 ms beside its own tokens. In windows that is 75 tokens of a model of a million
# parameters on two cores, as measured, and would be 2,000 of GPT-2 at 300,000 tokens a second.
CALL = 512

Pair = tuple[tuple[str, str], list[int], list[int]]
"""Texts of context and continuation, and the ids of both."""
Scored = tuple[list[int], int]
"""Ids, and the first of them that is scored."""


class EngineLM(TemplateLM):
    """Replies by continuous batching; log-likelihoods, too, where prompts share much, else by `Scorer` in rows full of
    them; those of whole texts in the windows of the harness."""

    def __init__(self, model: Model, scorer: Scorer | None = None, seed: int = 0) -> None:
        super().__init__()
        self.model, self.scorer, self.seed = model, scorer or Scorer(model), seed
        self.warned = False

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eot

    @property
    def prefix_token_id(self) -> int:
        return (*self.model.tokenizer.begin, self.eot_token_id)[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begin = () if add_special_tokens is False else self.model.tokenizer.begin
        return [*begin, *self.model.tokenizer.encode(string).tolist()]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any) -> list[Any]:
        """(nats, whether greedy decoding would give it) of each continuation; a context that is too long loses its
        beginning."""
        made: list[Any] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])  # equal beginnings together
        asked = [i for i in order if requests[i][2]]
        pairs = [self._cut(requests[i]) for i in asked]
        answers = self._by_engine(pairs, disable_tqdm) if self._worth_sharing(pairs) else self._by_windows(pairs)
        for i, answer in zip(asked, answers, strict=True):
            made[i] = answer
        return made

    def _cut(self, pair: Pair) -> Scored:
        """What of a pair the model sees, and where the continuation begins."""
        _, context, continuation = pair
        if len(continuation) > self.model.context:
            raise UserError(
                f"a continuation of {len(continuation):,} tokens: the context holds {self.model.context:,}; leave the "
                "task out"
            )
        ids = [*context, *continuation][-(self.model.context + 1) :]
        return ids, len(ids) - len(continuation)

    def _worth_sharing(self, pairs: Sequence[Scored]) -> bool:
        """Whether the engine, which computes a common beginning once, is faster than windows, which compute all."""
        new = sum(len(ids) - min(common(ids, last), start - 1) for (last, _), (ids, start) in pairwise(pairs))
        return new + CALL * len(pairs) < sum(len(ids) for ids, _ in pairs[1:])

    def _by_engine(self, pairs: Sequence[Scored], quiet: bool) -> Iterator[tuple[float, bool]]:
        asked = [Request(ids, 0, tops=1, prompt_logprobs=True, told_from=start) for ids, start in pairs]
        for (ids, start), reply in zip(pairs, self._run(asked, "log-likelihoods", quiet), strict=True):
            likeliest = [top[0][0] for top in reply.prompt_tops]
            yield sum(reply.prompt_logprobs), likeliest == ids[start:]

    def _by_windows(self, pairs: Sequence[Scored]) -> Iterator[tuple[float, bool]]:
        def found() -> Iterator[Window]:
            for number, (ids, start) in enumerate(pairs):
                every = np.array(ids, np.int32)
                targets = np.where(np.arange(1, len(ids)) < start, PADDING, every[1:])
                yield Window(number, every[:-1], targets)

        for nats, hits, targets in zip(*self.scorer.sums(found()), strict=True):
            yield -float(nats), bool(hits == targets)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Nats of each text, in windows that overlap only at its end."""
        strides = Strides(self.model, self.model.context)
        texts = [request.args[0] for request in requests]
        some = [i for i, text in enumerate(texts) if len(self.tok_encode(text, add_special_tokens=False))]
        sums = self.scorer.sums(window for number, i in enumerate(some) for window in strides.over(number, texts[i]))
        made = [0.0] * len(texts)
        for i, nats in zip(some, sums.nats.tolist(), strict=True):
            made[i] = -nats
        return made

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, without the string that ended it."""
        seen: Counter[str] = Counter()
        asked = []
        for request in requests:
            context, how = request.args
            asked.append(self._prompt(context, dict(how), seen[context]))
            seen[context] += 1  # of several replies to the same context each is drawn anew
        return [reply.text for reply in self._run(asked, "replies", disable_tqdm)]

    def _prompt(self, context: str, how: dict[str, Any], sample: int) -> Request:
        until, lengths = how.pop("until", None) or [], [how.pop(name) for name in LENGTHS if name in how]
        drawn = how.pop("do_sample", None)
        temperature = float(how.pop("temperature", None) or (1.0 if drawn else 0.0))
        how = {name: value for name, value in how.items() if value is not None}
        if unknown := [name for name in how if name not in DRAWN]:
            raise UserError(f"generation_kwargs = {unknown[0]}: not one of {', '.join(('until', *LENGTHS, *DRAWN))}")
        sampling = Sampling(temperature=0.0 if drawn is False else temperature, **how)
        length, most = int(lengths[0]) if lengths else REPLY, self.model.context // 2
        if length > most and not self.warned:
            self.warned = True
            print(f"replies are cut at {most:,} tokens, half the context, not {length:,}", file=sys.stderr)
        length = min(length, most)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return Request(
            ids[-(self.model.context - length) :],
            length,
            sampling,
            self.seed,
            sample,
            stop=(until,) if isinstance(until, str) else tuple(until),
            stop_tokens=self.model.stage.ends,
        )

    def _run(self, requests: Sequence[Request], what: str, quiet: bool) -> list[Reply]:
        """Replies in the order of the requests, of which only a few wait in the engine: it looks at all that do."""
        engine, replies, over = self.model.engine, list[Reply](), 0
        left: Iterator[Request] = iter(requests)
        with tqdm(total=len(requests), desc=what, disable=quiet or not requests) as bar:
            while over < len(requests):
                while len(replies) - over < AHEAD * engine.slots and (request := next(left, None)):
                    replies.append(engine.submit(request))
                engine.step()
                done = over
                while over < len(replies) and replies[over].reason:
                    over += 1
                bar.update(over - done)
        return replies
