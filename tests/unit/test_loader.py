"""The loader: what each process gets of a global batch, with and without a data set mixed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from rlhf_pipeline.data.loader import Layout, TreeStream, micro_batches
from rlhf_pipeline.data.order import by_examples
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.data.tree import Tree

ALONE = Layout(row_length=48, micro_rows=2, width_multiple=1, rank=0, num_ranks=1)


class FakeData:
    """Trees in memory, which remembers the ones that were read."""

    def __init__(self, trees: list[Tree], name: str) -> None:
        self.trees, self.name = trees, name
        self.lengths = np.array([len(tree) for tree in trees])
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, index: int) -> Tree:
        self.read.append(index)
        return self.trees[index]

    def origin(self, index: int) -> str:
        return f"{self.name}:{index + 1}"


@pytest.fixture
def data(make_tree: Callable[..., Tree]) -> list[FakeData]:
    """A set of 23 preference pairs, and one of 7 documents."""
    rng = np.random.default_rng(0)
    pairs = [make_tree(int(rng.integers(2, 9)), rng.integers(1, 12, 2), rng=rng, index=i) for i in range(23)]
    documents = [make_tree(1, rng.integers(5, 30, 1), rng=rng, index=i) for i in range(7)]
    return [FakeData(pairs, "pairs.jsonl"), FakeData(documents, "documents.jsonl")]


def stream(data: list[FakeData], *, mix_ratio: float = 0.0, layout: Layout = ALONE) -> TreeStream:
    order = by_examples(len(data[0]), batch=10, epochs=2, seed=3)
    return TreeStream(data=data, order=order, layout=layout, mix_ratio=mix_ratio)


def examples_in(packed: list[PackedTrees]) -> list[tuple[int, int]]:
    """(data set, example) of every response."""
    return sorted((int(g), int(i)) for one in packed for g, i in zip(one.group, one.index, strict=True))


def contents(packed: list[PackedTrees]) -> list[list[list[int]]]:
    names = ("tokens", "positions", "tree", "branch", "source", "target", "sequence", "last", "group", "index")
    return [[getattr(one, name).tolist() for name in names] for one in packed]


def test_a_step_takes_the_examples_of_its_order(data: list[FakeData]) -> None:
    order = by_examples(23, batch=10, epochs=2, seed=3)
    one = stream(data)
    assert one.order.num_steps == 6
    for step in range(6):
        chosen = [(0, int(i)) for i in order.indices(step)]
        assert one.examples(step) == chosen
        # two responses each
        assert examples_in(one.micro_batches(step)) == sorted(chosen * 2)


@pytest.mark.parametrize("mix_ratio", [0.0, 0.4])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 16])
def test_ranks_share_a_step_and_run_equally_many_micro_batches(
    data: list[FakeData], num_ranks: int, mix_ratio: float
) -> None:
    """16 processes are more than there are examples: some run only empty micro-batches."""
    for step in range(6):
        ranks = [
            stream(data, mix_ratio=mix_ratio, layout=replace(ALONE, rank=rank, num_ranks=num_ranks)).micro_batches(step)
            for rank in range(num_ranks)
        ]
        assert len({len(rank) for rank in ranks}) == 1
        expected = [one for one in stream(data, mix_ratio=mix_ratio).examples(step) for _ in range(2 - one[0])]
        assert examples_in(list(chain(*ranks))) == sorted(expected)


def test_a_process_reads_only_its_own_trees(data: list[FakeData]) -> None:
    reads = []
    for rank in range(2):
        data[0].read.clear()
        stream(data, layout=replace(ALONE, rank=rank, num_ranks=2)).micro_batches(0)
        reads.append(list(data[0].read))
    assert sorted(reads[0] + reads[1]) == sorted(index for _, index in stream(data).examples(0))


def test_rows_keep_to_the_layout(data: list[FakeData]) -> None:
    layout = replace(ALONE, row_length=64, micro_rows=2, width_multiple=32)
    for packed in stream(data, layout=layout).micro_batches(0):
        rows, width = packed.tokens.shape
        assert rows <= 2
        assert width % 32 == 0
        assert ((packed.tree >= 0).sum(1) <= 64).all()


def test_the_trees_come_with_the_data_set_they_are_from(data: list[FakeData]) -> None:
    packed = micro_batches(data, [(1, 4), (0, 4)], ALONE)
    assert examples_in(packed) == [(0, 4), (0, 4), (1, 4)]
    for one in packed:
        for response, (group, index) in enumerate(zip(one.group, one.index, strict=True)):
            tree = data[group].trees[index]
            assert one.target[one.sequence == response].tolist() in [r.tolist() for r in tree.responses]


def test_the_mixture_makes_up_its_share(data: list[FakeData]) -> None:
    mixed = stream(data, mix_ratio=0.4)
    drawn = [[index for group, index in mixed.examples(step) if group == 1] for step in range(6)]
    # 40 % of all: 2 for every 3 of the first set, which has used 10, 20, 23, 33, 43, 46 by the end of each step.
    assert np.cumsum([len(step) for step in drawn]).tolist() == [6, 13, 15, 22, 28, 30]
    assert sorted(list(chain(*drawn))[:7]) == list(range(7))
    for step in range(6):
        first_set = [index for group, index in mixed.examples(step) if group == 0]
        assert first_set == [index for _, index in stream(data).examples(step)]


def test_a_step_can_be_asked_for_by_itself(data: list[FakeData]) -> None:
    """As a run does that goes on after a crash."""
    undisturbed = stream(data, mix_ratio=0.4)
    steps = [contents(undisturbed.micro_batches(step)) for step in range(6)]
    assert contents(stream(data, mix_ratio=0.4).micro_batches(4)) == steps[4]
    assert len({str(step) for step in steps}) == 6


def test_origins_name_the_file_of_every_example(data: list[FakeData]) -> None:
    mixed = stream(data, mix_ratio=0.4)
    names = ("pairs.jsonl", "documents.jsonl")
    assert mixed.origins(1) == [f"{names[group]}:{index + 1}" for group, index in mixed.examples(1)]
