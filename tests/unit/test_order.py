"""Order: every example once an epoch, batches by examples or by tokens, and the ratio of a data set mixed in."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest

from rlhf_pipeline.data.order import BatchOrder, by_examples, by_tokens, mixed_in, permutation

LENGTHS = np.random.default_rng(3).integers(1, 30, 41)


def orders() -> list[BatchOrder]:
    return [
        by_examples(10, batch=4, epochs=3, seed=5),
        by_examples(12, batch=4, epochs=2, seed=5),
        by_examples(3, batch=8, epochs=2, seed=5),
        by_tokens(LENGTHS, batch=100, epochs=3, seed=5),
        by_tokens(LENGTHS, batch=1, epochs=1, seed=5),
        by_tokens(LENGTHS, batch=10**6, epochs=2, seed=5),
    ]


def epochs_of(order: BatchOrder) -> list[list[list[int]]]:
    """The batches of each epoch."""
    epochs: list[list[list[int]]] = [[] for _ in order.starts]
    for step in range(order.num_steps):
        epochs[order.place(step)[0]].append(order.indices(step).tolist())
    return epochs


@pytest.mark.parametrize("order", orders())
def test_every_example_once_an_epoch(order: BatchOrder) -> None:
    for batches in epochs_of(order):
        assert all(batches)
        assert sorted(chain(*batches)) == list(range(order.size))


def test_by_examples_leaves_the_rest_to_the_last_batch() -> None:
    order = by_examples(10, batch=4, epochs=2, seed=0)
    assert order.num_steps == 6
    assert [len(order.indices(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    assert [order.place(step) for step in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [order.ends_epoch(step) for step in range(6)] == [False, False, True, False, False, True]
    assert [order.size_before(step) for step in range(7)] == [0, 4, 8, 10, 14, 18, 20]
    with pytest.raises(IndexError):
        order.indices(6)


def test_a_whole_number_of_batches_has_no_empty_one() -> None:
    assert by_examples(12, batch=4, epochs=1, seed=0).num_steps == 3


def test_by_tokens_closes_a_batch_with_the_example_that_reaches_it() -> None:
    order = by_tokens(LENGTHS, batch=100, epochs=2, seed=0)
    for batches in epochs_of(order):
        for batch in batches[:-1]:
            assert LENGTHS[batch].sum() >= 100
            assert LENGTHS[batch[:-1]].sum() < 100
        assert LENGTHS[batches[-1][:-1]].sum() < 100


def test_by_tokens_closes_a_batch_that_is_exactly_full() -> None:
    # Examples of 5 tokens: two reach 10, whatever the order.
    order = by_tokens(np.full(7, 5), batch=10, epochs=1, seed=0)
    assert [len(order.indices(step)) for step in range(order.num_steps)] == [2, 2, 2, 1]


@pytest.mark.parametrize("order", orders())
def test_size_before_counts_what_was_used(order: BatchOrder) -> None:
    used = 0
    for step in range(order.num_steps):
        assert order.size_before(step) == used
        used += len(order.indices(step))
    assert order.size_before(order.num_steps) == used == order.size * len(order.starts)


@pytest.mark.parametrize("order", orders())
def test_the_last_step_of_each_epoch(order: BatchOrder) -> None:
    ends = [order.place(step)[0] for step in range(order.num_steps) if order.ends_epoch(step)]
    assert ends == list(range(len(order.starts)))


def test_epochs_seeds_and_salts_differ_and_repeat() -> None:
    first = permutation(50, seed=1, epoch=0).tolist()
    others = [
        permutation(50, seed=1, epoch=1),
        permutation(50, seed=2, epoch=0),
        permutation(50, seed=1, epoch=0, salt=1),
        permutation(50, seed=0, epoch=1),
    ]
    assert len({tuple(first), *(tuple(p.tolist()) for p in others)}) == 5
    permutation.cache_clear()
    assert permutation(50, seed=1, epoch=0).tolist() == first


def test_a_step_does_not_depend_on_those_before() -> None:
    """Resuming asks for step 7 first; an undisturbed run comes to it after 0..6."""
    in_turn = [batch for epoch in epochs_of(by_tokens(LENGTHS, batch=100, epochs=3, seed=9)) for batch in epoch]
    permutation.cache_clear()
    fresh = by_tokens(LENGTHS, batch=100, epochs=3, seed=9)
    assert fresh.indices(7).tolist() == in_turn[7]
    assert fresh.indices(2).tolist() == in_turn[2]


# The data set mixed in


def mixture(counts: list[int], *, ratio: float, size: int, seed: int = 0) -> list[int]:
    """Everything mixed in by steps that use `counts` examples of the first data set."""
    ends = np.cumsum([0, *counts])
    return [
        int(i)
        for before, after in pairwise(ends)
        for i in mixed_in(int(before), int(after), ratio=ratio, size=size, seed=seed)
    ]


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, 90), (0.25, 30), (0.1, 10), (0.75, 270)])
def test_ratio_of_all_examples_comes_from_the_second_set(ratio: float, expected: int) -> None:
    # 90 of the first: expected / (90 + expected) is the ratio. Never more than one example behind or ahead.
    assert len(mixture([9] * 10, ratio=ratio, size=1000)) == expected
    for used in range(1, 90):
        count = len(mixed_in(0, used, ratio=ratio, size=1000, seed=0))
        assert abs(count - ratio * (used + count)) < 1


def test_the_second_set_is_used_up_before_it_repeats() -> None:
    drawn = mixture([5, 1, 7, 2, 9, 30], ratio=0.5, size=9)
    assert len(drawn) == 54
    rounds = [tuple(drawn[i : i + 9]) for i in range(0, 54, 9)]
    assert all(sorted(one) == list(range(9)) for one in rounds)
    assert len(set(rounds)) == 6


def test_the_mixture_does_not_depend_on_the_size_of_steps() -> None:
    at_once = mixture([60], ratio=0.3, size=8)
    assert mixture([1] * 60, ratio=0.3, size=8) == at_once
    assert mixture([7] * 8 + [4], ratio=0.3, size=8) == at_once


def test_the_mixture_follows_the_seed_and_not_the_first_set() -> None:
    drawn = mixture([20], ratio=0.5, size=20, seed=4)
    assert drawn != mixture([20], ratio=0.5, size=20, seed=5)
    assert drawn != permutation(20, seed=4, epoch=0).tolist()


def test_a_step_may_draw_nothing() -> None:
    nothing = mixed_in(0, 1, ratio=0.1, size=5, seed=0)
    assert nothing.shape == (0,)
    assert nothing.dtype == np.int64
