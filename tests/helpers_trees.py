"""Data sets of random token trees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_pipeline.data.encode import Counts
from rlhf_pipeline.data.store import Example, TreeDataset, open_dataset, to_batch, write
from rlhf_pipeline.data.tree import Tree

NAMES = ("rows", "kept", "dropped_long_prompt", "dropped_long_response", "dropped_no_target")
SHAPES = ((3, (2, 4, 1)), (1, (3, 9)), (5, (2, 2)), (2, (1, 6, 2, 3)), (7, (5,)), (4, (8, 1)), (6, (3, 3)))
VOCABULARY = 97


def random_trees(
    file: Path,
    shapes: Sequence[tuple[int, Sequence[int]]] = SHAPES,
    *,
    seed: int = 0,
    groups: Sequence[int] | None = None,
    scored: float = 0.8,
) -> TreeDataset:
    """`shapes`: tokens of each prompt and of its responses. Two record batches; example i comes from f:i."""
    rng = np.random.default_rng(seed)
    examples = [
        Example(
            Tree(
                prompt=rng.integers(0, VOCABULARY, prompt).astype(np.int32),
                responses=tuple(rng.integers(0, VOCABULARY, n).astype(np.int32) for n in responses),
                scored=tuple(rng.random(n) < scored for n in responses),
                index=i,
            ),
            group=i if groups is None else groups[i],
            origin=f"f:{i}",
        )
        for i, (prompt, responses) in enumerate(shapes)
    ]

    def summarise(tokens: int, targets: int) -> tuple[Counts, list[str]]:
        zeros = dict.fromkeys((*NAMES, "prompt_truncated", "response_truncated"), 0)
        return Counts(bad={}, trees=len(examples), tokens=tokens, targets=targets, **zeros), []  # type: ignore[arg-type]

    halves = [part for part in (examples[: len(examples) // 2], examples[len(examples) // 2 :]) if part]
    write(file, [to_batch(part) for part in halves], summarise)
    return open_dataset(file)
