"""Trees that several tests look at."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rlhf_pipeline.data.tree import Tree

SHAPES: list[list[tuple[int, tuple[int, ...]]]] = [
    [(5, (4,)), (3, (2, 6, 1)), (6, (5, 2))],  # 34 tokens
    [(1, (3, 1, 2, 5, 2)), (7, (3, 3, 4, 2))],  # 33
    [(12, (4, 6))],  # 22, so that its row ends with much padding
]


@pytest.fixture
def rows(make_tree: Callable[..., Tree]) -> list[list[Tree]]:
    """Trees of 1..5 branches in rows of unequal length; about a third of the response tokens are no targets."""
    rng = np.random.default_rng(7)
    return [[make_tree(prompt, branches, rng=rng, scored=0.7) for prompt, branches in row] for row in SHAPES]
