"""Where the time of a train step goes: a profiler's trace sorted into the parts of the model, and the floor of each.

The trace names the program's instructions, the program names the model's operations, and these carry the scopes that
the model and the step open.
"""

import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

from gptjax.config import Config
from gptjax.model.accounting import Reading, adapter_params, matrices, mean_keys
from gptjax.planner.bill import CALLED, source, split
from gptjax.stages import stage_class

PARTS = {
    "attention": {"attention"},
    "projections": {"qkv", "projection"},
    "MLP": {"mlp"},
    "head and loss": {"loss"},
    "optimizer": {"optimizer"},
    "rest": set[str](),
}
"""Part -> scopes. The projections are those of queries, keys, values and output; the rest is embeddings, LayerNorms,
residuals and the summing of gradients."""
UNKNOWN = "unknown"
CONTROL = ("while", "call", "conditional")  # their time is that of what they run


def part_of(operation: str) -> str:
    """The part that an operation such as jit(step)/transpose(jvp(GPT))/unit_0/block_0/mlp/mul belongs to."""
    words = set(re.findall(r"\w+", operation))
    return next((part for part, scopes in PARTS.items() if scopes & words), "rest")


def instructions(program: str) -> dict[str, str]:
    """Instruction -> part, of everything in a compiled module that does work of its own."""
    computations, _ = split(program)
    parts = {}
    for body in computations.values():
        for one in body:
            if one.opcode in CONTROL:
                continue
            operation = source(one.rest)
            if not operation and (called := CALLED.search(one.rest)):  # a fusion of several: its first that has a name
                operation = next(filter(None, (source(inner.rest) for inner in computations.get(called[1], []))), "")
            parts[one.name] = part_of(operation)
    return parts


def seconds_by_part(folder: Path, program: str, module: str, workers: int) -> dict[str, float]:
    """Seconds of the clock in each part, of all executions of `module` in the trace under `folder`; UNKNOWN is what
    runs under names that the program does not have. Their sum is the time in which anything ran."""
    parts = instructions(program)
    control = {one.name for body in split(program)[0].values() for one in body if one.opcode in CONTROL}
    seconds = dict.fromkeys([*PARTS, UNKNOWN], 0.0)
    for name, spent in divided([s for s in _spans(folder, module) if s.instruction not in control], workers).items():
        seconds[parts.get(name, UNKNOWN)] += spent
    return seconds


class Span(NamedTuple):
    """One execution of an instruction, in nanoseconds of the trace."""

    instruction: str
    start: float
    stop: float
    """The thread or stream that ran it goes on."""
    done: float
    """What it left to other threads is done, too: most of a product on a CPU."""


def divided(spans: list[Span], workers: int) -> dict[str, float]:
    """Instruction -> seconds of the clock, a moment in which several are in progress being divided among them: one
    share for each thread that is in one, and those of the other `workers` for what was left to them."""
    edges = [(s.start, s.instruction, 1, 0) for s in spans]
    edges += [(s.stop, s.instruction, -1, 1) for s in spans]
    edges += [(s.done, s.instruction, 0, -1) for s in spans]
    running, left, seconds = Counter[str](), Counter[str](), defaultdict[str, float](float)
    for (now, name, runs, leaves), (then, *_) in pairwise(sorted(edges)):
        running[name] += runs
        left[name] += leaves
        if then == now:
            continue
        running, left = +running, +left  # those above 0
        free = max(workers - running.total(), 0) if left else 0
        share = (then - now) * 1e-9 / max(running.total() + free, 1)
        for other, count in running.items():
            seconds[other] += share * count
        for other, count in left.items():
            seconds[other] += share * free * count / left.total()
    return seconds


def _spans(folder: Path, module: str) -> list[Span]:
    """Every execution of an instruction of `module`, from the devices where they keep a record, else from the host's
    threads."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(ProfileData.from_file(str(newest)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for chosen in (devices, planes):
        events = [(e, dict(e.stats)) for plane in chosen for line in plane.lines for e in line.events]
        # On a CPU the event of an instruction is its call alone; another, linked by a number, says when all is done.
        done = {stats["_c"]: e.start_ns for e, stats in events if e.name.startswith("end: ") and "_c" in stats}
        spans = [
            Span(str(stats["hlo_op"]), e.start_ns, e.end_ns, max(e.end_ns, done.get(stats.get("_p"), 0)))
            for e, stats in events
            if stats.get("hlo_module") == module
        ]
        if spans:
            break
    return spans


def floors(config: Config, limits: dict[str, float], width: int, state_bytes: dict[str, int]) -> dict[str, float]:
    """Seconds that each part of a step takes at least, by the device's measured limits: products at its FLOP/s, or
    each input read once and each output written once at its bytes/s, whichever is longer.

    `width` is the bytes of a number in the compute dtype. Attention reads q, k, v and writes its output forward; it
    reads these, the output and its gradient and writes three gradients backward: 12 numbers a head channel. A
    LayerNorm with its residual moves 6 numbers a channel. The optimizer reads and writes the state and reads gradients.
    """
    tokens, layers, dim = config.step_tokens, config.model.num_layers, config.model.embed_dim
    heads = (config.model.num_heads + config.model.kv_heads) * config.model.head_dim
    flops = Counter[str]()
    for reading in stage_class(config)(config, "cpu").learning:
        flops.update(_products(reading, config.updates * config.train.batch_size))
    moved = {
        "attention": 6 * heads * layers * tokens * width,
        "optimizer": 2 * sum(state_bytes.values()) + state_bytes["params"],
        "rest": 6 * dim * (2 * layers + 1) * tokens * width,
    }
    return {part: max(flops.get(part, 0) / limits["flops"], moved.get(part, 0) / limits["bytes"]) for part in PARTS}


def _products(reading: Reading, rows: int) -> dict[str, float]:
    """FLOPs of the parts that one model needs for so many rows."""
    c, tokens = reading.model, rows * reading.sequences * reading.model.seq_len
    keys = sum(mean_keys(kind, c.seq_len, c.window) for kind in c.layer_kinds)
    each, head, adapter = reading.products_per_weight
    adapters = Counter(adapter_params(c, reading.lora))
    weights = {name: c.num_layers * inner * outer for name, (inner, outer) in matrices(c).items()}

    def products(*names: str) -> float:
        return tokens * sum(each * weights[name] + adapter * adapters[name] for name in names)

    return {
        "attention": reading.products_per_key * c.num_heads * c.head_dim * keys * tokens,
        "projections": products("qkv", "projection"),
        "MLP": products("mlp_up", "mlp_down"),
        "head and loss": head * c.vocab_size * c.embed_dim * tokens,
    }
