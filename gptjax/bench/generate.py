"""`gptjax bench generate CONFIG`: how fast a model of random weights answers, beside what the device could and a peer.

Workloads are lists of (tokens of the prompt, tokens of the reply) that all come at once. Every side is a process of its
own, warm before it is timed; they take turns. Times to compile are told apart.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.bench.measure import limits, provenance, save, si, times
from gptjax.bench.trial import in_process
from gptjax.config import Config, from_json, to_json
from gptjax.errors import UserError
from gptjax.files import json_text
from gptjax.infer.engine import Engine
from gptjax.infer.prepare import prepared
from gptjax.infer.request import Request
from gptjax.infer.sampling import Sampling
from gptjax.model.accounting import cache_bytes, layer_weights
from gptjax.parallel.network import Network

COMMAND = (sys.executable, "-m", "gptjax.bench.generate")
Work = list[tuple[int, int]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How to measure."""

    weights: tuple[str, ...] = ("auto",)
    """How parameters are held, each a row."""
    workloads: tuple[str, ...] = ()
    """Those to run of `workloads`; empty is all."""
    slots: int = 16
    steps: int = 4
    """Tokens that are decoded between two looks."""
    peer: str = ""
    """A script that does the same work; it reads the job as `_child` does."""
    rounds: int = 1
    timeout: float = 900.0


def workloads(config: Config) -> dict[str, Work]:
    """One request, sixteen of equal lengths, sixteen of mixed ones, and one at the end of the context."""
    length = config.model.seq_len
    half, rng = length // 2, np.random.default_rng(0)
    prompts, outputs = rng.integers(16, half + 1, 16), rng.integers(16, max(17, length // 4 + 1), 16)
    return {
        "one": [(min(128, half), min(64, half))],
        "sixteen": [(min(128, half), min(64, half))] * 16,
        "mixed": [(int(p), int(o)) for p, o in zip(prompts, outputs, strict=True)],
        "long": [(length - 32, 32)],
    }


def run(config: Config, options: Options, out: Path) -> str:
    """Measure, write OUT/generate.json; the table as text. Raises UserError where nothing can be measured."""
    if options.peer and not Path(options.peer).is_file():
        raise UserError(f"--peer {options.peer}: no such file; name a script such as tests/peers/generate_torch.py")
    jobs = _chosen(workloads(config), options.workloads)
    rows: list[Row] = []
    for turn in range(options.rounds):
        for weights in options.weights:
            job = {**asdict(options), "config": to_json(config), "weights": weights, "workloads": jobs}
            rows.append(_side(weights, turn, job, options.timeout, COMMAND))
        if options.peer:
            job = {"config": json.loads(to_json(config)), "workloads": jobs}
            rows.append(_side("peer", turn, job, options.timeout, (sys.executable, options.peer)))
    about = next((row["about"] for row in rows if "about" in row), None)
    if about is None:
        raise UserError(f"bench generate: nothing ran: {rows[0].get('reason', rows[0]['status'])}")
    result = {"benchmark": "generate", **about, "config": config.name, "settings": asdict(options), "rows": rows}
    save(result, out / "generate.json")
    return f"{table(result)}\n\n{out / 'generate.json'}"


def _chosen(every: dict[str, Work], names: tuple[str, ...]) -> dict[str, Work]:
    for name in names:
        if name not in every:
            raise UserError(f"--workloads {name}: choose from {', '.join(every)}")
    return {name: every[name] for name in names or every}


def _side(name: str, turn: int, job: dict[str, Any], timeout: float, command: tuple[str, ...]) -> Row:
    row = {"name": name, "turn": turn} | in_process(job, timeout, command)
    print(f"{name}: {row['status']} {row.get('reason', '')}", flush=True)
    return row


def table(result: dict[str, Any]) -> str:
    """A line for each workload and side, medians over the turns."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    bounds = result["limits"]
    title = (
        f"{result['config']} with random weights; {result['device']}, {versions}, {result['date']}; measured limits "
        f"{si(bounds['flops'])}FLOP/s in products, {si(bounds['reads'])}B/s in reading"
    )
    head = ["workload", "weights", "tokens/s", "ratio", "first token", "each token", "bytes", "products", "programs"]
    lines = [head, ["---"] * len(head)]
    done = [row for row in result["rows"] if row["status"] == "ok"]
    for work in result["rows"][0].get("workloads", {}):
        theirs = _median(done, "peer", work, "tokens_per_s")
        for name in dict.fromkeys(row["name"] for row in done):
            rate = _median(done, name, work, "tokens_per_s")
            if rate is None:
                continue
            first, each = (_median(done, name, work, field) for field in ("first_s", "each_s"))
            shares = [_median(done, name, work, field) for field in ("byte_share", "product_share")]
            lines.append(
                [
                    work,
                    name,
                    f"{rate:,.1f}",
                    f"{rate / theirs:.2f}" if theirs and name != "peer" else "",
                    f"{1e3 * first:,.0f} ms" if first else "",
                    f"{1e3 * each:,.1f} ms" if each else "",
                    *(f"{share:.0%}" if share else "" for share in shares),
                    str(next(row.get("programs", "") for row in done if row["name"] == name)),
                ]
            )
    return title + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _median(rows: list[Row], name: str, work: str, field: str) -> float | None:
    values = [row["workloads"][work].get(field) for row in rows if row["name"] == name and work in row["workloads"]]
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _child() -> None:
    job = json.loads(sys.stdin.read())
    config = from_json(job["config"])
    network = Network(config, jax.default_backend())
    engine = Engine(network.decoder, _params(network, job["weights"]), slots=job["slots"], steps=job["steps"])
    dtype = network.decoder.dtype
    bounds = limits(dtype) | {"reads": _read_rate()}
    answers, rng = {}, np.random.default_rng(0)  # one for all: no prompt begins as another
    for name, work in job["workloads"].items():
        started = time.perf_counter()
        measured(engine, work, rng)  # compiles
        warm = time.perf_counter() - started
        answers[name] = measured(engine, work, rng) | {"warm_s": warm} | _shares(engine, work, bounds)
        answers[name] = _judged(answers[name])
    about = {**provenance(), "limits": bounds, "dtype": str(dtype)}
    print(json_text({"status": "ok", "about": about, "workloads": answers, "programs": engine.programs.compiled}))


def _params(network: Network, weights: str) -> Any:
    make = jax.jit(lambda key: prepared(nn.unbox(network.init(key)), weights, network.decoder.dtype))
    return make(jax.random.key(0))


def measured(
    engine: Engine, work: Work, rng: np.random.Generator, clock: Callable[[], float] = time.perf_counter
) -> Row:
    """Tokens per second of all requests together, seconds to the first token of each and between the others."""
    size, greedy = engine.model.config.vocab_size, Sampling(0.0)
    started = clock()
    replies = [engine.submit(Request(rng.integers(0, size, p).tolist(), o, greedy)) for p, o in work]
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    while engine.busy:
        engine.step()
        now = clock() - started
        for i, reply in enumerate(replies):
            if reply.tokens:
                first.setdefault(i, now)
            if reply.reason:
                last.setdefault(i, now)
    whole = clock() - started
    made = [len(reply.tokens) for reply in replies]
    each = [(last[i] - first[i]) / (n - 1) for i, n in enumerate(made) if n > 1]
    return {
        "seconds": whole,
        "tokens": sum(made),
        "tokens_per_s": sum(made) / whole,
        "first_s": mean(first.values()),
        "each_s": median(each) if each else None,
    }


def _read_rate() -> float:
    """Bytes per second of an array that is read and nothing else, which a copy's rate lies below."""
    line = jnp.ones((1 << (25 if jax.default_backend() == "cpu" else 28),), jnp.float32)
    return line.nbytes / times([partial(jax.jit(jnp.sum), line)])[0]


def _shares(engine: Engine, work: Work, bounds: dict[str, float]) -> Row:
    """Seconds that reading the weights once a token and the caches, or the products, would take at the device's
    measured limits, of one decoding step in the middle of the work."""
    config, rows = engine.model.config, min(len(work), engine.slots)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params))
    length = round(mean(p + o / 2 for p, o in work))
    itemsize = jnp.dtype(engine.model.dtype).itemsize
    size = weights + cache_bytes(config, rows, length, itemsize)
    products = 2 * (config.num_layers * layer_weights(config) + config.vocab_size * config.embed_dim) * rows
    return {"floor_bytes_s": size / bounds["reads"], "floor_products_s": products / bounds["flops"]}


def _judged(row: Row) -> Row:
    if not row["each_s"]:
        return row
    return row | {
        "byte_share": row["floor_bytes_s"] / row["each_s"],
        "product_share": row["floor_products_s"] / row["each_s"],
    }


if __name__ == "__main__":
    _child()
