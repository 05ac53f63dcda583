"""Which rows of a batch each process holds, and so has to read."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from gptjax.errors import UserError
from gptjax.sharding.rules import Layout


def rows_by_process(layout: Layout, rows: int) -> dict[int, tuple[int, ...]]:
    """The rows of a batch of so many that the devices of each process hold, in order; of absent devices as well.

    A mesh follows the torus, where a host is a block such as 2x2x1, so they need not be consecutive: on v5p-1024
    process 0 of GPT-3 175B holds rows 0 to 3 and 32 to 35 of 256. All processes hold as many, and two of them hold
    the same rows or have none in common: `jax.make_array_from_process_local_data` wants no less, and takes them in
    this order. Raises UserError for a layout of which that is not true.
    """
    held: dict[int, set[int]] = defaultdict(set)
    places: Any = layout.sharding(("batch",)).devices_indices_map((rows,))
    for device, (part,) in places.items():
        held[device.process_index].update(range(*part.indices(rows)))
    made = {process: tuple(sorted(held[process])) for process in sorted(held)}
    first: dict[tuple[int, ...], int] = {}
    for process, mine in made.items():
        first.setdefault(mine, process)
    # Every row is held, so the different sets have no row in common if together they count each once.
    if sum(map(len, first)) > rows or len({len(mine) for mine in first}) > 1:
        few = "; ".join(f"process {process} {spans(mine)}" for mine, process in list(first.items())[:3])
        raise UserError(
            f"layout: the hosts share rows of a micro-batch of {rows} only in part ({few}); let the devices of a "
            "pipeline stage, and those of layout.context x layout.tensor, be whole hosts or divide one"
        )
    return made


def spans(rows: Sequence[int]) -> str:
    """0-3, 32-35"""
    starts = [row for row in rows if row - 1 not in rows]
    ends = [row for row in rows if row + 1 not in rows]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
