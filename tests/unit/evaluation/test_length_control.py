"""Length-controlled win rates: planted biases, an independent fit, and what the model promises."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_pipeline.evaluation.length_control import RIDGE, Compared, joint_difficulty, length_controlled


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def judged(
    rng: np.random.Generator, size: int, *, theta: float = 0.0, phi: float = 0.0, gamma: np.ndarray | float = 0.0
) -> Compared:
    """Verdicts of a judge whose preference is the model's, on answers that are longer more often than not."""
    longer = rng.normal(80, 100, size)
    chance = sigmoid(theta + phi * np.tanh(longer / longer.std(ddof=1)) + gamma)
    return Compared(value=(rng.random(size) < chance).astype(float), longer=longer)


def test_a_pure_length_bias_is_taken_away() -> None:
    compared = judged(np.random.default_rng(0), 1500, phi=2.0)
    found = length_controlled(compared)
    assert compared.value.mean() > 0.65
    assert found is not None and found.low < 0.5 < found.high and abs(found.mean - 0.5) < 0.04


def test_a_judge_that_goes_by_the_raw_difference_in_length_is_no_exception() -> None:
    """Its preference is not the model's: sigmoid of the difference itself, not of its tanh."""
    rng = np.random.default_rng(1)
    longer = rng.normal(1.0, 1.5, 1500)
    compared = Compared(value=(rng.random(1500) < sigmoid(longer)).astype(float), longer=longer)
    found = length_controlled(compared)
    assert compared.value.mean() > 0.62
    assert found is not None and abs(found.mean - 0.5) < 0.05


def test_a_real_difference_stays() -> None:
    compared = judged(np.random.default_rng(2), 1500, theta=1.0, phi=2.0)
    found = length_controlled(compared)
    truth = sigmoid(np.array(1.0))
    assert found is not None and found.low < truth < found.high and abs(found.mean - truth) < 0.04
    assert compared.value.mean() > truth + 0.04


@pytest.mark.parametrize("with_difficulty", [False, True])
def test_it_is_the_fit_of_scikit_learn(with_difficulty: bool) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(3)
    gamma = rng.normal(size=300)
    compared = judged(rng, 300, theta=0.4, phi=1.2, gamma=0.8 * gamma * with_difficulty)
    compared.value[:60] = 0.5
    found = length_controlled(compared, difficulty=gamma if with_difficulty else None)

    term = np.tanh(compared.longer / compared.longer.std(ddof=1))
    features = np.stack([np.ones(300), term, gamma][: 3 if with_difficulty else 2], axis=1)
    # Soft targets, as everywhere: each row once as won and once as lost, weighted by how much of either it was.
    model = linear.LogisticRegression(C=1 / RIDGE, fit_intercept=False, tol=1e-10, max_iter=10_000)
    weight = np.concatenate([compared.value, 1 - compared.value])
    model.fit(np.concatenate([features, features]), np.repeat([1, 0], 300), sample_weight=weight)
    features[:, 1] = 0
    assert found is not None
    assert found.mean == pytest.approx(model.predict_proba(features)[:, 1].mean(), abs=1e-6)
    loose = linear.LogisticRegression(C=1e8, fit_intercept=False, tol=1e-10, max_iter=10_000)
    features[:, 1] = term
    loose.fit(np.concatenate([features, features]), np.repeat([1, 0], 300), sample_weight=weight)
    features[:, 1] = 0
    assert found.mean == pytest.approx(loose.predict_proba(features)[:, 1].mean(), abs=1e-4)  # the ridge hardly shows


def test_the_other_way_round_it_is_one_less() -> None:
    rng = np.random.default_rng(4)
    gamma = rng.normal(size=120)
    compared = judged(rng, 120, theta=0.7, phi=1.0, gamma=gamma)
    turned = Compared(value=1 - compared.value, longer=-compared.longer)
    one, other = length_controlled(compared, difficulty=gamma), length_controlled(turned, difficulty=gamma)
    assert one is not None and other is not None
    assert other.mean == pytest.approx(1 - one.mean, abs=1e-7)
    assert (other.low, other.high) == pytest.approx((1 - one.high, 1 - one.low), abs=1e-6)


def test_prompts_nobody_judged_do_not_count() -> None:
    compared = judged(np.random.default_rng(5), 200, theta=0.5, phi=1.0)
    longer = np.concatenate([compared.longer, [1e6, -1e6]])
    more = Compared(value=np.concatenate([compared.value, [np.nan, np.nan]]), longer=longer)
    assert length_controlled(more) == length_controlled(compared)


def test_who_always_wins_has_a_finite_rate() -> None:
    longer = np.random.default_rng(6).normal(0, 1, 100)
    found = length_controlled(Compared(value=np.ones(100), longer=longer))
    assert found is not None and 0.99 < found.low <= found.mean <= found.high < 1


def test_without_lengths_or_prompts_there_is_none() -> None:
    rng = np.random.default_rng(7)
    value = rng.integers(0, 2, 40).astype(float)
    assert length_controlled(Compared(value=value, longer=np.full(40, 3.0))) is None
    assert length_controlled(Compared(value=value, longer=rng.normal(1000, 1, 40))) is None  # all longer by the same
    assert length_controlled(Compared(value=value[:9], longer=rng.normal(size=9))) is None
    assert length_controlled(Compared(value=value[:10], longer=rng.normal(size=10))) is not None


def test_equal_prompts_are_drawn_together() -> None:
    compared = judged(np.random.default_rng(8), 100, phi=1.0)
    twice = Compared(value=np.repeat(compared.value, 4), longer=np.repeat(compared.longer, 4))
    apart = length_controlled(twice)
    together = length_controlled(twice, prompt=np.repeat(np.arange(100), 4))
    one = length_controlled(compared)
    assert apart is not None and together is not None and one is not None
    assert together.high - together.low == pytest.approx(one.high - one.low, rel=0.1)
    assert apart.high - apart.low == pytest.approx((one.high - one.low) / 2, rel=0.15)


def test_difficulties_are_found_from_the_other_systems() -> None:
    rng = np.random.default_rng(9)
    gamma = 2 * rng.normal(size=400)
    several = [judged(rng, 400, theta=theta, phi=1.0, gamma=gamma) for theta in (-1, -0.5, 0, 0, 0.5, 1, 1.5)]
    found = [np.zeros(0) if one is None else one for one in joint_difficulty(several)]
    assert all(abs(one.mean()) < 1e-9 for one in found)
    assert min(np.corrcoef(one, gamma)[0, 1] for one in found) > 0.75
    # A system's own verdicts have no part in its own: those of the others stay what they are.
    turned = Compared(value=1 - several[0].value, longer=several[0].longer)
    again = [np.zeros(0) if one is None else one for one in joint_difficulty([turned, *several[1:]])]
    assert np.array_equal(again[0], found[0]) and not np.allclose(again[1], found[1], atol=0.1)


def test_a_single_system_has_no_difficulties() -> None:
    compared = judged(np.random.default_rng(10), 50)
    assert joint_difficulty([compared]) == [None]
    none = Compared(value=np.full(50, np.nan), longer=compared.longer)
    assert joint_difficulty([compared, none])[0] is None
