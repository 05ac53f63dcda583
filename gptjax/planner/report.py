"""A plan as people read it: a table in the terminal, and one HTML page with plots."""

import base64
import dataclasses
import html
import io
import re
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from gptjax.config import Config, EncoderDecoderConfig, RewardedConfig
from gptjax.config.fields import walk
from gptjax.model.accounting import cache_bytes, memory_matrix
from gptjax.model.gpt import compute_dtype
from gptjax.planner.cost import learning
from gptjax.planner.plan import Plan, Row
from gptjax.planner.rollout import drawing, rollout
from gptjax.planner.traffic import Transfer
from gptjax.stages.rewards import is_function
from gptjax.stages.scorer import is_there

PARTS = ("parameters", "optimizer", "gradients", "activations", "temporaries", "cache")
TITLES = (
    "layout / remat / micro-batch",
    "memory",
    "of",
    "compiler",
    "step",
    "MFU",
    "tok/s/device",
    "days",
    "cost",
    "network",
    "",
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } table { border-collapse: collapse; margin: 1rem 0 } h2 { margin-top: 2.5rem }
th, td { text-align: right; padding: .15rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child, td:last-child { text-align: left } td:last-child { white-space: normal }
tr.out td { color: #999 } code { background: #f5f5f5; padding: 0 .2rem }
"""


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    compiled = row.compiled.peak if row.compiled and row.compiled.peak else None
    network = row.seconds["fast network"] + row.seconds["slow network"]
    return (
        row.candidate.name,
        f"{row.candidate.estimate.peak / 1e9:.1f} GB",
        f"{row.candidate.estimate.peak / row.chip.hbm:.0%}",
        f"{compiled / 1e9:.1f} GB" if compiled else "-",
        _span(row.spread.seconds(row.step_seconds), _seconds),
        _span(row.spread.speed(row.mfu), "{:.0%}".format),
        _span(row.spread.speed(row.tokens_per_device), "{:,.0f}".format),
        "-" if row.days is None else _span(row.spread.seconds(row.days), "{:,.1f}".format),
        "-" if row.dollars is None else _span(row.spread.seconds(row.dollars), "${:,.0f}".format),
        f"{network / row.step_seconds:.0%}",
        row.status,
    )


def _span(ends: tuple[float, float], shown: Callable[[float], str]) -> str:
    """24-33 s: both ends, the unit once where it is the same."""
    low, high = map(shown, ends)
    unit = re.search(r"( ?[^\d.,]*)$", high)
    return f"{low.removesuffix(unit[1]) if unit else low}-{high}"


def table(plan: Plan) -> Table:
    """The ranked layouts for the terminal."""
    made = Table(box=None, pad_edge=False, title_justify="left", header_style="bold")
    shown = [title for title in TITLES if title != "cost" or plan.topology.chip.price]
    for i, title in enumerate(shown):
        made.add_column(title, justify="left" if i in (0, len(shown) - 1) else "right", no_wrap=i < len(shown) - 1)
    for row in plan.rows:
        told = [cell for title, cell in zip(TITLES, cells(row), strict=True) if title in shown]
        made.add_row(*told, style=None if row.fits else "dim")
    return made


def headline(plan: Plan) -> str:
    """What was asked and looked at."""
    found = plan.found
    return (
        f"{plan.config.name} on {plan.topology}\n"
        f"{len(found.fitting):,} combinations fit, {len(found.crowded):,} need more memory, "
        f"{found.refused.total():,} layouts do not divide; compiler: {plan.compiler}"
        + (f"\n{plan.tight}" if plan.tight else "")
        + f"\n{plan.trust}"
        + (f"\ndays: {plan.endless}" if plan.endless else "")
        + (f"\nreward: {assumed}" if (assumed := assumption(plan.config)) else "")
        + (f"\n{kept}" if (kept := decoding(plan.config, plan.topology.chip.platform)) else "")
    )


def assumption(config: Config) -> str:
    """What is taken for granted of a reward model whose run is not there yet; empty where it is."""
    if not isinstance(config, RewardedConfig) or is_function(config.reward) or is_there(config.reward):
        return ""
    return f"{config.reward} is not there; reward and value model are taken to be of the policy's size"


def decoding(config: Config, platform: str) -> str:
    """What generation will keep of a text of the whole context, over all devices that its heads are split over; empty
    for what writes nothing."""
    model = config.model
    if not model.causal:
        return ""
    width = compute_dtype(model, platform).itemsize
    kept, dense = (
        cache_bytes(m, 1, m.seq_len, width) for m in (model, dataclasses.replace(model, attention_pattern=("dense",)))
    )
    saved = f", {dense / 1e6:,.1f} MB were all layers dense" if kept < dense else ""
    own = f"generation: keys and values of a text of {model.seq_len:,} tokens are {kept / 1e6:,.1f} MB{saved}"
    if not isinstance(config, EncoderDecoderConfig):
        return own
    read = config.encoder.seq_len
    looked_at = model.num_layers * memory_matrix(model)[1] * read * width
    return f"{own}, and of the {read:,} that it looks at {looked_at / 1e6:,.1f} MB"


def details(row: Row) -> str:
    """Memory, time and traffic of one layout, as text."""
    lines = [f"{row.candidate.name}: {row.status}"]
    lines.append(
        "memory   "
        + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in row.candidate.estimate.memory.items())
        + f"; together {row.candidate.estimate.peak / 1e9:.2f} GB"
        + (f", by the compiler {row.compiled.peak / 1e9:.2f} GB" if row.compiled and row.compiled.peak else "")
    )
    lines.append(f"time     {', '.join(f'{name} {_seconds(s)}' for name, s in row.seconds.items() if s)}")
    lines += iteration(row)
    lines += [f"traffic  {_transfer(t)}" for t in row.transfers if t.bytes > 1e6]
    lines += [f"surprise {text}" for text in row.surprises]
    lines.append(f"train    {flags(row.candidate.config)}")
    return "\n".join(lines)


def iteration(row: Row) -> list[str]:
    """Rollout, judging and updates of a policy that learns from its own replies, a line each; else none."""
    place, c = row.candidate.place, row.candidate.config
    drawn = rollout(place)
    if drawn is None or not isinstance(c, RewardedConfig):
        return []
    prompt, reply = c.text_tokens
    kept = sum(size for part, _, size in drawing(place) if part == "cache")
    longest = max(drawn.parts, key=lambda part: drawn.parts[part])
    episodes, names = c.rollout.episodes, [model.reading.name or "policy" for model in place.judges]
    learners = [model.reading.name or "policy" for model in place.learners[:2]]
    text = sum(model.reading.sequences for model in place.learners[2:])
    return [
        f"rollout  {episodes:,} replies of {reply} tokens to prompts of {prompt}, {c.rollout.slots} side by side: "
        f"{drawn.steps:,} steps of {_seconds(drawn.step_seconds)}, most for {longest}, and prompts "
        f"{_seconds(drawn.prompts)}; {_seconds(drawn.seconds)} at least; caches {kept / 1e6:,.1f} MB",
        f"judging  {episodes:,} replies by {', '.join(names)}; {_seconds(row.seconds['judging'])}",
        f"updates  {c.updates} of {c.train.batch_size} replies by {', '.join(learners)}"
        + f", and {text} rows of text beside each" * bool(text)
        + f"; {_seconds(learning(row.seconds))}",
    ]


def flags(config: Config) -> str:
    """The layout as fields to train with, ready to paste."""
    layout, train = config.layout, config.train
    given = {f"layout.{f.name}": getattr(layout, f.name) for f in dataclasses.fields(layout)}
    plain = {f"layout.{f.name}": f.default for f in dataclasses.fields(layout)}
    words = {name: value for name, value in given.items() if value != plain[name]}
    words |= {f"{section}.remat": model.remat for section, model in config.models.items()}
    words |= {"train.micro_batch_size": config.micro_batch_size}
    used = {leaf.name for leaf in walk(type(config))}
    some = {"train.ramp_start": train.ramp_start} | ({"data.lanes": config.data.lanes} if "data.lanes" in used else {})
    words |= {name: value for name, value in some.items() if name in used}
    return " ".join(f"--{name} {str(value).lower()}" for name, value in words.items())


def _transfer(t: Transfer) -> str:
    hidden = f"{_seconds(t.exposed)} of it in the way" if t.exposed else "hidden"
    count = f" x {t.count:,}" if t.count else ""
    where, size = " x ".join(t.axes), f"{t.bytes / 1e9:,.1f} GB"
    return f"{t.kind}{count} over {where} ({t.what}), {t.network} network: {size}, {_seconds(t.seconds)}, {hidden}"


def _seconds(x: float) -> str:
    return (
        f"{x:.1f} s"
        if x >= 10
        else f"{x:.2f} s"
        if x >= 1
        else f"{x * 1e3:.0f} ms"
        if x >= 0.01
        else f"{x * 1e3:.1f} ms"
        if x >= 1e-4
        else f"{x * 1e6:.1f} us"
    )


def page(plan: Plan, out: Path) -> None:
    """One self-contained HTML file."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in TITLES)
    body = "\n".join(
        f"<tr{'' if row.fits else ' class=out'}>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(row)) + "</tr>"
        for row in plan.rows
    )
    best = plan.rows[0]
    days = _span(best.spread.seconds(best.days), "{:,.1f}".format) if best.days else ""
    refused = "".join(f"<li>{html.escape(why)}: {count:,}</li>" for why, count in plan.found.refused.most_common(5))
    bills = "\n".join(f"<h3>{html.escape(row.candidate.name)}</h3>{_bill(row)}" for row in plan.rows[:4])
    plots = [("memory per device", memory_plot(plan)), ("what a step's time goes to", time_plot(plan))]
    plots.append(("memory against speed", pareto_plot(plan)))
    pictures = "\n".join(
        f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for title, png in plots
    )
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(plan.config.name)} plan</title>
<style>{STYLE}</style></head><body>
<h1>{html.escape(plan.config.name)} on {html.escape(plan.topology.name)}</h1>
<p>{html.escape(headline(plan)).replace(chr(10), "<br>")}</p>
<p>Best: <code>{html.escape(best.candidate.name)}</code>, {_span(best.spread.seconds(best.step_seconds), _seconds)} for
{best.tokens:,} tokens, {_span(best.spread.speed(best.mfu), "{:.0%}".format)} MFU{
        f", {days} days for {best.length:,} tokens" if days else ""
    }.</p>
<p>To train with it: <code>{flags(best.candidate.config)}</code></p>
<table><tr>{head}</tr>{body}</table>
<p>memory: by formula, and its share of what a device has; compiler: its own peak; network: share of the step in which
nothing but the network works. Predictions, not measurements; assumptions are in <code>planner/chips.py</code>,
<code>arithmetic.py</code> and <code>traffic.py</code>, published runs in <code>published.py</code>.</p>
{pictures}
<h2>what each step sends</h2>{bills}
{f"<h2>layouts that do not divide</h2><ul>{refused}</ul>" if refused else ""}
</body></html>
"""
    out.write_text(text)


def _bill(row: Row) -> str:
    lines = "".join(
        f"<tr><td>{t.kind}</td><td>{' x '.join(t.axes)}</td><td>{t.count:,}</td><td>{t.bytes / 1e9:,.2f} GB</td>"
        f"<td>{t.network}</td><td>{_seconds(t.seconds)}</td><td>{_seconds(t.exposed)}</td><td>{t.what}</td></tr>"
        for t in row.transfers
        if t.bytes > 1e6
    )
    surprises = "".join(f"<p>Surprise: {html.escape(text)}</p>" for text in row.surprises)
    return (
        surprises
        + "<table><tr><th>kind</th><th>mesh axes</th><th>times</th><th>arrays</th><th>network</th><th>time</th>"
        f"<th>in the way</th><th></th></tr>{lines}</table>"
    )


def _figure(plan: Plan):  # type: ignore[no-untyped-def]
    from matplotlib.figure import Figure

    return Figure(figsize=(11, 0.42 * len(plan.rows) + 1.6), layout="constrained")


def _png(figure) -> bytes:  # type: ignore[no-untyped-def]
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def memory_plot(plan: Plan) -> bytes:
    """Stacked parts per layout, the compiler's peak, and what there is."""
    figure = _figure(plan)
    axes = figure.subplots()
    names, left = [row.candidate.name for row in plan.rows], [0.0] * len(plan.rows)
    for part in PARTS:
        sizes = [row.candidate.estimate.memory.get(part, 0.0) / 1e9 for row in plan.rows]
        axes.barh(names, sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    peaks = [(i, row.compiled.peak / 1e9) for i, row in enumerate(plan.rows) if row.compiled and row.compiled.peak]
    if peaks:
        axes.plot([p for _, p in peaks], [i for i, _ in peaks], "k|", ms=16, mew=2, label="compiler's peak")
    axes.axvline(plan.topology.chip.hbm / 1e9, color="C3", ls="--", label="memory of a device")
    axes.invert_yaxis()
    axes.set(xlabel="GB")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def time_plot(plan: Plan) -> bytes:
    """Stacked seconds per layout."""
    figure = _figure(plan)
    axes = figure.subplots()
    names, left = [row.candidate.name for row in plan.rows], [0.0] * len(plan.rows)
    for part in plan.rows[0].seconds:
        seconds = [row.seconds[part] for row in plan.rows]
        if max(seconds) > 0.002 * max(row.step_seconds for row in plan.rows):
            axes.barh(names, seconds, left=left, label=part)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="seconds of a step")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def pareto_plot(plan: Plan) -> bytes:
    """Every combination that was priced, the front of those that nothing beats in both, and the ranked ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    every = [(c.estimate.peak / 1e9, c) for c in (*plan.found.fitting, *plan.found.crowded)]
    steps = plan.config.step_tokens / plan.topology.num_devices
    points = [(peak, steps / c.estimate.step_seconds) for peak, c in every]
    axes.plot(*zip(*points, strict=True), ".", color="0.8", ms=3, label="priced by formula")
    front: list[tuple[float, float]] = []
    for peak, speed in sorted(points):
        if not front or speed > front[-1][1]:
            front.append((peak, speed))
    axes.plot(*zip(*front, strict=True), "-", color="C0", lw=1, label="nothing is smaller and faster")
    for i, row in enumerate(plan.rows):
        axes.plot(row.peak / 1e9, row.tokens_per_device, "o" if row.fits else "x", color="C1", ms=6)
        axes.annotate(str(i + 1), (row.peak / 1e9, row.tokens_per_device), textcoords="offset points", xytext=(6, 3))
    axes.plot([], [], "o", color="C1", label="ranked, numbered as in the table")
    axes.axvline(plan.topology.chip.hbm / 1e9, color="C3", ls="--", label="memory of a device")
    most = max(plan.topology.chip.hbm / 1e9 * 1.5, 1.05 * max(row.peak / 1e9 for row in plan.rows))
    axes.set(xlabel="GB per device", ylabel="tokens per second and device", xlim=(0, most), ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return _png(figure)
