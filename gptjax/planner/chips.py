"""Chips, and how they are wired: the one table behind every prediction.

TPU rows: "How to Scale Your Model" (tpus.md); tpu7x: Google Cloud's documentation of Ironwood, per device, of which a
chip has two. GPU rows: NVIDIA's datasheets. All rates are bytes or FLOPs per second, memory is what a program gets.
"""

import itertools
import math
import re
from dataclasses import dataclass

from gptjax.errors import UserError
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


GIB = 2.0**30
# `matmul` is the one figure that no data sheet has. Round numbers, with which published runs of GPT-3 175B come out as
# follows (tests/test_planner.py): v5p +1% (MaxText, int8), v6e +8% (MaxText), H100 +14% and A100 +5% (NVIDIA's Pax).
# v4, v5e, tpu7x and H200 are like the nearest of these, and not checked.
CHIPS = {
    "v4": Chip("TPU v4", PEAK_FLOPS["TPU v4"], 30.75 * GIB, 1.2e12, 9e10, 6.25e9, 0.70),
    "v5e": Chip("TPU v5e", PEAK_FLOPS["TPU v5e"], 15.75 * GIB, 8.1e11, 9e10, 6.25e9, 0.70),
    "v5p": Chip("TPU v5p", PEAK_FLOPS["TPU v5p"], 95.74 * GIB, 2.8e12, 1.8e11, 6.25e9, 0.70),
    "v6e": Chip("TPU v6e", PEAK_FLOPS["TPU v6e"], 31.25 * GIB, 1.6e12, 1.8e11, 6.25e9, 0.60),
    "tpu7x": Chip("TPU7x core", PEAK_FLOPS["TPU7x"], 94.75 * GIB, 3.69e12, 1.8e11, 6.25e9, 0.60),
    "a100": Chip("A100 80GB", PEAK_FLOPS["NVIDIA A100-SXM4-80GB"], 73.6 * GIB, 2.0e12, 3e11, 2.5e10, 0.75, "gpu"),
    "h100": Chip("H100 80GB", PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 72.7 * GIB, 3.35e12, 4.5e11, 5e10, 0.65, "gpu"),
    "h200": Chip("H200", PEAK_FLOPS["NVIDIA H200"], 129 * GIB, 4.8e12, 4.5e11, 5e10, 0.65, "gpu"),
}
ALIASES = {"v5litepod": "v5e"}
CORES_COUNTED = ("v4", "v5p", "tpu7x")
"""Families whose names count cores, two a chip: v5p-1024 has 512 chips."""
PLANES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 12), (8, 8, 16)),
    *((8, 12, 16), (12, 12, 12), (8, 16, 16), (12, 16, 16), (16, 16, 16), (16, 16, 24)),
)
"""Shapes of whole slices, in chips."""
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


def topology(name: str, num_slices: int = 1) -> Topology:
    """v4-, v5e- (v5litepod-), v5p-, v6e- and tpu7x-N as Google counts them, or GPU nodes such as h100-8x64.

    Raises UserError for a name that is not one, with the nearest size of that family.
    """
    match = re.fullmatch(r"([a-z0-9]+?)-(\d+)(?:x(\d+))?", name)
    family = ALIASES.get(match[1], match[1]) if match else ""
    if match is None or family not in CHIPS or (CHIPS[family].platform == "gpu") != bool(match[3]):
        raise UserError(
            f"--topology {name}: expected one of {', '.join(f'{f}-N' for f in COMPILER_NAMES)}, v5litepod-N, or GPUs a "
            "node x nodes, such as h100-8x64; nearest v5p-128"
        )
    if num_slices < 1:
        raise UserError(f"--slices {num_slices}: must be positive; nearest 1")
    chip, size = CHIPS[family], int(match[2])
    if chip.platform == "gpu":
        if num_slices > 1:
            raise UserError(f"--slices {num_slices}: GPU nodes are counted in the name; use {name.split('-')[0]}-8xN")
        if size < 1 or int(match[3]) < 1:
            raise UserError(f"--topology {name}: needs at least one GPU and one node; nearest {family}-8x1")
        return Topology(name, family, chip, (size,), int(match[3]))
    halves = 2 if family in CORES_COUNTED else 1
    shapes = {math.prod(shape): shape for shape in (CUBES if halves == 2 else PLANES)}
    chips = size // halves
    if chips not in shapes or size % halves:
        near = min(shapes, key=lambda n: abs(n - size / halves)) * halves
        raise UserError(f"--topology {name}: no slice of {family} has that size; nearest {family}-{near}")
    return Topology(name, family, chip, shapes[chips], num_slices)


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
