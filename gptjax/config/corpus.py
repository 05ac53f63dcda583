"""What `gptjax data build` makes: which texts, what happens to each, and what is left out."""

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gptjax.config.fields import Count, Positive, frozen


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", text):
        raise ValueError("give lower-case letters, digits and _, beginning with a letter, as TFDS has them")
    return text


def _version(text: str) -> str:
    if not re.fullmatch(r"\d+\.\d+\.\d+", text):
        raise ValueError("give three numbers, such as 1.0.0")
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return text


MANIFEST = "manifest.json"
"""The file of a data set that says what it was made of and what was dropped."""

Name = Annotated[str, AfterValidator(_name)]
Share = Annotated[float, Field(ge=0, le=1)]


@frozen
class OriginConfig:
    """Where some of the documents come from."""

    name: Name
    """By which the manifest counts them, and mixtures name them. Of two copies of a document that of the origin which
    is named first stays."""
    source: Annotated[str, Field(min_length=1)]
    """As data.source: files, folders and globs with commas between, stdlib, or tfds:NAME."""
    format: Literal["auto", "text", "html", "warc", "jsonl", "json", "csv", "tsv", "parquet", "arrow"] = "auto"
    """How files are read; auto goes by their endings."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """Field that holds the text in records."""
    split: Annotated[str, Field(min_length=1)] = "train"
    """Of tfds:NAME."""
    prose: bool = True
    """Whether `language` and `rules` are for its documents; not for code, questions and verse."""
    invalid: Literal["refuse", "drop"] = "refuse"
    """What becomes of a record that is none, and of a file that cannot be read to its end: the build ends with its
    place and the reason, or it is left out and counted."""
    max_chars: Positive = 1 << 24
    """A longer document is none: the steps take 60 bytes of memory a character."""
    begins: Annotated[str, AfterValidator(_pattern)] = ""
    """A regular expression at whose matches in a text another document begins; empty where each text is one."""


@frozen
class RepairConfig:
    """What is mended in every text; one that has nothing left is dropped."""

    encoding: bool = True
    """UTF-8 that was read as another encoding, such as â€™ (ftfy)."""
    unicode: bool = True
    """Composed characters (NFC), \\n as the end of a line, and neither control characters nor invisible marks."""
    max_junk: Share = 0.01
    """A text is dropped of which a larger share of characters is control characters or U+FFFD: no text, but bytes."""


@frozen
class LanguageConfig:
    """Languages."""

    keep: tuple[str, ...] = ()
    """Codes of ISO 639-1, such as en,de, of the languages that stay; empty keeps all."""
    min_score: Share = 0.5
    """Probability that a text is in its language, below which it is dropped."""


@frozen
class RulesConfig:
    """Published rules of thumb by which a text is no prose, and dropped (Gopher, arXiv 2112.11446, table A1; C4, arXiv
    1910.10683)."""

    c4: bool = False
    """Only lines that end as sentences do stay, of texts without braces and with five sentences: for pages of the
    web, not for code."""

    quality: bool = True
    """50 to 100,000 words of 3 to 10 characters in the mean, few # and ellipses, few bullets, words with letters, two
    of the commonest English words."""
    repetition: bool = True
    """Lines, and sequences of 2 to 10 words, that make up too much of the text by being there again."""
    min_words: Count = 50
    """Of the quality rule."""


@frozen
class QualityConfig:
    """GPT-3's filter of raw text (its paper, appendix A)."""

    good: tuple[str, ...] = ()
    """Origins whose text is good; empty filters nothing."""
    raw: tuple[str, ...] = ()
    """Origins of whose documents those stay that are like it: with probability (2 - score)^-alpha."""
    alpha: Annotated[float, Field(gt=0)] = 9.0
    """Of the Pareto distribution: 0.2% stay of a score of 0, 3% of 0.5, 42% of 0.9."""
    documents: Positive = 20_000
    """That are learned from, of each side at most."""


@frozen
class LeaksConfig:
    """Evaluations that nothing may be learned of (GPT-3 paper, appendix C)."""

    sources: tuple[str, ...] = ()
    """Files, folders and globs, of whose records every text counts. A document that has a sequence of their words is
    dropped, and listed in the manifest."""
    ngram: Positive = 13
    """Words of such a sequence; capitals and punctuation do not count."""


@frozen
class NearConfig:
    """Near duplicates, by MinHash of sequences of words (Broder 1997)."""

    on: bool = True
    ngram: Positive = 5
    """Words of a sequence."""
    bands: Positive = 14
    """Two texts are compared that agree in one of so many bands of `rows` hashes: of those whose sequences are the same
    to a share s, that is 1 - (1 - s^rows)^bands; 0.57 at 0.7, 0.92 at 0.8."""
    rows: Positive = 8
    threshold: Share = 0.7
    """Share of all bands' hashes in which two texts that are compared must agree to be copies."""


@frozen
class CorpusConfig:
    """A data set, from raw text."""

    name: Name
    """Of the TFDS data set."""
    origins: Annotated[tuple[OriginConfig, ...], Field(min_length=1)]
    version: Annotated[str, AfterValidator(_version)] = "1.0.0"
    """Of the TFDS data set."""
    repair: RepairConfig = field(default_factory=RepairConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    rules: RulesConfig = field(default_factory=RulesConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    leaks: LeaksConfig = field(default_factory=LeaksConfig)
    scrub: tuple[Literal["email", "key", "ip", "phone"], ...] = ()
    """What is replaced by its kind in angle brackets, such as <email>."""
    exact: bool = True
    """Drop the copies of a text, blanks and capitals aside."""
    near: NearConfig = field(default_factory=NearConfig)
    shard_bytes: Positive = 1 << 28
    """Text of a file of the data set, about."""
