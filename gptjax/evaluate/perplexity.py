"""Loss, perplexity, bits per byte and next-token accuracy of any text, every token with as much context as is asked."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from gptjax.api import Model
from gptjax.data.sources import TextSource
from gptjax.errors import UserError
from gptjax.evaluate.figures import Measure, ratio
from gptjax.evaluate.score import Scorer
from gptjax.evaluate.windows import Window, windows

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Strides:
    """Windows over texts by a model's tokenizer."""

    model: Model
    stride: int = 0
    """Targets that a window counts after the first; 0 is half the context."""

    @property
    def step(self) -> int:
        """Raises UserError where windows would leave tokens out."""
        length = self.model.context
        if not 0 <= self.stride <= length:
            nearest = min(max(self.stride, 1), length)
            raise UserError(f"--stride {self.stride}: the context holds {length} tokens; nearest {nearest}")
        return self.stride or max(length // 2, 1)

    def over(self, owner: int, text: str) -> Iterator[Window]:
        """The windows of one text."""
        return windows(owner, self.model.tokenizer.encode(text), self.model.before, self.model.context, self.step)


def documents(source: TextSource) -> Iterator[str]:
    """Whole documents, or of one that is in several splits the stretches that are in this."""
    parts: list[str] = []
    for number in range(len(source)):
        record = source[number]
        parts.append(record.text)
        if record.last or record.cut:
            yield "".join(parts)
            parts = []
    if parts:
        yield "".join(parts)


def perplexity(
    model: Model, source: TextSource, stride: int = 0, scorer: Scorer | None = None, report: Report = lambda *_: None
) -> Measure:
    """Measure a text. The tokens of each document are scored once each, the first after the end of another text; the
    end itself is not scored. Raises UserError for a stride that cannot be, and where no document has a token."""
    strides, total, empty = Strides(model, stride), source.num_bytes, 0
    step, sizes = strides.step, list[int]()

    def found() -> Iterator[Window]:
        nonlocal empty
        done = 0
        for text in documents(source):
            size = len(text.encode())
            first = next(mine := strides.over(len(sizes), text), None)
            if first is None:
                empty += 1
            else:
                sizes.append(size)
                yield first
                yield from mine
            done += size
            report("evaluating", done, total)

    sums = (scorer or Scorer(model)).sums(found())
    if not sizes:
        raise UserError(f"--text {source.name}: its {empty:,} document(s) hold no token; give a text with words in it")
    loss = ratio(sums.nats, sums.targets, "lower")
    figures = {
        "loss": loss,
        "perplexity": loss.mapped(_exp),
        "bits_per_byte": ratio(sums.nats / math.log(2), np.array(sizes), "lower"),
        "accuracy": ratio(sums.hits, sums.targets),
    }
    about = {
        "source": source.name,
        "stride": step,
        "documents": len(sizes),
        "empty": empty,
        "tokens": int(sums.targets.sum()),
        "bytes": sum(sizes),
        "interval": "95% over documents: ratio estimator with Student's t"
        if len(sizes) > 1
        else "none: it takes two documents or more",
    }
    return Measure(about, figures)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
