"""Rows to records: recognises a row's format by its fields, renames columns, and makes the records.

The formats themselves are in `format_table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from rlhf_pipeline.data.fields import Fields, shape_of
from rlhf_pipeline.data.format_table import FORMATS, Format, Kind
from rlhf_pipeline.data.records import BadRow, Record
from rlhf_pipeline.errors import UserError

__all__ = ["FORMATS", "Format", "Kind", "detect", "renamed", "to_records"]

NEAREST = 3  # formats named when none fits
SHOWN = 20  # fields of the row that are named then


def detect(row: Fields, kind: Kind, *, columns: Mapping[str, str] | None = None) -> str:
    """The name of the first format that makes a `kind` of rows like this one, by names and shapes of its fields.

    With `columns`, only formats that use every field named there. UserError if there is none, or a column is missing.
    """
    try:
        row = renamed(row, columns)
    except BadRow as bad:
        raise UserError(f"data.columns: {bad}") from None
    able = {name: format for name, format in FORMATS.items() if format.adapter(kind) and not format.named_only}
    if columns:
        able = {name: f for name, f in able.items() if set(columns) <= {*f.fields, *f.optional}}
        if not able:
            raise UserError(f"data.columns: no format makes a {kind} of the fields {', '.join(columns)} together")
    for name, format in able.items():
        if not format.unfit(row):
            return name
    shown = [f"{name} ({shape_of(value)})" for name, value in islice(row.items(), SHOWN)]
    more = [f"and {len(row) - SHOWN} more"] if len(row) > SHOWN else []
    found = ", ".join([*shown, *more]).encode(errors="backslashreplace").decode()  # a name may hold a lone surrogate
    near = sorted(able, key=lambda name: len(able[name].unfit(row)) / len(able[name].fields))[:NEAREST]
    lines = "".join(f"\n  {name} lacks {_lacking(able[name], row)}" for name in near)
    raise UserError(
        f"no format makes a {kind} of rows with the fields {found}. Nearest:{lines}\n"
        "Say which of your columns are meant with data.columns={our field: your column}, or name one of these with "
        f"data.format: {', '.join(able)}"
    )


def _lacking(format: Format, row: Fields) -> str:
    """As "chosen (a string), and prompt is not a string but messages"."""
    unfit = format.unfit(row)
    missing = ", ".join(f"{name} ({format.fields[name]})" for name in unfit if name not in row)
    wrong = ", ".join(f"{name} as {format.fields[name]}" for name in unfit if name in row)
    return ", ".join(part for part in (missing, wrong) if part)


def renamed(row: Fields, columns: Mapping[str, str] | None) -> Fields:
    """The row with fields of ours in place of its own columns: {our field: column}; `a.b` is b within a.

    Other columns stay, but those that were renamed. UserError for a field that no format has, BadRow for a column
    that the row lacks.
    """
    if not columns:
        return row
    known = {name for format in FORMATS.values() for name in (*format.fields, *format.optional)}
    for field in columns:
        if field not in known:
            raise UserError(f"data.columns: no format has a field {field!r}; known are {', '.join(sorted(known))}")
    taken = {field: _column(row, column) for field, column in columns.items()}
    return {name: value for name, value in row.items() if name not in columns.values()} | taken


def _column(row: Fields, column: str) -> Any:
    value: Any = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = f"there is {', '.join(value)}" if isinstance(value, Mapping) else f"it is {shape_of(value)}"
            raise BadRow(f"no column {column!r}", there)
        value = value[part]
    return value


def to_records(row: Fields, kind: Kind, format: str, *, columns: Mapping[str, str] | None = None) -> list[Record]:
    """The records of a row, one or more. BadRow if a field is missing or unfit, UserError if the format makes no `kind`."""
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    adapter = FORMATS[format].adapter(kind)
    if adapter is None:
        able = [name for name, other in FORMATS.items() if other.adapter(kind)]
        raise UserError(f"the format {format!r} makes no {kind}; {', '.join(able)} do")
    made = adapter(renamed(row, columns))
    return made if isinstance(made, list) else [made]
