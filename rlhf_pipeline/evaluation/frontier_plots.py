"""Pictures of `frontier`: reward against KL, and the gold reward against the proxy's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_pipeline.data.lab.summary import Mean
from rlhf_pipeline.evaluation.frontier import Point
from rlhf_pipeline.evaluation.pictures import COLOURS, GREY, MARKERS, figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BOUND = "best of N of the reference: upper bound of its KL"
SIZE = (6.6, 4.6)  # inches
TICKS_APART = 0.06  # of the axis


def reward_against_kl(points: Sequence[Point], scorer: str, path: Path) -> None:
    """A line a system through its checkpoints, with 95 % intervals both ways; the best of N dashed, at its KL's bound.

    The KL axis is the square root's, on which best of N and policies that are trained with a KL penalty run nearly
    straight at first (Bai et al. 2022, Gao et al. 2023), and small ones can be told apart beside large ones.
    """
    made = figure(*SIZE)
    axes = made.subplots()
    for name, mine, style in _lines(points):
        _line(axes, [one.kl for one in mine], [one.scores[scorer] for one in mine], name, style)
    axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    axes.set_xlim(left=0)
    axes.set_xticks(_ticks(axes.get_xlim()[1]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("KL(policy || reference), nats an answer (square-root scale)", fontsize=9)
    axes.set_ylabel(f"reward by {scorer}, mean over prompts", fontsize=9)
    _head(axes, "Reward against KL")
    write(made, [axes], path)


def gold_against_proxy(points: Sequence[Point], gold: str, proxy: str, path: Path) -> None:
    """Where the lines bend down, the proxy goes on to rise and the gold reward does not: overoptimisation."""
    made = figure(*SIZE)
    axes = made.subplots()
    for name, mine, style in _lines(points):
        label = "best of N of the reference" if name == BOUND else name
        _line(axes, [one.scores[proxy] for one in mine], [one.scores[gold] for one in mine], label, style)
    axes.set_xlabel(f"proxy reward, by {proxy}", fontsize=9)
    axes.set_ylabel(f"gold reward, by {gold}", fontsize=9)
    _head(axes, "Gold reward against the proxy's")
    write(made, [axes], path)


Style = dict[str, str]


def _lines(points: Sequence[Point]) -> list[tuple[str, list[Point], Style]]:
    """(label, points, style) of every line, in the points' order."""
    systems = list(dict.fromkeys(one.system for one in points if not one.kl_is_bound))
    found: list[tuple[str, list[Point], Style]] = []
    for number, system in enumerate(systems):
        mine = [one for one in points if one.system == system and not one.kl_is_bound]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": "-"}
        method = mine[-1].method
        found.append((system if method == system else f"{system} ({method})", mine, style))
    bounds = [one for one in points if one.kl_is_bound]
    return found + ([(BOUND, bounds, {"color": GREY, "marker": "X", "linestyle": "--"})] if bounds else [])


def _ticks(most: float) -> list[float]:
    """0 and numbers of the series 1, 2, 5 up to `most`, down to where two would touch on the root's axis."""
    found: list[float] = []
    for power in range(math.floor(math.log10(most)), -7, -1):
        for number in (digit * 10.0**power for digit in (5, 2, 1)):
            room = math.sqrt(found[-1]) - math.sqrt(number) if found else math.inf
            if number <= most and room > TICKS_APART * math.sqrt(most) and number > TICKS_APART**2 * most:
                found.append(number)
    return [0.0, *reversed(found)]


def _line(axes: Axes, x: Sequence[Mean], y: Sequence[Mean], label: str, style: Style) -> None:
    line, caps, bars = axes.errorbar(
        [one.mean for one in x],
        [one.mean for one in y],
        xerr=_reach(x),
        yerr=_reach(y),
        label=label,
        markersize=4.5,
        linewidth=1.3,
        elinewidth=0.8,
        capsize=1.5,
        **style,  # type: ignore[arg-type]
    )
    line.set_clip_on(False)  # the reference itself is on the edge
    for part in (*caps, *bars):
        part.set_alpha(0.5)


def _reach(values: Sequence[Mean]) -> np.ndarray:
    """How far each interval reaches down and up, [2, n]; rounding may put an end on the mean's other side."""
    return np.maximum(np.array([(one.mean - one.low, one.high - one.mean) for one in values]).T, 0)


def _head(axes: Axes, title: str) -> None:
    """The title, and the legend below the picture: inside, it would hide points."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(
        fontsize=8,
        frameon=False,
        ncols=2,
        loc="upper left",
        bbox_to_anchor=(0, -0.14),
        borderaxespad=0,
        columnspacing=1.6,
    )
