"""`gptjax bench single CONFIG...`: what one device gets out of configs, beside what it could and what a peer gets.

Every measurement is a process of its own (see trial), one after another, so that an accelerator serves one at a time
and running out of memory is an answer like any other. This process leaves the device alone.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax

from gptjax.bench import trial
from gptjax.bench.layouts_report import progress
from gptjax.bench.measure import figures, save
from gptjax.bench.parts import floors
from gptjax.bench.single_report import markdown
from gptjax.config import Config, LayoutConfig, validate
from gptjax.errors import UserError
from gptjax.planner.search import with_lanes

Row = dict[str, Any]
REMATS = ("none", "dots", "full")  # the less memory, the more work
GAIN = 1.005  # a larger micro-batch must be this much faster to be gone on from
OPTIONS = {
    "gpu": {
        "xla_gpu_enable_triton_gemm": "False",
        "xla_gpu_enable_command_buffer": "",
        "xla_disable_hlo_passes": "rematerialization",
        "xla_gpu_enable_latency_hiding_scheduler": "True",
        "xla_gpu_experimental_enable_fusion_autotuner": "True",
        "xla_gpu_unsupported_enable_triton_multi_output_fusion": "True",
        "xla_gpu_exhaustive_tiling_search": "True",
        "xla_gpu_cudnn_gemm_fusion_level": "2",
        "xla_gpu_dot_merger_threshold_mb": "64",  # the compiler's default in place of ours
        "xla_gpu_deterministic_ops": "True",
    },
    "cpu": {"xla_cpu_prefer_vector_width": "512"},
    "tpu": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
}
"""Compiler options worth an A/B measurement; the deterministic one for what it costs."""


@dataclass(frozen=True)
class Options:
    """How to measure."""

    steps: int = 10
    """Measured steps of each setting."""
    timeout: float = 900.0
    """Seconds that one process may take."""
    search: bool = False
    """Find the best micro-batch, remat and scan or unroll first."""
    options: bool = False
    """Measure each of OPTIONS against the platform's own."""
    stream: bool = False
    """Also with the config's own text in place of one batch of random tokens."""
    peer: str = ""
    """A script that does the same work; see trial.measure_peer."""
    rounds: int = 1
    """Times that we and the peer are measured in turns: more than once where a machine's speed drifts."""


def run(configs: list[Config], options: Options, out: Path) -> str:
    """Measure, write OUT/single.json after each config and OUT/single.md; the tables as text.

    Raises UserError where an argument is wrong or the device cannot be measured.
    """
    if options.peer and not Path(options.peer).is_file():
        raise UserError(f"--peer {options.peer}: no such file; name a script such as tests/peers/gpt2_torch.py")
    jax.config.update("jax_platforms", "cpu")  # the children keep the device
    configs = [alone(config) for config in configs]
    facts = trial.facts_of_devices(configs[0], options.timeout)
    about = {name: facts[name] for name in ("device", "platform", "versions", "date", "dtype", "limits")}
    result: dict[str, Any] = {"benchmark": "single", **about, "settings": asdict(options), "rows": []}
    for config in configs:
        result["rows"].append(measure(config, facts, options))
        save(result, out / "single.json")
    text = markdown(result)
    (out / "single.md").write_text(text + "\n")
    return f"{text}\n\n{out / 'single.json'}, {out / 'single.md'}"


def alone(config: Config) -> Config:
    """The config on one device, without what only the length of a run needs."""
    train = replace(config.train, ramp_start=0, ramp_tokens=0, total_tokens=sys.maxsize, total_steps=0, epochs=0)
    return _micro(validate(replace(config, layout=LayoutConfig(fsdp=1), train=train)), config.micro_batch_size)


def _micro(config: Config, size: int) -> Config:
    """With another micro-batch, and lanes that divide it."""
    return validate(with_lanes(replace(config, train=replace(config.train, micro_batch_size=size)), size))


def _model(config: Config, **fields: Any) -> Config:
    return replace(config, model=replace(config.model, **fields))


def measure(config: Config, facts: dict[str, Any], options: Options) -> Row:
    """One row: the config, or the best that the search finds, with all that the options ask for."""
    row: Row = {"name": config.name}
    if options.search:
        config, row["search"] = search(config, facts, options)
    answer = trial.measure_single(config, options.steps, options.timeout, parts=True, stream=options.stream)
    row |= {"config": asdict(config), **_judged(config, answer, facts)}
    _say(config.name, row)
    if answer["status"] == "ok":
        row["parts"] = parts(config, answer, facts)
        if options.stream:
            row["stream_ratio"] = median(answer["stream_s"]) / median(answer["again_s"])
        if options.options:
            row["options"] = compare_options(config, row, facts, options)
    if options.peer:
        row["peer"] = peer(config, facts, options)
        row["ratios"] = ratios(config, row, facts, options)
    return row


def ratios(config: Config, row: Row, facts: dict[str, Any], options: Options) -> list[float]:
    """Our tokens per second over the peer's, of each round; none where one of the two does not run."""
    other = _micro(config, row["peer"]["micro_batch_size"])
    rates = [(row.get("tokens_per_s"), row["peer"].get("tokens_per_s"))]
    for _ in range(options.rounds - 1):
        ours = trial.measure_single(config, options.steps, options.timeout)
        theirs = trial.measure_peer(Path(options.peer), other, options.steps, options.timeout)
        judged = _judged(config, ours, facts), _judged(other, theirs, facts)
        rates.append((judged[0].get("tokens_per_s"), judged[1].get("tokens_per_s")))
    return [ours / theirs for ours, theirs in rates if ours and theirs]


def _judged(config: Config, answer: Row, facts: dict[str, Any]) -> Row:
    """The answer of a process, with speed and MFU where it has times."""
    return answer | figures(config, answer["times_s"], facts | {"count": 1}) if answer["status"] == "ok" else answer


def parts(config: Config, answer: Row, facts: dict[str, Any]) -> dict[str, Row]:
    """Part -> its share of the traced step, and what its floor would be of that; with idle they sum to 1."""
    spent = answer["parts_s"]
    whole = sum(spent.values())
    least = floors(config, facts["limits"], answer["compute_width"], answer["state_bytes"])
    return {part: {"share": s / whole, "floor": least.get(part, 0.0) / whole} for part, s in spent.items()}


def search(config: Config, facts: dict[str, Any], options: Options) -> tuple[Config, list[Row]]:
    """(the fastest setting of micro-batch, remat and scan or unroll; all that were tried).

    Two micro-batches a step are enough to choose by: their gradients are summed as those of many are.
    """
    rows: list[Row] = []

    def rate(candidate: Config) -> float:
        micro = candidate.micro_batch_size
        batch = micro * min(2, candidate.max_accumulation)
        short = replace(candidate, train=replace(candidate.train, batch_size=batch))
        answer = trial.measure_single(short, options.steps, options.timeout)
        row = _judged(short, answer, facts)
        model = candidate.model
        tried = {"micro_batch_size": micro, "remat": model.remat, "scan_layers": model.scan_layers}
        rows.append(tried | _brief(row))
        _say(f"{config.name} micro-batch {micro}, remat {model.remat}", row)
        return float(row.get("tokens_per_s", 0.0))

    best, best_rate = config, 0.0
    for remat in REMATS:
        found, found_rate, full = climb(_model(best, remat=remat), rate)
        if found_rate > best_rate:
            best, best_rate = found, found_rate
        if not full:
            break  # memory was not what stopped it, and more remat only saves memory
    other = _model(best, scan_layers=not best.model.scan_layers)
    return (other if rate(other) > GAIN * best_rate else best), rows


def climb(config: Config, rate: Callable[[Config], float]) -> tuple[Config, float, bool]:
    """(config with the fastest micro-batch, its rate, whether memory kept it from growing): down by halves until one
    runs, then up by doubles as long as that pays."""
    found, full = 0.0, False
    for size in _halves(config.micro_batch_size):
        if found := rate(_micro(config, size)):
            break
        full = True
    while found and not full and config.train.batch_size % (2 * size) == 0:
        bigger = rate(_micro(config, 2 * size))
        full = bigger == 0
        if bigger < GAIN * found:
            break
        size, found = 2 * size, bigger
    return _micro(config, size), found, full


def _halves(size: int) -> Iterator[int]:
    yield size
    while size % 2 == 0:
        size //= 2
        yield size


def compare_options(config: Config, first: Row, facts: dict[str, Any], options: Options) -> list[Row]:
    """Each option against the platform's own, of which `first` is, and which are measured again at the end: gain in
    tokens per second."""

    def once(**more: str) -> Row:
        answer = trial.measure_single(config, options.steps, options.timeout, options=more)
        row = _judged(config, answer, facts)
        _say(" ".join([config.name, *(f"{name}={value}" for name, value in more.items())]), row)
        return row

    every = OPTIONS[facts["platform"]]
    tried = [{"option": f"{name}={value}"} | _brief(once(**{name: value})) for name, value in every.items()]
    own = [row["tokens_per_s"] for row in (first, once()) if "tokens_per_s" in row]
    for row in tried:
        if own and "tokens_per_s" in row:
            row["gain"] = row["tokens_per_s"] / median(own) - 1
    return [{"option": "own", "drift": own[-1] / own[0] - 1 if own else None}, *tried]


def peer(config: Config, facts: dict[str, Any], options: Options) -> Row:
    """The other program's best row, over micro-batches if we searched ours."""
    rows: dict[int, Row] = {}

    def rate(candidate: Config) -> float:
        answer = trial.measure_peer(Path(options.peer), candidate, options.steps, options.timeout)
        row = rows[candidate.micro_batch_size] = _judged(candidate, answer, facts)
        _say(f"{config.name} by {options.peer}, micro-batch {candidate.micro_batch_size}", row)
        return float(row.get("tokens_per_s", 0.0))

    if options.search:
        config = climb(config, rate)[0]
    else:
        rate(config)
    return rows[config.micro_batch_size] | {"micro_batch_size": config.micro_batch_size}


def _brief(row: Row) -> Row:
    """What a list of trials keeps."""
    kept = ("status", "reason", "median_s", "tokens_per_s", "memory_bytes", "compile_s")
    return {name: row[name] for name in kept if name in row}


def _say(name: str, row: Row) -> None:
    print(progress(row | {"name": name}), flush=True)
