"""Figures with 95% intervals, from what each document or each question gave."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

from gptjax.classes import KINDS, of_each_class
from gptjax.intervals import wilson

LEVEL = 0.95
DRAWS = 1000  # of the questions, for what is no mean of theirs


@dataclass(frozen=True)
class Figure:
    """A value and where it lies with 95% confidence; None where that cannot be said."""

    value: float
    low: float | None = None
    high: float | None = None
    better: Literal["lower", "higher", ""] = "higher"

    def mapped(self, function: Any) -> "Figure":
        """The same by a rising function."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Figure(function(self.value), low, high, self.better)


@dataclass(frozen=True)
class Measure:
    """What one text or one task says of a model."""

    about: dict[str, Any]
    """What was measured and how; "interval" says what the intervals are."""
    figures: dict[str, Figure]
    classes: dict[str, Any] = field(default_factory=dict)
    """Of a choice: "what" a class is, and its "rows" by name, each with precision, recall, f1 and count."""


def ratio(above: np.ndarray, below: np.ndarray, better: Literal["lower", "higher", ""] = "higher") -> Figure:
    """The sum of `above` over the sum of `below`, each [N], of N independent documents.

    The interval is the ratio estimator's: the residuals above - value * below give its variance, and Student's t with
    N - 1 degrees of freedom its width. None where there are not two documents.
    """
    count, total = len(above), float(np.sum(below))
    value = float(np.sum(above)) / total
    if count < 2:
        return Figure(value, better=better)
    residuals = np.asarray(above) - value * np.asarray(below)
    error = math.sqrt(count / (count - 1) * float(np.sum(residuals**2))) / total
    width = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Figure(value, value - width, value + width, better)


def mean(values: Sequence[float], better: Literal["lower", "higher", ""] = "higher") -> Figure:
    """The mean of what independent questions gave; of zeros and ones with Wilson's interval, which does not shrink to
    nothing where all are equal, else as `ratio`."""
    each = np.asarray(values, float)
    if not len(each) or not np.isin(each, (0, 1)).all():
        return ratio(each, np.ones(len(each)), better)
    return Figure(float(each.mean()), *wilson(int(each.sum()), len(each), LEVEL), better)


def classification(truth: Sequence[int], chosen: Sequence[int], names: Sequence[str]) -> Measure:
    """Accuracy, and precision, recall and F1 of each class and as their plain (macro) mean over the classes that occur
    in `truth` or `chosen`; a share of nothing is 0. The intervals of the means are of 1,000 draws of the questions
    (bootstrap, percentiles)."""
    size, count = len(names), len(truth)
    pairs = np.asarray(truth) * size + np.asarray(chosen)
    rng = np.random.default_rng(0)
    samples = [pairs, *(pairs[rng.integers(0, count, count)] for _ in range(DRAWS))]
    tables = np.stack([np.bincount(each, minlength=size**2) for each in samples]).reshape(-1, size, size)
    by_class = of_each_class(tables)
    occurs = (tables.sum(1) + tables.sum(2)) > 0
    macro = by_class.sum(-1) / occurs.sum(-1)
    figures = {"accuracy": mean((np.asarray(truth) == np.asarray(chosen)).tolist())}
    for name, (value, *draws) in zip(KINDS, macro, strict=True):
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        figures[f"macro_{name}"] = Figure(float(value), float(low), float(high))
    rows = {
        name: dict(zip(KINDS, by_class[:, 0, c].tolist(), strict=True)) | {"count": int(tables[0, c].sum())}
        for c, name in enumerate(names)
    }
    return Measure({}, figures, {"rows": rows})
