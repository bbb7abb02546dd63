"""Long curves made short enough to draw, without losing a peak."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def thinned(x: NDArray[np.float64], y: NDArray[np.float64], *, points: int) -> Curve:
    """At most so many points: of each stretch of the curve its lowest and its highest, and the curve's ends."""
    if len(x) <= points:
        return x, y
    kept = {0, len(x) - 1}
    for some in np.array_split(np.arange(len(x)), max(1, (points - 2) // 2)):
        kept |= {int(some[np.argmin(y[some])]), int(some[np.argmax(y[some])])}
    order = np.array(sorted(kept))
    return x[order], y[order]


def smoothed(y: NDArray[np.float64], *, window: int) -> NDArray[np.float64]:
    """The mean over so many neighbours, around each point; at the ends over those that there are."""
    sums = np.concatenate([[0.0], np.cumsum(y)])
    middle = np.arange(len(y))
    first, end = np.maximum(middle - window // 2, 0), np.minimum(middle + window // 2 + 1, len(y))
    return np.asarray((sums[end] - sums[first]) / (end - first))
