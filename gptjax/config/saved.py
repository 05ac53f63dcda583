"""A config as JSON, and what of it a run that goes on may change."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gptjax.config.check import validate
from gptjax.config.fields import OnResume, explain, walk
from gptjax.config.schema import Config
from gptjax.config.stages import STAGES
from gptjax.errors import UserError


def to_json(config: Config) -> str:
    return json.dumps({"stage": config.stage} | dataclasses.asdict(config), indent=2)


def from_json(text: str | bytes) -> Config:
    """The inverse of `to_json`; raises UserError where that is not JSON, or not this version's fields and values."""
    root: type[Config] = Config
    with suppress(ValueError):  # which is said below
        if isinstance(values := json.loads(text), dict) and "stage" in values:
            root, text = _stage(values.pop("stage")), json.dumps(values)
    try:
        return validate(TypeAdapter(root).validate_json(text))
    except ValidationError as error:
        raise UserError(f"saved config: {explain(error, root)}; it may be cut short, or of another version") from None


def _stage(name: Any) -> type[Config]:
    if not isinstance(name, str) or name not in STAGES:
        raise UserError(f"saved config: stage = {name}: choose from {', '.join(STAGES)}")
    return STAGES[name]


def get(config: Config, dotted: str) -> Any:
    """The value of a leaf field by its dotted name."""
    node: Any = config
    for part in dotted.split("."):
        node = getattr(node, part)
    return node


@dataclasses.dataclass(frozen=True)
class Change:
    """A field in which a run that goes on differs from the run that was saved."""

    name: str
    saved: Any
    given: Any
    allowed: OnResume | None

    def __str__(self) -> str:
        return f"{self.name}: the run has {self.saved!r}, given {self.given!r}"


def changes(saved: Config, given: Config) -> Iterator[Change]:
    """Every field in which two configs differ, with what a resume may do about it.

    A micro-batch changes rounding alone while the batches stay what they were and no dropout counts its rows.
    """
    dropout = given.model.dropout > 0
    for leaf in walk(type(given)):
        a, b = get(saved, leaf.name), get(given, leaf.name)
        pinned = leaf.name == "train.micro_batch_size" and dropout
        if a != b:
            yield Change(leaf.name, a, b, None if pinned else leaf.on_resume)
