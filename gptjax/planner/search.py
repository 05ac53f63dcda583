"""Which layouts are worth a compile: every combination that divides, priced by formulas and ranked."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gptjax.config import LAYOUT_PRESETS, Config, LayoutConfig, validate
from gptjax.errors import UserError
from gptjax.planner.chips import Chip, Topology
from gptjax.planner.cost import Estimate, estimate
from gptjax.planner.place import Array, Place, parameters, place
from gptjax.sharding.mesh import MESH_AXES, check, degrees

MOST_TENSOR, MOST_PIPELINE, MOST_CONTEXT = 16, 16, 8
MOST_ROWS = 64  # sequences of a micro-batch on a device
PIECES = 1.2  # what compilers set aside over the peak: 1.2 to 1.4 for the small, 1.2 for those that fill a device
LONG = 8192
"""Positions from which splitting the sequence is tried: below, its attention costs more than it saves."""
SHORT = {"replica": "replica", "pipeline": "pp", "data": "dp", "fsdp": "fsdp", "context": "cp", "tensor": "tp"}


@dataclass(frozen=True)
class Candidate:
    """A config with a layout, a remat policy and a micro-batch, and what it is predicted to cost."""

    name: str
    place: Place
    estimate: Estimate

    @property
    def config(self) -> Config:
        return self.place.config


@dataclass(frozen=True)
class Search:
    """What was looked at."""

    fitting: tuple[Candidate, ...]
    """By predicted step time, fastest first."""
    crowded: tuple[Candidate, ...]
    """Those that need more memory than there is, least first."""
    refused: Counter[str]
    """Why layouts were not priced, by the field that does not allow them, and how many."""


def search(config: Config, topology: Topology) -> Search:
    """Price every layout x remat x micro-batch of a config on a topology."""
    arrays, refused = parameters(config, topology.chip.platform), Counter[str]()
    fitting: list[Candidate] = []
    crowded: list[Candidate] = []
    for layout in layouts(config, topology):
        numbers = None
        for tried in variants(config, layout, topology, refused):
            candidate = priced(tried, topology, arrays, numbers)
            numbers = candidate.place.numbers
            (fitting if fits(candidate.estimate, topology.chip) else crowded).append(candidate)
    fitting.sort(key=lambda c: (c.estimate.step_seconds, c.estimate.peak))
    crowded.sort(key=lambda c: c.estimate.peak)
    return Search(tuple(fitting), tuple(crowded), refused)


def fits(estimate: Estimate, chip: Chip) -> bool:
    """Whether the peak leaves room for the pieces that memory falls into."""
    return estimate.peak * PIECES <= chip.hbm


def priced(
    config: Config,
    topology: Topology,
    arrays: tuple[Array, ...] | None = None,
    numbers: dict[str, float] | None = None,
) -> Candidate:
    """What is known before is as for `place`. Raises UserError where the layout does not fit."""
    here = place(config, topology, arrays, numbers=numbers)
    return Candidate(name(config, topology.num_devices), here, estimate(here))


def layouts(config: Config, topology: Topology) -> Iterator[LayoutConfig]:
    """Products of degrees that use all devices, slices by replica or pipeline; not all of them divide the model."""
    model, total = config.model, topology.num_devices
    units = model.num_layers // len(model.attention_pattern)
    slices = topology.num_slices if topology.chip.platform == "tpu" else 1
    most_context = MOST_CONTEXT if model.seq_len >= LONG else 1
    for tensor in _divisors(topology.slice_devices, MOST_TENSOR):
        for context in _divisors(total, most_context):
            for pipeline in _divisors(total, MOST_PIPELINE) if model.scan_layers else [1]:
                for replica in _divisors(slices, slices):
                    if pipeline % (slices // replica):
                        continue
                    left, rest = divmod(total, tensor * context * pipeline * replica)
                    if rest or not left:
                        continue
                    for data in _divisors(left, left):
                        made = LayoutConfig(
                            replica=replica,
                            pipeline=pipeline,
                            data=data,
                            fsdp=left // data,
                            context=context,
                            tensor=tensor,
                        )
                        yield made
                        if tensor > 1:
                            yield replace(made, sequence_sharding=True)
                        for rounds in (2, 4, 8):
                            if pipeline > 1 and units % (pipeline * rounds) == 0 and rounds <= pipeline:
                                yield replace(made, pipeline_rounds=rounds, sequence_sharding=tensor > 1)


def variants(config: Config, layout: LayoutConfig, topology: Topology, refused: Counter[str]) -> Iterator[Config]:
    """The layout with every remat policy and micro-batch, and where the ramp of the batch must start then."""
    sizes = degrees(layout, topology.num_devices)
    mesh = dict(zip(MESH_AXES, sizes, strict=True))
    ways, stages = mesh["replica"] * mesh["data"] * mesh["fsdp"], mesh["pipeline"]
    config = replace(config, layout=layout)
    try:
        check(with_micro(config, ways * stages), sizes)
        found = [rows for rows in _divisors(config.train.batch_size // ways, MOST_ROWS) if rows % stages == 0]
        if config.train.batch_size % ways or not found:
            raise UserError(f"train.batch_size: {config.train.batch_size} is no multiple of what the batch is cut into")
        tries = [validate(with_micro(config, rows * ways)) for rows in found]
    except UserError as error:
        refused[re.sub(r" = [\d,]+:", ":", str(error).split(";")[0], count=1)] += 1
        return
    for tried in tries:
        for remat in ("none", "dots", "full"):
            yield tried.with_models(remat=remat)


def with_micro(config: Config, micro: int) -> Config:
    """The config with another micro-batch. A ramp starts at a multiple of it, and lanes divide it."""
    train = config.train
    start = min(math.ceil(train.ramp_start / micro) * micro, train.batch_size)
    train = replace(train, micro_batch_size=micro, ramp_start=start)
    return with_lanes(replace(config, train=train), micro)


def with_lanes(config: Config, rows: int) -> Config:
    """The config with as many of its lanes as divide so many rows; a stage that has none stays as it is."""
    lanes = math.gcd(config.data.lanes, rows)
    return config if lanes == config.data.lanes else replace(config, data=replace(config.data, lanes=lanes))


def finalists(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The first of each kind of mesh, in their order: what they would tell apart is what formulas know least."""
    best: dict[tuple[int, ...], Candidate] = {}
    for candidate in candidates:
        best.setdefault(kind(candidate), candidate)
    return list(best.values())[:count]


def smaller(found: Search, candidate: Candidate) -> Candidate | None:
    """The fastest of the same kind that needs an eighth less memory, for one that turned out not to fit."""
    most = candidate.estimate.peak * 7 / 8
    return next((c for c in found.fitting if kind(c) == kind(candidate) and c.estimate.peak <= most), None)


def kind(candidate: Candidate) -> tuple[int, ...]:
    """Degrees of the axes that change what a step sends."""
    layout = candidate.config.layout
    return layout.replica, layout.pipeline, layout.context, layout.tensor


def name(config: Config, num_devices: int) -> str:
    """fsdp64_tp8_seq/full/256: the layout, remat, and the sequences of a micro-batch."""
    return f"{layout_name(config.layout, num_devices)}/{config.model.remat}/{config.micro_batch_size}"


def layout_name(layout: LayoutConfig, num_devices: int) -> str:
    """pp2_rounds2_fsdp64_tp8_seq: degrees over 1, slowest network first, and what else differs from the default."""
    parts = [f"{SHORT[axis]}{n}" for axis, n in zip(MESH_AXES, degrees(layout, num_devices), strict=True) if n > 1]
    if layout.pipeline_rounds > 1:
        parts.append(f"rounds{layout.pipeline_rounds}")
    if layout.pipeline_chunks:
        parts.append(f"chunks{layout.pipeline_chunks}")
    if layout.sequence_sharding:
        parts.append("seq")
    return "_".join(parts) or "single"


def named(config: Config, text: str) -> Config:
    """The inverse: a preset, or a name such as fsdp64_tp8_seq, fsdp64_tp8_seq/full or fsdp64_tp8_seq/full/256.

    What the name leaves out stays the config's. Raises UserError for a name that is neither.
    """
    mesh, _, rest = text.partition("/")
    remat, _, micro = rest.partition("/")
    if mesh in LAYOUT_PRESETS:
        layout = LAYOUT_PRESETS[mesh]
    else:
        values: dict[str, int | bool] = {"fsdp": 1}
        fields = {short: axis for axis, short in SHORT.items()}
        fields |= {"rounds": "pipeline_rounds", "chunks": "pipeline_chunks"}
        for part in mesh.split("_"):
            match = re.fullmatch(r"([a-z]+)(\d+)", part)
            if part == "seq":
                values["sequence_sharding"] = True
            elif match and match[1] in fields:
                values[fields[match[1]]] = int(match[2])
            elif part != "single":
                raise UserError(
                    f"layout {text}: {part} is not a degree; use names such as fsdp64_tp8_seq/full/256, or one of "
                    f"{', '.join(LAYOUT_PRESETS)}"
                )
        layout = LayoutConfig(**values)  # type: ignore[arg-type]
    made = replace(config, layout=layout)
    if remat:
        if remat not in ("none", "dots", "full"):
            raise UserError(f"layout {text}: {remat} is no remat policy; choose from none, dots, full")
        made = made.with_models(remat=remat)
    if micro:
        if not micro.isdigit() or int(micro) < 1:
            raise UserError(f"layout {text}: {micro} is not a number of sequences; nearest 1")
        made = with_micro(made, int(micro))
    return validate(made)


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
