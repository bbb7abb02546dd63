"""Pictures of the frontier show the figures that they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlhf_pipeline.data.lab.summary import Mean
from rlhf_pipeline.evaluation import frontier_plots
from rlhf_pipeline.evaluation.diversity import Diversity
from rlhf_pipeline.evaluation.frontier import Point
from rlhf_pipeline.scoring.best_of import kl_upper_bound

SPREAD = Diversity(
    answers=1, tokens=1.0, characters=1.0, finished=1.0, distinct_1=None, distinct_2=None, distinct_3=None,
    identical=None, similarity=None,
)  # fmt: skip


def around(value: float, reach: float) -> Mean:
    return Mean(mean=value, low=value - reach, high=value + reach, count=9)


def point(system: str, method: str, kl: float, gold: float, rm: float, *, bound: bool = False) -> Point:
    return Point(
        system=system,
        label="step_1",
        method=method,
        step=1,
        kl=around(kl, 0.0 if bound else kl / 4),
        kl_is_bound=bound,
        scores={"gold": around(gold, 0.1), "rm": around(rm, 0.5)},
        entropy=None,
        diversity=SPREAD,
    )


POINTS = [
    *(point("mine", "ppo", kl, gold, rm) for kl, gold, rm in ((1.0, 0.5, 1), (4.0, 0.7, 2), (16.0, 0.6, 3))),
    point("ipo", "ipo", 2.0, 0.6, 1.5),
    *(point("best_of_n", "best_of_n", kl_upper_bound(n), n / 9, n, bound=True) for n in (1, 4)),
]
ODD = {
    "all": POINTS,
    "one": POINTS[:1],
    "bounds alone": POINTS[4:],
    "many systems": [point(f"s{i}", "dpo", 1.0 + i, 0.1 * i, i) for i in range(12)],
    "the reference itself": [point("sft", "sft", 0.0, 0.5, 1)],
    "a KL that rounding made negative": [point("sft", "sft", -1e-9, 0.5, 1)],
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of what would have been written."""
    panels: list[Any] = []
    monkeypatch.setattr(frontier_plots, "write", lambda figure, axes, path: panels.extend(axes))
    return panels


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("error")
def test_pictures_of_odd_points(name: str, tmp_path: Path) -> None:
    frontier_plots.reward_against_kl(ODD[name], "gold", tmp_path / "frontier.png")
    frontier_plots.gold_against_proxy(ODD[name], "gold", "rm", tmp_path / "proxy_gold.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frontier.png", "proxy_gold.png"]
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG"


def lines_of(axes: Any) -> dict[str, Any]:
    """What the legend calls each line, and the line with its bars."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def test_a_line_a_system_and_the_best_of_n_dashed(drawn: list[Any]) -> None:
    frontier_plots.reward_against_kl(POINTS, "gold", Path("unused.png"))
    (axes,) = drawn
    lines = lines_of(axes)
    assert list(lines) == ["mine (ppo)", "ipo", frontier_plots.BOUND]
    line, _, bars = lines["mine (ppo)"]
    assert line.get_xdata().tolist() == [1, 4, 16] and line.get_ydata().tolist() == [0.5, 0.7, 0.6]
    across, up = (np.array(one.get_segments()) for one in bars)
    np.testing.assert_allclose(across[:, :, 0], [[0.75, 1.25], [3, 5], [12, 20]])
    np.testing.assert_allclose(up[:, :, 1], [[0.4, 0.6], [0.6, 0.8], [0.5, 0.7]])
    bound = lines[frontier_plots.BOUND][0]
    assert (line.get_linestyle(), bound.get_linestyle()) == ("-", "--")
    assert bound.get_xdata() == pytest.approx([0, 0.6362944]) and "upper bound" in frontier_plots.BOUND
    assert len({line.get_color(), lines["ipo"][0].get_color(), bound.get_color()}) == 3
    left, one, four = axes.transData.transform([(0, 0.5), (1, 0.5), (4, 0.5)])[:, 0]
    assert four - left == pytest.approx(2 * (one - left))  # the axis is that of the root
    assert "gold" in axes.get_ylabel() and "KL(policy || reference)" in axes.get_xlabel()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.1", "0.5", "1", "2", "5", "10", "20"]


def test_gold_against_proxy(drawn: list[Any]) -> None:
    frontier_plots.gold_against_proxy(POINTS, "gold", "rm", Path("unused.png"))
    (axes,) = drawn
    lines = lines_of(axes)
    assert list(lines) == ["mine (ppo)", "ipo", "best of N of the reference"]
    assert lines["mine (ppo)"][0].get_xdata().tolist() == [1, 2, 3]
    assert lines["mine (ppo)"][0].get_ydata().tolist() == [0.5, 0.7, 0.6]
    assert "gold" in axes.get_ylabel() and "rm" in axes.get_xlabel()


def test_styles_tell_systems_apart(drawn: list[Any]) -> None:
    frontier_plots.reward_against_kl(ODD["many systems"], "gold", Path("unused.png"))
    lines = [one[0] for one in lines_of(drawn[0]).values()]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 12
