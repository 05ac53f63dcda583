"""Which records of a text a slice such as `train[:95%]` has: whole documents, or a stretch of each."""

import re

import numpy as np

SLICE = re.compile(r"(\w[\w-]*)(?:\[(?:(\d+(?:\.\d+)?)%)?:(?:(\d+(?:\.\d+)?)%)?\])?")


def bounds(name: str) -> tuple[str, float, float]:
    """`train[a%:b%]` as the split and shares of 1. Raises ValueError for anything else."""
    found = SLICE.fullmatch(name)
    if not found or not 0 <= float(found[2] or 0) <= 100 >= float(found[3] or 100):
        raise ValueError(name)
    return found[1], float(found[2] or 0) / 100, float(found[3] or 100) / 100


def chosen(documents: np.ndarray, low: float, high: float, split_by: str) -> np.ndarray:
    """The records of a slice, ascending, int64 [N]. `documents` is uint64 [documents, 2]: a hash of each one's text,
    and the number of its records.

    By `document` a document lies where its hash does among all hashes, so that any slice is a fair sample, equal
    documents are on one side, and what is added to a text moves nothing else. By `position` a record lies where it
    does within its document.
    """
    count = documents[:, 1].astype(np.int64)
    if split_by == "document":
        place = np.repeat(documents[:, 0] / 2.0**64, count)
    else:
        first = np.repeat(np.cumsum(count) - count, count)
        place = (np.arange(len(first)) - first + 0.5) / np.repeat(count, count)
    return np.flatnonzero((place >= low) & ((place < high) | (high == 1)))
