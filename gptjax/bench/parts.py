"""Where the time of a train step goes: a profiler's trace sorted into the parts of the model, and the floor of each.

The trace names the program's instructions, the program names the model's operations, and these carry the scopes that
the model and the step open.
"""

import re
from collections import defaultdict
from pathlib import Path

from jax.profiler import ProfileData

from gptjax.config import Config
from gptjax.model.accounting import mean_keys
from gptjax.planner.bill import CALLED, source, split

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


def seconds_by_part(folder: Path, program: str, module: str) -> dict[str, float]:
    """Seconds in each part of all executions of `module` in the trace under `folder`.

    A GPU's kernels run one after another; a CPU may run several instructions at once, and then their times overlap.
    """
    parts, seconds = instructions(program), dict.fromkeys(PARTS, 0.0)
    for name, spent in _events(folder, module).items():
        if name in parts:
            seconds[parts[name]] += spent
    return seconds


def _events(folder: Path, module: str) -> dict[str, float]:
    """Instruction -> seconds, of the devices where they keep a record, else of the host's threads."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = {plane.name: plane for plane in ProfileData.from_file(str(newest)).planes}
    devices = [plane for name, plane in planes.items() if name.startswith("/device:")]
    for chosen in (devices, planes.values()):
        seconds: dict[str, float] = defaultdict(float)
        for plane in chosen:
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats)
                    if stats.get("hlo_module") == module:
                        seconds[str(stats["hlo_op"])] += event.duration_ns * 1e-9
        if seconds:
            break
    return seconds


def floors(config: Config, limits: dict[str, float], width: int, state_bytes: dict[str, int]) -> dict[str, float]:
    """Seconds that each part of a step takes at least, by the device's measured limits: products at its FLOP/s, or
    each input read once and each output written once at its bytes/s, whichever is longer.

    `width` is the bytes of a number in the compute dtype. Attention reads q, k, v and writes its output forward; it
    reads these, the output and its gradient and writes three gradients backward: 12 numbers a head channel. A
    LayerNorm with its residual moves 6 numbers a channel. The optimizer reads and writes the state and reads gradients.
    """
    model = config.model
    tokens = config.train.batch_size * model.seq_len
    layers, dim = model.num_layers, model.embed_dim
    keys = sum(mean_keys(kind, model.seq_len, model.window) for kind in model.layer_kinds)
    flops = {
        "attention": 12 * dim * keys * tokens,
        "projections": 24 * layers * dim**2 * tokens,
        "MLP": 48 * layers * dim**2 * tokens,
        "head and loss": 6 * model.vocab_size * dim * tokens,
    }
    moved = {
        "attention": 12 * dim * layers * tokens * width,
        "optimizer": 2 * sum(state_bytes.values()) + state_bytes["params"],
        "rest": 6 * dim * (2 * layers + 1) * tokens * width,
    }
    return {part: max(flops.get(part, 0) / limits["flops"], moved.get(part, 0) / limits["bytes"]) for part in PARTS}
