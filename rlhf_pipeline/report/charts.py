"""Draws with matplotlib, and hands out SVG that takes its colours from the page it stands in.

Figures are drawn in colours that mean "ink" or "third series"; in the SVG they become CSS variables, so that a light and
a dark page share one picture. What is drawn is the same, byte for byte, for the same numbers.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf_pipeline.report.thin import smoothed, thinned
from rlhf_pipeline.report.values import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.0, 2.45  # inches; the page sets the width on the screen
POINTS = 220  # of a curve that is drawn
SMOOTH = 40  # a curve of more points than this is drawn faintly, under its mean over a twentieth of it
COLOURS = 8  # of series: the page has as many
INK, FAINT, PAPER = "#010203", "#040506", "#fafbfc"
_STYLES = {"line": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.4))}
# Every system's own text is drawn as it is, a dollar sign too; labels stay text, in the page's font.
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf report",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "grid.color": FAINT,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one colour. `low` and `high` are bounds of `y`, where they are known."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    colour: int = 0
    style: str = "line"  # of report.parts.Key
    is_hollow: bool = False
    is_exact: bool = False  # no noise in it: drawn as it is


def curves(
    series: Sequence[Series],
    slug: str,
    *,
    x: str,
    y: str,
    end: float | None = None,
    level: float | None = None,
    lowest: float | None = None,
) -> str:
    """Lines and points over steps from 0 to `end`; `level` is worth comparing with, and `lowest` is as far as is shown."""
    with _figure(WIDTH, HEIGHT) as (figure, axes):
        for one in series:
            _points(axes, one) if one.style == "dots" else _line(axes, one)
        if level is not None:
            axes.axhline(level, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        if end:
            axes.set_xlim(-0.03 * end, 1.03 * end)
        low, high = axes.get_ylim()
        if high - low < 0.2 * abs(high) and all(np.ptp(one.y) <= 1e-9 * np.abs(one.y).max() for one in series):
            low, high = sorted((0.0, 2 * float(series[0].y[0])))  # a constant is no slope of rounding errors
        if lowest is not None and low < lowest:
            top = max(float(one.y.max()) for one in series)
            low, high = lowest, max(top, level or lowest) + 0.06 * (max(top, level or lowest) - lowest) + 1e-6
        axes.set_ylim(low, high)
        _labels(axes, x, y)
        return _svg(figure, slug)


def reliability(bins: Sequence[tuple[float, Interval, float]], slug: str) -> str:
    """Of (confidence, how often it was right, share of the comparisons)."""
    with _figure(WIDTH, HEIGHT) as (figure, axes):
        axes.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        x = [confidence for confidence, *_ in bins]
        axes.bar(x, [share for *_, share in bins], width=0.035, color=_colour(1), alpha=0.3, zorder=1)
        _points(axes, _with_bars(x, [observed for _, observed, _ in bins]))
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(0, 1.03)
        _labels(axes, "confidence in the higher reward", "share")
        return _svg(figure, slug)


def whiskers(rows: Sequence[tuple[str, Interval, int]], slug: str, *, x: str, level: float | None = None) -> str:
    """A line a name, the first on top: its value with the interval, in the colour of that number."""
    tall = 0.65 + 0.27 * len(rows)
    with _figure(WIDTH, tall, left=0.34) as (figure, axes):
        for place, (_, one, colour) in enumerate(rows):
            axes.plot([one.low, one.high], [place, place], color=_colour(colour), linewidth=2.2, solid_capstyle="round")
            axes.plot([one.mean], [place], "o", color=_colour(colour), markersize=5)
        axes.set_yticks(range(len(rows)), [_cut(name) for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        if level is not None:
            axes.axvline(level, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        _labels(axes, x, "")
        return _svg(figure, slug)


def stacked(rows: Sequence[tuple[str, Sequence[float]]], slug: str, *, x: str) -> str:
    """A bar a name, of parts in the colours' order."""
    tall = 0.65 + 0.27 * len(rows)
    with _figure(WIDTH, tall, left=0.34) as (figure, axes):
        for place, (_, parts) in enumerate(rows):
            start = 0.0
            for colour, part in enumerate(parts):
                axes.barh(place, part, left=start, height=0.62, color=_colour(colour), edgecolor=PAPER, linewidth=0.6)
                start += part
        axes.set_yticks(range(len(rows)), [_cut(name) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        _labels(axes, x, "")
        return _svg(figure, slug)


def frontier(lines: Sequence[Series], slug: str, *, y: str) -> str:
    """Reward over KL, each line in the order of its points, over an axis that is spaced by its square root.

    So best-of-n and PPO fit on one picture (Gao et al. 2023).
    """
    with _figure(WIDTH, HEIGHT + 0.5) as (figure, axes):
        for one in lines:
            axes.plot(one.x, one.y, color=_colour(one.colour), linewidth=1.1, alpha=0.7, zorder=2)
            _points(axes, one)
        most = max((float(one.x.max()) for one in lines if len(one.x)), default=1.0)
        axes.set_xscale("function", functions=(_root, np.square))
        axes.set_xlim(0, most * 1.06 or 1.0)
        ticks = _root_ticks(most)
        axes.set_xticks(ticks, [f"{one:g}" for one in ticks])
        _labels(axes, "KL, nats an answer (square-root scale)", y)
        return _svg(figure, slug)


def _root(values: Any) -> Any:
    return np.sqrt(np.maximum(values, 0))


def _root_ticks(most: float) -> list[float]:
    """Round values (1, 2 and 5 times powers of ten) whose roots are not too near to each other."""
    round_values = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]
    ticks = [0.0]
    for one in round_values:
        if one <= most and np.sqrt(one) - np.sqrt(ticks[-1]) > 0.14 * np.sqrt(most):
            ticks.append(one)
    return ticks


def _line(axes: Axes, one: Series) -> None:
    colour, style = _colour(one.colour), _STYLES[one.style]
    x, y = one.x, one.y
    if one.low is not None and one.high is not None:
        axes.fill_between(x, one.low, one.high, color=colour, alpha=0.14, linewidth=0, zorder=1)
    if one.is_exact:
        x, y = thinned(x, y, points=POINTS)
    elif len(y) > SMOOTH:
        axes.plot(*thinned(x, y, points=POINTS), color=colour, linewidth=0.7, alpha=0.3, zorder=2)
        mean = smoothed(y, window=max(3, len(y) // 20))
        places = np.unique(np.linspace(0, len(y) - 1, POINTS // 2).astype(int))
        x, y = x[places], mean[places]
    axes.plot(x, y, color=colour, linewidth=1.5, linestyle=style, zorder=3)


def _points(axes: Axes, one: Series) -> None:
    colour = _colour(one.colour)
    if one.low is not None and one.high is not None:
        axes.vlines(one.x, one.low, one.high, color=colour, linewidth=1.3, alpha=0.55, zorder=3)
    filling = PAPER if one.is_hollow else colour
    axes.plot(one.x, one.y, "o", color=colour, markerfacecolor=filling, markersize=4.2, markeredgewidth=1.1, zorder=4)


def _with_bars(x: Sequence[float], found: Sequence[Interval]) -> Series:
    columns = np.array([(one.mean, one.low, one.high) for one in found]).reshape(-1, 3).T
    return Series(x=np.array(x), y=columns[0], low=columns[1], high=columns[2], style="dots")


def _labels(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _cut(name: str) -> str:
    name = name.encode("utf-8", "replace").decode()
    return name if len(name) <= 22 else f"{name[:10]}…{name[-11:]}"


def _colour(number: int) -> str:
    """The colour that stands for the series' number."""
    return f"#0{number % COLOURS}0{number % COLOURS}ee"


@contextmanager
def _figure(width: float, height: float, *, left: float = 0.15) -> Iterator[tuple[Figure, Axes]]:
    """A figure of nobody else's, with its only panel. Margins are given in inches: looking for the best ones is slow."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # it is the page's font that will draw it
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((left, 0.42 / height, 0.98 - left, 1 - 0.6 / height))
        axes.patch.set_visible(False)
        yield figure, axes


def _svg(figure: Figure, slug: str) -> str:
    """The figure as an element to be set into a page, its ids beginning with `slug`."""
    written = io.StringIO()
    figure.patch.set_visible(False)
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{slug}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{slug}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"font-family: [^;\"]*; ", "", re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1", svg))
    svg = re.sub(r' (?:d|x|y|transform|width|height)="[^"]*"', _shorter, svg)
    for name, sentinel in {"ink": INK, "faint": FAINT, "paper": PAPER}.items():
        svg = svg.replace(sentinel, f"var(--{name})")
    svg = re.sub(r"#0(\d)0\1ee", r"var(--series-\1)", svg)
    return re.sub(r">\s+<", "><", svg).strip()


def _shorter(attribute: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point, in one line."""
    rounded = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), attribute[0])
    return " ".join(rounded.replace("\n", " ").split(" ")).replace(' "', '"')
