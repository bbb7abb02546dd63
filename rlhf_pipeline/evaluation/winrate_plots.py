"""Pictures of `winrate` and `strengths`: win rates, a ranking, all pairs, and win rates by sampling temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_pipeline.evaluation.pictures import BLUE, COLOURS, GREY, ORANGE, figure, write
from rlhf_pipeline.evaluation.strengths import SCALE, START, Strength
from rlhf_pipeline.evaluation.tables import Interval
from rlhf_pipeline.evaluation.winrate import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 0.42  # inches
MARKERS = "osD^vPX"  # beside the colours, for those who see none
LONGEST = 28  # characters of a name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reach:
    mean: float
    low: float
    high: float


def win_rates(comparisons: Sequence[Comparison], path: Path) -> None:
    """A line a comparison: the win rate and, below it, the length-controlled one, with 95 % intervals."""
    made = figure(6.4, 1.3 + ROW * len(comparisons))
    axes = made.subplots()
    baselines = {one.baseline for one in comparisons}
    places = np.arange(len(comparisons))
    known = {i: one.length_controlled for i, one in enumerate(comparisons) if one.length_controlled is not None}
    apart = 0.13 if known else 0.0
    _dots(axes, places - apart, [one.win_rate for one in comparisons], BLUE, "o", "win rate, 95 % interval")
    if known:
        _dots(axes, np.array(list(known)) + apart, list(known.values()), ORANGE, "D", "length-controlled")
    axes.axvline(0.5, color=GREY, linewidth=1, linestyle="--", zorder=1)
    _names(axes, [_name(one.system) if len(baselines) == 1 else _against(one) for one in comparisons])
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(f"win rate over {_name(baselines.pop())}" if len(baselines) == 1 else "win rate", fontsize=9)
    _head(axes, "Win rates")
    write(made, [axes], path)


def strengths(ranking: Mapping[str, Strength], path: Path) -> None:
    """A line a system, the strongest on top: its strength with the 95 % interval, and the rating that is the same."""
    made = figure(6.4, 1.6 + ROW * len(ranking))
    axes = made.subplots()
    found = [_Reach(mean=one.strength, low=one.low, high=one.high) for one in ranking.values()]
    _dots(axes, np.arange(len(found)), found, BLUE, "o", "")
    axes.axvline(0, color=GREY, linewidth=1, linestyle="--", zorder=1)
    _names(axes, [_name(name) for name in ranking])
    axes.set_xlabel("Bradley-Terry strength in logits, with its 95 % interval; the mean is 0", fontsize=9)
    rating = axes.secondary_xaxis("top", functions=(_rating, _strength))
    rating.set_xlabel("Elo", fontsize=8)
    rating.tick_params(labelsize=7)
    axes.set_title("Ranking", loc="left", fontsize=11, pad=12)
    write(made, [axes], path)


def matrix(systems: Sequence[str], comparisons: Sequence[Comparison], path: Path) -> None:
    """How often the system of a row beats that of a column; pairs that were not compared stay grey."""
    place = {name: i for i, name in enumerate(systems)}
    rates = np.full((len(systems), len(systems)), np.nan)
    for one in comparisons:
        rates[place[one.system], place[one.baseline]] = one.win_rate.mean
        rates[place[one.baseline], place[one.system]] = 1 - one.win_rate.mean
    side = 1.9 + 0.62 * len(systems)
    made = figure(side + 0.9, side)
    axes = made.subplots()
    axes.set_facecolor("#dddddd")
    picture = axes.imshow(rates, cmap="PuOr_r", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(~np.isnan(rates)), strict=True):
        rate = rates[row, column]
        colour = "white" if abs(rate - 0.5) > 0.3 else "black"
        axes.text(column, row, f"{rate:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(systems)), [_name(name) for name in systems], rotation=40, ha="right")
    axes.set_yticks(range(len(systems)), [_name(name) for name in systems])
    axes.set_xlabel("against", fontsize=9)
    axes.set_ylabel("system", fontsize=9)
    axes.set_title("Win rate of the row over the column", loc="left", fontsize=11)
    bar = made.colorbar(picture, ax=axes, fraction=0.046)
    bar.set_label("win rate", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    write(made, [axes], path)


def by_temperature(rates: Mapping[str, Mapping[float, Interval]], baseline: str, path: Path) -> None:
    """A line a system: its win rate over the baseline, whose temperature stays, by its own sampling temperature."""
    made = figure(6.4, 4.2)
    axes = made.subplots()
    for i, (name, mine) in enumerate(rates.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        at = sorted(mine)
        low, mean, high = zip(*((mine[t].low, mine[t].mean, mine[t].high) for t in at), strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(at, mean, color=colour, marker=marker, markersize=5, linewidth=1.4, label=_name(name))
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle="--", zorder=1)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("sampling temperature", fontsize=9)
    axes.set_ylabel(f"win rate over {_name(baseline)}, 95 % interval", fontsize=9)
    _head(axes, "Win rate by temperature")
    write(made, [axes], path)


def _dots(axes: Axes, at: np.ndarray, rates: Sequence[Interval], colour: str, marker: str, label: str) -> None:
    """Points with horizontal intervals, one a line; a point may lie outside its interval by a rounding error."""
    mean = np.array([one.mean for one in rates])
    reach = np.array([(one.mean - one.low, one.high - one.mean) for one in rates]).T
    axes.errorbar(
        mean,
        at,
        xerr=np.maximum(reach, 0),
        color=colour,
        label=label,
        fmt=marker,
        markersize=5,
        elinewidth=1.4,
        capsize=2.5,
        zorder=2,
    )


def _rating(strength: Any) -> Any:
    return START + SCALE * strength


def _strength(rating: Any) -> Any:
    return (rating - START) / SCALE


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top


def _head(axes: Axes, title: str) -> None:
    """The title and, below it, the legend in a row: inside, it would hide what is drawn."""
    axes.set_title(title, loc="left", fontsize=11, pad=22)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)


def _against(one: Comparison) -> str:
    return f"{_name(one.system)} : {_name(one.baseline)}"


def _name(name: str) -> str:
    short = name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
    return short.replace("$", r"\$")  # two of them would begin and end a formula
