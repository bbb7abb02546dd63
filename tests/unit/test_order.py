"""Order: every example once an epoch, batches by examples or by tokens, and the ratio of a data set mixed in."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, pairwise

import numpy as np
import pytest

from rlhf_pipeline.data.order import (
    BatchOrder,
    Part,
    by_examples,
    by_tokens,
    epoch_order,
    epoch_size,
    mixed_in,
    permutation,
)

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


def size_of(order: BatchOrder) -> int:
    return sum(part.size for part in order.parts)


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
        assert sorted(chain(*batches)) == list(range(size_of(order)))


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
    assert order.size_before(order.num_steps) == used == size_of(order) * len(order.starts)


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


# Weights


def test_without_weights_the_order_is_one_permutation() -> None:
    """Of numpy's own generator, so that runs of before go on: sources of weight 1 are as one, epoch by epoch."""
    for epoch in range(3):
        expected = np.random.default_rng([7, 0, epoch]).permutation(41).tolist()
        assert epoch_order((Part(41),), seed=7, epoch=epoch).tolist() == expected
        assert epoch_order((Part(11), Part(30)), seed=7, epoch=epoch).tolist() == expected
    plain = by_tokens(LENGTHS, batch=100, epochs=3, seed=9)
    parts = by_tokens(LENGTHS, batch=100, epochs=3, seed=9, parts=(Part(40, 1), Part(1, 1.0)))
    assert [plain.indices(i).tolist() for i in range(9)] == [parts.indices(i).tolist() for i in range(9)]


def visits(parts: tuple[Part, ...], epochs: int, *, seed: int = 3) -> np.ndarray:
    """visits[e][i]: how often example i has been seen after epoch e."""
    size = sum(part.size for part in parts)
    seen = [np.bincount(epoch_order(parts, seed=seed, epoch=e), minlength=size) for e in range(epochs)]
    return np.cumsum(seen, axis=0)


@pytest.mark.parametrize("weight", [0.5, 2, 0.29, 1.7, 1 / 3, 3.0, 0.01])
def test_examples_are_used_up_before_one_repeats(weight: float) -> None:
    """After E epochs each example has been seen floor or ceil of E * weight times; others are not disturbed."""
    seen = visits((Part(100, weight), Part(7)), 9)
    for epoch, counts in enumerate(seen, start=1):
        exact = epoch * weight * 100
        assert abs(counts[:100].sum() - exact) < 1 + 1e-9
        assert counts[:100].max() - counts[:100].min() <= 1
        assert counts[:100].min() in (np.floor(epoch * weight - 1e-9), np.floor(epoch * weight + 1e-9))
        assert (counts[100:] == epoch).all()


def test_two_halves_are_the_whole_and_not_the_same_halves_again() -> None:
    parts = (Part(50, 0.5),)
    halves = [frozenset(epoch_order(parts, seed=1, epoch=e).tolist()) for e in range(6)]
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        assert len(first) == 25 and first | second == frozenset(range(50))
    assert len({halves[0], halves[2], halves[4]}) == 3


def test_weights_are_taken_as_typed() -> None:
    assert 0.29 * 100 < 29
    assert [epoch_size(Part(100, 0.29), e) for e in range(3)] == [29, 29, 29]
    assert [epoch_size(Part(3, 0.5), e) for e in range(4)] == [1, 2, 1, 2]


def test_sources_of_one_size_are_drawn_apart_and_shuffled_together() -> None:
    order = epoch_order((Part(40, 0.5), Part(40, 0.5)), seed=2, epoch=0)
    first, second = order[order < 40], order[order >= 40] - 40
    assert set(first.tolist()) != set(second.tolist())
    assert 0 < (order[:20] < 40).sum() < 20
    assert order.tolist() != epoch_order((Part(40, 0.5), Part(40, 0.5)), seed=3, epoch=0).tolist()


WEIGHED = (Part(20, 0.35), Part(14, 2), Part(7, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: by_examples(41, batch=8, epochs=5, seed=4, parts=WEIGHED),
        lambda: by_tokens(LENGTHS, batch=100, epochs=5, seed=4, parts=WEIGHED),
    ],
)
def test_batches_of_weighed_sources(make: Callable[[], BatchOrder]) -> None:
    """They are the epochs' examples in turn, whole batches, counted rightly; and a resumed run has the same suffix."""
    order = make()
    steps = [order.indices(step).tolist() for step in range(order.num_steps)]
    epochs = epochs_of(order)
    for epoch, batches in enumerate(epochs):
        assert list(chain(*batches)) == epoch_order(WEIGHED, seed=4, epoch=epoch).tolist()
    assert [len(list(chain(*batches))) for batches in epochs] == [42, 42, 42, 42, 42]
    used = [order.size_before(step) for step in range(order.num_steps + 1)]
    assert np.diff(used).tolist() == [len(step) for step in steps]
    epoch_order.cache_clear()
    permutation.cache_clear()
    again = make()
    assert [again.indices(step).tolist() for step in range(11, again.num_steps)] == steps[11:]


def test_epochs_of_different_sizes() -> None:
    order = by_examples(3, batch=2, epochs=4, seed=0, parts=(Part(3, 0.5),))
    assert [len(order.indices(step)) for step in range(order.num_steps)] == [1, 2, 1, 2]
    assert [order.place(step) for step in range(4)] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert [order.size_before(step) for step in range(5)] == [0, 1, 3, 4, 6]
    assert all(order.ends_epoch(step) for step in range(4))


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
