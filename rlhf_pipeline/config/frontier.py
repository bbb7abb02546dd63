"""The section of `rlhf evaluate kind=frontier`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class FrontierConfig:
    """Which scorers of `rewards` are the two axes, and what is drawn beside the checkpoints."""

    gold: str | None = "gold"  # the scorer that knows the truth, where one does
    proxy: str | None = None  # the one that policies were trained against
    best_of: list[int] = dataclasses.field(
        default_factory=list
    )  # points for the best of so many answers of the reference
    chosen_by: str | None = None  # the scorer that chooses them; null: the proxy, or gold where there is none
