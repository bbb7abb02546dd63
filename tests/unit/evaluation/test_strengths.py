"""Strengths and ratings: by hand, planted, and by other fits."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from rich.console import Console

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.strengths import PRIOR, Games, bradley_terry, online_elo, ranking, show
from rlhf_pipeline.judging.pairs import Outcome, Ruling, Verdict

NAMES = ("strong", "good", "fair", "weak")
PLANTED = np.array([1.2, 0.5, -0.3, -1.4])


def ruling(value: float | None) -> Ruling:
    none = Verdict(outcome=Outcome.malformed, reason="")
    return Ruling(value=value, agreed=value is not None, verdicts=(none, none))


def rulings(values: Mapping[tuple[str, str], Sequence[float | None]]) -> dict[tuple[str, str], list[Ruling]]:
    return {pair: [ruling(value) for value in mine] for pair, mine in values.items()}


def planted(prompts: int, *, seed: int = 0) -> dict[tuple[str, str], list[float | None]]:
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, str], list[float | None]] = {}
    for j in range(4):
        for i in range(j):
            chance = 1 / (1 + math.exp(PLANTED[i] - PLANTED[j]))
            found[NAMES[j], NAMES[i]] = (rng.random(prompts) < chance).astype(float).tolist()
    return found


def test_two_systems_by_hand() -> None:
    """7 wins, 2 ties, 1 loss: 8 of 10 points, and the prior's tenth of a tie."""
    found = ranking(["a", "b"], rulings({("a", "b"): [1.0] * 7 + [0.5] * 2 + [0.0]}), np.arange(10))
    share = (8 + PRIOR / 2) / (10 + PRIOR)
    apart = math.log(share / (1 - share))
    assert list(found) == ["a", "b"]
    assert found["a"].strength == pytest.approx(apart / 2) and found["b"].strength == pytest.approx(-apart / 2)
    assert found["a"].elo - found["b"].elo == pytest.approx(400 * math.log10(share / (1 - share)))
    assert found["a"].elo + found["b"].elo == pytest.approx(2000)
    assert (found["a"].win_rate, found["b"].win_rate) == pytest.approx((0.8, 0.2))
    assert apart == pytest.approx(math.log(0.8 / 0.2), abs=0.02)  # the prior is small


def test_planted_strengths_are_found() -> None:
    found = ranking(NAMES, rulings(planted(1500)), np.arange(1500))
    assert list(found) == list(NAMES)
    assert [one.strength for one in found.values()] == pytest.approx(PLANTED.tolist(), abs=0.08)
    assert sum(one.strength for one in found.values()) == pytest.approx(0, abs=1e-9)
    for one, truth in zip(found.values(), PLANTED, strict=True):
        assert one.low < truth < one.high and 0.05 < one.high - one.low < 0.25


def test_it_is_the_fit_of_scikit_learn() -> None:
    """Bradley-Terry is a logistic regression on which systems met; the prior's ties are rows as well."""
    linear = pytest.importorskip("sklearn.linear_model")
    values = planted(60, seed=1)
    values["weak", "fair"] = [0.5] * 60
    rows, target, weight = [], [], []
    for (one, other), mine in values.items():
        row = np.zeros(4)
        row[NAMES.index(one)], row[NAMES.index(other)] = 1, -1
        for value, times in [*((value, 1.0) for value in mine), (0.5, PRIOR)]:
            assert value is not None
            rows += [row, row]
            target += [1, 0]
            weight += [times * value, times * (1 - value)]
    model = linear.LogisticRegression(C=1e9, fit_intercept=False, tol=1e-12, max_iter=100_000)
    model.fit(np.array(rows), target, sample_weight=weight)
    expected = model.coef_[0] - model.coef_[0].mean()
    found = ranking(NAMES, rulings(values), np.arange(60))
    assert [found[name].strength for name in NAMES] == pytest.approx(expected.tolist(), abs=1e-4)


def test_who_always_wins_is_finitely_strong() -> None:
    found = ranking(["a", "b", "c"], rulings({("a", "b"): [1.0] * 50, ("b", "c"): [1.0, 0.0] * 25}), np.arange(50))
    assert 2 < found["a"].strength < 10 and np.isfinite([found["a"].low, found["a"].high]).all()
    assert found["a"].strength - found["b"].strength == pytest.approx(math.log((50 + PRIOR / 2) / (PRIOR / 2)))
    assert found["b"].strength == pytest.approx(found["c"].strength)


def test_systems_are_compared_by_way_of_others() -> None:
    """a and c never met: what a is ahead of b and b of c adds up."""
    values = {("a", "b"): [1.0] * 3 + [0.0], ("c", "b"): [0.0] * 2 + [1.0] + [0.0]}
    found = ranking(["a", "b", "c"], rulings(values), np.arange(4))
    share = (3 + PRIOR / 2) / (4 + PRIOR)
    assert found["a"].strength - found["c"].strength == pytest.approx(2 * math.log(share / (1 - share)))


def test_groups_that_never_met_are_refused() -> None:
    values: dict[tuple[str, str], list[float | None]] = {
        ("a", "b"): [1.0, 0.0],
        ("c", "d"): [1.0, 0.5],
        ("a", "d"): [None, None],  # malformed verdicts compare nobody
    }
    with pytest.raises(UserError, match=r"a, b; c, d; e"):
        ranking(list("abcde"), rulings(values), np.arange(2))
    values["a", "d"] = [None, 0.0]
    with pytest.raises(UserError, match=r"a, b, c, d; e|c, d, a, b; e"):
        ranking(list("abcde"), rulings(values), np.arange(2))
    assert len(ranking(list("abcd"), rulings(values), np.arange(2))) == 4


def test_prompts_are_drawn_whole() -> None:
    """Four prompts that ask the same say no more than one of them."""
    values = planted(100, seed=2)
    four = {pair: [value for value in mine for _ in range(4)] for pair, mine in values.items()}
    one = ranking(NAMES, rulings(values), np.arange(100))["strong"]
    together = ranking(NAMES, rulings(four), np.repeat(np.arange(100), 4))["strong"]
    apart = ranking(NAMES, rulings(four), np.arange(400))["strong"]
    assert together.high - together.low == pytest.approx(one.high - one.low, rel=0.1)
    assert apart.high - apart.low == pytest.approx((one.high - one.low) / 2, rel=0.15)


def test_several_tournaments_at_once_are_each_alone() -> None:
    rng = np.random.default_rng(3)
    wins = rng.integers(1, 9, (5, 3, 3)).astype(float) * (1 - np.eye(3))
    together = bradley_terry(wins)
    alone = np.concatenate([bradley_terry(one[None]) for one in wins])
    assert together == pytest.approx(alone, abs=1e-9)


def test_one_game_of_elo_by_hand() -> None:
    one = Games(first=np.array([0]), second=np.array([1]), value=np.array([1.0]), prompt=np.array([0]))
    assert online_elo(one, 3).tolist() == pytest.approx([1002, 998, 1000])
    # A second win is worth less: 4 (1 - 1 / (1 + 10^(-4 / 400))).
    two = Games(first=np.array([0, 1]), second=np.array([1, 0]), value=np.array([1.0, 0.0]), prompt=np.array([0, 1]))
    gained = 4 * (1 - 1 / (1 + 10 ** (-4 / 400)))
    assert online_elo(two, 2).tolist() == pytest.approx([1002 + gained, 998 - gained])


def test_ratings_are_in_the_order_of_strengths_whatever_the_order_of_games() -> None:
    values = planted(200, seed=4)
    found = ranking(NAMES, rulings(values), np.arange(200))
    turned = ranking(NAMES, rulings({pair: mine[::-1] for pair, mine in values.items()}), np.arange(200))
    online = [found[name].online_elo for name in NAMES]
    assert online == sorted(online, reverse=True)
    assert sum(online) == pytest.approx(4000)
    assert [turned[name].online_elo for name in NAMES] == pytest.approx(online, abs=3)
    assert [turned[name].elo for name in NAMES] == pytest.approx([found[name].elo for name in NAMES])


def test_the_table() -> None:
    out = io.StringIO()
    show(Console(file=out, width=120), ranking(["a[b]", "c"], rulings({("a[b]", "c"): [1.0, 0.5]}), np.arange(2)))
    assert "a[b]" in out.getvalue() and "0.750" in out.getvalue()
