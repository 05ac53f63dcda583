"""How near texts come to those that people wrote, N > 0 texts and as many references: figures of 0 to 100, as they are
published. The libraries of the extra `eval` are imported where they are asked for."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from gptjax.errors import UserError

ROUGE = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
"""The package's names, and ours."""


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Of the corpus, with sacrebleu's own settings (mixed case, tokens 13a, smoothing exp), which its version names.

    Raises UserError without the extra.
    """
    _require_as_many(texts, references)
    return float(_library("sacrebleu").corpus_bleu([*texts], [[*references]]).score)


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of the corpus: characters to six in a row, no words. Raises UserError without the extra."""
    _require_as_many(texts, references)
    return float(_library("sacrebleu").corpus_chrf([*texts], [[*references]]).score)


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F1 of shared words, of shared pairs of words and of the longest common sequence, with Porter's stems, mean over
    the texts; letters and digits of ASCII alone are words. Raises UserError without the extra."""
    _require_as_many(texts, references)
    scorer = _library("rouge_score.rouge_scorer").RougeScorer([*ROUGE], use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {name: 100 * float(np.mean([each[kind].fmeasure for each in scores])) for kind, name in ROUGE.items()}


def exact(texts: Sequence[str], references: Sequence[str]) -> float:
    """The share that is the reference but for blanks around."""
    _require_as_many(texts, references)
    pairs = zip(texts, references, strict=True)
    return 100 * float(np.mean([text.strip() == reference.strip() for text, reference in pairs]))


def _require_as_many(texts: Sequence[str], references: Sequence[str]) -> None:
    """sacrebleu itself would take the shorter side."""
    if not len(texts) == len(references) > 0:
        raise ValueError(f"{len(texts)} texts for {len(references)} references")


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"figures of texts: no module {error.name}; pip install 'gptjax[eval]'") from None
