"""`gptjax bench attention`: dense against banded over the sequence length, beside what the device can do.

Useful work is counted: 4 K operations per query and visible key forward and 8 K backward (what recomputation adds
does not count), and the bytes that must move at least once: q, k, v and the output forward; those, their gradients
and the output's backward.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.bench.measure import limits, provenance, save, si, times
from gptjax.model.accounting import mean_keys
from gptjax.model.attention import Attend, Mask, Need
from gptjax.model.kernels import BACKENDS, choose


@dataclass(frozen=True)
class Settings:
    """One table."""

    lengths: tuple[int, ...]
    window: int
    batch: int
    heads: int
    head_dim: int
    dtype: str
    attention: str
    """A backend or auto."""


def run(settings: Settings, out: Path) -> str:
    """Measure, write OUT/attention.json and OUT/attention.png, return the table as text.

    Raises UserError for settings that no backend can serve.
    """
    lengths = sorted(settings.lengths)
    backends = [_backends(settings, length) for length in lengths]
    device = limits(jnp.dtype(settings.dtype))
    rows = [row for pair in zip(lengths, backends, strict=True) for row in _measure(settings, *pair)]
    result = {**provenance(), "settings": asdict(settings), "limits": device, "rows": rows}
    save(result, out / "attention.json")
    plot(result, out / "attention.png")
    return f"{table(result)}\n{out / 'attention.json'}\n{out / 'attention.png'}"


def _masks(settings: Settings) -> dict[str, Mask]:
    return {"dense": Mask(), "banded": Mask(settings.window)}


def _backends(settings: Settings, length: int) -> dict[str, str]:
    """The backend of each kind of layer."""
    about = jax.default_backend(), jnp.dtype(settings.dtype), settings.head_dim, length
    return {kind: choose(settings.attention, Need(*about, (mask,)))[0] for kind, mask in _masks(settings).items()}


def _measure(settings: Settings, length: int, backends: dict[str, str]) -> list[dict[str, Any]]:
    """One row per mask; all of a length take turns."""
    scale, dtype = settings.head_dim**-0.5, jnp.dtype(settings.dtype)
    shape = (settings.batch, length, settings.heads, settings.head_dim)
    q, k, v = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3))
    masks = _masks(settings)
    functions = []
    for kind, mask in masks.items():
        forward, gradient = _compiled(BACKENDS[backends[kind]].attend, mask, scale)
        functions += [partial(forward, q, k, v), partial(gradient, q, k, v)]
    seconds = times(functions)
    rows = []
    for i, (kind, mask) in enumerate(masks.items()):
        pairs = settings.batch * settings.heads * length * mean_keys(kind, length, mask.window or length)
        rows.append(
            {
                "kind": kind,
                "length": length,
                "backend": backends[kind],
                "forward_s": seconds[2 * i],
                "both_s": seconds[2 * i + 1],
                "forward_flops": 4 * settings.head_dim * pairs / seconds[2 * i],
                "both_flops": 12 * settings.head_dim * pairs / seconds[2 * i + 1],
                "forward_bytes": 4 * q.nbytes / seconds[2 * i],
                "both_bytes": 12 * q.nbytes / seconds[2 * i + 1],
            }
        )
    return rows


def _compiled(attend: Attend, mask: Mask, scale: float) -> tuple[Callable, Callable]:
    """The forward pass, and forward and backward, of (q, k, v)."""

    def forward(q: Array, k: Array, v: Array) -> Array:
        return attend(q, k, v, mask, scale, None)

    def summed(q: Array, k: Array, v: Array) -> Array:
        return jnp.sum(forward(q, k, v), dtype=jnp.float32)

    return jax.jit(forward), jax.jit(jax.grad(summed, (0, 1, 2)))


def exponent(result: dict[str, Any], kind: str, field: str) -> float | None:
    """p of time ~ T^p over the lengths that are well beyond the window; None with fewer than two of them."""
    window = result["settings"]["window"]
    rows = [r for r in result["rows"] if r["kind"] == kind and r["length"] >= 8 * window]
    if len(rows) < 2:
        return None
    lengths, seconds = (np.log([r[name] for r in rows]) for name in ("length", field))
    return float(np.polyfit(lengths, seconds, 1)[0])


def table(result: dict[str, Any]) -> str:
    """The figures as text; shares are of the device's own measured limits."""
    device = result["limits"]
    lines = [
        f"{_title(result)}, jax {result['versions']['jax']}, {result['date']}",
        f"measured limits: matrix product {si(device['flops'])}FLOP/s, copy {si(device['bytes'])}B/s",
        "",
        f"{'T':>6} {'mask':7}{'backend':10} {'forward':>9} {'+backward':>10} {'FLOP/s':>8} {'of peak':>8} {'B/s':>8} "
        f"{'of copy':>8} {'dense / banded':>15}",
    ]
    dense = {r["length"]: r for r in result["rows"] if r["kind"] == "dense"}
    for r in result["rows"]:
        ratio = "" if r["kind"] == "dense" else f"{dense[r['length']]['both_s'] / r['both_s']:.1f}x"
        lines.append(
            f"{r['length']:>6} {r['kind']:7}{r['backend']:10} {si(r['forward_s']):>8}s {si(r['both_s']):>9}s "
            f"{si(r['both_flops']):>8} {r['both_flops'] / device['flops']:>8.0%} {si(r['both_bytes']):>8} "
            f"{r['both_bytes'] / device['bytes']:>8.1%} {ratio:>15}"
        )
    for kind in ("dense", "banded"):
        if (p := exponent(result, kind, "both_s")) is not None:
            lines.append(f"{kind}: time of forward and backward grows as T^{p:.2f} (T of 8 windows and more)")
    return "\n".join(lines)


def _title(result: dict[str, Any]) -> str:
    s = result["settings"]
    shape = f"{s['batch']} x {s['heads']} heads of {s['head_dim']}"
    return f"attention on {result['device']}, {s['dtype']}, {shape}, window {s['window']}"


def plot(result: dict[str, Any], out: Path) -> None:
    """Time over T, and the share of the limit that binds each kind of layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    time, share = figure.subplots(1, 2)
    device = result["limits"]
    for kind, color in (("dense", "C3"), ("banded", "C0")):
        rows = [r for r in result["rows"] if r["kind"] == kind]
        lengths = [r["length"] for r in rows]
        for field, style, label in (("forward_s", "o--", "forward"), ("both_s", "o-", "forward and backward")):
            time.plot(lengths, [r[field] for r in rows], style, color=color, ms=4, label=f"{kind}, {label}")
        for what, style, label in (("flops", "o-", "FLOP/s"), ("bytes", "o:", "bytes/s")):
            shares = [r[f"both_{what}"] / device[what] for r in rows]
            share.plot(lengths, shares, style, color=color, ms=4, label=f"{kind}, {label}")
    time.set(xscale="log", yscale="log", xlabel="sequence length T", ylabel="seconds", title="time")
    share.set(xscale="log", xlabel="sequence length T", ylim=(0, None), title="share of the measured limit")
    share.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    for axes in (time, share):
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(_title(result))
    figure.savefig(out, dpi=120)
