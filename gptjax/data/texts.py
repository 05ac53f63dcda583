"""What `data.source` of a text names: one source, or several with weights, which are mixed as they are read.

Weights are shares of the tokens (arXiv 2005.14165, Table 2.2), the unit that is drawn is a record: a source gets
records by its weight over its mean tokens a record. Which source and which record come next is a closed form of the
seed and of how many came before, so that a lane's place stays one integer (see `order`).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gptjax.config import DataConfig
from gptjax.config.mixture import later_weights, weighted
from gptjax.data import sources
from gptjax.data.ids import tokenized
from gptjax.data.order import Interleaved, Period, derived, units
from gptjax.data.pool import Report
from gptjax.data.sources import AnySource, Corpus, TextSource
from gptjax.data.store import Joined, Store
from gptjax.data.stream import Source, TokenStream
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError

SAMPLE = 1 << 21  # bytes of a source of which tokens are counted: their ratio to bytes is known to some 1%


@dataclass(frozen=True)
class Mixture(Corpus):
    """Several texts with weights, in the order of their digests: how a source is called changes nothing."""

    texts: tuple[Corpus, ...] = ()
    periods: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """From so many tokens on, the weights of the texts, which sum to 1; the first from 0."""

    @property
    def place(self) -> str:
        return json.dumps({text.name: text.place for text in self.texts})

    @property
    def labels(self) -> tuple[str, ...]:
        """A short name of each text, another for each."""
        short = [text.label for text in self.texts]
        return tuple(
            name if short.count(name) == 1 else f"{name}-{text.digest[:6]}"
            for name, text in zip(short, self.texts, strict=True)
        )

    @property
    def weights(self) -> tuple[float, ...]:
        """Those that training begins with."""
        return self.periods[0][1]

    @property
    def digest(self) -> str:
        """Of the texts and their weights."""
        return hashlib.sha256(json.dumps([self.store.digest, self.periods]).encode()).hexdigest()

    def described(self) -> str:
        """Texts and weights in words, as far as they are this mixture's own."""
        return "; ".join(
            (f"from token {start:,} " if start else "")
            + ", ".join(f"{label} {weight:.4%}" for label, weight in zip(self.labels, weights, strict=True))
            for start, weights in self.periods
        )

    def splits(self, name: str, split_by: str) -> list[TextSource]:
        """The split of each text. Raises what `split` raises."""
        return [text.split(name, split_by) for text in self.texts]

    def split(self, name: str, split_by: str) -> TextSource:
        assert isinstance(self.store, Joined)
        every = zip(self.splits(name, split_by), self.store.starts, strict=False)
        return TextSource(self.name, self.store, np.concatenate([text.chosen + start for text, start in every]))


def build(config: AnySource, report: Report = lambda what, done, total: None) -> Corpus:
    """The text of `data.source`, built now unless it is there; raises what `sources.build` raises, and UserError for
    weights that make no mixture."""
    parts = _parts(config)
    return _mixture(config, [sources.build(part, report) for part in parts]) if parts else sources.build(config, report)


def reopen(config: AnySource, place: str) -> Corpus:
    """What `build` made, from its `place`; raises what `sources.reopen` raises."""
    if not (parts := _parts(config)):
        return sources.reopen(config, Path(place))
    folders = json.loads(place)
    return _mixture(config, [sources.reopen(part, Path(folders[part.source])) for part in parts])


def look(config: AnySource) -> tuple[str, Corpus | None]:
    """What a run would read, in words, and the text if all of it is built; nothing is written. Raises what
    `sources.look` raises."""
    if not (parts := _parts(config)):
        return sources.look(config)
    told, found = zip(*map(sources.look, parts), strict=True)
    there = [text for text in found if text]
    return "\n".join(told), _mixture(config, there) if len(there) == len(parts) else None


def left_out(config: AnySource) -> str:
    """The files of folders or globs that are not read, in words; empty where all are."""
    every: Sequence[AnySource] = _parts(config) or (config,)
    return "; ".join(filter(None, map(sources.left_out, every)))


def _parts(config: AnySource) -> list[DataConfig]:
    """The config of each text of a mixture; none where `data.source` is no mixture."""
    every = weighted(config.source) if isinstance(config, DataConfig) else ()
    return [replace(config, source=part.source) for part in every if isinstance(config, DataConfig)]


def _mixture(config: AnySource, texts: Sequence[Corpus]) -> Mixture:
    """Of the texts in the order in which they are named."""
    assert isinstance(config, DataConfig)
    by_digest: dict[str, Corpus] = {}
    for text in texts:
        if (same := by_digest.setdefault(text.digest, text)) is not text:
            raise UserError(f"data.source: {same.name} and {text.name} hold the same text; name one, with both weights")
    first = tuple(part.weight for part in weighted(config.source))
    places = sorted(range(len(texts)), key=lambda place: texts[place].digest)
    periods = [(0, first), *later_weights(config.later_weights, len(texts))]
    shares = tuple((start, tuple(weights[place] / sum(weights) for place in places)) for start, weights in periods)
    every = [texts[place] for place in places]
    joined = Joined([text.store for text in every if isinstance(text.store, Store)])
    return Mixture(config.source, joined, texts=tuple(every), periods=shares)


@dataclass(frozen=True)
class Drawing:
    """The order in which a mixture's training records come, and how often each of its texts is read."""

    order: Interleaved
    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    """Records of each text."""
    lengths: tuple[float, ...]
    """Mean tokens of their records, about."""

    def told(self, drawn: int) -> dict[str, float]:
        """What is to be logged after so many records: how often each text was read."""
        return {f"epochs_{label}": epochs for label, epochs in self._by_label(drawn).items()}

    def epochs(self, tokens: int) -> dict[str, float]:
        """How often each text is read in so many tokens of training, about."""
        low, high = 0, tokens + 1  # records, of a token or more each
        while high - low > 1:
            middle = (low + high) // 2
            size = sum(count * each for count, each in zip(self.order.drawn(middle), self.lengths, strict=True))
            low, high = (middle, high) if size <= tokens else (low, middle)
        return self._by_label(low)

    def _by_label(self, drawn: int) -> dict[str, float]:
        every = zip(self.labels, self.order.drawn(drawn), self.sizes, strict=True)
        return {label: count / size for label, count, size in every}


def drawing(config: DataConfig, mixture: Mixture, tokenizer: Tokenizer) -> Drawing:
    """The order of a mixture's training split; the same on every process. Raises what `Corpus.split` raises."""
    texts = mixture.splits(config.train_split, config.split_by)
    lengths = [mean_tokens(text, tokenizer) for text in texts]
    periods, start = [], 0
    for (tokens, weights), later in zip(mixture.periods, [*mixture.periods[1:], None], strict=True):
        rates = [weight / length for weight, length in zip(weights, lengths, strict=True)]
        periods.append(Period(start, units(rates)))
        if later:  # the weights sum to 1: a record has 1 / sum(rates) tokens
            start += max(round((later[0] - tokens) * sum(rates)), 1)
    sizes = tuple(map(len, texts))
    seeds = [derived(config.seed, text.digest) for text in mixture.texts]
    return Drawing(Interleaved(sizes, seeds, periods, config.seed), mixture.labels, sizes, tuple(lengths))


def mean_tokens(text: TextSource, tokenizer: Tokenizer) -> float:
    """Tokens of a record, with the one that ends it: of its mean bytes, which are known, by what records at equal
    distances have."""
    mean = text.num_bytes / len(text)
    some = np.linspace(0, len(text) - 1, min(len(text), int(SAMPLE / max(mean, 1)) + 1)).astype(int)
    size = tokens = 0
    for number in some.tolist():
        record = text[number].text
        size, tokens = size + len(record.encode()), tokens + len(tokenizer.encode(record))
    return 1 + mean * tokens / max(size, 1)


def epochs(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, tokens: int) -> dict[str, float]:
    """How often each source is read in so many tokens of training, about."""
    if isinstance(corpus, Mixture):
        return drawing(config, corpus, tokenizer).epochs(tokens)
    text = corpus.split(config.train_split, config.split_by)
    return {corpus.label: tokens / mean_tokens(text, tokenizer) / len(text)}


def require_epochs(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, tokens: int) -> None:
    """Raises UserError where a training of so many tokens would read a source more often than `data.max_epochs`."""
    for label, count in epochs(config, corpus, tokenizer, tokens).items() if config.max_epochs else ():
        if count > config.max_epochs:
            raise UserError(
                f"data.max_epochs = {config.max_epochs:g}: {label} would be read {count:.2f} times in {tokens:,} "
                "tokens; give more of it or less weight, train on fewer tokens, or raise it"
            )


def source_of(config: DataConfig, text: TextSource, tokenizer: Tokenizer, report: Report = lambda *_: None) -> Source:
    """A split as a stream reads it: its text, or its ids where these are kept."""
    return tokenized(config.cache_dir, text, tokenizer, report) if config.cache_tokens else text


def stream(
    config: DataConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    micro_batch: int,
    rows: Sequence[int] | None,
    positions: Sequence[int] | None,
    separate: bool = False,
) -> TokenStream:
    """The training rows of a text; see `TokenStream`."""
    drawn = drawing(config, corpus, tokenizer) if isinstance(corpus, Mixture) else None
    return TokenStream(
        source_of(config, corpus.split(config.train_split, config.split_by), tokenizer),
        tokenizer,
        seq_len,
        lanes=config.lanes,
        seed=config.seed,
        micro_batch=micro_batch,
        rows=rows,
        separate=separate,
        threads=config.threads,
        positions=positions,
        fim_rate=config.fim_rate,
        order=drawn.order if drawn else None,
        told=drawn.told if drawn else None,
    )
