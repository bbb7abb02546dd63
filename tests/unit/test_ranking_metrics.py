"""Measures of a reward model against numbers worked out by hand, plain loops, and simulated worlds."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest

from rlhf_pipeline.evaluation.intervals import cluster_means
from rlhf_pipeline.evaluation.ranking_metrics import (
    Judged,
    RankingMetrics,
    average_ranks,
    calibration,
    correct,
    correlations,
    flat,
    measure,
    pairs,
    pearson,
)


def judged(
    reward: list[float],
    *,
    rank: list[int] | None = None,
    prompt: list[int] | None = None,
    score: list[float] | None = None,
    length: list[int] | None = None,
) -> Judged:
    size = len(reward)
    return Judged(
        reward=np.array(reward, np.float64),
        prompt=np.array(prompt or [7] * size, np.int64),
        rank=np.array(rank or range(size), np.int32),
        score=np.array(score or [math.nan] * size, np.float32),
        length=np.array(length or range(1, size + 1), np.int64),
    )


PAIRS = 8_000

# One ranking of 4, the second and the third tied. Comparisons 0>1, 0>2, 0>3, 1>3, 2>3 have reward gaps 1, -1, 1, 0, 2:
# right 1, 0, 1, 0.5, 1.
FOUR = judged([2, 1, 3, 1], rank=[0, 1, 1, 2], score=[9, 5, 5, 1], length=[10, 30, 20, 20])


def world(prompts: int, *, seed: int = 0, sharpness: float = 1.0) -> Judged:
    """Rankings of 2 to 6 answers by Bradley-Terry labelers (Gumbel noise on true rewards); some scores are missing."""
    rng = np.random.default_rng(seed)
    parts = []
    for prompt in range(prompts):
        size = int(rng.integers(2, 7))
        true = rng.normal(size=size)
        liked = true + rng.gumbel(size=size)
        score = np.clip(np.round(liked), -2, 4) if prompt % 3 else np.full(size, np.nan)
        rank = np.unique(-np.round(liked, 1), return_inverse=True)[1]
        length = np.round(40 + 9 * true + 5 * rng.normal(size=size))
        parts.append((sharpness * true, np.full(size, prompt), rank, score, length))
    reward, prompt_, rank, score, length = (np.concatenate(column) for column in zip(*parts, strict=True))
    shuffled = rng.permutation(len(reward))
    return Judged(
        reward=reward[shuffled],
        prompt=prompt_[shuffled].astype(np.int64),
        rank=rank[shuffled].astype(np.int32),
        score=score[shuffled].astype(np.float32),
        length=length[shuffled].astype(np.int64),
    )


# --- comparisons


def test_pairs_of_a_ranking_with_a_tie() -> None:
    found = pairs(FOUR)
    assert set(zip(found.winner.tolist(), found.loser.tolist(), strict=True)) == {
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 3),
        (2, 3),
    }
    assert found.tied == 1
    assert found.prompt.tolist() == [7] * 5


def test_pairs_are_those_of_plain_loops() -> None:
    data = world(60)
    expected, tied = [], 0
    for i, j in combinations(range(len(data.reward)), 2):
        if data.prompt[i] == data.prompt[j]:
            better, worse = (i, j) if data.rank[i] < data.rank[j] else (j, i)
            if data.rank[i] == data.rank[j]:
                tied += 1
            else:
                expected.append((better, worse, int(data.prompt[i])))
    found = pairs(data)
    columns = (found.winner.tolist(), found.loser.tolist(), found.prompt.tolist())
    assert sorted(zip(*columns, strict=True)) == sorted(expected)
    assert found.tied == tied > 0


def test_a_ranking_by_hand() -> None:
    found = measure(FOUR)
    assert (found.responses, found.prompts, found.pairs, found.tied_pairs) == (4, 1, 5, 1)
    assert found.accuracy is not None and found.accuracy.mean == pytest.approx(3.5 / 5)
    assert {name: (one.mean, one.count) for name, one in found.accuracy_by_responses.items()} == {"4": (0.7, 5)}
    assert {name: (one.mean, one.count) for name, one in found.accuracy_by_distance.items()} == {
        "1": (2.5 / 4, 4),
        "2": (1.0, 1),
    }
    assert [(b.low, b.high, b.value.mean, b.value.count) for b in found.accuracy_by_margin] == [
        (4.0, 4.0, 2.5 / 4, 4),
        (8.0, 8.0, 1.0, 1),
    ]
    assert [(b.low, b.high, b.value.mean, b.value.count) for b in found.reward_by_score] == [
        (1.0, 1.0, 1.0, 1),
        (5.0, 5.0, 2.0, 2),
        (9.0, 9.0, 2.0, 1),
    ]
    assert (found.reward_mean, found.reward_chosen_mean) == (1.75, 2.0)
    assert found.reward_std == pytest.approx(math.sqrt(2.75 / 4))
    assert found.reward_other_mean == pytest.approx(5 / 3)


def test_ranks_far_apart_are_counted_together() -> None:
    found = measure(judged([6, 5, 4, 3, 2, 9], rank=[0, 1, 2, 3, 4, 5]))
    counts = {name: one.count for name, one in found.accuracy_by_distance.items()}
    assert counts == {"1": 5, "2": 4, "3": 3, "4+": 3}
    assert found.accuracy_by_distance["4+"].mean == pytest.approx(1 / 3)  # 0>4 right; 0>5 and 1>5 wrong
    assert flat(found)["eval/accuracy_distance4_or_more"] == pytest.approx(1 / 3)


def test_margins_that_are_equal_in_decimals_are_one_bin() -> None:
    data = judged(
        [1, 0] * 3, rank=[0, 1] * 3, prompt=[0, 0, 1, 1, 2, 2], score=[0.3, 0.2, 0.2, 0.1, 8.4, 8.3]
    )  # three float32 differences
    (only,) = measure(data).accuracy_by_margin
    assert (only.low, only.high, only.value.count) == (pytest.approx(0.1), pytest.approx(0.1), 3)


def test_many_scores_are_binned_by_quantile() -> None:
    size = 80
    data = judged(list(range(size)), rank=list(range(size))[::-1], score=list(range(size)))
    bins = measure(data).reward_by_score
    assert [(b.low, b.high, b.value.mean) for b in bins] == [(10 * i, 10 * i + 9, 10 * i + 4.5) for i in range(8)]


@pytest.mark.parametrize("part", ["accuracy_by_responses", "accuracy_by_distance", "calibration"])
def test_parts_make_up_the_whole(part: str) -> None:
    found = measure(world(200))
    parts = getattr(found, part)
    means = [b.observed for b in parts] if part == "calibration" else list(parts.values())
    assert len(means) > 2
    assert sum(one.count for one in means) == found.pairs
    assert found.accuracy is not None
    assert sum(one.mean * one.count for one in means) / found.pairs == pytest.approx(found.accuracy.mean)


def test_margins_make_up_the_scored_comparisons() -> None:
    data = world(200)
    scored = replace(
        data, **{f: getattr(data, f)[data.prompt % 3 > 0] for f in ("reward", "prompt", "rank", "score", "length")}
    )
    means = [one.value for one in measure(data).accuracy_by_margin]
    whole = measure(scored).accuracy
    assert whole is not None and sum(one.count for one in means) == whole.count
    assert sum(one.mean * one.count for one in means) / whole.count == pytest.approx(whole.mean)


# --- intervals


def test_interval_of_two_prompts_by_hand() -> None:
    """Samples are (A, A), (A, B) twice and (B, B), whose ratios of sums are 1, 3/4 and 0."""
    (found,) = cluster_means(np.array([1.0, 1, 1, 0]), np.array([4, 4, 4, 9]))
    assert (found.mean, found.low, found.high, found.count, found.prompts) == (0.75, 0.0, 1.0, 4, 2)


def test_interval_of_independent_prompts_is_the_binomial_one() -> None:
    (found,) = cluster_means(np.tile([0.0, 1.0], 50), np.arange(100))
    assert (found.low, found.high) == (pytest.approx(0.40, abs=0.011), pytest.approx(0.60, abs=0.011))


def test_groups_are_those_measured_one_by_one() -> None:
    rng = np.random.default_rng(0)
    values, prompt, group = rng.normal(size=300), rng.integers(40, size=300), rng.integers(3, size=300)
    prompt[group == 2] = 0  # one prompt, absent from about a third of the samples
    found = cluster_means(values, prompt, group, seed=5)
    for i, one in enumerate(found):
        mine = group == i
        assert one.mean == pytest.approx(values[mine].mean())
        assert (one.count, one.prompts) == (mine.sum(), len(np.unique(prompt[mine])))
        assert one.low <= one.mean <= one.high
    assert found[2].low == pytest.approx(found[2].high)
    (alone,) = cluster_means(values[group == 0], prompt[group == 0], seed=5)
    assert (alone.low, alone.high) == (pytest.approx(found[0].low, abs=0.05), pytest.approx(found[0].high, abs=0.05))


def test_intervals_hold_the_truth_as_often_as_they_say_only_over_prompts() -> None:
    """40 prompts with 6 comparisons each that share much of their luck; the true mean is 0."""
    rng = np.random.default_rng(1)
    prompt = np.repeat(np.arange(40), 6)
    held, held_if_independent = 0, 0
    for seed in range(200):
        values = rng.normal(size=40)[prompt] + 0.3 * rng.normal(size=240)
        (clustered,) = cluster_means(values, prompt, seed=seed)
        (independent,) = cluster_means(values, np.arange(240), seed=seed)
        held += clustered.low <= 0 <= clustered.high
        held_if_independent += independent.low <= 0 <= independent.high
    assert 0.88 <= held / 200 <= 0.99
    assert held_if_independent / 200 < 0.75


def test_the_seed_decides_the_interval_and_nothing_else() -> None:
    data = world(50)
    assert measure(data, seed=3) == measure(data, seed=3)
    first, second = measure(data, seed=3), measure(data, seed=4)
    assert first.accuracy is not None and second.accuracy is not None
    assert first.accuracy.mean == second.accuracy.mean
    assert (first.accuracy.low, first.accuracy.high) != (second.accuracy.low, second.accuracy.high)


# --- calibration


def test_calibration_by_hand() -> None:
    """Confidences sigmoid(1) three times (right 1, 0, 1), sigmoid(0) (half right) and sigmoid(2) (right)."""
    found = measure(FOUR)
    assert [(b.low, b.high, b.count) for b in found.calibration] == [(0.5, 0.55, 1), (0.7, 0.75, 3), (0.85, 0.9, 1)]
    assert [b.expected for b in found.calibration] == pytest.approx([0.5, 0.7310586, 0.8807971])
    assert [b.observed.mean for b in found.calibration] == pytest.approx([0.5, 2 / 3, 1.0])
    assert found.ece == pytest.approx((0 + 3 * 0.0643919 + 0.1192029) / 5, abs=1e-6)


def test_calibration_of_a_true_and_of_a_too_sharp_model() -> None:
    """Labels drawn from the rewards by Bradley-Terry; a model that triples them, or takes a third, is off."""
    rng = np.random.default_rng(2)
    reward = rng.normal(size=(PAIRS, 2))
    first_wins = rng.random(PAIRS) < 1 / (1 + np.exp(reward[:, 1] - reward[:, 0]))
    data = Judged(
        reward=reward.ravel(),
        prompt=np.repeat(np.arange(PAIRS), 2),
        rank=np.stack([~first_wins, first_wins], axis=1).ravel().astype(np.int32),
        score=np.full(2 * PAIRS, np.nan, np.float32),
        length=np.ones(2 * PAIRS, np.int64),
    )
    found = pairs(data)
    ece = {}
    for sharpness in (1 / 3, 1.0, 3.0, 1e6):
        ece[sharpness], _ = calibration(replace(data, reward=sharpness * data.reward), found)
    assert 0 < (ece[1.0] or 0) < 0.02
    assert (ece[1 / 3] or 0) > 0.08
    assert (ece[3.0] or 0) > 0.1
    # certain of everything, without an overflow on the way: the error is the share of wrong predictions
    assert ece[1e6] == pytest.approx(1 - correct(data, found).mean())


# --- what else rewards follow


def test_average_ranks_by_hand() -> None:
    assert average_ranks(np.array([30, 10, 20, 20, 20])).tolist() == [5.0, 1.0, 3.0, 3.0, 3.0]


def test_correlations_by_hand() -> None:
    x, y = np.array([10.0, 20, 20, 30]), np.array([1.0, 3, 2, 4])
    found = correlations(x, y, np.zeros(4, np.int64))
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5). Values: 30 / sqrt(200 * 5).
    assert found.spearman == pytest.approx(4.5 / math.sqrt(22.5))
    assert found.pearson == pytest.approx(30 / math.sqrt(1000))
    assert pearson(x, -x) == pytest.approx(-1)


def test_prompts_can_hide_what_happens_within_them() -> None:
    reward, length = np.array([10.0, 11, 0, 1, 500]), np.array([1, 2, 11, 12, 3])
    found = correlations(reward, length, np.array([0, 0, 1, 1, 2]))  # the last has nothing to be compared with
    assert found.pearson_within == pytest.approx(1)
    assert found.spearman_within == pytest.approx(1)
    assert found.pearson is not None and found.pearson < 0


def test_ties_within_prompts_survive_the_rounding_of_floats() -> None:
    """Lengths are -1/3, -1/3, 2/3 from their mean in both prompts: ranks 2.5 (4 times) and 5.5; rewards 1.5, 3.5, 5.5."""
    found = correlations(np.array([0.0, 1, 2, 0, 1, 2]), np.array([1, 1, 2, 4, 4, 5]), np.array([0, 0, 0, 1, 1, 1]))
    assert found.spearman_within == pytest.approx(12 / math.sqrt(16 * 12))


def test_a_prompt_with_one_response_says_nothing_within_prompts() -> None:
    reward, length, prompt = np.array([0.0, 1, 2]), np.array([1, 1, 2]), np.zeros(3, np.int64)
    alone = correlations(reward, length, prompt)
    found = correlations(np.append(reward, 9), np.append(length, 5), np.append(prompt, 1))
    assert (found.pearson_within, found.spearman_within) == (alone.pearson_within, alone.spearman_within)
    assert alone.spearman_within == pytest.approx(alone.spearman)


def test_the_largest_scores_that_can_be_stored() -> None:
    found = measure(judged([2, 1, 0], score=[3e38, 1e38, -3e38]))
    assert found.score is not None and found.score.spearman == pytest.approx(1)
    # from their means: 1, 0, -1 and 8/3, 2/3, -10/3
    assert found.score.pearson == pytest.approx(6 / math.sqrt(2 * 168 / 9))
    assert all(math.isfinite(value) for value in flat(found).values())


# --- what cannot be computed is left out


def test_flat_names_and_values() -> None:
    values = flat(measure(FOUR))
    assert values["eval/accuracy"] == values["eval/accuracy_k4"] == pytest.approx(0.7)
    assert values["eval/pairs"] == 5
    assert values["eval/reward_chosen_mean"] == 2.0
    expected = "accuracy accuracy_low accuracy_high accuracy_k4 accuracy_distance1 accuracy_distance2 ece reward_mean "
    expected += "reward_std reward_chosen_mean reward_other_mean pairs tied_pairs "
    for name in ("length", "score"):
        expected += f"{name}_correlation {name}_correlation_within {name}_rank_correlation "
        expected += f"{name}_rank_correlation_within "
    assert sorted(values) == sorted(f"eval/{name}" for name in expected.split())
    assert values["eval/length_correlation"] == pytest.approx(-10 / math.sqrt(2.75 * 200))


DEGENERATE: dict[str, tuple[Judged, set[str]]] = {
    "one comparison": (judged([1, 0]), set()),
    "all tie": (judged([1, 0, 2], rank=[0, 0, 0]), {"accuracy", "ece", "reward_other_mean"}),
    "one response": (judged([1]), {"accuracy", "ece", "length_correlation", "length_correlation_within"}),
    "single responses": (judged([1, 2], prompt=[0, 1], rank=[0, 0]), {"accuracy", "length_correlation_within"}),
    "constant rewards": (judged([0.1, 0.1, 0.1], length=[1, 5, 9]), {"length_correlation", "length_rank_correlation"}),
    "constant rewards a prompt": (
        judged([0.1, 0.1, 0.1, 0.7, 0.7, 0.7], prompt=[0, 0, 0, 1, 1, 1], rank=[0, 1, 2] * 2),
        {"length_correlation_within", "length_rank_correlation_within"},
    ),
    "constant length": (judged([3, 1, 2], length=[4, 4, 4]), {"length_correlation", "length_correlation_within"}),
    "constant score": (judged([3, 1], score=[2, 2]), {"score_correlation", "score_rank_correlation"}),
    "no best answer": (judged([3, 1], rank=[1, 2]), {"reward_chosen_mean"}),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_rankings(name: str) -> None:
    data, missing = DEGENERATE[name]
    found = measure(data)
    values = flat(found)
    assert not {f"eval/{name}" for name in missing} & values.keys()
    assert all(type(value) in (int, float) and math.isfinite(value) for value in values.values())
    assert (
        "accuracy" in missing or values["eval/accuracy_low"] <= values["eval/accuracy"] <= values["eval/accuracy_high"]
    )
    json.dumps(asdict(found), allow_nan=False)


def test_equal_rewards_are_half_right() -> None:
    found = measure(DEGENERATE["constant rewards"][0])
    assert found.accuracy is not None and (found.accuracy.mean, found.ece) == (0.5, 0.0)


def test_without_scores_nothing_is_said_of_them() -> None:
    found = measure(judged([2, 1, 0]))
    assert (found.score, found.accuracy_by_margin, found.reward_by_score) == (None, (), ())


def test_metrics_are_plain_json() -> None:
    found: RankingMetrics = measure(world(30))
    read = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert read["accuracy"]["mean"] == flat(found)["eval/accuracy"]
    assert read["calibration"][0]["observed"]["prompts"] > 0


def test_rewards_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 3 rewards are NaN or infinite"):
        measure(judged([1, math.nan, 2]))
    with pytest.raises(ValueError, match="no responses"):
        measure(judged([]))
