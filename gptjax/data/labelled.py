"""Texts with labels in records, in the forms in which they are published: one or two, and what is told of them.

A data set keeps each as one document of one record, which is JSON without blanks between: the texts and the label as
text, [["It rains","It is wet"],"0"]; a row that was dropped is the reason, "label is null, neither text nor a number".
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.data.dialogues import Invalid, filled, kept
from gptjax.data.formats import kind
from gptjax.data.pairs import columns_in, values_in

LABEL = "label"
FORMS = (  # two texts before one, which may have the name of the second
    ("sentence1", "sentence2", LABEL),
    ("premise", "hypothesis", LABEL),
    ("question1", "question2", LABEL),
    ("question", "sentence", LABEL),
    ("text", LABEL),
    ("sentence", LABEL),
)


@dataclass(frozen=True)
class Told:
    """One text or two, and what is told of them."""

    texts: list[str]
    label: str
    """As text whatever the record has: 1 is "1", 3.5 is "3.5", true is "true" as in JSON."""


@dataclass(frozen=True)
class Labelled:
    """The texts and the label of a record, or why it was dropped; `formats.Extract` for `LabelledConfig`."""

    fields: tuple[str, ...]
    """As `LabelledConfig.fields`."""
    invalid: str
    """As `LabelledConfig.invalid`."""

    def columns(self, names: Sequence[str], where: object) -> list[str]:
        return columns_in(self.fields, names, FORMS, where)

    def document(self, row: Any, where: object) -> str:
        def made() -> list[Any]:
            *texts, (name, value) = values_in(self.fields, row, FORMS)
            return [[filled(text, name) for name, text in texts], _label(value, name)]

        return kept(made, self.invalid, where)


def parse(text: str) -> Told:
    """What a record holds that `Labelled` wrote and did not drop."""
    return Told(*json.loads(text))


def _label(value: Any, name: str) -> str:
    """Raises Invalid, and UnicodeDecodeError."""
    if isinstance(value, str | bytes):
        return filled(value, name)
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer):
        return str(int(value))
    if not isinstance(value, float | np.floating):
        raise Invalid(f"{name} is {kind(value)}, neither text nor a number")
    if not math.isfinite(value):
        raise Invalid(f"{name} is {value}, not a finite number")
    return str(value)
