"""The graph of artifacts: who was made from whom, as the content hashes in their manifests say.

Parents stand to the left of their children. A parent that is not in the folder, or is no longer what a child was made
from, is drawn dashed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from rlhf_pipeline.report.collect import Stage
from rlhf_pipeline.report.parts import Figure
from rlhf_pipeline.report.values import mapping, short

BOX, HIGH, GAP, ROW = 208, 56, 54, 76  # pixels: a box, its height, between columns, from row to row
EDGE = 3
ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 8 4 0 8z" fill="var(--faint)"/></marker></defs>'
)
_Passing = dict[tuple[str, str, int], float]  # (parent, child, column) -> row


@dataclass(slots=True, kw_only=True)
class _Node:
    title: str
    lines: tuple[str, str]
    href: str = ""
    parents: dict[str, list[str]] = field(default_factory=dict)  # node -> roles
    column: int = 0
    row: float = 0.0


def lineage(stages: Sequence[Stage]) -> Figure | None:
    """None where no artifact names a parent and there is but one."""
    nodes = _nodes(stages)
    if len(nodes) < 2:
        return None
    passing = _place(nodes)
    return Figure(
        title="Who was made from whom",
        caption="Each box is an artifact with the beginning of its content hash; point at an arrow to see in which role a "
        "parent was used. Dashed boxes are models from outside of the folder, or that have been made anew since.",
        picture=_draw(nodes, passing),
        is_wide=True,
    )


def _nodes(stages: Sequence[Stage]) -> dict[str, _Node]:
    made = {stage.hash: stage for stage in reversed(stages) if stage.hash}
    nodes: dict[str, _Node] = {}
    for digest, stage in reversed(made.items()):
        size = f", {short(stage.parameters)} parameters" if stage.parameters else ""
        nodes[digest] = _Node(
            title=stage.label, lines=(f"rlhf {stage.stage}{size}", digest[:12]), href=f"#{anchor(stage)}"
        )
    for digest, stage in reversed(made.items()):
        for role, parent in sorted(mapping(stage.manifest.get("parents")).items()):
            path, theirs = str(mapping(parent).get("path", "")), mapping(parent).get("content_hash")
            key = str(theirs or f"path {path}")
            if key not in nodes:
                nodes[key] = _Node(
                    title=path, lines=("not in this folder", str(theirs)[:12] if theirs else "no artifact")
                )
            nodes[digest].parents.setdefault(key, []).append(role)
    return nodes


def anchor(stage: Stage) -> str:
    """The id of a stage's details on the page."""
    return "run-" + "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in stage.label)


def _place(nodes: dict[str, _Node]) -> _Passing:
    """Columns by the longest way from a root, rows near the parents', and the rows of lines that pass over a column."""
    for _ in nodes:  # a cycle, which no honest manifest has, ends as well
        for node in nodes.values():
            node.column = min(len(nodes) - 1, max((nodes[one].column + 1 for one in node.parents), default=0))
    passing: _Passing = {}
    for column in range(max(node.column for node in nodes.values()) + 1):
        taken: list[float] = []
        alike: dict[float, list[_Node]] = {}  # that want the same row
        for key, node in nodes.items():
            if node.column == column:
                above = [_row(nodes, passing, (parent, key), column - 1) for parent in node.parents]
                wanted = sum(above) / len(above) if above else 0.0
                node.row = _free(taken, wanted, apart=1.0)
                taken.append(node.row)
                alike.setdefault(wanted, []).append(node)
        for some in alike.values():  # in their own order from top to bottom
            for node, row in zip(some, sorted(one.row for one in some), strict=True):
                node.row = row
        for key, node in nodes.items():
            for parent in node.parents:
                if nodes[parent].column < column < node.column:
                    wanted = _row(nodes, passing, (parent, key), column - 1)
                    passing[parent, key, column] = _free(taken, wanted, apart=0.75)
                    taken.append(passing[parent, key, column])
    first = min(*(node.row for node in nodes.values()), *passing.values(), 0.0)
    for node in nodes.values():
        node.row -= first
    return {key: row - first for key, row in passing.items()}


def _row(nodes: dict[str, _Node], passing: _Passing, edge: tuple[str, str], column: int) -> float:
    """Where an edge is in a column: at its parent, or on its way to the child."""
    return passing.get((*edge, column), nodes[edge[0]].row)


def _free(taken: Sequence[float], wanted: float, *, apart: float) -> float:
    """The row nearest to the wanted one that is so far from all that are taken; below, where two are as near."""
    choices = [wanted, *(one + step for one in taken for step in (-apart, apart))]
    fits = [row for row in choices if all(abs(row - one) > apart - 1e-6 for one in taken)]
    return min(fits, key=lambda row: (abs(row - wanted), -row))


def _draw(nodes: dict[str, _Node], passing: _Passing) -> str:
    left = [EDGE + i * (BOX + GAP) for i in range(max(node.column for node in nodes.values()) + 1)]
    rows = [*(node.row for node in nodes.values()), *passing.values()]
    width, height = left[-1] + BOX + EDGE, 2 * EDGE + HIGH + max(rows) * ROW
    parts = [ARROW, *_edges(nodes, passing, left), *(_box(node, left[node.column]) for node in nodes.values())]
    size = f'width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}"'
    return f'<svg class="graph" {size}>{"".join(parts)}</svg>'


def _edges(nodes: dict[str, _Node], passing: _Passing, left: Sequence[int]) -> Iterable[str]:
    for key, node in nodes.items():
        for parent, roles in sorted(node.parents.items()):
            way = [(left[c], passing[parent, key, c]) for c in range(len(left)) if (parent, key, c) in passing]
            x, y = left[nodes[parent].column] + BOX, _middle(nodes[parent].row)
            drawn = f"M{x} {y:.1f}"
            for end, row in [*way, (left[node.column], node.row)]:
                below = _middle(row)
                drawn += f" C{x + GAP / 2:.1f} {y:.1f} {end - GAP / 2:.1f} {below:.1f} {end} {below:.1f}"
                x, y = end + BOX, below
                drawn += f" H{x}" if (end, row) in way else ""
            said = escape(", ".join(roles))
            yield f'<path class="edge" marker-end="url(#arrow)" d="{drawn}"><title>{said}</title></path>'


def _middle(row: float) -> float:
    return EDGE + row * ROW + HIGH / 2


def _box(node: _Node, x: float) -> str:
    y = EDGE + node.row * ROW
    outside = "" if node.href else " outside"
    texts = "".join(
        f'<text x="{x + 10:.1f}" y="{y + 18 + 15 * i:.1f}" class="{style}">{escape(_cut(text))}</text>'
        for i, (text, style) in enumerate(zip((node.title, *node.lines), ("title", "", "hash"), strict=True))
    )
    box = f'<rect class="box{outside}" x="{x:.1f}" y="{y:.1f}" width="{BOX}" height="{HIGH}" rx="6"/>'
    whole = f"<title>{escape(' | '.join((node.title, *node.lines)))}</title>{box}{texts}"
    return f'<a href="{node.href}">{whole}</a>' if node.href else f"<g>{whole}</g>"


def _cut(text: str) -> str:
    return text if len(text) <= 31 else f"{text[:13]}…{text[-17:]}"
