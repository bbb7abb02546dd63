"""Takes single values out of a row: finds them, tells their shapes apart, checks their types.

What several fields together mean is `adapters`' business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_pipeline.data.records import BadRow

Fields = Mapping[str, Any]

_DIALOGUE = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
_TRUTH = {"true": True, "false": False, "1": True, "0": False}


def _is_list_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(fits, value))


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_written_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _is_messages(value: Any) -> bool:
    return _is_list_of(value, lambda item: isinstance(item, dict) and "role" in item)


# What a field must look like in the first row to be recognised, by the words used for it in messages and tables.
SHAPES: dict[str, Callable[[Any], bool]] = {
    "a string": _is_string,
    "true or false": lambda value: isinstance(value, bool) or str(value).lower() in ("true", "false"),
    "an object with text": lambda value: isinstance(value, dict) and _is_string(value.get("text")),
    "an object with messages": lambda value: isinstance(value, dict) and _is_messages(value.get("messages")),
    "a string or message": lambda value: (
        _is_string(value) or (isinstance(value, dict) and ("content" in value or "value" in value))
    ),
    "messages": _is_messages,
    "turns": lambda value: _is_list_of(value, lambda item: isinstance(item, dict) and "from" in item),
    "a string or messages": lambda value: _is_string(value) or _is_messages(value),
    "strings": lambda value: _is_list_of(value, _is_string),
    "numbers": lambda value: _is_list_of(value, _is_number),
    "objects": lambda value: _is_list_of(value, lambda item: isinstance(item, dict)),
    "an object with replies": lambda value: isinstance(value, dict) and isinstance(value.get("replies"), list),
    "an object": lambda value: isinstance(value, dict),
    "a number": lambda value: _is_number(value) or _is_written_number(value),
    "a dialogue": lambda value: _is_string(value) and _DIALOGUE.match(value) is not None,
    "a dialogue up to Assistant:": lambda value: (
        _is_string(value) and _DIALOGUE.match(value) is not None and value.rstrip().endswith("Assistant:")
    ),
}


def shape_of(value: Any) -> str:
    """A word or two for a value in a message."""
    if value is None:
        return "empty"
    if isinstance(value, list):
        fitting = [name for name in ("messages", "turns", "objects", "strings", "numbers") if SHAPES[name](value)]
        return fitting[0] if fitting else "a list"
    return {str: "a string", bool: "true or false", int: "a number", float: "a number", dict: "an object"}.get(
        type(value), type(value).__name__
    )


def get(row: Fields, field: str) -> Any:
    if field not in row:
        raise BadRow(f"no field {field!r}", f"there is {', '.join(row)}")
    return row[field]


def string(row: Fields, field: str) -> str:
    value = get(row, field)
    if not isinstance(value, str):
        raise BadRow(f"{field} is not a string", type(value).__name__)
    return value


def optional_string(row: Fields, *fields: str) -> str:
    """The first of these fields that is there and not blank, else ""."""
    for field in fields:
        if row.get(field) is not None and string(row, field).strip():
            return string(row, field)
    return ""


def items(row: Fields, field: str) -> list[Any]:
    value = get(row, field)
    if not isinstance(value, list):
        raise BadRow(f"{field} is not a list", type(value).__name__)
    return value


def object_of(row: Fields, field: str) -> dict[str, Any]:
    value = get(row, field)
    if not isinstance(value, dict):
        raise BadRow(f"{field} is not an object", type(value).__name__)
    return value


def number(value: Any, what: str) -> float:
    """A finite number, also one written out, as in CSV."""
    try:
        if not _is_number(value) and not _is_string(value):
            raise ValueError
        found = float(value)
    except (ValueError, OverflowError):  # the second of a whole number of over 308 digits
        raise BadRow(f"{what} is not a number", repr(value)[:40]) from None
    if not math.isfinite(found):
        raise BadRow(f"{what} is not a finite number")
    return found


def boolean(row: Fields, field: str) -> bool:
    """True or false, also as 1 and 0 or written out, as in CSV."""
    value = get(row, field)
    if isinstance(value, bool | int | str) and str(value).lower() in _TRUTH:
        return _TRUTH[str(value).lower()]
    raise BadRow(f"{field} is not true or false", repr(value)[:40])
