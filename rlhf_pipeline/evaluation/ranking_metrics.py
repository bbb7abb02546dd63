"""What the rewards of held-out rankings say about a reward model: accuracy, calibration, what else they follow.

Arrays in, plain figures out; `ranking_plots` draws them. Where the rewards come from, and when they are measured, is
the recipe's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_pipeline.evaluation.intervals import ClusterMean, cluster_means

FARTHEST = 4  # ranks apart; pairs that are farther apart are counted here
CALIBRATION_BINS = 10
MOST_DISTINCT = 8  # values that are shown one by one; more are binned by quantile
MARGIN_BINS = 4
SCORE_BINS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Rewards of the held-out responses, flat. R responses of P prompts."""

    reward: np.ndarray  # float64 [R], as the model was trained to give them: neither shifted nor scaled
    prompt: np.ndarray  # int64 [R]; which prompt; equal = same prompt
    rank: np.ndarray  # int32 [R]; 0 best; equal ranks tie
    score: np.ndarray  # float32 [R]; labels' scores, NaN where there are none
    length: np.ndarray  # int64 [R]; tokens of the response


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The N comparisons that the labels decide, as indices into the responses; ties are only counted."""

    winner: np.ndarray  # int64 [N]
    loser: np.ndarray  # int64 [N]
    prompt: np.ndarray  # int64 [N]
    tied: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Binned:
    """A mean over what lies from `low` to `high`, both included."""

    low: float
    high: float
    value: ClusterMean


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Comparisons that were predicted with a confidence from `low` up to `high`."""

    low: float
    high: float
    expected: float  # mean confidence
    observed: ClusterMean  # share of predictions that were right
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlations:
    """Of the rewards with something else, over all responses and within prompts; None where either is constant.

    Within prompts: both as differences from their mean over the prompt's responses, since prompts differ in both.
    `pearson` is of the values, `spearman` of their ranks.
    """

    pearson: float | None
    spearman: float | None
    pearson_within: float | None
    spearman_within: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingMetrics:
    """Everything that is measured; a figure that cannot be computed is None, or missing from its collection."""

    responses: int
    prompts: int
    pairs: int
    tied_pairs: int
    accuracy: ClusterMean | None
    accuracy_by_responses: dict[str, ClusterMean]  # by K, the responses of the prompt
    accuracy_by_distance: dict[str, ClusterMean]  # by ranks apart: 1, 2, 3, 4+
    accuracy_by_margin: tuple[Binned, ...]  # by the difference of the labels' scores
    ece: float | None
    calibration: tuple[CalibrationBin, ...]  # without empty bins
    reward_mean: float
    reward_std: float
    reward_chosen_mean: float | None  # of the responses with rank 0
    reward_other_mean: float | None
    reward_by_score: tuple[Binned, ...]
    length: Correlations
    score: Correlations | None


def measure(judged: Judged, *, seed: int = 0) -> RankingMetrics:
    """All figures of the held-out rewards; intervals are 95 %, by a seeded bootstrap over prompts.

    Raises:
        ValueError: when there is no response, or a reward is NaN or infinite.
    """
    _check(judged)
    found = pairs(judged)
    right = correct(judged, found)
    best = judged.rank == 0
    scored = ~np.isnan(judged.score)
    score = judged.score[scored].astype(np.float64)
    scored_reward, scored_prompt = judged.reward[scored], judged.prompt[scored]
    ece, bins = calibration(judged, found, seed=seed)
    return RankingMetrics(
        responses=len(judged.reward),
        prompts=len(np.unique(judged.prompt)),
        pairs=len(right),
        tied_pairs=found.tied,
        accuracy=next(iter(cluster_means(right, found.prompt, seed=seed)), None),
        accuracy_by_responses=_by_responses(judged, found, right, seed=seed),
        accuracy_by_distance=_by_distance(judged, found, right, seed=seed),
        accuracy_by_margin=_by_margin(judged, found, right, seed=seed),
        ece=ece,
        calibration=bins,
        reward_mean=float(judged.reward.mean()),
        reward_std=float(judged.reward.std()),
        reward_chosen_mean=float(judged.reward[best].mean()) if best.any() else None,
        reward_other_mean=float(judged.reward[~best].mean()) if not best.all() else None,
        reward_by_score=_binned(
            _rounded(score, 6, like=score),
            scored_reward,
            scored_prompt,
            quantiles=SCORE_BINS,
            seed=seed,
        ),
        length=correlations(judged.reward, judged.length, judged.prompt),
        score=correlations(scored_reward, score, scored_prompt) if scored.any() else None,
    )


def flat(metrics: RankingMetrics) -> dict[str, float]:
    """The figures for the tracker by name, without those that could not be computed; no NaN among them."""
    accuracy = metrics.accuracy
    values: dict[str, float | None] = (
        {}
        if accuracy is None
        else {
            "accuracy": accuracy.mean,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
        }
    )
    values |= {f"accuracy_k{size}": one.mean for size, one in metrics.accuracy_by_responses.items()}
    for apart, one in metrics.accuracy_by_distance.items():
        values[f"accuracy_distance{apart.replace('+', '_or_more')}"] = one.mean
    values |= {
        "ece": metrics.ece,
        "reward_mean": metrics.reward_mean,
        "reward_std": metrics.reward_std,
        "reward_chosen_mean": metrics.reward_chosen_mean,
        "reward_other_mean": metrics.reward_other_mean,
    }
    for name, found in (("length", metrics.length), ("score", metrics.score)):
        if found is not None:
            values |= {
                f"{name}_correlation": found.pearson,
                f"{name}_correlation_within": found.pearson_within,
                f"{name}_rank_correlation": found.spearman,
                f"{name}_rank_correlation_within": found.spearman_within,
            }
    values |= {"pairs": metrics.pairs, "tied_pairs": metrics.tied_pairs}
    return {f"eval/{name}": value for name, value in values.items() if value is not None}


def pairs(judged: Judged) -> Pairs:
    """Every pair of responses to the same prompt, the better first; prompts with fewest responses come first."""
    order = np.argsort(judged.prompt, kind="stable")
    _, start, sizes = np.unique(judged.prompt[order], return_index=True, return_counts=True)
    winners, losers, tied = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for size in np.unique(sizes):
        left, right = np.triu_indices(size, 1)
        responses = order[start[sizes == size][:, None] + np.arange(size)]  # [prompts of this size, size]
        a, b = responses[:, left].ravel(), responses[:, right].ravel()
        ahead = judged.rank[b].astype(np.int64) - judged.rank[a]
        tied += int((ahead == 0).sum())
        a, b, ahead = a[ahead != 0], b[ahead != 0], ahead[ahead != 0]
        winners.append(np.where(ahead > 0, a, b))
        losers.append(np.where(ahead > 0, b, a))
    winner = np.concatenate(winners)
    return Pairs(winner=winner, loser=np.concatenate(losers), prompt=judged.prompt[winner], tied=tied)


def correct(judged: Judged, found: Pairs) -> np.ndarray:
    """float64 [N]: 1 where the winner has the higher reward, 0.5 where both have the same."""
    gap = judged.reward[found.winner] - judged.reward[found.loser]
    return (np.sign(gap) + 1) / 2


def calibration(judged: Judged, found: Pairs, *, seed: int = 0) -> tuple[float | None, tuple[CalibrationBin, ...]]:
    """Whether the model is right as often as its rewards say: the expected calibration error and its bins.

    The model says that a beats b with probability p = sigmoid(reward_a - reward_b). Each comparison would appear
    twice, as (p, a wins) and as (1 - p, b wins), and the two say the same; it is counted once, by the response that
    the model prefers: confidence = max(p, 1 - p), right when the labels prefer that response too, and half right
    when the rewards are equal. So bins divide [0.5, 1] rather than [0, 1].

        ECE = sum over bins of n_b / N * |observed_b - expected_b|      (Naeini et al. 2015; Guo et al. 2017, eq. 5)

    With few comparisons a bin the ECE of a perfect model is above 0 by the noise of `observed`. Ties are no
    comparisons here, so a model that rightly calls them close gets no credit for it.
    """
    gap = np.abs(judged.reward[found.winner] - judged.reward[found.loser])
    confidence = 1 / (1 + np.exp(-gap))
    if not len(confidence):
        return None, ()
    at = np.minimum(((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    taken, group = np.unique(at, return_inverse=True)
    observed = cluster_means(correct(judged, found), found.prompt, group, seed=seed)
    edges = np.linspace(0.5, 1, CALIBRATION_BINS + 1).round(6)
    expected = np.bincount(group, weights=confidence) / np.bincount(group)
    bins = tuple(
        CalibrationBin(
            low=float(edges[i]), high=float(edges[i + 1]), expected=float(mean), observed=one, count=one.count
        )
        for i, mean, one in zip(taken, expected, observed, strict=True)
    )
    return sum(one.count * abs(one.observed.mean - one.expected) for one in bins) / len(confidence), bins


def correlations(reward: np.ndarray, other: np.ndarray, prompt: np.ndarray) -> Correlations:
    """Of `reward` [R] with `other` [R]. Prompts with one response have nothing to say within prompts."""
    _, prompt, sizes = np.unique(prompt, return_inverse=True, return_counts=True)
    several = sizes[prompt] > 1
    centred = [_centred(values, prompt, sizes)[several] for values in (reward, other)]
    return Correlations(
        pearson=pearson(reward, other),
        spearman=pearson(average_ranks(reward), average_ranks(other)),
        pearson_within=pearson(*centred),
        spearman_within=pearson(*map(average_ranks, centred)),
    )


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation of x [N] and y [N]; None where either is constant."""
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 up, float64 [N]; equal values share the mean of theirs. Spearman's is Pearson's of these."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _check(judged: Judged) -> None:
    if not len(judged.reward):
        raise ValueError("there are no responses to measure")
    if bad := int((~np.isfinite(judged.reward)).sum()):
        raise ValueError(f"{bad} of {len(judged.reward)} rewards are NaN or infinite")


def _by_responses(judged: Judged, found: Pairs, right: np.ndarray, *, seed: int) -> dict[str, ClusterMean]:
    _, prompt, sizes = np.unique(judged.prompt, return_inverse=True, return_counts=True)
    return _by(sizes[prompt[found.winner]], right, found.prompt, seed=seed)


def _by_distance(judged: Judged, found: Pairs, right: np.ndarray, *, seed: int) -> dict[str, ClusterMean]:
    apart = np.minimum(judged.rank[found.loser] - judged.rank[found.winner], FARTHEST)
    named = _by(apart, right, found.prompt, seed=seed)
    return {f"{name}+" if name == str(FARTHEST) else name: one for name, one in named.items()}


def _by_margin(judged: Judged, found: Pairs, right: np.ndarray, *, seed: int) -> tuple[Binned, ...]:
    margin = judged.score[found.winner].astype(np.float64) - judged.score[found.loser]
    known = ~np.isnan(margin)
    # 0.3 - 0.2 and 0.2 - 0.1 of float32 scores are one margin
    margin = _rounded(margin[known], 6, like=judged.score[~np.isnan(judged.score)])
    return _binned(margin, right[known], found.prompt[known], quantiles=MARGIN_BINS, seed=seed)


def _by(key: np.ndarray, values: np.ndarray, prompt: np.ndarray, *, seed: int) -> dict[str, ClusterMean]:
    """The mean of `values` [N] for each value of `key` [N], smallest first."""
    keys, group = np.unique(key, return_inverse=True)
    means: Sequence[ClusterMean] = cluster_means(values, prompt, group, seed=seed)
    return {str(name): one for name, one in zip(keys.tolist(), means, strict=True)}


def _binned(
    key: np.ndarray, values: np.ndarray, prompt: np.ndarray, *, quantiles: int, seed: int
) -> tuple[Binned, ...]:
    """The mean of `values` [N] for each value of `key` [N] where these are few, otherwise by its quantiles."""
    distinct = np.unique(key)
    if len(distinct) > MOST_DISTINCT:
        distinct = np.unique(np.quantile(key, np.arange(1, quantiles) / quantiles))
    taken, group = np.unique(np.searchsorted(distinct, key, side="right"), return_inverse=True)
    means = cluster_means(values, prompt, group, seed=seed)
    parts = [key[group == i] for i in range(len(taken))]
    return tuple(
        Binned(low=float(part.min()), high=float(part.max()), value=one) for part, one in zip(parts, means, strict=True)
    )


def _centred(values: np.ndarray, prompt: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Differences from the prompt's mean, float64 [R]; rounded, or the rounding of floats would break ties."""
    means = np.bincount(prompt, weights=values) / sizes
    return _rounded(values - means[prompt], 12, like=values)


def _rounded(values: np.ndarray, digits: int, *, like: np.ndarray) -> np.ndarray:
    """`values` to so many significant digits of the largest of `like`."""
    largest = float(np.abs(like).max(initial=0))
    return np.round(values, digits - 1 - int(np.floor(np.log10(largest)))) if largest else values
