"""What one step costs on one device, by formulas: memory, traffic and time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gptjax.planner.arithmetic import computation
from gptjax.planner.memory import memory
from gptjax.planner.place import Place
from gptjax.planner.rollout import judging, rollout
from gptjax.planner.traffic import Transfer, traffic

STRAGGLERS = 0.02
"""Of a step's computation, for each doubling of the number of TPU slices that wait for the slowest; fitted with
`traffic.SLICES_EXPOSED`."""


@dataclass(frozen=True)
class Estimate:
    """Per device; bytes, and seconds of a step."""

    memory: dict[str, float]
    """parameters, optimizer, gradients, activations, temporaries; cache while replies are drawn."""
    seconds: dict[str, float]
    """What a step's time is made of, adding up to it."""
    transfers: tuple[Transfer, ...]

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def update_seconds(self) -> float:
        """Of the program that learns."""
        return learning(self.seconds)


def estimate(place: Place) -> Estimate:
    """The prediction for a step."""
    transfers = traffic(place)
    return Estimate(memory(place), times(place, transfers), tuple(transfers))


def times(place: Place, transfers: Sequence[Transfer]) -> dict[str, float]:
    """Seconds of a step by what they go to: arithmetic, the pipeline's bubble, waiting for the slowest of several
    slices, and traffic that nothing hides; and before the updates, where a policy learns from its own replies, rollout
    and judging."""
    parts = computation(place)
    inside = sum(parts.values()) - parts["optimizer"]
    parts["bubble"] = inside * (place.stretch - 1)
    if place.topology.chip.platform == "tpu":
        parts["waiting for slices"] = STRAGGLERS * math.log2(place.topology.num_slices) * (inside + parts["bubble"])
    for network in ("fast", "slow"):
        parts[f"{network} network"] = sum(t.exposed for t in transfers if t.network == network)
    if drawn := rollout(place):
        parts |= {"rollout": drawn.seconds, "judging": judging(place)}
    return parts


def learning(seconds: dict[str, float]) -> float:
    """Of those parts the updates'."""
    return sum(each for part, each in seconds.items() if part not in ("rollout", "judging"))
