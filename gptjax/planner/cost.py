"""What one step costs on one device, by formulas: memory, traffic and time.

Letters as in the model, and: M micro-batches a step, p stages, r rounds, m chunks. W is the 12 D² of a layer's
matrices in the compute dtype. Every formula is checked against what the real compiler makes of the same step
(tests/test_planner.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gptjax.config import Config
from gptjax.model.accounting import mean_keys
from gptjax.planner.bill import Collective
from gptjax.planner.chips import Topology, wiring
from gptjax.sharding.mesh import MESH_AXES, check, degrees
from gptjax.sharding.rules import Rules, partition_spec, rule_table

FLOAT = 4  # bytes of a master weight, a moment, a gradient
# Assumptions about time; the matrix rate of a chip is in chips.CHIPS.
ATTENTION_RATE = 0.5  # of the matrix rate: its products are small, and exponentials wait in between
KERNEL_BLOCK = 256  # keys that a kernel computes beyond the mask's edge, on average
UNFUSED = 0.7  # share of the traffic between operations that no fusion saves
HIDDEN_WEIGHTS = 0.9  # of the computation, behind which weights and gradients travel
HIDDEN_RESIDUAL = 0.5  # of the traffic of tensor parallelism: collective products and neighbouring work
WORKING = 0.65  # share of a unit's activations that is there at one moment of its backward pass


@dataclass(frozen=True)
class Array:
    """One array of the parameters."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


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


@dataclass(frozen=True)
class Estimate:
    """Per device; bytes, and seconds of a step."""

    memory: dict[str, float]
    """parameters, optimizer, gradients, activations, temporaries."""
    seconds: dict[str, float]
    """What a step's time is made of, adding up to it."""
    transfers: tuple[Transfer, ...]

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def parameters(config: Config) -> tuple[Array, ...]:
    """Shapes and logical axes of all parameters; the same on every layout."""
    import jax

    from gptjax.sharding.rules import is_boxed, leaf_name
    from gptjax.tasks.pretrain import Pretrain

    boxed = jax.eval_shape(Pretrain(config, "tpu").init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_boxed)
    return tuple(Array(leaf_name(path), leaf.value.shape, leaf.names) for path, leaf in leaves)


@dataclass(frozen=True)
class Place:
    """A config on a mesh, seen from one device."""

    config: Config
    topology: Topology
    mesh: dict[str, int]
    arrays: tuple[Array, ...]
    rules: Rules

    def ways(self, axis: str) -> int:
        """Parts into which the rules cut a logical axis."""
        return math.prod(self.mesh[name] for name in self.rules[axis])

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        dtype = self.config.model.dtype
        return 2 if dtype == "bfloat16" or (dtype == "auto" and self.topology.chip.platform != "cpu") else 4

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch on this device's stage."""
        return self.config.micro_batch_size // self.ways("batch")

    @property
    def length(self) -> int:
        return self.config.model.seq_len // self.ways("length")

    @property
    def residual_length(self) -> int:
        return self.config.model.seq_len // self.ways("residual_length")

    @property
    def tokens(self) -> int:
        """Of a micro-batch, inside the layers."""
        return self.rows * self.length

    @property
    def outside_tokens(self) -> float:
        """Of a micro-batch, in the embedding and the loss."""
        return self.tokens / self.mesh["pipeline"]

    @property
    def layers(self) -> float:
        return self.config.model.num_layers / self.mesh["pipeline"]

    @property
    def chunks(self) -> int:
        """Parts of the micro-batch in the pipeline; 1 without one."""
        return (self.config.layout.pipeline_chunks or self.rows) if self.mesh["pipeline"] > 1 else 1

    @property
    def ticks(self) -> int:
        """Times at which the stages work on a micro-batch: m r + p - 1."""
        rounds = self.config.layout.pipeline_rounds if self.mesh["pipeline"] > 1 else 1
        return self.chunks * rounds + self.mesh["pipeline"] - 1

    @property
    def stretch(self) -> float:
        """Work done, bubble included, over work that counts: (m r + p - 1) / (m r)."""
        return self.ticks / (self.ticks - self.mesh["pipeline"] + 1)

    @property
    def matrices(self) -> float:
        """W: bytes of one layer's matrices, whole over fsdp."""
        return 12 * self.config.model.embed_dim**2 * self.width / self.mesh["tensor"]

    @property
    def residual(self) -> float:
        """Bytes of the residual stream of a micro-batch, whole over tensor."""
        return self.tokens * self.config.model.embed_dim * self.width

    @property
    def embedding(self) -> float:
        """Bytes of the embedding in the compute dtype, whole over fsdp."""
        return self.config.model.padded_vocab_size * self.config.model.embed_dim * self.width / self.mesh["tensor"]

    def local(self, array: Array) -> float:
        """Numbers of a parameter on this device."""
        spec = partition_spec(self.rules, array.axes, array.name)
        total = 1.0
        for size, axis, entry in zip(array.shape, array.axes, spec, strict=True):
            names = () if entry is None else (entry,) if isinstance(entry, str) else entry
            part = math.ceil(size / math.prod(self.mesh[name] for name in names))
            if axis == "embed" and len(array.shape) > 2 and self.topology.chip.platform == "tpu":
                part = -(-part // 8) * 8  # a TPU's registers have 8 rows, and memory is laid out for them
            total *= part
        return total

    @cached_property
    def local_parameters(self) -> float:
        return sum(self.local(array) for array in self.arrays)


def estimate(place: Place) -> Estimate:
    """The prediction for a step."""
    transfers = traffic(place)
    return Estimate(memory(place), times(place, transfers), tuple(transfers))


def place(
    config: Config, topology: Topology, arrays: tuple[Array, ...] | None = None, rules: Rules | None = None
) -> Place:
    """`arrays` saves deriving the parameters again, `rules` tries another table. Raises UserError where the layout does
    not fit the devices or the model."""
    sizes = degrees(config.layout, topology.num_devices)
    check(config, sizes)
    mesh = dict(zip(MESH_AXES, sizes, strict=True))
    return Place(config, topology, mesh, arrays or parameters(config), rules or rule_table(config.layout))


def memory(place: Place) -> dict[str, float]:
    """Bytes by what they are for, at the highest moment of the step."""
    parts: dict[str, float] = {}
    for part, _, size in arrays_at_peak(place):
        parts[part] = parts.get(part, 0.0) + size
    return parts


def arrays_at_peak(place: Place) -> list[tuple[str, str, float]]:
    """(part, what, bytes) of everything that is there at the highest moment of the step: in the backward pass of a
    unit, or in the loss."""
    model, mesh, accumulates = place.config.model, place.mesh, place.config.max_accumulation > 1
    state, unit = FLOAT * place.local_parameters, len(model.attention_pattern)
    inputs = place.rows * place.residual_length * model.embed_dim * place.width  # of one unit
    found = [
        ("parameters", "float32 weights", state),
        ("optimizer", "Adam's two moments", 2 * state),
        ("gradients", "float32 gradients", state),
        ("gradients", "their sum over micro-batches", state if accumulates else 0.0),
        ("activations", "inputs of the units", place.ticks / place.chunks * place.layers / unit * inputs),
        ("activations", f"kept by remat {model.remat}", place.ticks / place.chunks * place.layers * saved(place)),
    ]
    working = unit * saved(place, "none") * (1 if model.remat == "full" else 0.5) * WORKING / place.chunks
    if mesh["tensor"] > 1:  # what the layers gather along the length, and its gradients
        working += 2 * unit * place.residual / place.chunks
    if mesh["pipeline"] > 1:
        whole = place.layers * place.matrices
        found.append(("temporaries", "the stage's weights, whole over fsdp", whole))
        found.append(("temporaries", "float32 gradients of the stage's weights", whole * FLOAT / place.width))
        found.append(("activations", "what waits between rounds", 3 * place.residual))
        gathered = 0.0
    else:
        gathered = (3 if Rates(place).padded("fsdp") else 2) * place.matrices if mesh["fsdp"] > 1 else place.matrices
    backward = [
        ("temporaries", "weights of the layers at work, and their gradient", gathered),
        ("temporaries", "activations of the unit at work", working),
        ("temporaries", "the embedding and its gradient, whole over fsdp", 2 * place.embedding),
    ]
    logits = place.outside_tokens / place.length * min(model.loss_chunk, model.seq_len)
    loss = [
        ("temporaries", "the embedding and its float32 gradient", place.embedding * (1 + FLOAT / place.width)),
        ("temporaries", "a chunk of logits", logits * model.padded_vocab_size / mesh["tensor"] * (FLOAT + place.width)),
        ("temporaries", "what the loss is computed from", 2 * place.residual / mesh["pipeline"]),
    ]
    return found + max(backward, loss, key=lambda phase: sum(size for _, _, size in phase))


def saved(place: Place, remat: str | None = None) -> float:
    """Bytes that a layer keeps for its backward pass, for a micro-batch, beside the input of its unit."""
    model, tensor = place.config.model, place.mesh["tensor"]
    remat = remat or model.remat
    if remat == "full":
        return 0.0
    whole = place.tokens * model.embed_dim * place.width  # [rows, length, D]
    shared = whole / place.length * place.residual_length
    normaliser = place.tokens * model.num_heads / tensor * FLOAT
    if remat == "dots":  # qkv, attention's output and normaliser, the projection, the MLP's inner product
        return (3 + 1 + 4) * whole / tensor + normaliser + shared
    # Beside those: q, k and v as the kernel takes them, both norms' inputs and outputs, the activation.
    return (3 + 3 + 1 + 4 + 4) * whole / tensor + normaliser + 2 * whole + 2 * shared


def traffic(place: Place) -> list[Transfer]:
    """What a step sends, in bytes of whole arrays, with times."""
    model, layout, mesh = place.config.model, place.config.layout, place.mesh
    micro, stages = place.config.max_accumulation, mesh["pipeline"]
    rates = Rates(place)
    unit = len(model.attention_pattern)
    compute = sum(computation(place).values())
    made: list[tuple[str, tuple[str, ...], str, float, float]] = []  # kind, axes, what, bytes, share hidden

    def add(kind: str, axes: tuple[str, ...], what: str, size: float, hidden: float = 0.0) -> None:
        used = tuple(axis for axis in axes if mesh[axis] > 1)
        if used and size:
            made.append((kind, used, what, size, hidden))

    weights = place.matrices * place.layers * micro
    if stages > 1:
        add("all-gather", ("fsdp",), "weights", weights, 0.0)
    else:
        # Forward, backward, and under full remat once more but for what the backward pass needs right after: the
        # last layer's projection and both its MLP matrices, 9 of a unit's 12 n D².
        again = (12 * unit - 9) / (12 * unit) if model.remat == "full" else 0.0
        add("all-gather", ("fsdp",), "weights", weights * (2 + again), 1.0)
    fsdp = mesh["fsdp"]
    copies = ("replica", "data", "context")
    behind = 1.0 if stages == 1 else 0.0
    add("reduce-scatter", ("fsdp",), "gradients", weights, behind)
    add("all-reduce", copies, "gradients", weights / fsdp, behind)
    # The embedding, whole over fsdp, once a step; its gradient from the head and from the lookup, and the positions'.
    positions = model.seq_len * model.embed_dim * place.width
    rows = ("replica", "pipeline", "data", "fsdp", "context")
    add("all-gather", ("fsdp",), "embedding", place.embedding + positions)
    add("all-reduce", rows, "embedding's gradient", (2 * place.embedding + positions) * micro)

    residual = place.residual * place.layers * micro * place.stretch
    ends = place.residual / stages * micro
    recomputed = (2 * unit - 1) / unit if model.remat == "full" else 0.0  # a unit's last sum is not needed again
    add("all-to-all", ("tensor",), "embedding from vocabulary to width", place.embedding * (1 + micro))
    add("all-gather", ("tensor",), "tokens looked up", ends)
    add("all-reduce", ("tensor",), "the loss's gradient", ends)
    if layout.sequence_sharding:
        gathers = 6 if model.remat == "full" else 4
        add("all-gather", ("tensor",), "residual", residual * gathers, HIDDEN_RESIDUAL)
        add("reduce-scatter", ("tensor",), "residual", residual * (4 + recomputed), HIDDEN_RESIDUAL)
    else:
        add("all-reduce", ("tensor",), "residual", residual * (4 + recomputed), HIDDEN_RESIDUAL)

    add("collective-permute", ("context",), "keys and values", _context_bytes(place) * micro * place.stretch, 0.5)

    if stages > 1:
        chunk = place.rows / place.chunks * place.residual_length * model.embed_dim * place.width
        add("collective-permute", ("pipeline",), "stages", 2 * place.ticks * chunk * micro, 0.0)
        ends = place.rows * place.residual_length * model.embed_dim * place.width
        add("all-gather", ("pipeline",), "batch in and out", 4 * ends * micro, 0.0)
    return [
        Transfer(kind, axes, what, size, seconds, _exposed(seconds, hidden, compute), rates.network(axes))
        for kind, axes, what, size, hidden in made
        for seconds in [rates.seconds(kind, axes, size)]
    ]


def _exposed(seconds: float, hidden: float, compute: float) -> float:
    """What is left of a transfer: all but a share of itself, or what does not fit behind the computation."""
    if hidden == 1.0:
        return max(0.0, seconds - HIDDEN_WEIGHTS * compute)
    return seconds * (1 - hidden)


def _context_bytes(place: Place) -> float:
    """Keys and values round the ring (dense) or over the chunks' edges (banded), forward and backward, one step."""
    model, ways = place.config.model, place.mesh["context"]
    if ways == 1:
        return 0.0
    pair = 2 * place.rows * model.embed_dim / place.mesh["tensor"]  # keys and values of one position
    ring = pair * place.length * ((ways - 1) * place.width + ways * (FLOAT + place.width))
    halo = 2 * 2 * pair * (model.window - 1) * place.width
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


def computation(place: Place) -> dict[str, float]:
    """Seconds of a step's arithmetic and of its own memory traffic, without the bubble."""
    model, chip, tensor = place.config.model, place.topology.chip, place.mesh["tensor"]
    rate, micro = chip.flops * chip.matmul, place.config.max_accumulation
    work = place.tokens * place.layers * micro  # tokens x layers
    unit = len(model.attention_pattern)
    product = 24 * model.embed_dim**2 / tensor * work / rate  # the forward pass
    kinds = model.layer_kinds
    keys = sum(mean_keys(kind, model.seq_len, model.window) + KERNEL_BLOCK for kind in kinds) / len(kinds)
    attention = 4 * model.embed_dim / tensor * min(keys, model.seq_len) * work / (rate * ATTENTION_RATE)
    again = 1.0 if model.remat == "full" else 0.0
    residual_ways = place.length / place.residual_length
    # Reads and writes of a layer's forward pass between its products: 12 of [T, D], 27 split over tensor.
    between = UNFUSED * place.width * model.embed_dim * (12 / residual_ways + 27 / tensor) * work / chip.hbm_rate
    passes = 3 + (0.5 if model.remat == "dots" else again)
    head = 6 * model.padded_vocab_size * model.embed_dim / tensor * place.outside_tokens * micro / rate
    state = FLOAT * place.local_parameters / chip.hbm_rate
    return {
        "matrix products": 3 * product + head,
        "recomputation": again * (product * (12 * unit - 4) / (12 * unit) + attention),
        "attention": 3.5 * attention,
        "memory traffic": passes * between,
        "optimizer": state * (8 + (3 * micro if micro > 1 else 0)),
    }


def times(place: Place, transfers: Sequence[Transfer]) -> dict[str, float]:
    """Seconds of a step by what they go to: arithmetic, the pipeline's bubble, and traffic that nothing hides."""
    parts = computation(place)
    inside = sum(parts.values()) - parts["optimizer"]
    parts["bubble"] = inside * (place.stretch - 1)
    for network in ("fast", "slow"):
        parts[f"{network} network"] = sum(t.exposed for t in transfers if t.network == network)
    return parts


def billed(place: Place, collectives: Sequence[Collective]) -> list[Transfer]:
    """The transfers of a compiled program. What it does not overlap is exposed whole; what it overlaps, as far as it
    does not fit behind the computation."""
    rates, compute = Rates(place), sum(computation(place).values())
    grouped: dict[tuple[str, tuple[str, ...], bool, bool], list[Collective]] = {}
    for c in collectives:
        grouped.setdefault((c.kind, c.axes, c.overlapped, c.disguised), []).append(c)
    found = []
    for (kind, axes, overlapped, disguised), same in grouped.items():
        size, count = float(sum(c.total for c in same)), sum(c.count for c in same)
        seconds = rates.seconds("all-reduce" if disguised else kind, axes, size)
        what = "overlapped" if overlapped else "not overlapped"
        exposed = max(0.0, seconds - HIDDEN_WEIGHTS * compute) if overlapped else seconds
        what += ", as an all-reduce" if disguised else ""
        found.append(Transfer(kind, axes, what, size, seconds, exposed, rates.network(axes), count))
    return sorted(found, key=lambda t: -t.bytes)
