"""A `bench single` result as tables in Markdown, for a terminal and for the README alike."""

from statistics import median
from typing import Any

from gptjax.bench.layouts_report import cell
from gptjax.bench.measure import si
from gptjax.bench.parts import UNKNOWN

Row = dict[str, Any]
BELOW = 0.1  # of a floor: the limits are measured, too
AWAY = 0.25  # of the measured step: what a trace may cost, or a machine drift
IDLE = 0.5  # of the step: more is a trace that misses work, or a step too short to be one


def markdown(result: dict[str, Any]) -> str:
    """The figures, the parts of a step, and the compiler options that were tried."""
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    tables = [_title(result), _figures(result["rows"]), _parts(rows), _options(rows)]
    return "\n\n".join(table for table in tables if table)


def _title(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    for row in result["rows"]:
        if how := row.get("peer", {}).get("how"):
            versions += f"; peer: {how}"
            break
    limits = result["limits"]
    measured = f"measured limits {si(limits['flops'])}FLOP/s in products, {si(limits['bytes'])}B/s in copies"
    return f"{result['device']}, {result['dtype']}, {versions}, {result['date']}; {measured}"


def _figures(rows: list[Row]) -> str:
    """One line a config; what did not run says why."""
    head = ["config", "tokens/s", "ms a step (p10-p90)", "MFU", "MFU 6N+12LTD", "peak memory", "micro-batch, remat"]
    with_peer = any("peer" in row for row in rows)
    with_stream = any("stream_ratio" in row for row in rows)
    head += ["peer tokens/s", "ratio"] if with_peer else []
    head += ["real data / one batch"] if with_stream else []
    lines = []
    for row in rows:
        cells = [row["name"]]
        if row["status"] == "ok":
            config, spread = row["config"], f"{1e3 * row['p10_s']:,.1f}-{1e3 * row['p90_s']:,.1f}"
            layers = "" if config["model"]["scan_layers"] else ", unrolled"
            cells += [f"{row['tokens_per_s']:,.0f}", f"{1e3 * row['median_s']:,.1f} ({spread})"]
            cells += [
                cell(row, "mfu", "{:.1%}".format),
                cell(row, "mfu_6n", "{:.1%}".format),
                f"{si(row['memory_bytes'])}B",
            ]
            cells += [f"{config['train']['micro_batch_size']}, {config['model']['remat']}{layers}"]
        else:
            cells += [f"{row['status']}: {row['reason']}"] + [""] * 5
        if with_peer:
            other = row.get("peer", {})
            rate = cell(other, "tokens_per_s", "{:,.0f}".format)
            cells += [other.get("status", "-") if rate == "-" else rate, _ratio(row.get("ratios", []))]
        if with_stream:
            cells += [cell(row, "stream_ratio", "{:.3f}".format)]
        lines.append(cells)
    return _table(head, lines)


def _parts(rows: list[Row]) -> str:
    """Share of the step in each part, and what its floor would be of the same step; then what cannot be."""
    if not rows:
        return ""
    named = [part for part in rows[0]["parts"] if part != UNKNOWN]
    shown = [
        [f"{row['parts'][part]['share']:.0%} ({row['parts'][part]['floor']:.0%})" for part in named] for row in rows
    ]
    table = _table(["share of the step (floor)", *named], [[r["name"], *c] for r, c in zip(rows, shown, strict=True)])
    return "\n\n".join([table, *(f"**{row['name']}: {doubt}.**" for row in rows for doubt in doubts(row))])


def doubts(row: Row) -> list[str]:
    """What shows that the instrument erred: in its attribution, or in the limits that the floors rest on."""
    parts, found = row["parts"], []
    for part, of in parts.items():
        if of["share"] < (1 - BELOW) * of["floor"]:
            found.append(f"{part} has {of['share']:.0%} of the step, below its floor of {of['floor']:.0%}")
    if (unknown := parts.get(UNKNOWN, {"share": 0.0})["share"]) > 0.01:
        found.append(f"{unknown:.0%} of the step ran under names that the program does not have")
    if (idle := parts["idle"]["share"]) < -0.01 or idle > IDLE:
        found.append(f"{idle:.0%} of the step is in no instruction that the trace names")
    traced = sum(row["parts_s"].values()) / row["median_s"] - 1
    if abs(traced) > AWAY:
        found.append(f"the traced step took {traced:+.0%} of the measured one's time")
    return [f"not to be trusted: {doubt}" for doubt in found]


def _options(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for tried in row.get("options", ())[1:]:
            gain = f"{tried['gain']:+.1%}" if "gain" in tried else f"{tried['status']}: {tried.get('reason', '')}"
            lines.append([row["name"], f"`{tried['option']}`", gain])
        if drift := row.get("options", [{}])[0].get("drift"):
            lines.append([row["name"], "the same again", f"{drift:+.1%}"])
    return _table(["config", "compiler option", "tokens/s"], lines) if lines else ""


def _table(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]
    shown = [head, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in shown)


def _ratio(rounds: list[float]) -> str:
    """The median, and the span of several rounds."""
    if not rounds:
        return "-"
    span = f" ({min(rounds):.2f}-{max(rounds):.2f})" if len(rounds) > 1 else ""
    return f"{median(rounds):.2f}{span}"
