"""Trees to a file and back: nothing of them is lost, and all that is trained on is in the fingerprint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_pipeline.data.encode import Counts
from rlhf_pipeline.data.store import Example, TreeDataset, open_dataset, to_batch, write
from rlhf_pipeline.data.tree import Tree


def tree(*lengths: int, ranks: list[int] | None = None, scores: list[float] | None = None, start: int = 0) -> Tree:
    """A prompt of three tokens and responses of these lengths, every second token of which is scored."""
    responses = tuple(np.arange(start + 10 * k, start + 10 * k + n, dtype=np.int32) for k, n in enumerate(lengths))
    made = Tree(
        prompt=np.arange(start, start + 3, dtype=np.int32),
        responses=responses,
        scored=tuple(np.arange(n) % 2 == 0 for n in lengths),
        index=0,
    )
    made = made if ranks is None else replace(made, ranks=np.asarray(ranks, np.int32))
    return made if scores is None else replace(made, scores=np.asarray(scores, np.float32))


def stored(file: Path, *parts: list[Tree]) -> TreeDataset:
    def summarise(tokens: int, targets: int) -> tuple[Counts, list[str]]:
        names = ("rows", "kept", "dropped_long_prompt", "dropped_long_response", "dropped_no_target")
        zeros = dict.fromkeys((*names, "prompt_truncated", "response_truncated"), 0)
        trees = sum(map(len, parts))
        return Counts(bad={}, trees=trees, tokens=tokens, targets=targets, **zeros), []  # type: ignore[arg-type]

    batches = [to_batch([Example(one, group=5, origin=f"f:{i}") for i, one in enumerate(part)]) for part in parts]
    write(file, batches, summarise)
    return open_dataset(file)


def same(one: Tree, other: Tree) -> bool:
    def content(tree: Tree) -> list[Any]:
        arrays = (tree.prompt, *tree.responses, *tree.scored, tree.ranks, tree.scores)
        return [(array.dtype, array.tobytes()) for array in arrays]

    return content(one) == content(other)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    first = [
        tree(4, 9, 1, ranks=[1, 0, 1], scores=[0.5, 2.0, 0.5]),
        tree(),  # a prompt alone
        tree(7, start=100),
    ]
    second = [tree(2, 2, ranks=[0, 0], start=200), tree(5, ranks=[1])]
    data = stored(tmp_path / "a.arrow", first, second)
    assert len(data) == 5
    for found, written in zip(data, [*first, *second], strict=True):
        assert same(found, written)
    assert data[0].scores.tolist() == [0.5, 2.0, 0.5] and np.isnan(data[2].scores).all()
    assert data.lengths.tolist() == [17, 3, 10, 7, 8] and data.targets.tolist() == [2 + 5 + 1, 0, 4, 2, 3]
    assert data.counts.tokens == 45 and data.counts.targets == 17
    chosen = data.select(np.array([4, 0]))
    assert same(chosen[0], second[1]) and same(chosen[1], first[0])


def test_prompts_alone_fill_a_file(tmp_path: Path) -> None:
    data = stored(tmp_path / "a.arrow", [tree(), tree(start=50)])
    assert [one.prompt.tolist() for one in data] == [[0, 1, 2], [50, 51, 52]]
    assert all(one.responses == () and one.ranks.shape == (0,) == one.scores.shape for one in data)
    assert data.targets.tolist() == [0, 0] and data.counts.tokens == 6


@pytest.mark.parametrize(
    "change",
    [{"ranks": np.array([1, 0], np.int32)}, {"scores": np.array([1.0, np.nan], np.float32)}],
    ids=["ranks", "scores"],
)
def test_order_and_scores_are_part_of_the_fingerprint(tmp_path: Path, change: dict[str, np.ndarray]) -> None:
    one = tree(3, 4, ranks=[0, 1])
    data, again = stored(tmp_path / "a.arrow", [one]), stored(tmp_path / "b.arrow", [one])
    other = stored(tmp_path / "c.arrow", [replace(one, **change)])
    assert data.fingerprint == again.fingerprint != other.fingerprint
