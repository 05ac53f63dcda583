"""Pairs of texts in records, in the forms in which they are published: what is given, and what is to be written for it.

A data set keeps each as one document of one record, which is JSON without blanks between, ["Good day","Guten Tag"]; a
row that was dropped is the reason, "target is empty".
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.data.dialogues import Invalid, columns_of, filled, kept, no_form, reach, record
from gptjax.errors import UserError

FORMS = (
    ("source", "target"),
    ("document", "summary"),
    ("article", "highlights"),
    ("input", "output"),
    ("text", "summary"),
    ("prompt", "completion"),
)


@dataclass(frozen=True)
class Pair:
    """The pair of a record, or why it was dropped; `formats.Extract` for `PairConfig`."""

    fields: tuple[str, ...]
    """As `PairConfig.fields`."""
    invalid: str
    """As `PairConfig.invalid`."""

    def columns(self, names: Sequence[str], where: object) -> list[str]:
        return columns_in(self.fields, names, FORMS, where)

    def document(self, row: Any, where: object) -> str:
        def made() -> list[str]:
            return [filled(value, name) for name, value in values_in(self.fields, row, FORMS)]

        return kept(made, self.invalid, where)


def parse(text: str) -> tuple[str, str]:
    """Source and target of a record that `Pair` wrote and did not drop."""
    source, target = json.loads(text)
    return source, target


Forms = Sequence[tuple[str, ...]]


def columns_in(fields: tuple[str, ...], names: Sequence[str], forms: Forms, where: object) -> list[str]:
    """The columns of a table that hold `fields`, or where these are empty those of the first form that is there.

    Raises UserError where they are not there.
    """
    if fields:
        return columns_of(fields, names, where)
    if not (found := first_form(names, forms)):
        raise UserError(f"data.source: {where}: {no_form(names)}")
    return [*found]


def values_in(fields: tuple[str, ...], row: Any, forms: Forms) -> list[tuple[str, Any]]:
    """The name and the value of each of the same fields in a record. Raises Invalid where one is not there."""
    row = record(row)
    names = fields or first_form(row, forms)
    if not names:
        raise Invalid(no_form(row))
    return [(name, reach(row, name)) for name in names]


def first_form(names: Collection[str], forms: Forms) -> tuple[str, ...]:
    """The first form of which every field is there; empty where none is."""
    return next((form for form in forms if all(name in names for name in form)), ())
