"""Which documents stay: of each cluster of copies the one whose origin is named first, of those the longest, of those
the first."""

from collections.abc import Callable, Iterable

import numpy as np

from gptjax.corpus.near import agreement

PAIRS, STEP = 1 << 18, 1 << 14


def rank(origin: np.ndarray, size: np.ndarray) -> np.ndarray:
    """int64 [D]: 0 for the best copy of all documents, and so on. origin: number of each one's; size: its bytes."""
    order = np.lexsort((np.arange(len(origin)), -size, origin))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def same(keys: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """int64 [D]: the best of the documents whose key [D] is the same, for each the document's own number where that is
    itself."""
    order = np.lexsort((ranks, keys))
    begins = np.ones(len(keys), bool)
    begins[1:] = keys[order][1:] != keys[order][:-1]
    best = np.empty(len(keys), np.int64)
    best[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))]
    return best


def candidates(bands: Iterable[np.ndarray], ranks: np.ndarray) -> np.ndarray:
    """int64 [P, 2]: document and the best of those whose key of a band is the same. bands: uint64 [D] keys of each, 0
    for a document that has none.

    One pair a document and band, never all pairs of those who share a band: a page that is there 100,000 times would
    give 5 billion. One band at a time is held: 8 bytes a document."""
    found = [np.zeros((0, 2), np.int64)]
    for keys in bands:
        worded = np.flatnonzero(keys)
        best = worded[same(keys[worded], ranks[worded])]
        other = np.flatnonzero(best != worded)
        found.append(np.stack([worded[other], best[other]], 1))
    return np.unique(np.concatenate(found), axis=0)


def close(pairs: np.ndarray, signatures: Callable[[np.ndarray], np.ndarray], threshold: float) -> np.ndarray:
    """Those of the pairs [P, 2] enough of whose hashes agree. signatures: of documents, int64 [U] in order, the uint32
    [U, K]; asked for those of PAIRS pairs at once, half a kilobyte each."""
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(pairs), PAIRS):
        some = pairs[start : start + PAIRS]
        numbers, place = np.unique(some, return_inverse=True)
        rows, place = signatures(numbers), place.reshape(some.shape)
        for first in range(0, len(some), STEP):
            here = place[first : first + STEP]
            found.append(some[first : first + STEP][agreement(rows[here[:, 0]], rows[here[:, 1]]) >= threshold])
    return np.concatenate(found)


def stays(count: int, edges: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """bool [D]: the best of each cluster that the edges [P, 2] make."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), (count, count))
    cluster = connected_components(graph, directed=False)[1]
    kept: np.ndarray = same(cluster, ranks) == np.arange(count)
    return kept
