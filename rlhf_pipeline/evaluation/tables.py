"""Pieces of what evaluations print: tables with a column a system, cells and differences with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from rich.table import Table

FIRST_COLUMN = 26  # characters of a table for the names of its rows
System = TypeVar("System")


class Interval(Protocol):
    """A mean and its 95 % interval."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def table(title: str, first: str, others: Iterable[str]) -> Table:
    """An empty table whose first column holds names and whose others hold figures."""
    made = Table(title=title)
    made.add_column(first)
    for name in others:
        made.add_column(name, justify="right")
    return made


def blocks(systems: Mapping[str, System], width: int, *, widest: str) -> Iterator[dict[str, System]]:
    """As many systems at a time as have `room` beside each other."""
    names = list(systems)
    size = room(width, widest)
    for start in range(0, len(names), size):
        yield {name: systems[name] for name in names[start : start + size]}


def room(width: int, widest: str) -> int:
    """Columns of a table that are as wide as `widest`, beside one of names."""
    return max(1, (width - FIRST_COLUMN) // (len(widest) + 3))


def cell(one: Interval) -> str:
    return f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]"


def signed(gap: Interval) -> str:
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def is_clear(gap: Interval) -> bool:
    """Whether the interval of a difference leaves out 0."""
    return gap.low > 0 or gap.high < 0


def clear(gap: Interval) -> str:
    return "clear of chance" if is_clear(gap) else "not clear of chance"
