"""What a page is made of: tables and pictures in sections. Plain data that the template turns into HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    text: str
    note: str = ""  # in small print behind it: an interval, mostly
    shade: float | None = None  # 0 (the worst) to 1 (the best), by which the cell is tinted
    href: str = ""
    is_text: bool = False  # set to the left, as words are


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    title: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell | None, ...], ...]  # the first cell of a row names it
    kind: str = "table"

    @property
    def texts(self) -> list[bool]:
        """Of each column whether it holds words rather than figures."""
        columns = zip(*self.rows, strict=True)
        return [any(cell is not None and cell.is_text for cell in column) for column in columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An entry of a legend: a colour's number and how the line is drawn."""

    label: str
    colour: int
    style: str  # line | dashed | dotted | dots | bar


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    title: str
    caption: str  # what it shows and what good looks like
    picture: str  # SVG, or a PNG as base64
    legend: tuple[Key, ...] = ()
    is_wide: bool = False
    kind: str = "svg"  # svg | png


Block = Table | Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    anchor: str
    title: str
    intro: str
    blocks: tuple[Block, ...]


def words(text: str, *, href: str = "") -> Cell:
    return Cell(text=text, href=href, is_text=True)


def table(
    title: str, caption: str, names: Sequence[Cell], columns: Mapping[str, Sequence[Cell | None]], *, first: str = ""
) -> Table | None:
    """A row a name; columns without any cell are left out, and without a column there is no table."""
    filled = {head: cells for head, cells in columns.items() if any(cells)}
    if not names or not filled:
        return None
    rows = tuple((name, *(cells[i] for cells in filled.values())) for i, name in enumerate(names))
    return Table(title=title, caption=caption, head=(first, *filled), rows=rows)


def section(anchor: str, title: str, intro: str, blocks: Sequence[Block | None]) -> Section | None:
    """None where no block is left."""
    found = tuple(block for block in blocks if block is not None)
    return Section(anchor=anchor, title=title, intro=intro, blocks=found) if found else None
