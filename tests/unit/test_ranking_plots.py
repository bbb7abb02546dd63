"""Pictures of a reward model: they show the figures they are given, for odd inputs too, and appear at once or not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlhf_pipeline.evaluation import ranking_plots
from rlhf_pipeline.evaluation.ranking_metrics import Judged, measure

# Reward gaps of the comparisons 0>1, 0>2, 0>3, 1>3, 2>3: 1, -1, 1, 0, 2.
FOUR = Judged(
    reward=np.array([2.0, 1, 3, 1]),
    prompt=np.zeros(4, np.int64),
    rank=np.array([0, 1, 1, 2], np.int32),
    score=np.full(4, np.nan, np.float32),
    length=np.ones(4, np.int64),
)
ODD = {
    "a ranking": FOUR,
    "all tie": replace(FOUR, rank=np.zeros(4, np.int32)),
    "none is best": replace(FOUR, rank=np.arange(1, 5, dtype=np.int32)),
    "constant rewards": replace(FOUR, reward=np.full(4, 3.0)),
    "rewards a rounding error apart": replace(FOUR, reward=np.array([1e8, 1e8, np.nextafter(1e8, 2e8), 1e8])),
    "always wrong": replace(FOUR, reward=np.array([-9.0, 1, 3, 9])),
    "one response": Judged(**{name: getattr(FOUR, name)[:1] for name in Judged.__slots__}),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of what would have been written."""
    panels: list[Any] = []
    monkeypatch.setattr(ranking_plots.pictures, "write", lambda figure, axes, path: panels.extend(axes))
    return panels


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("error")
def test_pictures_of_odd_rankings(name: str, tmp_path: Path) -> None:
    ranking_plots.reliability(measure(ODD[name]), tmp_path / "reliability.png")
    ranking_plots.rewards(ODD[name], tmp_path / "rewards.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reliability.png", "rewards.png"]
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert (picture.format, picture.width) == ("PNG", 720)


def test_the_diagram_shows_the_bins(drawn: list[Any]) -> None:
    ranking_plots.reliability(measure(FOUR), Path("unused.png"))
    upper, lower = drawn
    (points,) = (line for line in upper.get_lines() if line.get_marker() == "o")
    assert points.get_xdata() == pytest.approx([0.5, 0.7310586, 0.8807971])
    assert points.get_ydata() == pytest.approx([0.5, 2 / 3, 1])
    assert [bar.get_x() for bar in lower.patches] == pytest.approx([0.5, 0.7, 0.85])
    assert [bar.get_height() for bar in lower.patches] == pytest.approx([20, 60, 20])
    (text,) = upper.texts
    assert text.get_text().splitlines() == [
        "accuracy 70.0% [70.0%, 70.0%]",
        "calibration error (ECE) 0.062",
        "5 comparisons, 1 prompt",
    ]


def test_no_comparison_is_said_to_be_none(drawn: list[Any]) -> None:
    ranking_plots.reliability(measure(ODD["all tie"]), Path("unused.png"))
    assert [text.get_text() for text in drawn[0].texts] == ["no comparisons"]


@pytest.mark.parametrize(("shift", "scale", "best", "others"), [(0.0, 1.0, "2.00", "1.67"), (1.0, 0.5, "2.00", "1.33")])
def test_rewards_by_group(drawn: list[Any], shift: float, scale: float, best: str, others: str) -> None:
    """The shift is subtracted, then the scale divides: best (2 - 1) / 0.5; others (5/3 - 1) / 0.5."""
    ranking_plots.rewards(FOUR, Path("unused.png"), shift=shift, scale=scale)
    (axes,) = drawn
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        f"best answers (1), mean {best}",
        f"other answers (3), mean {others}",
    }
    assert axes.get_xlabel() == ("reward" if shift == 0 else "reward, shifted and scaled")
    for outline in axes.patches:  # filled and drawn: each group's shares add up to 100 %
        assert outline.get_data().values.sum() == pytest.approx(100)


def test_a_failure_leaves_the_picture_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def full_disk(figure: Figure, path: Path, **settings: Any) -> None:
        path.write_bytes(b"half a pic")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    (tmp_path / "rewards.png").write_bytes(b"before")
    with pytest.raises(OSError, match="no space"):
        ranking_plots.rewards(FOUR, tmp_path / "rewards.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("rewards.png", b"before")]


def test_pyplot_and_its_global_state_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    ranking_plots.rewards(FOUR, tmp_path / "rewards.png")
    assert "matplotlib.pyplot" not in sys.modules
