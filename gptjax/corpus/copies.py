"""Which documents stay: of each cluster of copies the one whose origin is named first, of those the longest, of those
the first."""

import numpy as np

from gptjax.config.corpus import NearConfig
from gptjax.corpus.near import agreement, band_keys


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


def pairs(signatures: np.ndarray, ranks: np.ndarray, config: NearConfig) -> np.ndarray:
    """int64 [P, 2]: document and the best of a band that it shares, where enough of their hashes agree.

    One pair a document and band, never all pairs of those who share a band: a page that is there 100,000 times would
    give 5 billion."""
    found, worded = [np.zeros((0, 2), np.int64)], np.flatnonzero((signatures != 0xFFFFFFFF).any(1))
    for keys in band_keys(signatures[worded], config).T:
        best = worded[same(keys, ranks[worded])]
        other = np.flatnonzero(best != worded)
        found.append(np.stack([worded[other], best[other]], 1))
    every = np.unique(np.concatenate(found), axis=0)
    close = [agreement(*(signatures[part[:, side]] for side in (0, 1))) for part in _in_parts(every)]
    return every[np.concatenate([np.zeros(0), *close]) >= config.threshold] if len(every) else every


def _in_parts(every: np.ndarray, rows: int = 1 << 16) -> list[np.ndarray]:
    return [every[start : start + rows] for start in range(0, len(every), rows)]


def stays(count: int, edges: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """bool [D]: the best of each cluster that the edges [P, 2] make."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), (count, count))
    cluster = connected_components(graph, directed=False)[1]
    kept: np.ndarray = same(cluster, ranks) == np.arange(count)
    return kept
