"""The constants of a chip as the attached devices have them, for plans of larger machines of the same kind."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.planner.chips import CHIPS, KINDS, Topology, topology, wiring
from gptjax.planner.cost import estimate
from gptjax.planner.place import place

HALVINGS = 20  # of the share: to a millionth


def constants(config: Config, seconds: float, facts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What `gptjax plan --chip-file` reads: memory and rates as measured, and the share of the peak that products reach
    with which the step of a config is predicted to take the seconds that it took; 1 where it was faster than that.

    Empty where there is no such family of chips, or no slice or node of so many. The network between slices and nodes,
    which is not here, keeps its constant, and so does the share that the config does not use, of float8 or the others.
    """
    family, count = KINDS.get(facts["device"]), facts["count"]
    here = _whole(family, facts) if family else None
    if family is None or here is None:
        return {}
    found: dict[str, Any] = {"hbm": facts["memory_bytes"], "hbm_rate": facts["limits"]["bytes"]}
    if count > 1:
        one = replace(here, chip=replace(here.chip, link=1.0))
        found["link"] = facts["limits"]["gather"] / wiring(one, {"all": count})["all"][0]
    share = "matmul8" if config.model.fp8 and here.chip.float8 else "matmul"
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = replace(here, chip=replace(here.chip, **(found | {share: middle})))
        low, high = (middle, high) if estimate(place(config, tried)).update_seconds > seconds else (low, middle)
    return {family: found | {share: high}}


def _whole(family: str, facts: dict[str, Any]) -> Topology | None:
    """The slice or node that the attached devices are; None where they are none, or several nodes."""
    count = facts["count"]
    if CHIPS[family].platform == "gpu":
        return topology(f"{family}-{count}x1") if count == facts["local_count"] else None
    for size in (count, 2 * count):  # names of some families count two cores of a device
        with suppress(UserError):
            if (found := topology(f"{family}-{size}")).num_devices == count:
                return found
    return None
