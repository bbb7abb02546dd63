"""Pictures of win rates and rankings: they show the figures they are given, for odd inputs too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlhf_pipeline.evaluation import winrate_plots
from rlhf_pipeline.evaluation.intervals import ClusterMean
from rlhf_pipeline.evaluation.length_control import LengthControlled
from rlhf_pipeline.evaluation.strengths import Strength
from rlhf_pipeline.evaluation.winrate import Comparison


def rate(mean: float, reach: float = 0.05) -> ClusterMean:
    return ClusterMean(mean=mean, low=mean - reach, high=mean + reach, count=9, prompts=9)


def comparison(system: str, baseline: str, mean: float, controlled: float | None = None) -> Comparison:
    length = None if controlled is None else LengthControlled(mean=controlled, low=controlled, high=controlled)
    return Comparison(
        system=system,
        baseline=baseline,
        win_rate=rate(mean),
        wins=1,
        ties=0,
        losses=0,
        disagreed=0,
        malformed=0,
        length_controlled=length,
        by_category={},
    )


def strength(mean: float) -> Strength:
    return Strength(strength=mean, low=mean - 0.2, high=mean + 0.3, elo=1000, online_elo=1000, win_rate=0.5)


TWO = [comparison("sft", "base", 0.8, 0.6), comparison("ppo", "base", 0.9)]
THREE = [*TWO, comparison("ppo", "sft", 0.7)]
CERTAIN = [comparison("$a_{" * 9 + "$", "base", 1.0)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of what would have been written."""
    panels: list[Any] = []
    monkeypatch.setattr(winrate_plots, "write", lambda figure, axes, path: panels.extend(axes))
    return panels


@pytest.mark.filterwarnings("error")
def test_pictures_are_written(tmp_path: Path) -> None:
    winrate_plots.win_rates(THREE, tmp_path / "all.png")
    winrate_plots.win_rates(CERTAIN, tmp_path / "certain.png")
    winrate_plots.strengths({"a": strength(0.5), "b": strength(-0.5)}, tmp_path / "rank.png")
    winrate_plots.matrix(["base", "sft", "ppo", "alone"], THREE, tmp_path / "matrix.png")
    winrate_plots.by_temperature({"sft": {0.0: rate(0.6)}}, "base", tmp_path / "temperature.png")
    names = ["all.png", "certain.png", "matrix.png", "rank.png", "temperature.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 300


def points(axes: Any) -> list[tuple[float, float]]:
    """(x, y) of all dots."""
    found = [line for line in axes.get_lines() if line.get_marker() in ("o", "D")]
    return [pair for line in found for pair in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_win_rates_are_drawn_where_they_are(drawn: list[Any]) -> None:
    winrate_plots.win_rates(TWO, Path("unused.png"))
    (axes,) = drawn
    assert points(axes) == [(0.8, pytest.approx(-0.13)), (0.9, pytest.approx(0.87)), (0.6, pytest.approx(0.13))]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sft", "ppo"]
    assert axes.get_xlabel() == "win rate over base"
    bars = axes.collections[0].get_segments()
    assert [bar[:, 0].tolist() for bar in bars] == [pytest.approx([0.75, 0.85]), pytest.approx([0.85, 0.95])]


def test_with_several_baselines_each_line_says_which(drawn: list[Any]) -> None:
    winrate_plots.win_rates(THREE, Path("unused.png"))
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == ["sft : base", "ppo : base", "ppo : sft"]
    assert drawn[0].get_xlabel() == "win rate"


def test_the_ranking(drawn: list[Any]) -> None:
    winrate_plots.strengths({"a": strength(0.5), "b": strength(-0.5)}, Path("unused.png"))
    (axes,) = drawn
    assert points(axes) == [(0.5, 0), (-0.5, 1)]
    assert [bar[:, 0].tolist() for bar in axes.collections[0].get_segments()] == [
        pytest.approx([0.3, 0.8]),
        pytest.approx([-0.7, -0.2]),
    ]
    low, high = axes.get_ylim()
    assert low > high  # the first is on top


def test_the_matrix_has_both_ways_of_each_pair(drawn: list[Any]) -> None:
    winrate_plots.matrix(["base", "sft", "ppo", "alone"], THREE, Path("unused.png"))
    (axes,) = drawn
    shown = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
    nan = np.nan
    expected = [[nan, 0.2, 0.1, nan], [0.8, nan, 0.3, nan], [0.9, 0.7, nan, nan], [nan] * 4]
    assert np.allclose(shown, expected, equal_nan=True)
    assert sorted(text.get_text() for text in axes.texts) == ["0.10", "0.20", "0.30", "0.70", "0.80", "0.90"]


def test_temperatures_are_in_order(drawn: list[Any]) -> None:
    rates = {"sft": {1.0: rate(0.5), 0.0: rate(0.7), 0.5: rate(0.6)}, "ppo": {0.0: rate(0.8)}}
    winrate_plots.by_temperature(rates, "base", Path("unused.png"))
    (axes,) = drawn
    sft, ppo, _half = axes.get_lines()
    assert list(sft.get_xdata()) == [0.0, 0.5, 1.0] and list(sft.get_ydata()) == [0.7, 0.6, 0.5]
    assert list(ppo.get_ydata()) == [0.8] and ppo.get_marker() != sft.get_marker()
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.45, 0.75))
    assert "base" in axes.get_ylabel() and axes.get_xlabel() == "sampling temperature"
