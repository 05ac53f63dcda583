"""What one step costs on one device, by formulas: memory, time, and the traffic behind it."""

from dataclasses import dataclass

from gptjax.config import Config
from gptjax.planner.chips import Topology


@dataclass(frozen=True)
class Transfer:
    """One kind of traffic over one mesh axis in a step."""

    kind: str
    axis: str
    what: str
    """Which arrays: weights, gradients, residual, keys and values, stages."""
    bytes: float
    """Of whole arrays, as in the bill."""
    seconds: float
    exposed: float
    """Seconds that no computation hides."""


@dataclass(frozen=True)
class Estimate:
    """Per device; bytes, and seconds of a step."""

    memory: dict[str, float]
    """parameters, optimizer, gradients, activations, temporaries."""
    seconds: dict[str, float]
    """What a step's time is made of, adding up to it: matrix products, recomputation, attention, memory traffic,
    optimizer, bubble, and exposed communication."""
    transfers: tuple[Transfer, ...]

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def estimate(config: Config, topology: Topology) -> Estimate:
    """The prediction for a config whose layout fits the topology's devices. Raises UserError where it does not."""
    raise NotImplementedError
