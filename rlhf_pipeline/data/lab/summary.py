"""Verdicts of many prompts as figures with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_pipeline.data.lab.judge import Verdict

RESAMPLES = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over `count` prompts and its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Scores of a set of answers: in all, by category, and each criterion as a share of its points."""

    score: Mean
    by_category: dict[str, Mean]
    by_criterion: dict[str, Mean]


def summary(verdicts: Sequence[Verdict], *, seed: int = 0) -> Summary:
    """Mean scores with 95 % intervals: percentiles of the bootstrap over prompts, seeded.

    Args:
        verdicts: one a prompt, in any order; at least one.
    """
    scores = np.array([verdict.score for verdict in verdicts])
    categories = np.array([verdict.category for verdict in verdicts])
    shares = {
        criterion.name: np.array([verdict.criteria[i].points / verdict.criteria[i].out_of for verdict in verdicts])
        for i, criterion in enumerate(verdicts[0].criteria)
    }
    return Summary(
        score=mean(scores, seed=seed),
        by_category={str(c): mean(scores[categories == c], seed=seed) for c in dict.fromkeys(categories.tolist())},
        by_criterion={name: mean(values, seed=seed) for name, values in shares.items()},
    )


def mean(values: np.ndarray, *, seed: int = 0) -> Mean:
    """The mean of values [N] and the 2.5th and 97.5th percentile of the means of samples drawn from them."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Mean(mean=float(values.mean()), low=float(low), high=float(high), count=len(values))


def difference(left: Sequence[Verdict], right: Sequence[Verdict], *, seed: int = 0) -> Mean:
    """How much better `left` answers the same prompts than `right`, in the same order: the paired difference."""
    gaps = [one.score - other.score for one, other in zip(left, right, strict=True)]
    return mean(np.array(gaps), seed=seed)
