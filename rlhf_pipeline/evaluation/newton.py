"""Newton's method for many small convex problems at once, as the samples of a bootstrap are: each starts near its end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STEPS = 100
LONGEST = 2.0  # a step; a logistic likelihood is flat far from its end, and a full step there goes much too far
CLOSE = 1e-6


def newton(slopes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], start: np.ndarray) -> np.ndarray:
    """The places where R functions of P numbers are least, float [R, P].

    Args:
        slopes: of R places [R, P] the gradients [R, P] and the Hessians [R, P, P], which are positive definite.
        start: float [R, P].
    """
    place = start.copy()
    for _ in range(STEPS):
        gradient, hessian = slopes(place)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        length = np.linalg.norm(step, axis=1, keepdims=True)
        place -= step * np.minimum(1, LONGEST / np.maximum(length, CLOSE))
        if length.max() < CLOSE:
            break
    return place
