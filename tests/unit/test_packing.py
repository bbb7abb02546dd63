"""Packing: the arrays of hand-written trees, and the plan that spreads trees over ranks, micro-batches and rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from rlhf_pipeline.data.packing import PADDING, PackedTrees, Segment, first_fit, pack, plan, split
from rlhf_pipeline.data.tree import Tree


def tree(prompt: list[int], responses: list[list[int]], scored: list[list[int]], index: int) -> Tree:
    return Tree(
        prompt=np.array(prompt, np.int32),
        responses=tuple(np.array(r, np.int32) for r in responses),
        scored=tuple(np.array(s, bool) for s in scored),
        index=index,
    )


PAIR = tree([11, 12, 13], [[21, 22], [31, 32, 33]], [[1, 0], [1, 0, 1]], index=40)
SINGLE = tree([41], [[51, 52, 53]], [[0, 1, 1]], index=7)


def check(packed: PackedTrees, **expected: object) -> None:
    for name, value in expected.items():
        assert np.asarray(getattr(packed, name)).tolist() == value, name


def test_tree_counts_its_prompt_once() -> None:
    assert len(PAIR) == 8
    assert PAIR.path(1).tolist() == [11, 12, 13, 31, 32, 33]


def test_two_trees_in_one_row() -> None:
    packed = pack([[PAIR, SINGLE]])
    check(
        packed,
        # column      0   1   2   3   4   5   6   7   8   9  10  11
        tokens=[[11, 12, 13, 21, 22, 31, 32, 33, 41, 51, 52, 53]],
        positions=[[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]],
        tree=[[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]],
        branch=[[0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 1, 1]],
        # 21 and 31 start the two branches of one prompt: its last token, in column 2, predicts both.
        source=[2, 2, 6, 9, 10],
        target=[21, 31, 33, 52, 53],
        sequence=[0, 1, 1, 2, 2],
        last=[4, 7, 11],
        group=[0, 0, 0],
        index=[40, 40, 7],
        num_tokens=12,
    )
    # The prompt with its first response, the second response, the other tree.
    assert packed.segments == (Segment(5), Segment(3, trunk=0, prompt_length=3), Segment(4))


def test_rows_are_padded_to_a_multiple_and_positions_in_them_are_flat() -> None:
    packed = pack([[SINGLE], [PAIR]], groups=[[1], [0]], width_multiple=5)
    check(
        packed,
        tokens=[[41, 51, 52, 53, 0, 0, 0, 0, 0, 0], [11, 12, 13, 21, 22, 31, 32, 33, 0, 0]],
        positions=[[0, 1, 2, 3, 0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 3, 4, 5, 0, 0]],
        tree=[[0, 0, 0, 0, *[PADDING] * 6], [0, 0, 0, 0, 0, 0, 0, 0, PADDING, PADDING]],
        branch=[[0, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 2, 2, 2, 0, 0]],
        source=[1, 2, 12, 12, 16],
        target=[52, 53, 21, 31, 33],
        sequence=[0, 0, 1, 2, 2],
        last=[3, 14, 17],
        group=[1, 0, 0],
        index=[7, 40, 40],
        num_tokens=12,
    )
    # 4 tokens and 6 of padding; 8 and 2
    assert packed.segments == (
        Segment(4), Segment(6), Segment(5), Segment(3, trunk=2, prompt_length=3), Segment(2)
    )  # fmt: skip


def test_the_groups_of_trees_within_a_row() -> None:
    check(pack([[PAIR, SINGLE]], groups=[[1, 0]]), group=[1, 1, 0])


def test_a_response_without_targets_keeps_its_number() -> None:
    silent = tree([1, 2], [[3], [4], [5]], [[1], [0], [1]], index=0)
    check(pack([[silent]]), source=[1, 1], target=[3, 5], sequence=[0, 2], last=[2, 3, 4])


@pytest.mark.parametrize("rows", [[], [[]]])
def test_no_trees_give_a_row_of_padding(rows: list[list[Tree]]) -> None:
    packed = pack(rows, width_multiple=16)
    assert packed.tokens.shape == packed.positions.shape == packed.tree.shape == packed.branch.shape == (1, 16)
    assert (packed.tree == PADDING).all()
    assert packed.num_tokens == 0
    assert packed.segments == (Segment(16),)
    for name in ("source", "target", "sequence", "last", "group", "index"):
        assert getattr(packed, name).shape == (0,), name
        assert getattr(packed, name).dtype == np.int64, name


def test_dtypes() -> None:
    packed = pack([[PAIR, SINGLE]])
    for name in ("tokens", "positions", "source", "target", "sequence", "last", "group", "index"):
        assert getattr(packed, name).dtype == np.int64, name
    assert packed.tree.dtype == packed.branch.dtype == np.int32


def test_packing_loses_no_target(make_tree: Callable[..., Tree]) -> None:
    """Each (path so far, next token) of the trees comes back from the arrays by following them one by one."""
    rng = np.random.default_rng(0)
    rows = [
        [make_tree(int(rng.integers(1, 6)), rng.integers(1, 5, k).tolist(), rng=rng, scored=0.6) for k in ks]
        for ks in ([1, 3, 2], [5], [4, 1])
    ]
    packed = pack(rows, width_multiple=8)
    expected = [
        (tuple(t.path(k)[: len(t.prompt) + j].tolist()), int(t.path(k)[len(t.prompt) + j]))
        for t in chain(*rows)
        for k in range(len(t.responses))
        for j in np.flatnonzero(t.scored[k])
    ]
    width = packed.tokens.shape[1]
    found = []
    for source, target, sequence in zip(packed.source, packed.target, packed.sequence, strict=True):
        row, column = divmod(int(source), width)
        branch = packed.branch[row, packed.last[sequence] % width]
        context = [
            int(packed.tokens[row, c])
            for c in range(column + 1)
            if packed.tree[row, c] == packed.tree[row, column] and packed.branch[row, c] in (0, branch)
        ]
        found.append((tuple(context), int(target)))
    assert found == expected


def test_segments_are_the_positions_in_order(make_tree: Callable[..., Tree]) -> None:
    """Every further response finds its prompt at the start of the segment that it names."""
    rng = np.random.default_rng(0)
    rows = [[make_tree(3, (2, 4, 1), rng=rng), make_tree(2, (1,), rng=rng)], [make_tree(5, (2, 2), rng=rng)]]
    packed = pack(rows, width_multiple=8)
    starts = np.cumsum([0, *(segment.length for segment in packed.segments)])
    tokens, trees, branches = packed.tokens.flatten(), packed.tree.flatten(), packed.branch.flatten()
    assert starts[-1] == len(tokens)
    further = [(i, segment) for i, segment in enumerate(packed.segments) if segment.trunk is not None]
    found = []
    for i, segment in further:
        prompt = tokens[starts[segment.trunk] : starts[segment.trunk] + segment.prompt_length]
        found.append([*prompt.tolist(), *tokens[starts[i] : starts[i + 1]].tolist()])
    branching = (rows[0][0], rows[0][0], rows[1][0])
    assert found == [t.path(k).tolist() for t, k in zip(branching, (1, 2, 1), strict=True)]
    for i in range(len(packed.segments)):
        here = slice(starts[i], starts[i + 1])
        assert len(set(trees[here].tolist())) == 1
        assert len(set(branches[here].tolist()) - {0}) <= 1


# Numbers of tokens


def with_numbers(tree: Tree, **numbers: list[list[float]]) -> Tree:
    arrays = {name: tuple(np.array(values, np.float32) for values in rows) for name, rows in numbers.items()}
    return replace(tree, numbers=arrays)


def test_numbers_are_those_of_the_scored_tokens() -> None:
    pair = with_numbers(PAIR, old=[[1, 2], [3, 4, 5]], advantage=[[10, 20], [30, 40, 50]])
    single = with_numbers(SINGLE, old=[[6, 7, 8]])
    packed = pack([[pair, single]])
    check(packed, target=[21, 31, 33, 52, 53])
    assert sorted(packed.numbers) == ["advantage", "old"]
    assert packed.numbers["old"].tolist() == [1, 3, 5, 7, 8]
    assert packed.numbers["advantage"].tolist()[:3] == [10, 30, 50]
    assert np.isnan(packed.numbers["advantage"][3:]).all() and len(packed.numbers["advantage"]) == 5
    assert packed.numbers["old"].dtype == packed.numbers["advantage"].dtype == np.float32


def test_text_beside_episodes_has_no_numbers() -> None:
    """In one row and in rows of its own, before and behind."""
    pair = with_numbers(PAIR, old=[[1, 2], [3, 4, 5]])
    found = pack([[SINGLE, pair], [SINGLE]], groups=[[1, 0], [1]]).numbers["old"]
    np.testing.assert_array_equal(found, [np.nan, np.nan, 1, 3, 5, np.nan, np.nan])


@pytest.mark.parametrize("rows", [[], [[]], [[PAIR, SINGLE]]])
def test_no_numbers(rows: list[list[Tree]]) -> None:
    assert pack(rows).numbers == {}


def test_numbers_lie_beside_their_targets(make_tree: Callable[..., Tree]) -> None:
    rng = np.random.default_rng(1)
    shapes = [[(3, (2, 4, 1)), (1, (3,))], [(5, (2, 2)), (2, (1, 6, 2, 3))]]
    rows = [[make_tree(n, branches, rng=rng, scored=0.6) for n, branches in row] for row in shapes]
    rows = [[replace(t, numbers={"id": tuple(r.astype(np.float32) for r in t.responses)}) for t in row] for row in rows]
    packed = pack(rows, width_multiple=8)
    assert 5 < len(packed.target) < 26
    assert packed.numbers["id"].tolist() == packed.target.tolist()


# Rows and plans


def test_first_fit_takes_the_longest_first_into_the_fullest_row() -> None:
    # 7 opens row 0 (3 left), 5 row 1 (5 left), 4 goes to row 1 (1 left), and 1 to row 1, the fuller.
    assert first_fit([1, 5, 7, 4], 10) == [[2], [1, 3, 0]]


def test_a_tree_longer_than_the_row_is_alone() -> None:
    assert first_fit([1, 12, 2], 10) == [[1], [2, 0]]


def test_split_gives_each_tree_to_the_rank_with_least() -> None:
    # 5 -> rank 0; 4 -> rank 1; 3 -> rank 1 (4 < 5) = 7; 3 -> rank 0 = 8; 1 -> rank 1 = 8.
    assert split([5, 4, 3, 3, 1], 2) == [[0, 3], [1, 2, 4]]


PLANS = [(40, 1, 32, 4), (40, 2, 32, 2), (64, 4, 48, 3), (3, 4, 32, 2), (17, 3, 20, 1), (0, 2, 32, 2)]


@pytest.mark.parametrize(("count", "num_ranks", "row_length", "micro_rows"), PLANS)
def test_plan_keeps_its_promises(count: int, num_ranks: int, row_length: int, micro_rows: int) -> None:
    # Lengths to 40: some trees exceed the row in most of the cases.
    lengths = np.random.default_rng(count).integers(1, 41, count).tolist()
    made = plan(lengths, num_ranks=num_ranks, row_length=row_length, micro_rows=micro_rows)

    assert len(made) == num_ranks
    assert sorted(i for rank in made for micro in rank for row in micro for i in row) == list(range(count))
    assert len({len(rank) for rank in made}) == 1
    assert len(made[0]) >= 1
    for rank in made:
        widths = [sum(lengths[i] for i in row) for micro in rank for row in micro]
        assert widths == sorted(widths, reverse=True)
        for micro in rank:
            assert len(micro) <= micro_rows
            for row in micro:
                assert row
                assert len(row) == 1 or sum(lengths[i] for i in row) <= row_length
    loads = [sum(lengths[i] for micro in rank for row in micro for i in row) for rank in made]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_no_micro_batch_more_than_the_busiest_rank_needs() -> None:
    # Rank 0 gets the 9, rank 1 the five 2s; rows of 4 hold two of them: 3 rows in micro-batches of 2.
    assert plan([2, 2, 2, 2, 2, 9], num_ranks=2, row_length=4, micro_rows=2) == [
        [[[5]], []],
        [[[0, 1], [2, 3]], [[4]]],
    ]


def test_ranks_without_trees_get_empty_micro_batches() -> None:
    assert plan([5], num_ranks=3, row_length=8, micro_rows=2) == [[[[0]]], [[]], [[]]]


def test_plan_is_a_function_of_the_lengths() -> None:
    lengths = [4] * 7 + [9, 9, 2, 2]  # ties, which an unstable order would break differently
    first = plan(lengths, num_ranks=3, row_length=12, micro_rows=2)
    assert first == plan(tuple(lengths), num_ranks=3, row_length=12, micro_rows=2)
    assert first == plan(np.array(lengths), num_ranks=3, row_length=12, micro_rows=2)  # type: ignore[arg-type]
