"""The collective bill: what a compiled step sends, read from the program's own text.

A computation that a loop repeats counts as often as the loop turns: as the compiler knows it (CPU, GPU), or as the
loop's condition says (TPU). A loop over a number that only the run knows (gradient accumulation) turns `dynamic_trips`
times.

Bytes are those of the whole array that a collective moves: what an all-gather makes, what a reduce-scatter or an
all-reduce takes, what a collective-permute or an all-to-all sends.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4}
WIDTHS |= {"s64": 8, "u64": 8}
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str
    """Operands and attributes."""


@dataclass(frozen=True)
class Collective:
    """One collective of the program."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes over which it talks."""
    ways: int
    """Devices in a group."""
    bytes: int
    """Of one execution; see the module."""
    count: int
    """Executions in a step."""
    overlapped: bool
    """Started before and waited for after other work."""
    source: str
    """The operation of the model that it belongs to, where the compiler says so."""
    disguised: bool = False
    """An all-gather that the compiler writes as an all-reduce of zero-padded parts: twice the traffic."""

    @property
    def total(self) -> int:
        return self.bytes * self.count


def read(text: str, mesh: dict[str, int], dynamic_trips: int = 1) -> list[Collective]:
    """The collectives of a compiled module; mesh: axis -> size, in the order of the devices."""
    computations, entry = split(text)
    counts: dict[str, int] = defaultdict(int)
    fused = {CALLED.findall(i.rest)[0] for body in computations.values() for i in body if i.opcode == "fusion"}
    for name, times in _walk(computations, entry, 1, dynamic_trips):
        counts[name] += times
    coordinates = np.stack(np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values())), axis=1)
    bill: dict[str, Collective] = {}
    for name, times in counts.items():
        body = {i.name: i for i in computations[name]}
        for instruction in computations[name]:
            if between := _between_slices(instruction, mesh, times):
                bill[f"{name} {instruction.name}"] = between
                continue
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            axes, ways = _axes(instruction.rest, mesh, coordinates)
            if ways == 1:
                continue
            size = _bytes(instruction, kind, ways)
            scattered = kind == "all-reduce" and name.startswith("all-reduce-scatter")
            disguised = kind == "all-reduce" and not scattered and _is_padded_part(instruction, body, computations)
            kind = "reduce-scatter" if scattered else "all-gather" if disguised else kind
            overlapped, operation = instruction.opcode.endswith("-start"), source(instruction.rest)
            # The TPU compiler repeats a collective in each fusion with work that hides it: one channel, one bill.
            channel = re.search(r"channel_id=(\d+)", instruction.rest) if name in fused else None
            key = f"channel {channel[1]}" if channel else f"{name} {instruction.name}"
            if key in bill:
                bill[key] = replace(bill[key], overlapped=True)
            else:
                bill[key] = Collective(kind, axes, ways, size, times, overlapped, operation, disguised)
    return list(bill.values())


def split(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a compiled module by name, and the name of the one that runs first."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith((" ", "}")) and (match := HEADER.match(line)):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None and (match := INSTRUCTION.match(line)):
            current.append(Instruction(match[1], match[2], match[3], match[4]))
    return computations, entry


def _walk(
    computations: dict[str, list[Instruction]], name: str, times: int, dynamic_trips: int
) -> Iterator[tuple[str, int]]:
    """Every computation that runs, with how often."""
    yield name, times
    for instruction in computations[name]:
        if instruction.opcode not in ("while", "fusion", "call", "conditional", "async-start"):
            continue
        turns = _trips(instruction, computations, dynamic_trips) if instruction.opcode == "while" else 1
        called = CALLED.findall(instruction.rest)
        if branches := BRANCHES.search(instruction.rest):
            called += re.findall(r"%?([\w.\-]+)", branches[1])
        for other in called:
            if other in computations:
                yield from _walk(computations, other, times * turns, dynamic_trips)


def _trips(loop: Instruction, computations: dict[str, list[Instruction]], dynamic_trips: int) -> int:
    """Turns of a loop from 0 in steps of 1, as all of ours are."""
    if known := re.search(r'known_trip_count":?=?\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    constants: dict[str, int] = {}
    for instruction in computations[condition[1]] if condition else []:
        if instruction.opcode == "constant" and (value := re.match(r"(\d+)\)", instruction.rest)):
            constants[instruction.name] = int(value[1])
        elif instruction.opcode == "compare" and "direction=LT" in instruction.rest:
            operands = re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])
            return next((constants[o] for o in operands if o in constants), dynamic_trips)
    return dynamic_trips


def _between_slices(instruction: Instruction, mesh: dict[str, int], times: int) -> Collective | None:
    """Traffic between TPU slices, which the compiler writes as a send to the hosts' network."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    if instruction.opcode != "send" or kind is None:
        return None
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', instruction.rest)
    count = len(slices[1].split(",")) if slices else 1
    axes, product = [], 1
    for axis, size in mesh.items():  # the outer axes cross slices
        if product < count and size > 1:
            axes.append(axis)
            product *= size
    names = {"ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter"}
    size = _shown(instruction.shape.split(", u32[]")[0])
    named = names.get(kind[1], "collective-permute")
    return Collective(named, tuple(axes), product, size, times, True, source(instruction.rest))


def _shown(shape: str) -> int:
    """Bytes of all arrays in a shape as text."""
    return sum(
        WIDTHS.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in re.findall(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]", shape)
    )


def _bytes(instruction: Instruction, kind: str, ways: int) -> int:
    """Of the whole array; the result of a start, except of an all-reduce, has the operands as well."""
    shown = _shown(instruction.shape)
    if not instruction.opcode.endswith("-start") or kind == "all-reduce":
        return shown * ways if kind == "reduce-scatter" else shown
    return shown * ways // (ways + 1) if kind in ("all-gather", "reduce-scatter") else shown // 2


def _axes(rest: str, mesh: dict[str, int], coordinates: np.ndarray) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the members of a group differ, and the size of a group."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        ids = np.array(re.findall(r"\{(\d+),(\d+)\}", pairs[1]), int)
        varies = (coordinates[ids[:, 0]] != coordinates[ids[:, 1]]).any(axis=0)
    else:
        group = coordinates[_group(rest, len(coordinates))]
        varies = (group != group[0]).any(axis=0)
    axes = tuple(axis for axis, changes in zip(mesh, varies, strict=True) if changes)
    return axes, math.prod(mesh[axis] for axis in axes)


def _group(rest: str, devices: int) -> np.ndarray:
    """Device numbers of the first group: written out, as an iota, or as axes of a mesh."""
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?)\))? \{([^}]*)\}", rest
    ):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = _iota(named[2], devices) if named[2] else np.arange(devices)
        order = order.reshape(tuple(sizes.values()))
        wanted = re.findall(r"'(\w+)'", named[3])
        return order[tuple(slice(None) if axis in wanted else 0 for axis in sizes)].ravel()
    if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _iota(iota[1], devices)[0]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return np.array(listed[1].split(","), int)
    return np.arange(devices)


def _iota(text: str, devices: int) -> np.ndarray:
    """[8,64]<=[64,8]T(1,0), or [64,8]T(1,0) with the outer shape left to the caller."""
    outer, _, inner = text.rpartition("<=")
    shape = [int(n) for n in re.findall(r"\d+", inner.split("T")[0])]
    ids = np.arange(devices).reshape(shape)
    if "T" in inner:
        ids = ids.transpose([int(n) for n in re.findall(r"\d+", inner.split("T")[1])])
    return ids.reshape([int(n) for n in re.findall(r"\d+", outer)]) if outer else ids


def _is_padded_part(
    instruction: Instruction, body: dict[str, Instruction], computations: dict[str, list[Instruction]]
) -> bool:
    """Whether the operand is one part written into zeros."""
    operand = re.match(r"%?([\w.\-]+)", instruction.rest)
    made = body.get(operand[1]) if operand else None
    if made is None:
        return False
    if made.opcode == "fusion" and (called := CALLED.search(made.rest)):
        return computations[called[1]][-1].opcode == "dynamic-update-slice"
    return made.opcode == "dynamic-update-slice"


def source(rest: str) -> str:
    """The operation of the model that an instruction belongs to, as JAX names it; empty where it is not said."""
    match = re.search(r'op_name="([^"]*)"', rest)
    return match[1] if match else ""
