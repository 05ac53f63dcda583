"""Chips, and how they are wired: the one table behind every prediction.

TPU rows: "How to Scale Your Model" (tpus.md); tpu7x: Google Cloud's documentation of Ironwood, per device, of which a
chip has two. GPU rows: NVIDIA's datasheets. All rates are bytes or FLOPs per second, memory is what a program gets.
The slow network: what published multi-slice runs had of it, a chip: v5e 25 Gbit/s, v6e 100.
"""

import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.files import read_json
from gptjax.hardware import PEAK_FLOPS


@dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them."""

    name: str
    flops: float
    """Dense bfloat16 peak."""
    hbm: float
    """Bytes that a program may use: what the compiler grants (TPU), or all but 8% or so (GPU)."""
    hbm_rate: float
    link: float
    """One ICI axis of a TPU, both directions together; one GPU's NVLink, one direction."""
    slow: float
    """This device's share of the network between slices or nodes, one direction."""
    matmul: float
    """Share of the bfloat16 peak that large matrix products reach; see below."""
    platform: str = "tpu"
    price: float = 0.0
    """Dollars for an hour of a chip; 0 where nobody has said."""
    float8: float = 0.0
    """Dense float8 peak; 0 where such products are computed as others, or not at all."""
    matmul8: float = 0.6
    """Share of it that large matrix products reach."""
    tile: int = 128
    """Side of the tiles that a product is computed in."""
    compute_capability: str = ""
    """Of NVIDIA's."""

    @property
    def device_kind(self) -> str:
        """As JAX has it on a device."""
        return self.name


GIB = 2.0**30
# `matmul` and `matmul8` are what no data sheet has. They and the constants of traffic.py and cost.py that are called
# fitted make the mean of |log(predicted / published)| over the entries of one half of published runs smallest, in steps
# of 0.01; the other half says how wrong that is (planner/published.py has both, and the errors). Rows that they were
# fitted on: matmul of v4: 22B; v5e: 16B, 64B, fuji 7B; v5p: 32B to 1024B; v6e and tpu7x: Llama 70B and 405B; A100 and
# H100: GPT 5B. matmul8 of v5p: four of GPT-3 175B in int8; tpu7x: Llama 70B and 405B in fp8; H100: GPT 5B in fp8.
# Taken from their like, not fitted: both of H200 and Blackwell (H100), matmul8 of v6e (between v5p and tpu7x).
# Tiles are the side of the systolic array, or of what a thread block of a GPU computes; no published size shows them.
_HOPPER: dict[str, Any] = {"platform": "gpu", "float8": 1.979e15, "matmul8": 0.50, "compute_capability": "9.0"}
_BLACKWELL: dict[str, Any] = {"platform": "gpu", "matmul8": 0.50, "compute_capability": "10.0"}
CHIPS = {
    "v4": Chip("TPU v4", PEAK_FLOPS["TPU v4"], 30.75 * GIB, 1.2e12, 9e10, 6.25e9, 0.82),
    "v5e": Chip("TPU v5e", PEAK_FLOPS["TPU v5e"], 15.75 * GIB, 8.1e11, 9e10, 3.1e9, 0.94, matmul8=0.63),
    "v5p": Chip("TPU v5p", PEAK_FLOPS["TPU v5p"], 95.74 * GIB, 2.8e12, 1.8e11, 6.25e9, 0.79, matmul8=0.63),
    "v6e": Chip(
        *("TPU v6e", PEAK_FLOPS["TPU v6e"], 31.25 * GIB, 1.6e12, 1.8e11, 1.25e10, 0.74),
        float8=1.836e15,
        matmul8=0.67,
        tile=256,
    ),
    "tpu7x": Chip(
        *("TPU7x core", PEAK_FLOPS["TPU7x"], 94.75 * GIB, 3.69e12, 1.8e11, 6.25e9, 0.79),
        float8=2.307e15,
        matmul8=0.71,
        tile=256,
    ),
    "a100": Chip(
        *("A100 80GB", PEAK_FLOPS["NVIDIA A100-SXM4-80GB"], 73.6 * GIB, 2.0e12, 3e11, 2.5e10, 0.72, "gpu"),
        compute_capability="8.0",
    ),
    "h100": Chip("H100 80GB", PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 72.7 * GIB, 3.35e12, 4.5e11, 5e10, 0.55, **_HOPPER),
    "h200": Chip("H200", PEAK_FLOPS["NVIDIA H200"], 129 * GIB, 4.8e12, 4.5e11, 5e10, 0.55, **_HOPPER),
    "b200": Chip("B200", PEAK_FLOPS["NVIDIA B200"], 165 * GIB, 8.0e12, 9e11, 5e10, 0.55, float8=4.5e15, **_BLACKWELL),
    "gb200": Chip("GB200", PEAK_FLOPS["NVIDIA GB200"], 170 * GIB, 8.0e12, 9e11, 5e10, 0.55, float8=5e15, **_BLACKWELL),
}
ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "v5": "v5p",
    "v6": "v6e",
    "v6litepod": "v6e",
    "trillium": "v6e",
    "ironwood": "tpu7x",
    "v7x": "tpu7x",
    "tpuv7x": "tpu7x",
    "a100-80gb": "a100",
    "h100-80gb": "h100",
    "h200-141gb": "h200",
    "h100-mega-80gb": "h100",
}
MACHINES = {
    "a2-ultragpu": "a100",
    "a3-highgpu": "h100",
    "a3-edgegpu": "h100",
    "a3-megagpu": "h100",
    "a3-ultragpu": "h200",
    "a4-highgpu": "b200",
    "a4x-highgpu": "gb200",
    "p4de.24xlarge": "a100",
    "p5.48xlarge": "h100",
    "p5e.48xlarge": "h200",
    "p5en.48xlarge": "h200",
    "p6-b200.48xlarge": "b200",
}
"""Machines that clouds rent, by their GPU: a3-highgpu-8g has 8."""
NODE = 8  # GPUs of a machine whose name does not say how many
CORES_COUNTED = ("v4", "v5p", "tpu7x")
"""Families whose names count cores, two a chip: v5p-1024 has 512 chips."""
PLANES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Shapes of whole slices, in chips; from 64 chips on in three dimensions any of whole cubes of 4 x 4 x 4."""
LONGEST = 28  # chips along one side: a pod of v5p is 16 x 20 x 28
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
}
"""Families by what JAX calls an attached device of them."""
COMPILER_NAMES = {"v4": "v4", "v5e": "v5e", "v5p": "v5", "v6e": "v6e", "tpu7x": "tpu7x"}


@dataclass(frozen=True)
class Topology:
    """Slices of a torus (TPU) or nodes of GPUs, and the slow network between them."""

    name: str
    family: str
    chip: Chip
    shape: tuple[int, ...]
    """Devices along each fast axis of a slice or node."""
    num_slices: int = 1

    @property
    def slice_devices(self) -> int:
        return math.prod(self.shape) * (2 if self.family == "tpu7x" else 1)

    @property
    def num_devices(self) -> int:
        return self.slice_devices * self.num_slices

    @property
    def chips(self) -> int:
        """As they are rented: of tpu7x half as many as devices."""
        return self.num_devices // (2 if self.family == "tpu7x" else 1)

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Axes whose ends are joined: of 16 in a plane, all of whole cubes of 4."""
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape)
        return (min(self.shape) >= 4,) * len(self.shape)

    @property
    def compiler_name(self) -> str:
        """The name by which the TPU compiler knows a slice."""
        return f"{COMPILER_NAMES[self.family]}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        if self.chip.platform == "gpu":
            return f"{self.name}: {self.num_slices} nodes of {shape} x {self.chip.name}"
        slices = f"{self.num_slices} slices of " if self.num_slices > 1 else ""
        return f"{self.name}: {slices}{self.slice_devices} x {self.chip.name} ({shape})"


NAME = re.compile(r"(?:tpu-)?(?P<family>[a-z0-9.-]+?)(?:-(?P<size>\d+(?:x\d+)*)g?(?:x(?P<nodes>\d+))?)?")


def topology(name: str, num_slices: int = 1) -> Topology:
    """TPUs as Google counts them (v4-, v5e- or v5litepod-, v5p-, v6e-, tpu7x-N) or by shape in chips (v5p-4x4x12);
    GPUs by node and nodes (h100-8x64) or by a machine (a3-highgpu-8g), of which `num_slices` are taken.

    Raises UserError for a name that is not one, with the nearest size of that family.
    """
    if num_slices < 1:
        raise UserError(f"--slices {num_slices}: must be positive; nearest 1")
    match = NAME.fullmatch(name.lower().replace("_", "-"))
    written = match["family"] if match else ""
    family = MACHINES.get(written) or ALIASES.get(written, written)
    if match is None or family not in CHIPS or not (match["size"] or written in MACHINES):
        raise UserError(
            f"--topology {name}: expected one of {', '.join(f'{f}-N' for f in COMPILER_NAMES)}, v5litepod-N, a shape "
            f"such as v5p-4x4x12, or GPUs: a node x nodes of {', '.join(_gpus())}, such as h100-8x64, or a machine "
            "such as a3-highgpu-8g; nearest v5p-128"
        )
    sizes = [int(n) for n in (match["size"] or str(NODE)).split("x")]
    if CHIPS[family].platform == "gpu":
        return _nodes(name, family, [*sizes, *([int(match["nodes"])] if match["nodes"] else [])], num_slices)
    return Topology(name, family, CHIPS[family], _slice(name, family, sizes), num_slices)


def _gpus() -> list[str]:
    return [family for family, chip in CHIPS.items() if chip.platform == "gpu"]


def _nodes(name: str, family: str, sizes: list[int], times: int) -> Topology:
    """GPUs of a node, and nodes unless `times` says how many."""
    if len(sizes) > 2 or min(sizes) < 1:
        raise UserError(f"--topology {name}: needs at least one GPU and one node; nearest {family}-{NODE}x1")
    if len(sizes) == 2 and times > 1:
        raise UserError(f"--slices {times}: GPU nodes are counted in the name; use {family}-{sizes[0]}xN")
    size, nodes = (*sizes, times)[:2]
    return Topology(f"{family}-{size}x{nodes}", family, CHIPS[family], (size,), nodes)


def _slice(name: str, family: str, sizes: list[int]) -> tuple[int, ...]:
    """The shape of a slice in chips: as written, or the most compact of those of so many chips."""
    cores = 2 if family in CORES_COUNTED else 1
    shapes = _shapes(family)
    if len(sizes) > 1 and tuple(sorted(sizes)) in shapes:
        return tuple(sorted(sizes))
    chips = math.prod(sizes) if len(sizes) > 1 else sizes[0] / cores
    compact = min((shape for shape in shapes if len(sizes) == 1 and math.prod(shape) == chips), key=_spread, default=())
    if not compact:
        near = math.prod(min(shapes, key=lambda shape: abs(math.prod(shape) - chips))) * cores
        raise UserError(f"--topology {name}: no slice of {family} has that size; nearest {family}-{near}")
    return compact


def _spread(shape: tuple[int, ...]) -> tuple[int, int]:
    return max(shape), sum(shape)


def _shapes(family: str) -> list[tuple[int, ...]]:
    """Shapes of whole slices of a family, in chips."""
    if family not in CORES_COUNTED:
        return [*PLANES]
    sides = range(4, LONGEST + 1, 4)
    return [*SMALL_CUBES, *itertools.combinations_with_replacement(sides, 3)]


CONSTANTS = ("flops", "hbm", "hbm_rate", "link", "slow", "matmul", "price", "float8", "matmul8", "tile")
"""Of a chip, as a file may give them."""


def with_constants(topology: Topology, path: Path | None, price: float) -> Topology:
    """The topology with what a file says of its chip, {"v5p": {"matmul": 0.72, "price": 4.2}}, and with a price unless
    it is 0. Raises UserError for a file of another form."""
    given = read_json(path, 'write {"v5p": {"matmul": 0.72}}') if path else {}
    for family, values in given.items():
        if family not in CHIPS or not isinstance(values, dict):
            raise UserError(f"{path}: {family}: no family of chips with constants; choose from {', '.join(CHIPS)}")
        for name, value in values.items():
            if name not in CONSTANTS:
                raise UserError(f"{path}: {family}.{name}: no constant of a chip; choose from {', '.join(CONSTANTS)}")
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise UserError(f"{path}: {family}.{name} = {value}: must be a number above 0")
    own = given.get(topology.family, {}) | ({"price": price} if price else {})
    return replace(topology, chip=replace(topology.chip, **own))


def wiring(topology: Topology, sizes: dict[str, int]) -> dict[str, tuple[float, int]]:
    """Within a slice or node, for each mesh axis: bytes per second into a device from the others, and how many
    physical axes it lies on.

    Mesh axes take physical axes from the innermost on, whole ones where the sizes fit, else parts. A ring runs both
    ways round a whole axis whose ends are joined; part of an axis, or an open one, gives half. On GPUs every axis has
    the whole switch.
    """
    chip = topology.chip
    if chip.platform != "tpu":
        return dict.fromkeys(sizes, (chip.link, 1))
    cores = topology.family == "tpu7x"
    whole = [2, *topology.shape] if cores else list(topology.shape)
    wrap = [False, *topology.wrap] if cores else list(topology.wrap)
    left, wires = list(whole), {}
    for axis in reversed(sizes):
        pieces = _pieces(left, whole, sizes[axis])
        rate = sum(chip.link * (1.0 if part == whole[i] and wrap[i] else 0.5) for i, part in pieces)
        for i, part in pieces:
            left[i] //= part
        wires[axis] = (rate or chip.link, len(pieces))
    return wires


def _pieces(left: list[int], whole: list[int], size: int) -> list[tuple[int, int]]:
    """(physical axis, part of it) whose product is `size`, or as much of it as there is."""
    free = [i for i in range(len(left)) if left[i] == whole[i] > 1]
    for count in range(len(free), 0, -1):
        for chosen in itertools.combinations(free, count):
            if math.prod(left[i] for i in chosen) == size:
                return [(i, left[i]) for i in chosen]
    parts = []
    for i in sorted(range(len(left)), key=lambda i: left[i]):
        part = math.gcd(left[i], size)
        if part > 1:
            parts.append((i, part))
            size //= part
    return parts
