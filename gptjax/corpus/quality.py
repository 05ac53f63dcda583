"""GPT-3's filter (its paper, appendix A): a logistic regression tells good text from raw by hashed words, and of raw
text a document stays with a probability that rises with its score."""

import heapq
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptjax.config.corpus import CorpusConfig
from gptjax.corpus.block import Block
from gptjax.corpus.clean import blocks, columns, rows
from gptjax.data.formats import Heard
from gptjax.errors import UserError
from gptjax.files import write_whole

BITS = 18  # 2^18 features, as Spark's HashingTF has
MODEL = "quality.npz"


@dataclass(frozen=True)
class Score:
    """Writes the scores of part `number`; as `pool.Work`."""

    folder: Path
    number: int
    size: int

    def run(self, heard: Heard) -> None:
        model = np.load(self.folder / MODEL)
        texts = (text.as_py().decode() for text in columns(self.folder, self.number, "text")["text"])
        found = [np.zeros(0)]
        for some in blocks(texts):
            found.append(scores(Block(some), model["weights"], float(model["bias"])))
            heard(sum(map(len, some)))
        write_whole(path_of(self.folder, self.number), np.concatenate(found).astype("<f8").tobytes())


def path_of(folder: Path, number: int) -> Path:
    return folder / f"scores-{number:05}.f64"


def scores_of(folder: Path, number: int) -> np.ndarray:
    """float64 [D] of a part that was scored."""
    return np.frombuffer(path_of(folder, number).read_bytes(), "<f8")


def features(block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents, features and values [W] of a matrix that is mostly empty: how often each word is there, each document
    scaled to length 1."""
    low = block.lowered
    words = low.hashes(low.terms) >> np.uint64(64 - BITS)
    both, counts = np.unique((low.terms.owner.astype(np.uint64) << np.uint64(BITS)) | words, return_counts=True)
    owner, feature = (both >> np.uint64(BITS)).astype(np.int64), (both & np.uint64((1 << BITS) - 1)).astype(np.int64)
    length = np.sqrt(np.bincount(owner, counts.astype(np.float64) ** 2, len(block.texts)))
    return owner, feature, counts / length[owner]


def scores(block: Block, weights: np.ndarray, bias: float) -> np.ndarray:
    """float64 [D]: the probability that each document is good text."""
    owner, feature, values = features(block)
    logits = bias + np.bincount(owner, values * weights[feature], len(block.texts))
    found: np.ndarray = 1 / (1 + np.exp(-logits))
    return found


def stays(scores: np.ndarray, keys: np.ndarray, alpha: float) -> np.ndarray:
    """bool [D]: where numpy's pareto(alpha) would lie above 1 - score, which it does with probability
    (2 - score)^-alpha; the draw is of the document's key, uint64 [D], whoever draws it and when."""
    found: np.ndarray = keys / 2.0**64 < (2 - scores) ** -alpha
    return found


def train(folder: Path, parts: list[int], recipe: CorpusConfig) -> None:
    """Writes the model. parts: the origin's number of each part that is cleaned.

    Learns from as many documents of both sides, those of the least keys: the same ones for any number of parts.
    Raises UserError where a side has none.
    """
    from scipy.sparse import csr_array
    from sklearn.linear_model import LogisticRegression

    config, names = recipe.quality, [origin.name for origin in recipe.origins]
    sides = []
    for wanted in (config.raw, config.good):
        texts = _sample(folder, [i for i, origin in enumerate(parts) if names[origin] in wanted], config.documents)
        if not texts:
            raise UserError(f"quality: no document of {', '.join(wanted)} is left to learn from; name other origins")
        sides.append(texts)
    count = min(map(len, sides))
    owner, feature, values = features(Block([*sides[0][:count], *sides[1][:count]]))
    matrix = csr_array((values, (owner, feature)), (2 * count, 1 << BITS))
    model = LogisticRegression(max_iter=1000).fit(matrix, np.repeat([0, 1], count))
    made = io.BytesIO()
    np.savez(made, weights=model.coef_[0], bias=model.intercept_[0])
    write_whole(folder / MODEL, made.getvalue())


def _sample(folder: Path, parts: list[int], most: int) -> list[str]:
    """The texts of the documents with the least keys."""
    keys = [rows(columns(folder, part, "key")["key"], np.uint64)[:, 0] for part in parts]
    least = heapq.nsmallest(
        most, ((key, part, i) for part, each in zip(parts, keys, strict=True) for i, key in enumerate(each.tolist()))
    )
    found: dict[tuple[int, int], str] = {}
    for part in {part for _, part, _ in least}:
        every = columns(folder, part, "text")["text"]
        found |= {(part, i): every[i].as_py().decode() for _, of, i in least if of == part}
    return [found[part, i] for _, part, i in least]
