"""A layouts result as text and as a picture."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from gptjax.bench.compare import Change, Earlier, machine
from gptjax.bench.measure import si

Row = dict[str, Any]
TIE = 1e-3  # predictions closer than this are alike: formulas do not see what tells the settings apart
LIMITS = {"flops": "matrix product", "bytes": "copy", "gather": "gather"}


def progress(row: Row) -> str:
    """One line as soon as a setting is done."""
    if row["status"] != "ok":
        return f"{row['name']}: {row['status']} ({row['reason']})"
    return f"{row['name']}: {_ms(row['median_s'])} ms a step, compiled in {row['compile_s']:.1f} s"


def table(result: dict[str, Any]) -> str:
    """Settings by speed, what the prediction rests on, and why settings have no figures."""
    rows, calibration = result["rows"], result["calibration"]
    measured = calibration["measured_limits"]
    gather = f", gather {si(measured['gather'])}B/s into each device" if "gather" in measured else ""
    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{_title(result)}, jax {result['versions']['jax']}, {result['date']}",
        f"measured limits: matrix product {si(measured['flops'])}FLOP/s, copy {si(measured['bytes'])}B/s{gather}",
        _basis(calibration),
        "",
        f"{'setting':{width}} {'status':13} {'median ms':>9} {'p10-p90 ms':>15} {'tokens/s':>9} {'MFU':>6} "
        f"{'memory':>9} {'predicted ms':>12} {'error':>7} {'pred. memory':>12}",
    ]
    for row in rows:
        ok = row["status"] == "ok"
        spread = f"{_ms(row['p10_s'])}-{_ms(row['p90_s'])}" if ok else "-"
        error = "fixed" if row["name"] == calibration["reference"] else cell(row, "error", "{:+.0%}".format)
        lines.append(
            f"{row['name']:{width}} {row['status']:13} {cell(row, 'median_s', _ms):>9} {spread:>15} "
            f"{cell(row, 'tokens_per_s', '{:,.0f}'.format):>9} {cell(row, 'mfu', '{:.1%}'.format):>6} "
            f"{cell(row, 'memory_bytes', _bytes):>9} {cell(row, 'predicted_s', _ms):>12} {error:>7} "
            f"{cell(row, 'predicted_bytes', _bytes):>12}"
        )
    sources = sorted({row["memory_source"] for row in rows if row["status"] == "ok"})
    if sources:
        lines += ["", f"memory: peak of the fullest device, as the {' or the '.join(sources)} says"]
    lines += [f"{row['name']}: {row['status']}: {row['reason']}" for row in rows if row["status"] != "ok"]
    lines += [f"{row['name']}: not predicted: {row['not_predicted']}" for row in rows if "not_predicted" in row]
    return "\n".join(lines)


def _basis(calibration: dict[str, Any]) -> str:
    """What the predicted times rest on."""
    shared = calibration["devices_sharing_the_limits"]
    limits = f"these limits{f', shared by {shared} virtual devices' if shared > 1 else ''}"
    if calibration["reference"] is None:
        return f"predicted: from {limits}; no setting ran that could fix what is reached of them"
    factor = calibration["factor"]
    return (
        f"predicted: from {limits}, times {factor:.3g} for all settings, which makes {calibration['reference']} right"
    )


def summary(result: dict[str, Any]) -> str:
    """How good the prediction was: its error, and whether it would have chosen the best setting."""
    tested = [row for row in result["rows"] if "error" in row]
    judged = [abs(row["error"]) for row in tested if row["name"] != result["calibration"]["reference"]]
    if not judged:
        return "prediction not judged: fewer than two settings have both figures"
    fastest, least = (min(_token_s(row, field) for row in tested) for field in ("median_s", "predicted_s"))
    best = next(row["name"] for row in tested if _token_s(row, "median_s") == fastest)
    guessed = [row for row in tested if _token_s(row, "predicted_s") < (1 + TIE) * least]
    names = ", ".join(row["name"] for row in guessed) if len(guessed) <= 3 else f"{len(guessed)} settings"
    chosen = f"predicted best {names}{' alike' if len(guessed) > 1 else ''}"
    slowest = max(_token_s(row, "median_s") for row in guessed)
    away = f" ({slowest / fastest:.2f}x as fast{' as the slowest of these' if len(guessed) > 1 else ''})"
    chosen += f", measured best {best}{away if slowest > fastest else ': the same'}"
    return f"median error of {len(judged)} predictions {median(judged):.0%}; {chosen}"


def _token_s(row: Row, field: str) -> float:
    """Seconds per token by a measured or predicted step: settings may differ in their batch."""
    return row[field] / (row["tokens_per_s"] * row["median_s"])


def change_lines(earlier: Earlier, result: dict[str, Any], found: list[Change]) -> str:
    """The comparison with an earlier result. The devices' own limits tell a slower program from a busier machine, and
    times are divided by what those have changed."""
    worse, width = sum(change.worse for change in found), max((len(change.name) for change in found), default=0)
    before, now = (r["calibration"]["measured_limits"] for r in (earlier.result, result))
    limits = ", ".join(f"{word} {now[name] / before[name]:.2f}x" for name, word in LIMITS.items() if name in now)
    slower = machine(earlier.result, result)
    lines = [
        f"against {earlier.path}: {worse} regression(s); the devices' measured limits now: {limits}; times are divided "
        f"by {slower:.2f} for it"
    ]
    lines += [f"{c.name:{width}}  {c.text}{'  REGRESSION' if c.worse else ''}" for c in found]
    return "\n".join(lines)


def plot(result: dict[str, Any], out: Path) -> None:
    """Step time with its spread, and memory, of every setting that was tried; the predictions as markers."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["status"] != "skipped"]
    unit, width = ("GB", 1e9) if max((row.get("memory_bytes", 0) for row in rows), default=0) > 2e9 else ("MB", 1e6)
    figure = Figure(figsize=(11, 1.9 + 0.32 * len(rows)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        if row["status"] == "ok":
            middle, low, high = (1e3 * row[name] for name in ("median_s", "p10_s", "p90_s"))
            spread = [[max(0, middle - low)], [max(0, high - middle)]]
            time.barh(place, middle, 0.6, xerr=spread, color="C0", error_kw={"capsize": 3, "ecolor": "0.25"})
            memory.barh(place, row["memory_bytes"] / width, 0.6, color="C0")
        else:
            time.text(0.01, place, row["status"], transform=time.get_yaxis_transform(), va="center", color="C3")
    # Where nothing ran, a time has nothing to stand beside; the memory may say why.
    _markers(time, [(1e3 * r["predicted_s"], i) for i, r in enumerate(rows) if r["status"] == "ok" and "error" in r])
    _markers(memory, [(r["predicted_bytes"] / width, i) for i, r in enumerate(rows) if "predicted_bytes" in r])
    for axes in (time, memory):
        axes.set_xlim(0, None)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    time.set_yticks(range(len(rows)), [row["name"] for row in rows])
    time.set_ylim(len(rows) - 0.4, -0.6)
    time.set(xlabel="ms a step: median, p10 to p90", title="step time")
    memory.set(xlabel=f"{unit}, fullest device", title="peak memory")
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    figure.suptitle(_title(result), fontsize=11)
    figure.savefig(out, dpi=120)


def _markers(axes: Any, points: list[tuple[float, int]]) -> None:
    """The predictions, on top of the bars."""
    if points:
        axes.plot(*zip(*points, strict=True), "D", color="C1", mec="white", ms=7, label="predicted", zorder=3)


def _title(result: dict[str, Any]) -> str:
    config = result["config"]
    train, model = config["train"], config["model"]
    batch = f"{train['batch_size']} x {model['seq_len']} tokens a step"
    return f"{config['name']} on {result['count']} x {result['device']}, {result['dtype']}, {batch}"


def cell(row: Row, field: str, shown: Callable[[float], str]) -> str:
    """A figure as it is shown, or a dash where there is none."""
    value = row.get(field)
    return "-" if value is None else shown(value)


def _ms(seconds: float) -> str:
    """Three digits at least."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _bytes(count: float) -> str:
    return f"{si(count)}B"
