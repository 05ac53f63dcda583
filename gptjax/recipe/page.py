"""The page of a recipe: what each stage made better, the same questions answered by each, and all curves; report.html,
which needs nothing else."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from gptjax.evaluate.page import STYLE
from gptjax.files import read_json, write_whole
from gptjax.recipe.compare import REPLIES
from gptjax.recipe.steps import EVALUATION, Recipe, writes_files
from gptjax.train.metrics import LOG, read_log
from gptjax.train.report import report
from gptjax.train.sinks import Record

PAGE = "report.html"
SHOWN = 8  # questions
POLICY = {  # figures of a policy's iterations, and what they are called
    "score": "score by the reward model",
    "gold": "what it stands for",
    "kl": "KL to the reference, nats a reply",
    "entropy": "entropy, nats a token",
    "length": "length, tokens",
}
MORE = """
.replies td, .replies th { text-align: left; white-space: normal; min-width: 13rem }
.worth { color: var(--soft); font-size: .82rem; display: block } .bad { color: #b3261e }
@media (prefers-color-scheme: dark) { .bad { color: #ff8a80 } img { filter: invert(.9) hue-rotate(180deg) } }
img { max-width: 100% }
"""


def write(recipe: Recipe, root: Path) -> Path:
    """Write the page, and those of the runs that it points to; returns it."""
    runs = [step.__name__ for step in recipe.steps if not writes_files(step)]
    logs = {name: read_log(root / name / LOG) for name in runs}
    for name in runs:
        report(str(root / name))
    write_whole(root / PAGE, _page(recipe, root, logs).encode("utf-8", "replace"))
    return root / PAGE


def _page(recipe: Recipe, root: Path, logs: dict[str, list[Record]]) -> str:
    folder = root / EVALUATION
    found = read_json(folder / REPLIES, f"remove {folder}, and it is made again")
    policies = {name: rows for name, log in logs.items() if "kl" in (rows := _of(log, "train"))[-1]}
    others = {name: log for name, log in logs.items() if name not in policies}
    pictures = [_image("loss of each stage over its tokens", _losses(others))]
    if policies:
        pictures += [
            _image("score, KL, entropy and length of each policy over its iterations", _iterations(policies)),
            "<h2>How far a reward model can be trusted</h2><p>What a policy scores, and what the score stands for "
            "where that can be computed, the further it is from the model that it began as.</p>",
            _image("score and gold over the KL", _overoptimisation(policies)),
        ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{_text(recipe.name)}</title><style>{STYLE}{MORE}</style></head><body>
<h1>{_text(recipe.name)}</h1>
<h2>What each stage made better</h2>
<div class="wide">{_worth(found)}</div>
<h2>The same questions</h2>
<p class="soft">Drawn at temperature 1, the first of {_count(found)} replies to each question. Chosen by nobody: these
questions stand evenly among all {len(found["questions"])}.</p>
<div class="wide">{_replies(found)}</div>
<h2>Curves</h2>
{"".join(pictures)}
<h2>Stages</h2>
<div class="wide">{_stages(logs)}</div>
</body></html>
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _of(log: list[Record], kind: str) -> list[Record]:
    return [record for record in log if record["kind"] == kind]


def _count(found: dict[str, Any]) -> int:
    return len(next(iter(found["models"].values()))["replies"][0])


def _worth(found: dict[str, Any]) -> str:
    """A row for each model: what its replies are worth by each judge, and how often it wins over the one before."""
    names = {"gold": "gold", "reward": "reward model"}
    judges = found["judges"]
    head = "".join(f"<th>{names[by]}</th><th>wins by {names[by]}</th>" for by in judges)
    wins = {(each["of"], each["by"]): each for each in found["wins"]}
    rows = []
    for name, model in found["models"].items():
        cells = ""
        for by in judges:
            cells += f"<td>{_figure(model['mean'][by], '.3f')}</td>"
            won = wins.get((name, by))
            cells += f"<td>{_figure(won, '.1%')}<small>over {_text(won['over'])}</small></td>" if won else "<td></td>"
        rows.append(f"<tr><th>{_text(name)}</th>{cells}</tr>")
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _figure(figure: dict[str, Any], form: str) -> str:
    between = "" if figure["low"] is None else f"{figure['low']:{form}} to {figure['high']:{form}}"
    return f"{figure['value']:{form}}<small>{between}</small>"


def _replies(found: dict[str, Any]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in found["models"])
    rows = []
    step = max(1, len(found["questions"]) // SHOWN)
    for i in range(0, len(found["questions"]), step)[:SHOWN]:
        asked = "<br>".join(_text(text) for _, text in found["questions"][i])
        cells = "".join(f"<td>{_reply(model, i, found['judges'])}</td>" for model in found["models"].values())
        rows.append(f"<tr><th>{asked}</th>{cells}</tr>")
    return f'<table class="replies"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _reply(model: dict[str, Any], i: int, judges: list[str]) -> str:
    worth = ", ".join(f"{by} {model[by][i][0]:.2f}" for by in judges)
    bad = " bad" * ("gold" in judges and model["gold"][i][0] == 0)
    return f'{_text(model["replies"][i][0]) or "<i>nothing</i>"}<span class="worth{bad}">{worth}</span>'


def _stages(logs: dict[str, list[Record]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("steps", "tokens", "seconds", "training loss", "evaluation"))
    rows = []
    for name, log in logs.items():
        last, evals = _of(log, "train")[-1], _of(log, "eval")
        cells = [f"{last['step']:,}", f"{last['tokens']:,}", f"{last['seconds']:,.0f}", _number(last["loss"])]
        cells.append(_number(evals[-1]["loss"]) if evals else "")
        link = f'<a href="{_text(name)}/report.html">{_text(name)}</a>'
        rows.append(f"<tr><th>{link}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _image(alt: str, figure: Any) -> str:
    kept = io.BytesIO()
    figure.savefig(kept, dpi=110)
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(kept.getvalue()).decode()}">'


def _axes(count: int, width: float, height: float, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in every[count:]:
        axes.set_visible(False)
    return figure, list(every[:count])


def _losses(logs: dict[str, list[Record]]) -> Any:
    figure, every = _axes(len(logs), 3.6, 2.8, min(3, len(logs)))
    for axes, (name, log) in zip(every, logs.items(), strict=True):
        train, evals = _of(log, "train"), _of(log, "eval")
        axes.plot(*_curve(train, "tokens", "loss"), color="0.6", lw=1.2, label="training")
        axes.plot(*_curve(evals, "tokens", "loss"), "o-", ms=3, label="evaluation")
        axes.set(xlabel="tokens", ylabel="loss, nats")
        axes.set_title(name, parse_math=False)
        axes.legend(frameon=False)
    return figure


def _iterations(policies: dict[str, list[Record]]) -> Any:
    names = [name for name in POLICY if any(name in rows[-1] for rows in policies.values())]
    figure, every = _axes(len(names), 3.6, 2.8, 3)
    for axes, name in zip(every, names, strict=True):
        for policy, rows in policies.items():
            axes.plot(*_curve(rows, "step", name), lw=1.4, label=policy)
        axes.set(xlabel="iteration", ylabel=POLICY[name])
        axes.legend(frameon=False)
    return figure


def _overoptimisation(policies: dict[str, list[Record]]) -> Any:
    figure, every = _axes(2, 4.6, 3.4, 2)
    for axes, name in zip(every, ("score", "gold"), strict=True):
        for policy, rows in policies.items():
            axes.plot(*_curve(rows, "kl", name), "o-", ms=2.5, lw=0.8, label=policy)
        axes.set(xlabel=POLICY["kl"], ylabel=POLICY[name])
        axes.legend(frameon=False)
    return figure


def _curve(rows: list[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    there = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    return [row[x] for row in there], [row[y] for row in there]
