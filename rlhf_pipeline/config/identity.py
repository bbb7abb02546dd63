"""Which fields make a run that run, and what differs between two configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any


def plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def identity(config: Any) -> dict[str, Any]:
    """The identity fields of `config` as {dotted key: value}; operational ones are left out."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        if f.metadata.get("operational"):
            continue
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found.update({f"{f.name}.{key}": item for key, item in identity(value).items()})
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            for name, member in value.items():
                found.update({f"{f.name}.{name}.{key}": item for key, item in identity(member).items()})
        else:
            found[f.name] = plain(value)
    return found


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """One line for each identity field that is not the same.

    A field that there was not yet when `before` was written had its default: what a new field does by default is what was
    done without it.
    """
    before = {key: value for key, value in (defaults or {}).items() if key in now} | dict(before)
    return [
        f"{key}: was {before.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
