"""Figures out of files that others wrote, which may lack any of them, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its 95 % interval; without one both bounds are the mean."""

    mean: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        return self.low < self.high

    def turned(self) -> Interval:
        """The other side's share."""
        return Interval(mean=1 - self.mean, low=1 - self.high, high=1 - self.low)


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def entries(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; none of anything else."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def interval(value: Any) -> Interval | None:
    """Of {"mean", "low", "high"}, or of a plain number."""
    if not isinstance(value, Mapping):
        value = {"mean": value}
    mean = number(value.get("mean"))
    if mean is None:
        return None
    low, high = number(value.get("low")), number(value.get("high"))
    return Interval(mean=mean, low=mean if low is None else low, high=mean if high is None else high)


def beside(values: Mapping[str, Any], name: str) -> Interval | None:
    """Of `name`, `name_low` and `name_high`, as metrics and points of the frontier have them."""
    return interval({"mean": values.get(name), "low": values.get(f"{name}_low"), "high": values.get(f"{name}_high")})


def plain(value: float) -> str:
    """A measurement, to three places or four figures: 0.637, 14.40, 1,509, 6.1e-05."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 0.001:
        return f"{value:.2g}"
    return f"{value:.{1 if size >= 100 else 2 if size >= 10 else 3}f}"


def whole(value: float) -> str:
    """A count: 1,509."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def bounds(one: Interval, *, as_percent: bool = False) -> str:
    """[low, high], or nothing where no interval is known."""
    if not one.is_known:
        return ""
    if as_percent:
        return f"[{100 * one.low:.1f}, {100 * one.high:.1f}]"
    return f"[{one.low:.3f}, {one.high:.3f}]"


def short(count: float) -> str:
    """847, 12.3 k, 1.2 M, 7.0 B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:.0f}"
