"""What scores of held-out replies say of what gave them: how often the better reply wins, and how surely it should."""

from typing import Any

import numpy as np

from gptjax.intervals import wilson
from gptjax.model.scalar import is_better

TERCILES = "near", "middle", "far"
BINS = 10  # of the predicted probability, from 1/2 to 1


def figures(scores: np.ndarray, ranks: np.ndarray) -> dict[str, Any]:
    """scores, ranks [N, K], rank 1 the best and 0 no reply -> by name:

    loss: nats, the mean over prompts of each one's mean over its pairs; accuracy: share of pairs whose better reply has
    the higher score (an equal score is wrong); accuracy_low, _high: Wilson's 95% interval of as many independent pairs,
    too narrow where a prompt has several; accuracy_near, _middle, _far: of the third of pairs with the smallest gaps
    between scores, of the next and of the largest; calibration: [predicted, observed, pairs] of each bin of
    sigmoid(|gap|), the predicted probability that the reply with the higher score is the better one; calibration_error:
    the mean over pairs of |predicted - observed| of their bins; score_mean, score_std: of all replies.
    """
    scores, better = scores.astype(np.float64), is_better(ranks)
    gaps = scores[:, :, None] - scores[:, None, :]
    nats, counts = np.where(better, np.logaddexp(0, -gaps), 0).sum((1, 2)), better.sum((1, 2))
    gap, replies = gaps[better], scores[ranks > 0]
    right, size = gap > 0, np.abs(gap)
    low, high = wilson(int(right.sum()), len(right))
    thirds = np.array_split(right[np.argsort(size, kind="stable")], 3)
    bins = _bins(1 / (1 + np.exp(-size)), right)
    return {
        "loss": float((nats[counts > 0] / counts[counts > 0]).mean()),
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        **{f"accuracy_{name}": float(t.mean()) for name, t in zip(TERCILES, thirds, strict=True) if len(t)},
        "calibration_error": sum(count * abs(said - seen) for said, seen, count in bins) / len(right),
        "calibration": bins,
        "score_mean": float(replies.mean()),
        "score_std": float(replies.std()),
    }


def _bins(predicted: np.ndarray, right: np.ndarray) -> list[list[float]]:
    """[mean predicted, share of right, number] of each bin that is not empty."""
    place = np.minimum(((2 * predicted - 1) * BINS).astype(int), BINS - 1)
    every = (place == number for number in range(BINS))
    return [[float(predicted[b].mean()), float(right[b].mean()), int(b.sum())] for b in every if b.any()]
