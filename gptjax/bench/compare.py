"""A layouts result beside an earlier one of the same work on the same devices."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.errors import UserError

SLOWER = 1.05  # a median beyond this, and beyond the earlier spread, is no noise


class Earlier(NamedTuple):
    """A result and where it was read."""

    path: Path
    result: dict[str, Any]


class Change(NamedTuple):
    """One setting of both results."""

    name: str
    text: str
    """What became of it, in a few words."""
    worse: bool


def open_result(path: Path) -> Earlier:
    """A file that `bench layouts` wrote. Raises UserError for any other."""
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--compare {path}: {error.strerror}; name a layouts.json of an earlier run") from error
    except ValueError:
        result = None
    if not isinstance(result, dict) or result.get("benchmark") != "layouts":
        raise UserError(
            f"--compare {path}: not a result of gptjax bench layouts; name a layouts.json of an earlier run"
        )
    return Earlier(path, result)


def require_same(earlier: Earlier, facts: dict[str, Any], config: dict[str, Any]) -> None:
    """Raises UserError unless the earlier result is of these devices and of the same work a step."""
    old = earlier.result
    pairs = [(name, old[name], facts[name]) for name in ("device", "platform", "count", "dtype")]
    pairs += _work(old["config"], config)
    for name, before, now in pairs:
        if before != now:
            raise UserError(
                f"--compare {earlier.path}: its {name} is {before}, here it is {now}; compare runs of the same devices "
                "and config"
            )


def _work(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(field, its value in both) of all that a step's time hangs on. The files' lists are the config's tuples."""
    old, new = json.loads(json.dumps([old, new]))
    for name in sorted(old["model"].keys() | new["model"].keys()):
        yield f"model.{name}", old["model"].get(name), new["model"].get(name)
    for name in ("batch_size", "micro_batch_size"):
        yield f"train.{name}", old["train"][name], new["train"][name]


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every setting that was measured in either, by name; slower is worse, and so is not running any more."""
    before = {row["name"]: row for row in old["rows"] if row["status"] == "ok"}
    after = {row["name"]: row for row in new["rows"]}
    found = []
    for name, row in after.items():
        if name in before:
            found.append(_change(before[name], row, machine(old, new)))
        elif row["status"] == "ok":
            found.append(Change(name, "new: no figure in the earlier result", False))
    return found + [Change(name, "not measured this time", False) for name in before if name not in after]


def machine(old: dict[str, Any], new: dict[str, Any]) -> float:
    """How much longer the devices themselves take now, by their matrix products and copies: the middle of the two."""
    before, now = (result["calibration"]["measured_limits"] for result in (old, new))
    return math.sqrt(math.prod(before[name] / now[name] for name in ("flops", "bytes")))


def _change(old: dict[str, Any], new: dict[str, Any], slower: float) -> Change:
    """`slower`: how much longer the devices themselves take."""
    name = new["name"]
    if new["status"] != "ok":
        return Change(name, f"was measured, now {new['status']}", True)
    ratio = new["median_s"] / old["median_s"]
    text = f"{ratio / slower:.2f}x the time ({1e3 * old['median_s']:.4g} -> {1e3 * new['median_s']:.4g} ms)"
    return Change(name, text, ratio / slower > SLOWER and new["median_s"] / slower > old["p90_s"])
