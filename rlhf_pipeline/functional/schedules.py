"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    *,
    num_steps: int,
    peak: float,
    decay: str,
    final_fraction: float,
    warmup_steps: int,
    warmup_start_fraction: float,
) -> float:
    """The rate of step 0..num_steps-1: a linear warm-up to `peak`, then `decay` to final_fraction * peak.

    decay: "constant", "linear" or "cosine". The last step of a decaying schedule is the one that reaches the floor.

    Raises:
        ValueError: for another decay.
    """
    if decay not in ("constant", "linear", "cosine"):
        raise ValueError(f"decay must be constant, linear or cosine, not {decay!r}")
    if step < warmup_steps:
        return peak * (warmup_start_fraction + (1 - warmup_start_fraction) * step / warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
    if decay == "constant":
        return peak
    left = 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (final_fraction + (1 - final_fraction) * left)
