"""What a step sends, by formula and by a compiled program's bill, and how long that takes.

Every formula is checked against what compilers make of the same step (tests/test_planner.py). M is the micro-batches of
a step; p, r and m the stages, rounds and chunks of a pipeline; W the bytes of a layer's 12 D² in the compute dtype.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from gptjax.model.accounting import MATRICES
from gptjax.planner.arithmetic import computation
from gptjax.planner.bill import Collective
from gptjax.planner.chips import wiring
from gptjax.planner.place import FLOAT, Place
from gptjax.sharding.rules import COPIES
from gptjax.train.step import copies_apart

HIDDEN_WEIGHTS = 0.9  # of the computation, behind which weights and gradients travel
# Fitted to published runs (planner/published.py). Of the traffic of tensor parallelism collective products and
# neighbouring work hide as much as in MaxText's rows on v5p (32B to 1024B, and 175B in int8) with its options of the
# compiler. Of the traffic between TPU slices, which would fit behind the computation, nothing is hidden in those on 2
# to 32 slices of v5e (16B, 64B), v5p and v4 (22B). Weights and gradients that travel behind the computation slow it by
# part of their time: the fitted rows want more of it the more it is, up to shares of the peak that no chip reaches, so
# it is the most with which none exceeds 0.95 (v5e 16B and 64B).
HIDDEN_RESIDUAL = 0.78
SLICES_EXPOSED = 1.0
WEIGHTS_EXPOSED = 0.4


@dataclass(frozen=True)
class Transfer:
    """One kind of traffic over some mesh axes in a step."""

    kind: str
    axes: tuple[str, ...]
    what: str
    """Which arrays: weights, gradients, residual, keys and values, stages."""
    bytes: float
    """Of whole arrays, as in the bill."""
    seconds: float
    exposed: float
    """Seconds that no computation hides."""
    network: str
    """fast (within a slice or node) or slow (between them)."""
    count: int = 0
    """How many, where a program was read."""


def traffic(place: Place) -> list[Transfer]:
    """What a step's updates send, in bytes of whole arrays, with times."""
    micro, updates = place.config.max_accumulation, place.config.updates
    sent = [(about, updates * size) for model in place.learners for about, size in _sent(model, micro)]
    used = tuple(axis for axis in COPIES if place.mesh[axis] > 1)
    if _apart(place, micro):
        sent.append((("all-reduce", used, "gradients' sums", 0.0), updates * FLOAT * place.local_trained))
    return _timed(place, sent, sum(computation(place).values()))


def judged(place: Place, calls: int, compute: float) -> list[Transfer]:
    """What so many micro-batches send that are only judged, in `compute` seconds."""
    sent = [(about, calls * size) for model in place.judges for about, size in _sent(model, 1)]
    return _timed(place, sent, compute)


About = tuple[str, tuple[str, ...], str, float]
"""Kind, mesh axes, what, and the share that is hidden; see Transfer."""


def _timed(place: Place, sent: Iterable[tuple[About, float]], compute: float) -> list[Transfer]:
    """What is sent beside so many seconds of computation."""
    rates, sizes = Rates(place), defaultdict[About, float](float)
    for about, size in sent:
        sizes[about] += size
    return [
        Transfer(kind, axes, what, size, seconds, rates.exposed(axes, seconds, hidden, compute), rates.network(axes))
        for (kind, axes, what, hidden), size in sizes.items()
        for seconds in [rates.seconds(kind, axes, size)]
    ]


def _sent(place: Place, micro: int) -> list[tuple[About, float]]:
    """Bytes that one model sends which reads so many micro-batches with the same parameters."""
    model, layout, mesh, reading = place.model, place.config.layout, place.mesh, place.reading
    stages, unit = mesh["pipeline"], len(model.attention_pattern)
    trained, full = int(reading.trained), model.remat == "full"
    made: list[tuple[About, float]] = []

    def add(kind: str, axes: tuple[str, ...], what: str, size: float, hidden: float = 0.0) -> None:
        used = tuple(axis for axis in axes if mesh[axis] > 1)
        if used and size:
            made.append(((kind, used, f"{reading.name}: {what}" if reading.name else what, hidden), size))

    weights = place.matrices * place.layers * micro
    split, rest = (size * place.layers * micro for size in place.adapters)
    if stages > 1:
        add("all-gather", ("fsdp",), "weights", weights + split, 0.0)
    else:
        # Forward, backward, and under full remat once more but for what the backward pass needs right after: the
        # last layer's projection and its MLP's matrices, 9 of a unit's 12 n D² in GPT-3. A CPU's compiler keeps all of
        # them.
        kept = (1 - place.share_of("qkv")) / unit
        again = 1 - kept if full and place.topology.chip.platform != "cpu" else 0.0
        add("all-gather", ("fsdp",), "weights", (weights + split) * (1 + trained * (1 + again)), 1.0)
    fsdp = mesh["fsdp"]
    copies = ("context",) if _apart(place, micro) else (*COPIES, "context")
    behind = 1.0 if stages == 1 else 0.0
    lora = reading.lora
    whole = 0 if lora else trained  # beside adapters nothing else has a gradient
    adapted = set(lora.matrices) if lora else set[str]()
    table = 1 if whole or "embedding" in adapted else 0  # the gradient of an adapter of it is made of its own
    add("reduce-scatter", ("fsdp",), "gradients", whole * weights + split, behind)
    add("all-reduce", copies, "gradients", (whole * weights + split) / fsdp, behind)
    add("all-reduce", (*copies, "fsdp"), "gradients of what fsdp does not cut of adapters", rest, behind)
    # The embedding, whole over fsdp, once a step; its gradient from the head and, in float32, from the lookup. The
    # positions' gradient is a product, and goes as those of matrices; where positions are looked up, it is as the
    # embedding's.
    learned = model.seq_len + model.position_offset if model.positions == "learned" else 0
    positions = learned * model.embed_dim * place.width
    others = ("pipeline", *copies)
    tables = place.embedding * (reading.own_table + (not model.tied_head))
    add("all-gather", ("fsdp",), "embedding", tables + positions)
    looked_up = place.embedding * FLOAT / place.width
    scored = place.embedding if reading.scored else 0.0
    add("all-reduce", (*others, "fsdp"), "embedding's gradient", table * (scored + looked_up) * micro)
    if lora and "embedding" in adapted:  # of the half that has all of the vocabulary, in float32
        half = lora.rank * model.padded_vocab_size * FLOAT / mesh["tensor"]
        add("all-reduce", ("fsdp",), "gradient of the embedding's adapter", half * micro)
    add("all-reduce", (*others, "fsdp"), "gradients of biases and norms", trained * place.vectors * micro)
    if model.positions == "relative":  # of what is added to the scores, which every layer gives its own of
        scores = model.num_heads / mesh["tensor"] * model.seq_len**2 * FLOAT
        add("all-reduce", (*others, "fsdp"), "gradient of distances", trained * scores * place.layers * micro)
    # A pooler's gradient is made of its rows, which are few.
    square = model.embed_dim**2 * place.width if reading.places else 0.0
    add("all-gather", ("fsdp",), "what stands on an encoder", place.heads)
    add("reduce-scatter", ("fsdp",), "gradient of the transform", trained * square * micro)
    add("all-reduce", others, "gradient of the transform", trained * square / fsdp * micro)
    if place.restarts:
        wide = positions * FLOAT / place.width / mesh["tensor"]
        add("all-reduce", (*others, "fsdp"), "positions' gradient", whole * wide * micro)
    else:
        add("reduce-scatter", ("fsdp",), "positions' gradient", trained * positions * micro)
        add("all-reduce", others, "positions' gradient", trained * positions / fsdp * micro)

    residual = place.residual * place.layers * micro * place.stretch
    ends = place.residual / stages * micro
    # What goes into the second half of an adapter is summed with what its matrix sums.
    sums = residual * (1 + (len(adapted.intersection(MATRICES)) * lora.rank / (4 * model.embed_dim) if lora else 0))
    parts = 2 + model.cross_attention
    recomputed = (parts * unit - 1) / unit if full else 0.0  # a unit's last sum is not needed again
    summed = parts + trained * (parts + recomputed)
    add("all-to-all", ("tensor",), "embedding from vocabulary to width", place.embedding * (1 + table * micro))
    add("all-gather", ("tensor",), "tokens looked up", ends)
    told = 1.0 if model.causal else reading.scored / model.seq_len  # of an encoder's tokens the hidden ones
    add("all-reduce", ("tensor",), "the loss's gradient", trained * ends * told)
    if layout.sequence_sharding:
        # What attention and the MLP read, and the gradient of what they give: once where both read, or give, the same.
        # No policy but none keeps what a matrix read, whole along the length. Of an adapter's gradient, once more what
        # its matrix needs of the residual's.
        across = model.cross_attention
        reads = (1 if model.parallel_mlp == "one_norm" else 2) + across
        gives = (2 if model.parallel_mlp == "no" else 1) + across
        gathers = reads + trained * (gives + (0 if model.remat == "none" else reads))
        gathers += len({"projection", "mlp_down"} & adapted)
        add("all-gather", ("tensor",), "residual", residual * gathers, HIDDEN_RESIDUAL)
        add("reduce-scatter", ("tensor",), "residual", sums * summed, HIDDEN_RESIDUAL)
    else:
        add("all-reduce", ("tensor",), "residual", sums * summed, HIDDEN_RESIDUAL)
    add("all-reduce", ("tensor",), "gradient of the text looked at", trained * place.memory * place.layers * micro)

    add("collective-permute", ("context",), "keys and values", _context_bytes(place) * micro * place.stretch, 0.5)

    if stages > 1:
        handed = place.ticks * place.resting / place.chunks * micro
        add("collective-permute", ("pipeline",), "stages", (1 + trained) * handed, 0.0)
        batches = 2 + trained * (1 + table)
        add("all-gather", ("pipeline",), "batch in and out", batches * place.resting * micro, 0.0)
    return made


def _apart(place: Place, micro: int) -> bool:
    """Whether gradients of so many micro-batches cross between the copies of parameters once, behind nothing."""
    return micro > 1 and copies_apart(place.config, place.mesh, place.width)


def _exposed(seconds: float, hidden: float, compute: float) -> float:
    """What is left of a transfer: all but a share of itself, or, of what travels behind the computation, the part that
    slows it or does not fit."""
    if hidden == 1.0:
        return max(WEIGHTS_EXPOSED * seconds, seconds - HIDDEN_WEIGHTS * compute)
    return seconds * (1 - hidden)


def _context_bytes(place: Place) -> float:
    """Keys and values round the ring (dense) or over the chunks' edges (banded), forward and backward, one step."""
    model, ways, trained = place.model, place.mesh["context"], place.reading.trained
    if ways == 1:
        return 0.0
    heads = model.num_heads * model.head_dim  # keys and values go to each head of queries before they travel
    pair = 2 * place.rows * heads / place.mesh["tensor"]  # keys and values of one position
    passes = 1 + trained * (2 if model.remat == "full" else 1)  # forward, once more, and backward
    # Gradients go one step further: home.
    ring = pair * place.length * (passes * (ways - 1) * place.width + trained * ways * FLOAT)
    halo = passes * 2 * pair * (model.window - 1) * place.width
    each = {"dense": ring, "banded": halo if model.window < model.seq_len else ring}
    return sum(each[kind] for kind in model.layer_kinds) / place.mesh["pipeline"]


@dataclass(frozen=True)
class Rates:
    """How fast the networks of a topology are for a mesh."""

    place: Place

    @cached_property
    def _across(self) -> dict[str, int]:
        """Slices or nodes that each mesh axis crosses: the outer axes cross first."""
        left, across = self.place.topology.num_slices, {}
        for axis, size in self.place.mesh.items():
            across[axis] = math.gcd(size, left)
            left //= across[axis]
        return across

    @cached_property
    def _wires(self) -> dict[str, tuple[float, int]]:
        return wiring(self.place.topology, {a: n // self._across[a] for a, n in self.place.mesh.items()})

    def padded(self, axis: str) -> bool:
        """Whether an all-gather becomes an all-reduce of zero-padded parts: the TPU compiler gathers along at most
        two axes of the torus."""
        return self._wires[axis][1] > 2

    def network(self, axes: tuple[str, ...]) -> str:
        """Which network carries traffic over these mesh axes; see Transfer."""
        return "slow" if any(self._across[axis] > 1 for axis in axes) else "fast"

    def exposed(self, axes: tuple[str, ...], seconds: float, hidden: float, compute: float) -> float:
        """Seconds of a transfer that are in the way: all but the share that is hidden, or, where that is 1, what does
        not fit behind the computation; between TPU slices no less than SLICES_EXPOSED."""
        slices = self.place.topology.chip.platform == "tpu" and self.network(axes) == "slow"
        return max(_exposed(seconds, hidden, compute), SLICES_EXPOSED * seconds if slices else 0.0)

    def seconds(self, kind: str, axes: tuple[str, ...], size: float) -> float:
        """Of moving arrays of so many bytes in all."""
        mesh, chip = self.place.mesh, self.place.topology.chip
        slow = math.prod(self._across[axis] for axis in axes)
        fast = math.prod(mesh[axis] for axis in axes) // slow
        if kind == "collective-permute":  # one neighbour, one direction
            one_way = min(self._wires[axis][0] for axis in axes) / (1 if chip.platform == "gpu" else 2)
            return size / (chip.slow if slow > 1 else one_way)
        twice = kind == "all-reduce" or (kind == "all-gather" and any(map(self.padded, axes)))
        rate = sum(self._wires[axis][0] for axis in axes if mesh[axis] > self._across[axis])
        rate = chip.link if chip.platform == "gpu" else rate
        inner = size * (fast - 1) / fast / rate if fast > 1 else 0.0
        outer = size * (slow - 1) / slow / (chip.slow * fast) if slow > 1 else 0.0
        return (2 if twice else 1) * (max(inner, outer) if chip.platform == "gpu" else inner + outer)


def billed(place: Place, collectives: Sequence[Collective]) -> list[Transfer]:
    """The transfers of a compiled program. What it does not overlap is exposed whole, the rest as by formula."""
    rates, compute = Rates(place), sum(computation(place).values())
    grouped: dict[tuple[str, tuple[str, ...], bool, bool], list[Collective]] = {}
    for c in collectives:
        grouped.setdefault((c.kind, c.axes, c.overlapped, c.disguised), []).append(c)
    found = []
    for (kind, axes, overlapped, disguised), same in grouped.items():
        size, count = float(sum(c.total for c in same)), sum(c.count for c in same)
        seconds = rates.seconds("all-reduce" if disguised else kind, axes, size)
        what = "overlapped" if overlapped else "not overlapped"
        hidden = 0.0 if not overlapped else HIDDEN_RESIDUAL if axes == ("tensor",) else 1.0
        exposed = rates.exposed(axes, seconds, hidden, compute)
        what += ", as an all-reduce" if disguised else ""
        found.append(Transfer(kind, axes, what, size, seconds, exposed, rates.network(axes), count))
    return sorted(found, key=lambda t: -t.bytes)
