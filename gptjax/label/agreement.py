"""How far two labellers agree, over the pairs of replies to the prompts that both have ranked.

The share is that of the pairs which both rank apart, and in the same order; tau is Kendall's tau-b, of all pairs, in
which ties count: 1 is the same order, 0 what chance gives, -1 the reverse.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from gptjax.label.answers import Answer

Ranks = dict[str, int]
"""Of each reply."""


@dataclass(frozen=True)
class Agreement:
    """Of two labellers."""

    names: tuple[str, str]
    prompts: int
    """That both have ranked, with the same replies."""
    same: int
    """Pairs of replies that both rank in the same order."""
    opposite: int
    tied: tuple[int, int]
    """Pairs that each of them ties."""
    pairs: int

    @property
    def share(self) -> float:
        """NaN where no pair is ranked apart by both."""
        apart = self.same + self.opposite
        return self.same / apart if apart else math.nan

    @property
    def tau(self) -> float:
        """NaN where one of them ties all."""
        room = math.prod(self.pairs - ties for ties in self.tied)
        return (self.same - self.opposite) / math.sqrt(room) if room else math.nan

    def __str__(self) -> str:
        apart = self.same + self.opposite
        return (
            f"{' and '.join(self.names)}: {self.prompts} prompts, the same order in {self.same} of {apart} pairs"
            + (f" ({self.share:.0%})" if apart else "")
            + (f", Kendall's tau-b {self.tau:.2f}" if not math.isnan(self.tau) else "")
        )


def agreements(answers: Iterable[Answer]) -> list[Agreement]:
    """Of every two labellers that have ranked the same replies to the same prompts; of what one has ranked twice the
    last counts."""
    ranked: dict[str, dict[tuple[str, frozenset[str]], Ranks]] = {}
    for answer in answers:
        about = answer.key, frozenset(answer.replies)
        ranked.setdefault(answer.labeller, {})[about] = dict(zip(answer.replies, answer.ranks, strict=True))
    found = []
    for one, other in combinations(sorted(ranked), 2):
        both = [(ranks, ranked[other][about]) for about, ranks in ranked[one].items() if about in ranked[other]]
        if both:
            found.append(_agreement((one, other), both))
    return found


def _agreement(names: tuple[str, str], both: list[tuple[Ranks, Ranks]]) -> Agreement:
    signs = [
        (_sign(ranks[a] - ranks[b]), _sign(others[a] - others[b]))
        for ranks, others in both
        for a, b in combinations(ranks, 2)
    ]
    products = [x * y for x, y in signs]
    tied = sum(x == 0 for x, _ in signs), sum(y == 0 for _, y in signs)
    return Agreement(names, len(both), products.count(1), products.count(-1), tied, len(signs))


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)
