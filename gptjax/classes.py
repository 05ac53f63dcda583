"""How well classes, or numbers, were told: arrays of what is true and of what was told, [N], to figures by name."""

import numpy as np
from numpy.typing import ArrayLike

KINDS = ("precision", "recall", "f1")


def of_classes(truth: ArrayLike, told: ArrayLike, count: int) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and Matthews' correlation of N > 0 classes out of `count`, each from 0 to 1 and
    the last from -1.

    Of two classes precision, recall and F1 are those of class 1, of more the plain (macro) means over the classes that
    occur on either side. A share of nothing is 0, and so is a correlation where one side is always the same.
    """
    table = np.bincount(np.asarray(truth) * count + np.asarray(told), minlength=count**2).reshape(count, count)
    each = of_each_class(table[None])[:, 0]
    shares = each[:, 1] if count == 2 else each[:, (table.sum(0) + table.sum(1)) > 0].mean(1)
    figures = {"accuracy": np.trace(table) / table.sum(), **dict(zip(KINDS, shares, strict=True))}
    return {name: float(value) for name, value in (figures | {"matthews": _matthews(table)}).items()}


def of_numbers(truth: ArrayLike, told: ArrayLike) -> dict[str, float]:
    """Mean squared error, and Pearson's and Spearman's correlations, of N > 0 numbers. A correlation is 0 where one
    side is always the same."""
    truth, told = np.asarray(truth, np.float64), np.asarray(told, np.float64)
    error = float(np.square(truth - told).mean())
    return {"mse": error, "pearson": _pearson(truth, told), "spearman": _pearson(_ranks(truth), _ranks(told))}


def _matthews(table: np.ndarray) -> float:
    """Of a table of counts [C, C], truth before what was told (Gorodkin 2004; of two classes Matthews 1975)."""
    told, true = table.sum(0).astype(float), table.sum(1).astype(float)
    total, right = float(table.sum()), float(np.trace(table))
    spread = (total**2 - told @ told) * (total**2 - true @ true)
    return float((right * total - told @ true) / np.sqrt(spread)) if spread > 0 else 0.0


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    one, other = one - one.mean(), other - other.mean()
    return float((one / np.linalg.norm(one)) @ (other / np.linalg.norm(other)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1, the lowest; equal values share the mean of their places."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def of_each_class(tables: np.ndarray) -> np.ndarray:
    """Confusion tables [N, C, C], truth before choice -> KINDS, [3, N, C]; 0 of a class that does not occur."""
    right = np.diagonal(tables, axis1=1, axis2=2)
    chosen, asked = tables.sum(1), tables.sum(2)
    return np.stack([k * right / np.maximum(of, 1) for k, of in ((1, chosen), (1, asked), (2, chosen + asked))])
