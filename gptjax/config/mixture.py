"""Sources with weights, as `data.source` and `data.later_weights` spell them."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from gptjax.errors import UserError

PRESET = "gpt3:"
GPT3 = {"common_crawl": 60.0, "webtext2": 22.0, "books1": 8.0, "books2": 8.0, "wikipedia": 3.0}
"""Shares of the tokens of training in percent, as rounded there (arXiv 2005.14165, Table 2.2); folders of gpt3:DIR."""
WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Weighted:
    """A source, and its share of the tokens as a weight beside the others'."""

    source: str
    weight: float

    def __str__(self) -> str:
        return f"{self.source}:{self.weight:g}"


def weighted(source: str) -> tuple[Weighted, ...]:
    """The parts of a mixture; none for a source without weights. Raises UserError for one that is no mixture."""
    if source.startswith(PRESET):
        root = source.removeprefix(PRESET)
        return tuple(Weighted(f"{root}/{name}", weight) for name, weight in GPT3.items())
    if Path(source).expanduser().exists():
        return ()
    names = [part.strip() for part in source.split(",") if part.strip()]
    found = [None if Path(name).expanduser().exists() else WEIGHTED.fullmatch(name) for name in names]
    if not any(found):
        return ()
    parts = []
    for name, match in zip(names, found, strict=True):
        if not match:
            raise UserError(
                f"data.source = {source}: {name} has no weight, others have; write {name}:1, or none at all"
            )
        parts.append(Weighted(match[1], float(match[2])))
    _usable(f"data.source = {source}", [part.weight for part in parts])
    if twice := next((part.source for part in parts if [p.source for p in parts].count(part.source) > 1), ""):
        raise UserError(f"data.source = {source}: {twice} is named twice; add up its weights")
    return tuple(parts)


def later_weights(text: str, count: int) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """What `data.later_weights` says of so many sources: from a number of tokens on, their weights.

    Raises UserError for anything else.
    """
    periods: list[tuple[int, tuple[float, ...]]] = []
    field = f"data.later_weights = {text}"
    for part in filter(None, map(str.strip, text.split(";"))):
        tokens, _, rest = part.partition(":")
        try:
            start, weights = float(tokens.replace("_", "")), tuple(map(float, rest.split(",")))
        except ValueError:
            raise UserError(f"{field}: write TOKENS:WEIGHT,WEIGHT,... such as 1e9:0.2,0.8, with ; between") from None
        if not math.isfinite(start) or start != int(start) or start <= (periods[-1][0] if periods else 0):
            raise UserError(f"{field}: {tokens} must be a number of tokens, above 0 and those before it")
        if len(weights) != count:
            named = "data.source has no weights" if not count else f"{count} sources need as many"
            raise UserError(f"{field}: {len(weights)} weight(s) from token {tokens} on; {named}")
        _usable(field, weights)
        periods.append((int(start), weights))
    return tuple(periods)


def _usable(field: str, weights: list[float] | tuple[float, ...]) -> None:
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights):
        raise UserError(f"{field}: weights must be 0 or more, and one of them more; such as 0.6 and 0.4")
