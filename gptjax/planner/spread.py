"""How far a prediction is to be trusted: as far as those of published runs were off that no constant was fitted to."""

from dataclasses import dataclass

from gptjax.planner.chips import Topology
from gptjax.planner.published import ERRORS, RUNS, Run, kind


@dataclass(frozen=True)
class Spread:
    """Between which multiples of a predicted time the true one lay in all such runs."""

    low: float
    high: float
    reason: str
    """Which runs these were."""

    def seconds(self, value: float) -> tuple[float, float]:
        """Of a time, or of what it costs."""
        return value * self.low, value * self.high

    def speed(self, value: float) -> tuple[float, float]:
        return value / self.high, value / self.low


def spread(topology: Topology, float8: bool) -> Spread:
    """Of predictions for a topology: by the held-out runs of its kind, 8 bit, several slices or one, on all chips; by
    all held-out runs where none of that kind is on this chip."""
    slices = topology.num_slices if topology.chip.platform == "tpu" else 1
    wanted = kind(8 if float8 and topology.chip.float8 else 16, slices)
    held = [run for run in RUNS if run.half == "held out"]
    alike = [run for run in held if run.kind == wanted]
    if topology.family in {run.family for run in alike}:
        return _of(alike, f"{len(alike)} published runs of the kind ({wanted})")
    return _of(held, f"all {len(held)} published runs, for none of this kind ({wanted}) is on this chip")


def _of(runs: list[Run], reason: str) -> Spread:
    ratios = [1.0, *(1 + ERRORS[run.title] / 100 for run in runs)]
    return Spread(min(ratios), max(ratios), f"as {reason} that no constant was fitted to")
