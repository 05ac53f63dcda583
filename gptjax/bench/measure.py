"""What every benchmark shares: times, the device's measured limits, and where a result came from."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import Config
from gptjax.files import json_text, write_whole
from gptjax.hardware import peak_flops
from gptjax.model.accounting import train_flops_per_token_6n
from gptjax.stages import stage_class

ROUND_SECONDS = 0.2  # long enough for the clock and for the scheduler of a shared machine


def times(functions: Sequence[Callable[[], Any]], rounds: int = 3) -> list[float]:
    """Seconds per call of each function: the median of rounds that take turns, so that noise meets all alike."""
    counts = []
    for function in functions:
        jax.block_until_ready(function())  # compiles, warms up
        counts.append(max(1, min(100, int(ROUND_SECONDS / _seconds(function, 1)))))
    turns = [[_seconds(f, n) for f, n in zip(functions, counts, strict=True)] for _ in range(rounds)]
    return [median(column) for column in zip(*turns, strict=True)]


def _seconds(function: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count


def limits(dtype: jnp.dtype) -> dict[str, float]:
    """What this device reaches on the two things that bound a kernel: a large matrix product (FLOP/s) and a copy
    (bytes/s, read and written)."""
    on_cpu = jax.default_backend() == "cpu"
    size, words = (2048, 1 << 25) if on_cpu else (8192, 1 << 28)
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)  # a GPU is faster on constants than on data
    line = jnp.ones((words,), jnp.float32)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda x: x + 1)
    product_s, copy_s = times([lambda: product(square), lambda: copy(line)])
    return {"flops": 2 * size**3 / product_s, "bytes": 2 * line.nbytes / copy_s}


def figures(config: Config, times: list[float], facts: dict[str, Any]) -> dict[str, Any]:
    """Median and spread in seconds, tokens per second over all devices, and MFU where the devices' peak is known: by
    the exact count of FLOPs, and, where all parameters are trained, by 6 N + 12 L T D."""
    low, high = np.percentile(times, (10, 90))
    rate = config.step_tokens / median(times)
    flops = stage_class(config)(config, "cpu").flops["updates"] / config.step_tokens
    peak, whole = peak_flops(facts["device"]), config.adapter is None and config.predicts and not config.has_reference
    return {
        "median_s": median(times),
        "p10_s": float(low),
        "p90_s": float(high),
        "tokens_per_s": rate,
        "mfu": rate * flops / (peak * facts["count"]) if peak else None,
        "mfu_6n": rate * train_flops_per_token_6n(config.model) / (peak * facts["count"]) if peak and whole else None,
    }


def percentiles(**times: Sequence[float]) -> dict[str, float | None]:
    """The median and the slowest in a hundred of each, as NAME_p50 and NAME_p99; None of nothing."""
    return {
        f"{name}_p{share}": float(np.percentile(values, share)) if len(values) else None
        for name, values in times.items()
        for share in (50, 99)
    }


def provenance() -> dict[str, Any]:
    """Device, versions and date, as every result file carries them."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "date": datetime.now(UTC).date().isoformat(),
    }


def save(result: dict[str, Any], path: Path) -> None:
    write_whole(path, (json_text(result, indent=1) + "\n").encode())


def si(x: float) -> str:
    """Three digits and a prefix: 1.23 m, 45.6 G."""
    for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1), ("m", 1e-3), ("u", 1e-6)):
        if x >= unit:
            return f"{x / unit:.3g} {prefix}"
    return f"{x:.3g} "
