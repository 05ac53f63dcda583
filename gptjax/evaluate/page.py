"""Results side by side: one HTML page that needs nothing else, a column for each model and a row for each figure."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.evaluate.figures import Figure
from gptjax.evaluate.results import Result
from gptjax.files import write_whole

PAGE = "index.html"
NAMES = {
    "loss": "loss, nats per token",
    "bits_per_byte": "bits per byte",
    "acc": "accuracy",
    "macro_precision": "precision, macro",
    "macro_recall": "recall, macro",
    "macro_f1": "F1, macro",
}
OF_TOKENS = ("loss", "perplexity", "accuracy")  # compare only where tokens are the same
PARTS = {"f1": "F1", "count": "questions"}
STYLE = """
:root { color-scheme: light dark; --line: #d8d8d8; --soft: #6a6a6a; --best: #0a6b3d; --back: #fff; --text: #1c1c1c }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a3a3a; --soft: #a0a0a0; --best: #5fd39a; --back: #161616; --text: #e8e8e8 } }
body { font: 16px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 72rem;
  background: var(--back); color: var(--text) }
h1 { font-size: 1.4rem } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem 1.2rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } tbody th { font-weight: 400; white-space: nowrap }
td, thead th + th { text-align: right; white-space: nowrap }
.part th { font-weight: 600; padding-top: 1.4rem; white-space: normal }
small, .soft { color: var(--soft); font-size: .82rem; font-weight: 400 } small { display: block }
.best { color: var(--best); font-weight: 600 }
details { margin: 1rem 0 } summary { cursor: pointer }
"""


def write(out: Path, results: Sequence[Result]) -> Path:
    """Write the page of some results into a folder; returns it."""
    write_whole(out / PAGE, page(results).encode("utf-8", "replace"))
    return out / PAGE


def page(results: Sequence[Result]) -> str:
    """The page as text."""
    keys = list(dict.fromkeys(key for result in results for key in result.measures))
    sizes = {result.model["vocab_size"] for result in results}
    heads = "".join(f"<th>{_text(result.name)}{_size(result.model)}</th>" for result in results)
    body = "\n".join(part for key in keys for part in _rows(key, results, len(sizes) == 1))
    tables = "\n".join(_classes(key, result) for key in keys for result in results if key in result.measures)
    warning = "; these models have different ones" if len(sizes) > 1 else ""
    paths = "".join(f"<li>{_text(result.name)}: {_text(result.model['path'])}</li>" for result in results)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Evaluation of {len(results)} model{"s" * (len(results) != 1)}</title><style>{STYLE}</style></head><body>
<h1>Evaluation</h1>
<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead><tbody>
{body}
</tbody></table></div>
<p class="soft">Below each value its 95% interval; green is the best of a row. Loss, perplexity and accuracy of a text
compare models with one tokenizer{warning}. Bits per byte compare any.</p>
{tables}
<ul class="soft">{paths}</ul>
</body></html>
"""


def _rows(key: str, results: Sequence[Result], one_tokenizer: bool) -> list[str]:
    """The heading of a text or a task, and a row for each of its figures."""
    mine = [result.measures.get(key) for result in results]
    first = next(measure for measure in mine if measure)
    names = list(dict.fromkeys(name for measure in mine if measure for name in measure.figures))
    note = _about(first.about)
    made = [f'<tr class="part"><th colspan="{len(results) + 1}">{_text(key)}<small>{_text(note)}</small></th></tr>']
    for name in names:
        row = [measure.figures.get(name) if measure else None for measure in mine]
        comparable = one_tokenizer or name not in OF_TOKENS
        best = _best([figure for figure in row if figure]) if comparable else None
        cells = "".join(_cell(figure, figure is not None and figure.value == best) for figure in row)
        arrow = {"lower": " ↓", "higher": " ↑"}.get(next(figure for figure in row if figure).better, "")
        made.append(f"<tr><th>{_text(NAMES.get(name, name.replace('_', ' ')))}{arrow}</th>{cells}</tr>")
    return made


def _best(figures: Sequence[Figure]) -> float | None:
    """The value to point out; None where nothing is compared or all are equal."""
    values = [figure.value for figure in figures if math.isfinite(figure.value)]
    if len(set(values)) < 2 or not figures[0].better:
        return None
    return min(values) if figures[0].better == "lower" else max(values)


def _cell(figure: Figure | None, best: bool) -> str:
    if figure is None:
        return '<td class="soft">not measured</td>'
    ends = None if figure.low is None or figure.high is None else (figure.low, figure.high)
    interval = f"<small>{number(ends[0])} – {number(ends[1])}</small>" if ends else "<small>no interval</small>"
    mark = ' class="best"' if best else ""
    return f"<td{mark}>{number(figure.value)}{interval}</td>"


def number(value: float) -> str:
    """Four figures, and never an exponent where a number can be read."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.{max(0, min(4, 3 - math.floor(math.log10(abs(value)))))}f}" if value else "0"


def _about(values: dict[str, Any]) -> str:
    """What was measured, in words."""
    shown = {name: value for name, value in values.items() if name in ("documents", "questions", "shots")}
    counts = [f"{value:,} {name}" for name, value in shown.items()]
    stride = [f"stride {values['stride']:,}"] if "stride" in values else []
    return ", ".join([*counts, *stride, f"interval: {values['interval']}"])


def _classes(key: str, result: Result) -> str:
    """Precision, recall and F1 of each class; empty where there is none."""
    classes = result.measures[key].classes
    if not classes:
        return ""
    columns = list(next(iter(classes["rows"].values())))
    heads = "".join(f"<th>{PARTS.get(name, name)}</th>" for name in columns)
    rows = "".join(
        f"<tr><th>{_text(name)}</th>" + "".join(f"<td>{number(row[column])}</td>" for column in columns) + "</tr>"
        for name, row in classes["rows"].items()
    )
    return f"""<details><summary>{_text(key)}, by class: {_text(result.name)}</summary>
<p class="soft">A class is {_text(classes["what"])}.</p>
<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></details>"""


def _size(model: dict[str, Any]) -> str:
    count = model["parameters"]
    parameters = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,}"
    facts = f"{parameters} parameters, {model['dtype']}", f"context {model['context']:,}, {model['vocab_size']:,} ids"
    return "".join(f"<small>{_text(fact)}</small>" for fact in facts)


def _text(value: object) -> str:
    return html.escape(str(value))
