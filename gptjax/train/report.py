"""A run's curves from its log alone: loss and throughput as PNG, and one HTML page around them."""

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

from gptjax import bucket
from gptjax.errors import UserError
from gptjax.train import goodput
from gptjax.train.falls import EVENTS, interruptions
from gptjax.train.metrics import LOG, read_log
from gptjax.train.run import CONFIG, META
from gptjax.train.sinks import Record

SHOWN_SAMPLES = 3
PLACE = ("kind", "step", "time", "tokens", "seconds", "took", "cost")  # what every record of a step has
COST = "what went before"
STARTED = ("time", "step", "command", "devices", "versions")  # what is shown of every start


def report(folder: str) -> str:
    """Write RUN/report.png and RUN/report.html; returns what was written. Raises UserError without a log."""
    run = bucket.opened(folder)
    if not (run / LOG).is_file():
        raise UserError(f"{folder}: no {LOG} in it, so it is not a run folder; name one below runs/")
    records = read_log(run / LOG)
    if not _of(records, "train"):
        raise UserError(f"{folder}/{LOG}: no training record yet; train past train.log_interval steps")
    evals, pictures = _of(records, "eval"), {"report.png": "loss and throughput over tokens"}
    _plot(run.name, _of(records, "train"), evals, run / "report.png")
    if evals and "calibration" in evals[-1]:
        _plot_calibration(evals[-1]["calibration"], run / "calibration.png")
        pictures["calibration.png"] = "calibration"
    (run / "report.html").write_text(_page(run, records, pictures), encoding="utf-8", errors="replace")
    bucket.send(run)
    return "\n".join(str(bucket.home(run) / name) for name in (*pictures, "report.html"))


def _of(records: list[Record], kind: str) -> list[Record]:
    """The records of a kind, the last of each step: what was done once more stands for what it was before."""
    return list({r["step"]: r for r in records if r["kind"] == kind}.values())


def _plot(title: str, train: list[Record], evals: list[Record], out: Path) -> None:
    from matplotlib.figure import Figure

    tokens = [r["tokens"] for r in train]
    figure = Figure(figsize=(10, 7), layout="constrained")
    loss, speed = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    loss.plot(tokens, _numbers(train, "loss"), ".-", color="0.6", lw=1.2, ms=2, label="training loss")
    if evals:
        others = [name for name in evals[-1] if name.endswith("_loss") or name.startswith("loss_")]  # in nats, too
        labels = {"loss": f"evaluation loss: {_figures(evals[-1], most=2)} at the end"}
        for name in ("loss", *others):
            label = labels.get(name, f"evaluation, {name.replace('_', ' ')}")
            loss.plot([r["tokens"] for r in evals], _numbers(evals, name), "o-", label=label)
    loss.set(ylabel="loss (nats per pair)" if evals and "calibration" in evals[-1] else "loss (nats per token)")
    loss.set_title(title, parse_math=False)  # a dollar in a run's name is a dollar
    loss.legend(frameon=False)
    speed.plot(tokens, _numbers(train, "tokens_per_s"), ".-", color="C2", lw=1.2, ms=2)
    speed.set(xlabel="tokens", ylabel="tokens per second", ylim=(0, None))
    for axes in (loss, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(out, dpi=120)


def _plot_calibration(bins: list[list[float]], out: Path) -> None:
    """Of a reward model's last evaluation: [predicted, observed, pairs] of each bin, the pairs as the point's area."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], "--", color="0.6", lw=1, label="calibrated")
    predicted, observed, pairs = zip(*bins, strict=True)
    axes.plot(predicted, observed, "-", color="C0", lw=1)
    axes.scatter(predicted, observed, s=[8 + 200 * count / sum(pairs) for count in pairs], color="C0", label="pairs")
    axes.set(xlabel="predicted that the reply with the higher score is better", ylabel="observed", ylim=(0, 1.02))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(out, dpi=120)


def _numbers(records: list[Record], name: str) -> list[float]:
    """One figure of each record; what the log has as null, or has not, leaves a gap in the curve."""
    return [math.nan if (value := r.get(name)) is None else value for r in records]


def _figures(record: Record, most: int | None = None) -> str:
    """An evaluation, or so many figures of it, in words: 2.8712 nats, 3.1021 bits per byte."""
    figures = {name: value for name, value in record.items() if name not in PLACE and not isinstance(value, list)}
    words = {"loss": "nats"}
    return ", ".join(
        f"{_shown(v, '.4f')} {words.get(name, name.replace('_', ' '))}" for name, v in [*figures.items()][:most]
    )


def _shown(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _meta(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or cut short; copy it from where the run was made") from error


def _rows(names: tuple[str, ...], records: list[Record]) -> str:
    """A table of some values of records, and what went before them."""
    shown = [r | {COST: goodput.cost_in_words(r)} for r in records]
    lines = ["".join(f"<td>{html.escape(str(r.get(name, '')))}</td>" for name in names) for r in shown]
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    return "\n".join(["<table>", *(f"<tr>{line}</tr>" for line in (head, *lines)), "</table>"])


def _page(run: Path, records: list[Record], pictures: dict[str, str]) -> str:
    """`pictures`: what is on each, by file name."""
    last, evals, samples = _of(records, "train")[-1], _of(records, "eval"), _of(records, "sample")[-SHOWN_SAMPLES:]
    starts = [r for r in records if r["kind"] == "start"]
    rows = {
        "step": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "training loss": _shown(last["loss"], ".4f"),
        "evaluation": _figures(evals[-1]) if evals else "none",
        "tokens per second": f"{last['tokens_per_s']:,.0f}",
        "mfu": f"{last['mfu']:.1%}" if last["mfu"] else "not known for this device",
        "skipped steps": f"{last['skipped']}",
        "training time": f"{last['seconds']:,.0f} s in {len(starts)} start{'s' if len(starts) > 1 else ''}",
        "time, over all starts": goodput.in_words(records),
    }
    latest = starts[-1] if starts else {}
    rows |= {name: str(text) for name, text in latest.items() if name not in (*PLACE, *STARTED, "mfu")}
    meta = _meta(run / META)
    rows["commit"] = meta["commit"] + (" (modified)" if meta["modified"] else "")
    rows["versions"] = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    table = "\n".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    begun = _rows((*STARTED, COST), starts)
    back = [r | {"from": r["end"], "to": r["step"]} for r in records if r["kind"] == "rollback"]
    gone_back = _rows(("time", "from", "to", "reason", COST), back)
    events = read_log(run / EVENTS) if (run / EVENTS).is_file() else []
    falls = interruptions(events)
    fallen = _rows(("time", "step", "what", "seconds_lost", "steps_lost"), falls)
    texts = "\n".join(f"<h3>step {s['step']:,}</h3>\n<pre>{html.escape(s['text'])}</pre>" for s in samples)
    images = "\n".join(
        f'<img alt="{alt}" src="data:image/png;base64,{_base64(run / name)}">' for name, alt in pictures.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(run.name)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100% }}
th, td {{ text-align: left; padding-right: 1.5rem; vertical-align: top }}
td {{ white-space: pre-line }} th {{ font-weight: 600 }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 14px }}
</style></head><body>
<h1>{html.escape(run.name)}</h1>
{images}
<table>{table}</table>
<h2>Starts</h2>
{begun}
{f"<h2>Falls</h2>{fallen}" if falls else ""}
{f"<h2>Rollbacks</h2>{gone_back}" if back else ""}
{f"<h2>Samples</h2>{texts}" if samples else ""}
<h2>Config</h2><pre>{html.escape((run / CONFIG).read_text(encoding="utf-8"))}</pre>
</body></html>
"""
