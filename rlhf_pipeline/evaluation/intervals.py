"""Means with 95 % intervals where observations come in clusters, as the comparisons and responses of a prompt do.

The comparisons of one ranking share their responses, so each says less than a fresh one: prompts are drawn, and all
that belongs to a prompt comes with it. Means over independent prompts are `data.lab.summary.mean`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2_000
_DRAWS_AT_ONCE = 1 << 21  # prompts drawn in one go: 16 MiB of indices


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterMean:
    """A mean over `count` values of `prompts` prompts and its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int
    prompts: int


def cluster_means(
    values: np.ndarray, prompt: np.ndarray, group: np.ndarray | None = None, *, seed: int = 0
) -> list[ClusterMean]:
    """The mean of each group of values, and the 2.5th and 97.5th percentile of those of redrawn prompts.

    A sample has as many prompts as there are, drawn with replacement; its mean is the sum of its values over their
    number, which differs from sample to sample. Samples without a value of a group are left out of that group's
    interval. Like every percentile bootstrap it is too narrow for a handful of prompts, and has no width for one.

    Args:
        values: float [N].
        prompt: int [N], equal where values belong to the same prompt.
        group: int [N], 0 to the number of groups less one, none of them empty; left out: one group.
    """
    if not len(values):
        return []
    group = np.zeros(len(values), np.int64) if group is None else group
    names, prompt = np.unique(prompt, return_inverse=True)
    shape = (len(names), int(group.max()) + 1)
    cell = prompt * shape[1] + group
    sums = np.bincount(cell, weights=values, minlength=shape[0] * shape[1]).reshape(shape)
    counts = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape).astype(float)
    with np.errstate(invalid="ignore"):  # 0 / 0, a sample without a value of the group, is the NaN that is left out
        redrawn = np.concatenate([(times @ sums) / (times @ counts) for times in drawn(len(names), seed)])
    low, high = np.nanpercentile(redrawn, [2.5, 97.5], axis=0)
    total, number = sums.sum(axis=0), counts.sum(axis=0)
    return [
        ClusterMean(
            mean=float(total[i] / number[i]),
            low=float(low[i]),
            high=float(high[i]),
            count=int(number[i]),
            prompts=int((counts[:, i] > 0).sum()),
        )
        for i in range(shape[1])
    ]


def drawn(size: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `size` prompts is in a sample, float [samples, size], for `RESAMPLES` samples in parts."""
    rng = np.random.default_rng(seed)
    part = max(1, _DRAWS_AT_ONCE // size)
    for start in range(0, RESAMPLES, part):
        samples = min(part, RESAMPLES - start)
        drawn = rng.integers(size, size=(samples, size)) + size * np.arange(samples)[:, None]
        yield np.bincount(drawn.ravel(), minlength=samples * size).reshape(samples, size).astype(float)
