"""A run's curves from its log alone: loss and throughput as PNG, and one HTML page around them."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.train.metrics import read_log
from gptjax.train.run import CONFIG, LOG, META

SHOWN_SAMPLES = 3


def report(folder: str) -> str:
    """Write RUN/report.png and RUN/report.html; returns what was written. Raises UserError without a log."""
    run = Path(folder)
    if not (run / LOG).is_file():
        raise UserError(f"{folder}: no {LOG} in it, so it is not a run folder; name one below runs/")
    records = read_log(run / LOG)
    train = [r for r in records if r["kind"] == "train"]
    if not train:
        raise UserError(f"{run / LOG}: no training record yet; train past train.log_interval steps")
    _plot(run.name, train, [r for r in records if r["kind"] == "eval"], run / "report.png")
    (run / "report.html").write_text(_page(run, records))
    return f"{run / 'report.png'}\n{run / 'report.html'}"


def _plot(title: str, train: list[dict[str, Any]], evals: list[dict[str, Any]], out: Path) -> None:
    from matplotlib.figure import Figure

    tokens = [r["tokens"] for r in train]
    at = {r["step"]: r["tokens"] for r in train}
    evals = [r for r in evals if r["step"] in at]
    figure = Figure(figsize=(10, 7), layout="constrained")
    loss, speed = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    loss.plot(tokens, [r["loss"] for r in train], color="0.6", lw=1.2, label="training loss")
    if evals:
        last = f"{evals[-1]['loss']:.3f} nats, {evals[-1]['bits_per_byte']:.3f} bits per byte at the end"
        loss.plot([at[r["step"]] for r in evals], [r["loss"] for r in evals], "o-", label=f"evaluation loss: {last}")
    loss.set(ylabel="loss (nats per token)", title=title)
    loss.legend(frameon=False)
    speed.plot(tokens, [r["tokens_per_s"] for r in train], color="C2", lw=1.2)
    speed.set(xlabel="tokens", ylabel="tokens per second", ylim=(0, None))
    for axes in (loss, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(out, dpi=120)


def _page(run: Path, records: list[dict[str, Any]]) -> str:
    last = [r for r in records if r["kind"] == "train"][-1]
    evals = [r for r in records if r["kind"] == "eval"]
    samples = [r for r in records if r["kind"] == "sample"][-SHOWN_SAMPLES:]
    start = next((r for r in records if r["kind"] == "start"), {})
    rows = {
        "step": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "training loss": f"{last['loss']:.4f}",
        "evaluation": f"{evals[-1]['loss']:.4f} nats, {evals[-1]['bits_per_byte']:.4f} bits per byte"
        if evals
        else "none",
        "tokens per second": f"{last['tokens_per_s']:,.0f}",
        "mfu": f"{last['mfu']:.1%}" if last["mfu"] else "not known for this device",
        "skipped steps": f"{last['skipped']}",
        "training time": f"{last['seconds']:,.0f} s",
    } | {name: text for name, text in start.items() if name not in ("kind", "step", "mfu")}
    meta = json.loads((run / META).read_text())
    rows["commit"] = meta["commit"] + (" (modified)" if meta["modified"] else "")
    rows["versions"] = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    table = "\n".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    texts = "\n".join(f"<h3>step {s['step']:,}</h3>\n<pre>{html.escape(s['text'])}</pre>" for s in samples)
    picture = base64.b64encode((run / "report.png").read_bytes()).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(run.name)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100% }} th {{ text-align: left; padding-right: 2rem; font-weight: 600; vertical-align: top }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 14px }}
</style></head><body>
<h1>{html.escape(run.name)}</h1>
<img alt="loss and throughput over tokens" src="data:image/png;base64,{picture}">
<table>{table}</table>
{f"<h2>Samples</h2>{texts}" if samples else ""}
<h2>Config</h2><pre>{html.escape((run / CONFIG).read_text())}</pre>
</body></html>
"""
