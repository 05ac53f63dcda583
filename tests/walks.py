"""The random walks of Decision Transformer (arXiv 2106.01345) as trlX trains PPO on them: a world of which the best
reply to every prompt is known.

A directed graph of 21 nodes, of which 0 is the goal. A prompt is BOS and a start, a reply the nodes after it and EOS:
a shorter way to the goal is better. A walk has at most 10 nodes, the start among them, so that a reply has at most 9
nodes and EOS, 10 tokens, and a text 12. The figure of a reply, its gold, counts the nodes of the walk up to the goal,
both ends among them: a goal that is the tenth node earns as little as one that was not reached, and no later node could
earn more. Longer walks would therefore have the same gold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NODES, GOAL = 21, 0
EOS, PAD, BOS = 21, 22, 23
VOCABULARY = 24
MOST = 10  # nodes of a walk, start and goal among them
REPLY, TEXT = MOST, MOST + 2  # tokens at most: without the start, with EOS; with BOS and the start, too
REPLIES = 6  # to each prompt that is ranked

Ids = Sequence[int] | np.ndarray
Replies = Callable[[np.ndarray], Sequence[Ids]]
"""One reply to each row of prompts [rows, 2]."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """A prompt, and what was drawn for it."""

    prompt: np.ndarray
    """BOS and a start, int32 [2]."""
    replies: list[list[int]]
    """As they were drawn, equal ones among them."""
    ranks: list[int]
    """By gold from 1, the best, without gaps; equal ones are ties, and they may all be."""


@dataclass(frozen=True, eq=False)
class World:
    adjacency: np.ndarray
    """bool [from, to]; the goal leads to itself alone."""
    shortest: np.ndarray
    """Nodes of the shortest way from each node to the goal, both ends among them, at most `MOST`; int32 [nodes]."""

    @classmethod
    def make(cls, seed: int = 1002) -> "World":
        state = np.random.RandomState(seed)
        while True:
            adjacency = state.rand(NODES, NODES) > 0.9
            np.fill_diagonal(adjacency, False)
            if adjacency.any(1).all():
                break
        adjacency[GOAL] = np.arange(NODES) == GOAL
        return cls(adjacency, _shortest(adjacency))

    def prompts(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """BOS and a start other than the goal, each as likely; int32 [count, 2]."""
        starts = rng.integers(GOAL + 1, NODES, count, np.int32)
        return np.stack([np.full(count, BOS, np.int32), starts], 1)

    def walks(self, rng: np.random.Generator, count: int) -> list[list[int]]:
        """Texts of walks that take any edge of a node as likely, until the goal or the tenth node."""
        return [[*map(int, prompt), *self.reply(rng, prompt)] for prompt in self.prompts(rng, count)]

    def reply(self, rng: np.random.Generator, prompt_ids: Ids) -> list[int]:
        """A random walk from a prompt, without the prompt."""
        nodes = [int(prompt_ids[-1])]
        while nodes[-1] != GOAL and len(nodes) < MOST:
            nodes.append(int(rng.choice(np.flatnonzero(self.adjacency[nodes[-1]]))))
        return [*nodes[1:], EOS]

    def stray(self, rng: np.random.Generator, prompt_ids: Ids) -> list[int]:
        """A random walk, of which four in ten have any node in the place of one: what a judge must know is no edge."""
        nodes = self.reply(rng, prompt_ids)
        if rng.random() < 0.4:
            nodes[int(rng.integers(len(nodes) - 1))] = int(rng.integers(NODES))
        return nodes

    def gold(self, prompt_ids: Ids, reply_ids: Ids) -> float:
        """From 0, where the goal is not reached over edges before the tenth node, to 1 for a shortest way.

        What follows the goal does not count, not even whether there is an EOS; before it, any token that is no node is
        as wrong as an edge that is not there.
        """
        start = int(prompt_ids[-1])
        best = int(self.shortest[start])
        return (MOST - self._length(start, reply_ids)) / max(1, MOST - best)

    def rankings(self, rng: np.random.Generator, count: int, replies_of: Replies) -> list[Ranking]:
        """`REPLIES` replies to each of so many prompts, which `replies_of` draws in one call, row by row."""
        prompts = self.prompts(rng, count)
        drawn = [[int(i) for i in ids] for ids in replies_of(prompts.repeat(REPLIES, 0))]
        if len(drawn) != count * REPLIES:
            raise ValueError(f"{len(drawn)} replies to {count * REPLIES} rows")
        rankings = []
        for i, prompt in enumerate(prompts):
            replies = drawn[i * REPLIES : (i + 1) * REPLIES]
            golds = [self.gold(prompt, ids) for ids in replies]
            order = sorted(set(golds), reverse=True)
            rankings.append(Ranking(prompt, replies, [order.index(gold) + 1 for gold in golds]))
        return rankings

    def _length(self, node: int, reply_ids: Ids) -> int:
        """Nodes up to the goal; `MOST` where it is not reached."""
        length = 1
        for token in map(int, reply_ids):
            if node == GOAL or length == MOST:
                break
            if not 0 <= token < NODES or not self.adjacency[node, token]:
                return MOST
            node, length = token, length + 1
        return length if node == GOAL else MOST


def _shortest(adjacency: np.ndarray) -> np.ndarray:
    """Breadth first, from the goal against the edges."""
    lengths = np.full(len(adjacency), MOST, np.int32)
    reached = np.arange(len(adjacency)) == GOAL
    lengths[reached] = 1
    for length in range(2, MOST):
        found = adjacency[:, reached].any(1) & ~reached
        lengths[found] = length
        reached |= found
    return lengths
