"""What a plan did not expect: parameters that no rule cuts, and collectives that no formula asks for."""

import math
from collections import defaultdict

from gptjax.planner.bill import Collective
from gptjax.planner.place import Place
from gptjax.planner.traffic import traffic
from gptjax.sharding.rules import TOLERANCE, is_vector

EXCESS = 1.25  # times the formula's bytes over the same mesh axes
SHARE = 0.02  # of all that the step sends: below, a surprise does not matter


def replicated(place: Place) -> list[str]:
    """Matrices whose copies cost a device more than TOLERANCE of its share of the whole. Biases and norms have copies
    by design, and what is padded has none."""
    ways = place.mesh["fsdp"] * place.mesh["tensor"]
    total = sum(math.prod(array.shape) for array in place.arrays) / ways
    lines = []
    for array in place.arrays:
        numbers, here = math.prod(array.shape), place.local(array)
        cut = math.prod(place.mesh[name] for axis in array.axes if axis for name in place.rules[axis])
        if numbers / cut - numbers / ways > TOLERANCE * total and not is_vector(array.name):
            rules = ", ".join(f"{axis} -> {' x '.join(place.rules[axis]) or 'nothing'}" for axis in array.axes if axis)
            size = array.dtype.itemsize * here / 1e6
            lines.append(f"{array.name}: {size:,.1f} MB on every device; its rules are {rules}")
    return lines


def unexpected(place: Place, collectives: tuple[Collective, ...]) -> list[str]:
    """Traffic of a compiled program beyond the formulas, with the largest collective behind it.

    The TPU compiler sends some gathers and sums round a ring in pieces, hidden by the products they feed; those do
    not count.
    """
    expected: dict[tuple[str, ...], float] = defaultdict(float)
    of_kind: dict[tuple[tuple[str, ...], str], float] = defaultdict(float)
    for transfer in traffic(place):
        expected[transfer.axes] += transfer.bytes
        of_kind[transfer.axes, transfer.kind] += transfer.bytes
    billed: dict[tuple[str, ...], list[Collective]] = defaultdict(list)
    for collective in collectives:
        ring = collective.kind == "collective-permute" and not {"context", "pipeline"} & set(collective.axes)
        if not (ring and collective.overlapped):
            billed[collective.axes].append(collective)
    everything = sum(c.total for c in collectives)
    lines = []
    for axes, found in billed.items():
        sent = sum(c.total for c in found)
        if sent > EXCESS * expected[axes] and sent - expected[axes] > SHARE * everything:
            excess = {c.kind: -of_kind[axes, c.kind] for c in found}
            for c in found:
                excess[c.kind] += c.total
            worst = max(excess, key=lambda kind: excess[kind])
            most = max((c for c in found if c.kind == worst), key=lambda c: c.total)
            lines.append(
                f"over {' x '.join(axes)} the program sends {sent / 1e9:,.2f} GB where the formulas ask for "
                f"{expected[axes] / 1e9:,.2f}; among it {most.count:,} x {most.kind} of {most.bytes / 1e6:,.1f} MB"
                + (f" for {'/'.join(most.source.split('/')[-4:])}" if most.source else "")
            )
    return lines
