"""What a model gives for windows of text: one program for all of them, on whatever devices it lies."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from gptjax.api import Model
from gptjax.data.rows import PADDING, Rows
from gptjax.evaluate.windows import Window, packed
from gptjax.model.int8 import widened
from gptjax.model.loss import judged
from gptjax.parallel.network import Network

ROWS = 8


class Sums(NamedTuple):
    """Of each text, float64 [N]."""

    nats: np.ndarray
    """Negative log-likelihood of its targets."""
    hits: np.ndarray
    """Targets that were the likeliest token."""
    targets: np.ndarray


class Scorer:
    """Scores windows by a model, `rows` times its context at once."""

    def __init__(self, model: Model, rows: int = ROWS) -> None:
        stage, layout = model.stage, model.stage.layout
        config = replace(stage.config, model=replace(stage.config.model, separate_documents=True))
        self.network = Network(config, stage.platform, layout)
        ways = layout.ways(layout.rules["batch"]) if layout else 1
        self.rows, self.length, self.params = -(-rows // ways) * ways, model.context, model.params

    def sums(self, found: Iterable[Window]) -> Sums:
        """What the windows of texts sum to. Their owners are 0 to N-1 in order, each with a window."""
        totals, waiting = np.zeros((3, 0)), deque[tuple[np.ndarray, np.ndarray, Any]]()
        for rows, owners in packed(found, self.rows, self.length):
            waiting.append((owners, rows.targets, self._judge(self.params, rows)))
            if len(waiting) > 1:  # the devices compute the next while the host adds
                totals = _added(totals, *waiting.popleft())
        while waiting:
            totals = _added(totals, *waiting.popleft())
        return Sums(*totals)

    @cached_property
    def _judge(self) -> Callable[[Any, Rows], tuple[Array, Array]]:
        """jit of (params, rows [b, T]) -> log-probability and hit of each target, [b, T]."""
        network, model = self.network, self.network.config.model

        def judge(params: Any, rows: Rows) -> tuple[Array, Array]:
            ready = widened(params, network.plain_model.dtype)
            hidden, head, targets = network.before_head(ready, rows, None)
            values = judged(hidden, head, targets, model.vocab_size, model.loss_chunk)
            return jax.tree.map(network.in_order, values)  # type: ignore[no-any-return]

        layout = network.layout
        return jax.jit(judge, out_shardings=None if layout is None else layout.sharding(()))


def _added(totals: np.ndarray, owners: np.ndarray, targets: np.ndarray, made: Any) -> np.ndarray:
    """Totals [3, N] and what a batch adds to them, of perhaps more texts."""
    values, hits = jax.device_get(made)
    counted = targets != PADDING
    whose = owners[counted]
    first, end = int(whose.min()), int(whose.max()) + 1
    if end > totals.shape[1]:
        totals = np.pad(totals, ((0, 0), (0, end - totals.shape[1])))
    for row, column in zip(totals, (-values[counted], hits[counted], np.ones(len(whose))), strict=True):
        row[first:end] += np.bincount(whose - first, column.astype(np.float64))
    return totals
