"""Near duplicates: signatures whose agreement is the share of sequences of words that two texts have in common
(MinHash, Broder 1997), and the bands by which those are found that may be copies."""

from functools import cache

import numpy as np

from gptjax.config.corpus import NearConfig
from gptjax.corpus import loops
from gptjax.corpus.block import Block
from gptjax.data.order import mix

NONE = np.uint32(0xFFFFFFFF)


@cache
def _factors(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [count] odd factors and summands of as many hash functions, always the same."""
    drawn = mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * loops.BASE)
    return drawn[:count] | np.uint64(1), drawn[count:]


def signatures(block: Block, config: NearConfig) -> np.ndarray:
    """uint32 [D, bands * rows]: of each document the least value of each hash function over its sequences, NONE where
    it has fewer words than a sequence."""
    low, count = block.lowered, config.bands * config.rows
    grams, first = loops.ngrams(low.term_hashes, low.terms.owner, config.ngram)
    found = np.full((len(block.texts), count), NONE)
    loops.least(grams, low.terms.owner[first], *_factors(count), found)
    return found


def band_keys(signatures: np.ndarray, config: NearConfig) -> np.ndarray:
    """uint64 [D, bands]: equal where two documents agree in all hashes of a band; 0 for one that has no sequence."""
    each = signatures.reshape(len(signatures), config.bands, config.rows).astype(np.uint64)
    total = np.broadcast_to(mix(np.arange(1, config.bands + 1, dtype=np.uint64)), each.shape[:2])
    for row in range(config.rows):
        total = mix(total * loops.BASE + each[:, :, row])
    return np.where((signatures != NONE).any(1)[:, None], total, np.uint64(0))


def agreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float64 [P]: the share of hashes in which signatures [P, K] agree, whose mean is the Jaccard similarity."""
    found: np.ndarray = (one == other).mean(-1)
    return found
