"""Near duplicates: signatures whose agreement is the share of sequences of words that two texts have in common
(MinHash, Broder 1997), and the bands by which those are found that may be copies."""

from functools import cache

import numpy as np

from gptjax.config.corpus import NearConfig
from gptjax.corpus.block import BASE, Block, ngrams
from gptjax.data.order import mix

PARTS = 1 << 15  # sequences that are hashed at once: what stays in a core's cache


@cache
def _factors(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [count] odd factors and summands of as many hash functions, always the same."""
    drawn = mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(BASE))
    return drawn[:count] | np.uint64(1), drawn[count:]


def signatures(block: Block, config: NearConfig) -> np.ndarray:
    """uint32 [D, bands * rows]: of each document the least value of each hash function over its sequences. All ones
    where it has fewer words than a sequence."""
    low, count = block.lowered, config.bands * config.rows
    grams, first = ngrams(low.hashes(low.terms), low.terms.owner, config.ngram)
    owner = low.terms.owner[first]
    found = np.full((len(block.texts), count), np.uint32(0xFFFFFFFF))
    factors, summands = _factors(count)
    for start in range(0, len(grams), PARTS):
        some, of = grams[start : start + PARTS], owner[start : start + PARTS]
        begins = np.flatnonzero(np.diff(of, prepend=-1))
        for j in range(count):
            values = ((some * factors[j] + summands[j]) >> np.uint64(32)).astype(np.uint32)
            here = found[of[begins], j]
            found[of[begins], j] = np.minimum(here, np.minimum.reduceat(values, begins))
    return found


def band_keys(signatures: np.ndarray, config: NearConfig) -> np.ndarray:
    """uint64 [D, bands]: equal where two documents agree in all hashes of a band."""
    each = signatures.reshape(len(signatures), config.bands, config.rows).astype(np.uint64)
    total = np.broadcast_to(mix(np.arange(1, config.bands + 1, dtype=np.uint64)), each.shape[:2])
    for row in range(config.rows):
        total = mix(total * np.uint64(BASE) + each[:, :, row])
    return total


def agreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float64 [P]: the share of hashes in which signatures [P, K] agree, whose mean is the Jaccard similarity."""
    found: np.ndarray = (one == other).mean(-1)
    return found
