"""Pictures of `ranking_metrics`: the reliability diagram, and the rewards of the best answers against the others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_pipeline.evaluation import pictures
from rlhf_pipeline.evaluation.pictures import BLUE, GREY, ORANGE
from rlhf_pipeline.evaluation.ranking_metrics import CALIBRATION_BINS, Judged, RankingMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BINS = 40


def reliability(metrics: RankingMetrics, path: Path) -> None:
    """How often the model was right by how sure it was, with 95 % intervals, over how often it was so sure.

    Points on the diagonal are calibrated; below it the model is surer than it should be. Without comparisons the
    diagram is empty.
    """
    figure = pictures.figure(6, 4.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
    bins = metrics.calibration
    upper.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated", zorder=1)
    if bins:
        expected = np.array([one.expected for one in bins])
        observed = np.array([one.observed.mean for one in bins])
        reach = np.array(
            [(one.observed.mean - one.observed.low, one.observed.high - one.observed.mean) for one in bins]
        )
        upper.errorbar(
            expected,
            observed,
            yerr=np.maximum(reach.T, 0),
            color=BLUE,
            marker="o",
            markersize=4.5,
            linewidth=1.2,
            elinewidth=1,
            capsize=2,
            label="reward model, 95 % interval",
            zorder=2,
        )
        lower.bar(
            [one.low for one in bins],
            [100 * one.count / metrics.pairs for one in bins],
            width=0.5 / CALIBRATION_BINS,
            align="edge",
            color=BLUE,
            edgecolor="white",
            linewidth=0.8,
        )
    upper.text(
        0.98,
        0.05,
        _headline(metrics),
        transform=upper.transAxes,
        ha="right",
        va="bottom",
        fontsize=9,
        linespacing=1.4,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
        zorder=3,
    )
    lowest = min((one.observed.low for one in bins), default=0.5)
    upper.set_ylim(max(-0.02, min(0.5, lowest) - 0.04), 1.02)
    upper.set_xlim(0.495, 1.005)
    upper.set_ylabel("share that was right", fontsize=9)
    lower.set_ylabel("share, %", fontsize=9)
    lower.set_xlabel("confidence: predicted probability that the higher reward wins", fontsize=9)
    _head(upper, "Reliability on held-out comparisons")
    pictures.write(figure, [upper, lower], path)


def rewards(judged: Judged, path: Path, *, shift: float = 0.0, scale: float = 1.0) -> None:
    """The distribution of the rewards of the best answers (rank 0) and of the others, with their means.

    `shift` and `scale` are the artifact's: rewards are shown less the shift and divided by the scale.
    """
    figure = pictures.figure(6, 3.8)
    axes = figure.subplots()
    values = (judged.reward - shift) / scale
    low, high = float(values.min()), float(values.max())
    margin = 0.5 if math.isclose(low, high, rel_tol=1e-6) else 0.0  # constant rewards: one bar in the middle
    bins = min(MOST_BINS, 2 * math.ceil(len(values) ** (1 / 3)))  # Rice's rule: few answers make few, wide bars
    edges = np.linspace(low - margin, high + margin, bins + 1)
    best = judged.rank == 0
    for name, mine, colour in (("other answers", ~best, ORANGE), ("best answers", best, BLUE)):
        if mine.any():
            share = 100 * np.histogram(values[mine], edges)[0] / mine.sum()
            mean = float(values[mine].mean())
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.22)
            axes.stairs(share, edges, color=colour, linewidth=1.4, label=f"{name} ({mine.sum():,}), mean {mean:.2f}")
            axes.axvline(mean, color=colour, linewidth=1.2, linestyle="--")
    _head(axes, "Rewards of held-out answers")
    is_normalised = (shift, scale) != (0.0, 1.0)
    axes.set_xlabel("reward, shifted and scaled" if is_normalised else "reward", fontsize=9)
    axes.set_ylabel("share of its group, %", fontsize=9)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    pictures.write(figure, [axes], path)


def _headline(metrics: RankingMetrics) -> str:
    accuracy = metrics.accuracy
    if accuracy is None or metrics.ece is None:
        return "no comparisons"
    return (
        f"accuracy {accuracy.mean:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}]\n"
        f"calibration error (ECE) {metrics.ece:.3f}\n"
        f"{accuracy.count:,} comparisons, {accuracy.prompts:,} prompt{'s' * (accuracy.prompts != 1)}"
    )


def _head(axes: Axes, title: str) -> None:
    """The title and, below it, the legend in a row: inside, it would hide what is drawn."""
    axes.set_title(title, loc="left", fontsize=11, pad=22)
    axes.legend(
        fontsize=8,
        frameon=False,
        ncols=2,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.3,
        borderpad=0,
        columnspacing=1.6,
    )
