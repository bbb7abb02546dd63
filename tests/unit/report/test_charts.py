"""Pictures for a page: the numbers they are given, no colour of their own, the same bytes again, and peaks kept."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from rlhf_pipeline.report import charts
from rlhf_pipeline.report.charts import Series
from rlhf_pipeline.report.thin import smoothed, thinned
from rlhf_pipeline.report.values import Interval

EVIL = '<script>alert(1)</script> & $x^2$ --> "#010203"'


def interval(mean: float, reach: float = 0.1) -> Interval:
    return Interval(mean=mean, low=mean - reach, high=mean + reach)


def drawn() -> dict[str, str]:
    x = np.arange(500.0)
    noisy = Series(x=x, y=np.sin(x) + x)
    points = Series(x=x[::100], y=x[::100], low=x[::100] - 1, high=x[::100] + 1, colour=9, style="dots")
    return {
        "curves": charts.curves([noisy, points], "one", x="step", y=EVIL, end=500.0, level=3.0),
        "reliability": charts.reliability([(0.55, interval(0.6), 0.8), (0.75, interval(0.7), 0.2)], "two"),
        "whiskers": charts.whiskers([(EVIL, interval(0.5), 0), ("b", interval(0.7), 1)], "three", x="x", level=0.5),
        "stacked": charts.stacked([(EVIL, [1.0, 2.0])], "four", x="minutes"),
        "frontier": charts.frontier([Series(x=x[:3], y=x[:3], style="dots", is_hollow=True)], "five", y="gold"),
    }


@pytest.fixture(scope="module")
def pictures() -> dict[str, str]:
    return drawn()


def test_pictures_are_the_same_again(pictures: dict[str, str]) -> None:
    assert drawn() == pictures


@pytest.mark.parametrize("name", ["curves", "reliability", "whiskers", "stacked", "frontier"])
def test_a_picture_takes_its_colours_from_the_page(pictures: dict[str, str], name: str) -> None:
    svg = pictures[name]
    ElementTree.fromstring(svg)  # well formed
    without_text = re.sub(r"<text.*?</text>", "", svg)
    assert re.findall(r"(?:fill|stroke): (?!none|var\()[^;\"]+", without_text) == []
    assert "var(--ink)" in svg
    assert "var(--series-0)" in svg
    assert not re.search(r"<(style|metadata|script|image|!)|http|font-family|DejaVu", without_text)


def test_ids_are_the_pictures_own_and_there(pictures: dict[str, str]) -> None:
    whole = "".join(pictures.values())
    ids = re.findall(r' id="([^"]+)"', whole)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', whole)) == set(ids)


def test_labels_are_text_letter_for_letter(pictures: dict[str, str]) -> None:
    texts = ["".join(one.itertext()) for one in ElementTree.fromstring(pictures["curves"]).iter() if one.tag == "text"]
    assert any(text.startswith("<script>alert(1)</script> & $x^2$ -->") for text in texts)


def test_a_constant_is_drawn_as_one() -> None:
    y = np.full(50, 0.005) + np.linspace(0, 1e-15, 50)
    svg = charts.curves([Series(x=np.arange(50.0), y=y, is_exact=True)], "beta", x="step", y="beta")
    assert {">0.000<", ">0.010<"} <= set(re.findall(r">[\d.]+<", svg))


def test_what_lies_below_the_lowest_is_cut_off() -> None:
    one = Series(x=np.arange(3.0), y=np.array([-17.0, 0.2, 0.6]), is_exact=True)
    labels = re.findall(r">(−?[\d.]+)</text>", charts.curves([one], "variance", x="step", y="share", lowest=-1.0))
    assert "−17.5" not in labels
    assert "−1.00" in labels or "−1.0" in labels


@pytest.mark.parametrize(("most", "ticks"), [(20.0, [0, 0.5, 2, 5, 10, 20]), (1.0, [0, 0.02, 0.1, 0.5, 1]), (0.0, [0])])
def test_ticks_of_the_root_scale(most: float, ticks: list[float]) -> None:
    assert charts._root_ticks(most) == pytest.approx(ticks)


def test_thinning_keeps_peaks_and_ends() -> None:
    x = np.arange(10_000.0)
    y = np.zeros(10_000)
    y[1234], y[5678], y[0], y[-1] = 9.0, -9.0, 1.0, 2.0
    short_x, short_y = thinned(x, y, points=100)
    assert len(short_x) <= 100
    assert {0.0, 1234.0, 5678.0, 9999.0} <= set(short_x)
    assert (short_y.max(), short_y.min()) == (9.0, -9.0)
    assert (np.diff(short_x) > 0).all()
    assert thinned(x[:50], y[:50], points=50)[0] is not None


def test_the_mean_over_neighbours_by_hand() -> None:
    y = np.array([1.0, 2, 6, 3, 8])
    assert smoothed(y, window=3) == pytest.approx([1.5, 3, 11 / 3, 17 / 3, 5.5])
