"""What a build made, as a person reads it: lines of a terminal, a picture, one page."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.corpus.stats import Origin
from gptjax.files import write_whole

PAGE, PICTURE = "stats.html", "stats.png"
BINS = [2.0**k for k in range(5, 25)]  # bytes
KEPT, SERIES = "#3ca951", ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")
STYLE = """
:root { color-scheme: light dark; --line: #d8d8d8; --soft: #6a6a6a; --back: #fff; --text: #1c1c1c }
@media (prefers-color-scheme: dark) { :root { --line: #3a3a3a; --soft: #a0a0a0; --back: #161616; --text: #e8e8e8 } }
body { font: 16px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 72rem;
  background: var(--back); color: var(--text) }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } .soft { color: var(--soft); font-size: .85rem }
img { max-width: 100%; background: #fff } summary { cursor: pointer }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
"""


def summary(manifest: Mapping[str, Any]) -> str:
    """By origin what was read and kept, and what was dropped by reason."""
    lines = []
    for name, about in manifest["origins"].items():
        read, kept = about["read"], about["kept"]
        share = f" ({kept['bytes'] / read['bytes']:.1%} of the text)" if read.get("bytes") else ""
        lines.append(f"{name:20} read {_count(read)}, kept {_count(kept)}{share}")
        lines += [f"  {count:>10,}  {size / 1e6:>9,.2f} MB  {reason}" for reason, count, size in _dropped(about)]
        lines += [f"  {count:>10,}  {'':>12}  replaced: {kind}" for kind, count in about["replaced"].items()]
    return "\n".join([*lines, f"digest {manifest['digest']}"])


def _count(about: Mapping[str, int]) -> str:
    return f"{about.get('documents', 0):,} documents, {about.get('bytes', 0) / 1e6:,.2f} MB"


def _dropped(about: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Reason, documents and bytes, the commonest first."""
    every = [(reason, each["documents"], each["bytes"]) for reason, each in about["dropped"].items()]
    return sorted(every, key=lambda row: -row[1])


HEADS = ("origin", "documents", "MB", "share", "median", "longest", "bytes a token", "tokens")


def rows(found: Mapping[str, Origin]) -> list[list[str]]:
    """The cells of a table with HEADS, a row an origin; lengths in bytes."""
    total = sum(each.num_bytes for each in found.values()) or 1
    made = []
    for name, each in found.items():
        lengths = each.lengths or [0]
        tokens = [f"{each.bytes_per_token:.2f}", f"{each.tokens:,.0f}"] if each.bytes_per_token else ["", ""]
        made.append([name, f"{each.documents:,}", f"{each.num_bytes / 1e6:,.2f}", f"{each.num_bytes / total:.1%}"])
        made[-1] += [f"{np.median(lengths):,.0f}", f"{max(lengths):,}", *tokens]
    return made


def table(found: Mapping[str, Origin]) -> str:
    every = [[*HEADS], *rows(found)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in every
    )


def write(out: Path, manifest: Mapping[str, Any], found: Mapping[str, Origin]) -> list[Path]:
    """The picture and the page."""
    picture = _picture(manifest, found)
    write_whole(out / PICTURE, picture)
    write_whole(out / PAGE, _page(manifest, found, picture).encode("utf-8", "replace"))
    return [out / PICTURE, out / PAGE]


def _picture(manifest: Mapping[str, Any], found: Mapping[str, Origin]) -> bytes:
    """Lengths of documents by origin, and what became of each origin's documents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2 + 0.35 * len(found)), layout="constrained")
    lengths, fates = figure.subplots(1, 2)
    for (name, each), colour in zip(found.items(), SERIES * len(found), strict=False):
        counts, _ = np.histogram(each.lengths, BINS)
        lengths.stairs(counts / max(counts.sum(), 1), BINS, label=name, color=colour, linewidth=1.8)
    lengths.set(xscale="log", xlabel="bytes of a document", ylabel="share of an origin's documents")
    lengths.legend(frameon=False, fontsize=8)
    _fates(fates, manifest)
    for axes in (lengths, fates):
        axes.spines[["top", "right"]].set_visible(False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()


def _fates(axes: Any, manifest: Mapping[str, Any]) -> None:
    """A bar an origin, from what is kept through the commonest reasons to the others."""
    origins = manifest["origins"]
    counts: dict[str, int] = {}
    for about in origins.values():
        for reason, count, _ in _dropped(about):
            counts[reason] = counts.get(reason, 0) + count
    named = sorted(counts, key=lambda reason: -counts[reason])[:6]
    colours = {"kept": KEPT} | dict(zip(named, SERIES, strict=False))
    if len(counts) > len(named):
        colours["other"] = "#bbbbbb"
    names = [*origins][::-1]
    left = np.zeros(len(names))
    for label, colour in colours.items():
        widths = np.array([_share(origins[name], label, named) for name in names])
        axes.barh(names, widths, left=left, color=colour, label=label)
        left += widths
    axes.set(xlabel="share of the documents that were read", xlim=(0, 1))
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)


def _share(about: Mapping[str, Any], label: str, named: Sequence[str]) -> float:
    total = about["read"].get("documents", 0) or 1
    if label == "kept":
        return float(about["kept"]["documents"] / total)
    return sum(n for reason, n, _ in _dropped(about) if (reason if reason in named else "other") == label) / total


def _page(manifest: Mapping[str, Any], found: Mapping[str, Origin], picture: bytes) -> str:
    recipe = manifest["recipe"]
    name, image = f"{recipe['name']} {recipe['version']}", base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{_text(name)}</title><style>{STYLE}</style></head><body>
<h1>{_text(name)}</h1>
<p class="soft">digest {_text(manifest["digest"])}</p>
<div class="wide">{_table(HEADS, rows(found))}</div>
<p class="soft">Lengths in bytes. Tokens are counted in a part of the documents.</p>
<p><img alt="Lengths of documents, and what became of those that were read" src="data:image/png;base64,{image}"></p>
{"".join(_origin(name, about) for name, about in manifest["origins"].items())}
</body></html>
"""


def _origin(name: str, about: Mapping[str, Any]) -> str:
    cells = [["kept", *_cells(about["kept"]["documents"], about["kept"]["bytes"], about)]]
    cells += [[reason, *_cells(count, size, about)] for reason, count, size in _dropped(about)]
    shown = "".join(
        f"<details><summary>{_text(reason)}: examples</summary>{''.join(f'<pre>{_text(text)}</pre>' for text in texts)}"
        "</details>"
        for reason, texts in about["examples"].items()
    )
    leaks = "".join(f"<li>{_text(leak['file'])}: {_text(leak['words'])}</li>" for leak in about["leaks"])
    leaks = f"<details><summary>parts of evaluations</summary><ul>{leaks}</ul></details>" if leaks else ""
    heads = ("what became of them", "documents", "of those read", "MB")
    return f'<h2>{_text(name)}</h2><div class="wide">{_table(heads, cells)}</div>{shown}{leaks}'


def _cells(count: int, size: int, about: Mapping[str, Any]) -> list[str]:
    return [f"{count:,}", f"{count / (about['read'].get('documents', 0) or 1):.2%}", f"{size / 1e6:,.2f}"]


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: object) -> str:
    return html.escape(str(value))
