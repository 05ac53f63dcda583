"""The world of random walks, on which PPO is proven, against plain loops and walks made by hand. Run:
pytest tests/test_walks.py
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from walks import BOS, EOS, GOAL, MOST, NODES, PAD, REPLIES, REPLY, TEXT, World

WORLD = World.make()


def by_hand(*edges: tuple[int, int]) -> World:
    """A world with these edges, whose shortest ways are 5 -> 3 -> 0 and 4 -> 5 -> 3 -> 0, and 1 -> 0."""
    adjacency = np.zeros((NODES, NODES), bool)
    for edge in ((0, 0), (5, 3), (3, 0), (4, 5), (5, 4), (1, 0), (2, 2), *edges):
        adjacency[edge] = True
    shortest = np.full(NODES, MOST, np.int32)
    shortest[[0, 1, 3, 5, 4]] = 1, 2, 2, 3, 4
    return World(adjacency, shortest)


@pytest.mark.parametrize("seed", range(1000, 1010))
def test_shortest_ways_are_those_of_floyd_and_warshall(seed):
    world = World.make(seed)
    steps = [[0 if i == j else 1 if world.adjacency[i, j] else 99 for j in range(NODES)] for i in range(NODES)]
    for k in range(NODES):
        for i in range(NODES):
            for j in range(NODES):
                steps[i][j] = min(steps[i][j], steps[i][k] + steps[k][j])
    assert world.shortest.tolist() == [min(MOST, row[GOAL] + 1) for row in steps]


def test_the_graph_is_the_one_of_trlx():
    """The seventh that the seed draws, the first in which every node leads somewhere."""
    state = np.random.RandomState(1002)
    drawn = [state.rand(NODES, NODES) > 0.9 for _ in range(7)]
    others = ~np.eye(NODES, dtype=bool)
    assert [bool((each & others).any(1).all()) for each in drawn] == [False] * 6 + [True]
    assert np.array_equal(WORLD.adjacency[1:], (drawn[6] & others)[1:])
    assert np.flatnonzero(WORLD.adjacency[GOAL]).tolist() == [GOAL]
    assert WORLD.shortest.max() == 5  # every node can reach the goal


@pytest.mark.parametrize(
    ("start", "reply", "gold"),
    [
        (5, [3, 0, EOS], 1),
        (1, [0, EOS], 1),
        (4, [5, 4, 5, 3, 0, EOS], 4 / 6),
        (5, [4, 5, 4, 5, 4, 5, 3, 0, EOS], 1 / 7),  # the ninth node
        (4, [5, 4, 5, 4, 5, 4, 5, 3, 0], 0),  # the tenth
        (4, [5, 4, 5, 4, 5, 4, 5, 4, 5, 3, 0], 0),  # later
        (5, [3, 0], 1),  # cut behind the goal
        (5, [3, 0, 7, PAD, 7], 1),  # what follows the goal
        (5, [3], 0),  # cut before
        (5, [], 0),
        (5, [EOS], 0),
        (5, [3, EOS], 0),  # ended before
        (5, [3, EOS, 0], 0),
        (5, [0, EOS], 0),  # no edge
        (5, [5, 3, 0, EOS], 0),
        (5, [4, 3, 0, EOS], 0),
        (5, [BOS, 3, 0, EOS], 0),
        (5, [PAD, 3, 0, EOS], 0),
        (5, [3, -21, EOS], 0),  # no token
        (2, [2] * 9 + [EOS], 0),  # no way
    ],
)
def test_gold_of_walks_made_by_hand(start, reply, gold):
    world = by_hand()
    assert world.gold([BOS, start], reply) == gold
    got = world.gold(np.array([BOS, start], np.int32), np.array(reply, np.int32))
    assert type(got) is float and got == gold


def test_a_shortest_way_from_every_start_is_worth_one():
    for start in range(1, NODES):
        way, node = [], start
        while node != GOAL:
            node = min(np.flatnonzero(WORLD.adjacency[node]), key=lambda to: WORLD.shortest[to])
            way.append(node)
        assert WORLD.gold([BOS, start], [*way, EOS]) == 1


def test_walks_take_edges_until_the_goal_or_the_tenth_node():
    walks = WORLD.walks(np.random.default_rng(0), 2000)
    assert len(walks) == 2000
    for bos, *nodes, eos in walks:
        assert (bos, eos) == (BOS, EOS) and nodes[0] != GOAL
        assert all(WORLD.adjacency[edge] for edge in pairwise(nodes))
        assert GOAL not in nodes[:-1] and (nodes[-1] == GOAL or len(nodes) == MOST)
    assert max(map(len, walks)) == TEXT == 2 + REPLY
    assert {walk[1] for walk in walks} == set(range(1, NODES))
    edges = {edge for walk in walks for edge in pairwise(walk[1:-1])}
    assert edges == {*zip(*(ends.tolist() for ends in np.nonzero(WORLD.adjacency)), strict=True)} - {(GOAL, GOAL)}


def test_random_walks_have_the_mean_gold_that_their_chain_has():
    """From the probability of each node after each step."""
    step = WORLD.adjacency / WORLD.adjacency.sum(1, keepdims=True)
    arrived = [np.linalg.matrix_power(step, length - 1)[1:, GOAL] for length in range(1, MOST + 1)]
    worth = sum((new - old) * (MOST - length) for length, (old, new) in enumerate(pairwise(arrived), 2))
    exact = float(np.mean(worth / (MOST - WORLD.shortest[1:])))
    golds = [WORLD.gold(walk[:2], walk[2:]) for walk in WORLD.walks(np.random.default_rng(0), 4000)]
    print(f"mean gold of random walks {np.mean(golds):.4f}, exact {exact:.4f}, deviation {np.std(golds):.3f}")
    assert exact == pytest.approx(0.7852, abs=1e-4)
    assert np.mean(golds) == pytest.approx(exact, abs=4 * np.std(golds) / len(golds) ** 0.5)


def test_prompts_are_bos_and_a_start():
    prompts = WORLD.prompts(np.random.default_rng(0), 500)
    assert prompts.shape == (500, 2) and prompts.dtype == np.int32
    assert (prompts[:, 0] == BOS).all() and set(prompts[:, 1].tolist()) == set(range(1, NODES))


def test_replies_are_ranked_by_gold_and_ties_are_equal():
    asked = []
    drawn = [[4, 5, 3, 0, EOS], [3, 0, EOS], [0, EOS], [3, 0], [4, 5, 4, 5, 3, 0], [3]]

    def replies_of(prompts: np.ndarray) -> list[np.ndarray]:
        asked.extend(prompts.tolist())
        return [np.array(ids, np.int32) for ids in drawn] * (len(prompts) // REPLIES)

    rankings = by_hand().rankings(np.random.default_rng(0), 200, replies_of)
    assert asked == [ranking.prompt.tolist() for ranking in rankings for _ in range(REPLIES)]
    assert all(ranking.replies == drawn for ranking in rankings)
    ranks = {int(ranking.prompt[1]): ranking.ranks for ranking in rankings}
    assert ranks[5] == [2, 1, 4, 1, 3, 4]
    assert ranks[1] == [2, 2, 1, 2, 2, 2]
    assert ranks[2] == [1] * REPLIES
    with pytest.raises(ValueError, match="5 replies to 6 rows"):
        by_hand().rankings(np.random.default_rng(0), 1, lambda prompts: drawn[:5])


def test_the_same_seed_draws_the_same():
    def drawn(seed: int) -> list[Sequence]:
        world, rng = World.make(), np.random.default_rng(seed)
        ranked = world.rankings(rng, 20, lambda prompts: [world.reply(rng, prompt) for prompt in prompts])
        return [
            world.adjacency.tolist(),
            world.walks(rng, 20),
            world.prompts(rng, 20).tolist(),
            [(*ranking.prompt.tolist(), ranking.replies, ranking.ranks) for ranking in ranked],
        ]

    once, again, other = drawn(0), drawn(0), drawn(1)
    assert once == again
    assert once[0] == other[0] and all(one != two for one, two in zip(once[1:], other[1:], strict=True))
    assert not np.array_equal(World.make(1).adjacency, WORLD.adjacency)
