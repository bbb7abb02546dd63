"""Pairs of a ranking: by hand, against loops over a prompt's responses, and a response's log-prob from its tokens'."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.config.direct import PairRule, PairTies, Reduction
from rlhf_pipeline.functional.pairs import (
    Pairs,
    best_responses,
    make_pairs,
    num_prompts_with_pairs,
    response_logprobs,
)

Listed = list[tuple[int, int, float]]


def listed(pairs: Pairs) -> Listed:
    """(winner, loser, label) of every pair, in their order."""
    return list(zip(pairs.winner.tolist(), pairs.loser.tolist(), pairs.label.tolist(), strict=True))


def whole(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# Two prompts, mixed: 0, 1, 3, 5 answer the first, ranked b a c b; 2, 4 the second, tied.
PROMPT = whole(7, 7, 2, 7, 2, 7)
RANKS = whole(1, 0, 0, 2, 0, 1)
BY_HAND: list[tuple[PairRule, Listed, Listed]] = [  # rule, the ordered pairs, and the ties that `half` adds
    (PairRule.all, [(0, 3, 1), (1, 0, 1), (1, 3, 1), (1, 5, 1), (5, 3, 1)], [(0, 5, 0.5), (2, 4, 0.5)]),
    (PairRule.best_worst, [(1, 3, 1)], [(2, 4, 0.5)]),
    (PairRule.adjacent, [(0, 3, 1), (1, 0, 1), (1, 5, 1), (5, 3, 1)], [(0, 5, 0.5), (2, 4, 0.5)]),
]


@pytest.mark.parametrize(("rule", "ordered", "ties"), BY_HAND)
def test_pairs_by_hand(rule: PairRule, ordered: Listed, ties: Listed) -> None:
    without = make_pairs(PROMPT, RANKS, rule=rule, ties=PairTies.drop)
    assert listed(without) == ordered
    assert without.weight.tolist() == pytest.approx([1 / len(ordered)] * len(ordered))
    assert num_prompts_with_pairs(without) == 1

    halves = make_pairs(PROMPT, RANKS, rule=rule, ties=PairTies.half)
    assert listed(halves) == sorted(ordered + ties)
    own = len(ordered) + len(ties) - 1  # the second prompt has one pair, its tie
    assert halves.weight.tolist() == pytest.approx([1.0 if w == 2 else 1 / own for w, _, _ in listed(halves)])
    assert num_prompts_with_pairs(halves) == 2


def test_two_responses_are_one_pair_under_every_rule() -> None:
    for rule in PairRule:
        for ties in PairTies:
            pairs = make_pairs(whole(0, 0, 1, 1), whole(0, 1, 1, 0), rule=rule, ties=ties)
            assert listed(pairs) == [(0, 1, 1), (3, 2, 1)]
            assert pairs.weight.tolist() == [1, 1]


@pytest.mark.parametrize("rule", list(PairRule))
def test_one_response_and_none_make_no_pair(rule: PairRule) -> None:
    for prompt, ranks in [(whole(), whole()), (whole(3), whole(0)), (whole(3, 1, 2), whole(0, 0, 1))]:
        for ties in PairTies:
            pairs = make_pairs(prompt, ranks, rule=rule, ties=ties)
            assert listed(pairs) == []
            assert pairs.weight.shape == (0,)
            assert num_prompts_with_pairs(pairs) == 0


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (PairRule.all, [(0, 1, 0.5), (0, 2, 0.5), (1, 2, 0.5)]),
        (PairRule.best_worst, [(0, 2, 0.5)]),
        (PairRule.adjacent, [(0, 1, 0.5), (0, 2, 0.5), (1, 2, 0.5)]),
    ],
)
def test_all_tied(rule: PairRule, expected: Listed) -> None:
    assert listed(make_pairs(whole(0, 0, 0), whole(4, 4, 4), rule=rule, ties=PairTies.half)) == expected
    assert listed(make_pairs(whole(0, 0, 0), whole(4, 4, 4), rule=rule, ties=PairTies.drop)) == []


def test_best_worst_takes_the_first_best_and_the_last_worst() -> None:
    ranks = whole(2, 0, 2, 1, 0, 2)
    for ties in PairTies:
        assert listed(make_pairs(whole(*[0] * 6), ranks, rule=PairRule.best_worst, ties=ties)) == [(1, 5, 1)]


def test_adjacent_skips_ranks_that_do_not_occur() -> None:
    pairs = make_pairs(whole(0, 0, 0), whole(9, 2, 5), rule=PairRule.adjacent, ties=PairTies.drop)
    assert listed(pairs) == [(1, 2, 1), (2, 0, 1)]


def by_loops(
    prompt: list[int], ranks: list[int], rule: PairRule, ties: PairTies
) -> list[tuple[int, int, float, float]]:
    found: list[tuple[int, int, float, float]] = []
    for p in set(prompt):
        own = [i for i, other in enumerate(prompt) if other == p]
        levels = sorted({ranks[i] for i in own})
        best, worst = levels[0], levels[-1]
        if rule is PairRule.best_worst:
            corners = (next(i for i in own if ranks[i] == best), [i for i in own if ranks[i] == worst][-1])
            candidates = [corners] if len(own) > 1 else []
        else:
            candidates = [(i, j) if ranks[i] <= ranks[j] else (j, i) for i, j in combinations(own, 2)]
        kept = []
        for w, x in candidates:
            steps = levels.index(ranks[x]) - levels.index(ranks[w])
            if steps == 0 and ties is PairTies.half:
                kept.append((w, x, 0.5))
            elif steps == 1 or (steps > 1 and rule is not PairRule.adjacent):
                kept.append((w, x, 1.0))
        found += [(*pair, 1 / len(kept)) for pair in kept]
    return sorted(found)


@pytest.mark.parametrize("ties", list(PairTies))
@pytest.mark.parametrize("rule", list(PairRule))
def test_pairs_against_loops(rule: PairRule, ties: PairTies) -> None:
    generator = torch.Generator().manual_seed(3)
    for count in [1, 2, 5, 13, 40]:
        prompt = torch.randint(0, max(1, count // 3), (count,), generator=generator)
        ranks = torch.randint(0, 4, (count,), generator=generator)
        expected = by_loops(prompt.tolist(), ranks.tolist(), rule, ties)
        pairs = make_pairs(prompt, ranks, rule=rule, ties=ties)
        assert listed(pairs) == [(w, x, label) for w, x, label, _ in expected]
        assert pairs.weight.tolist() == pytest.approx([weight for *_, weight in expected])
        assert num_prompts_with_pairs(pairs) == len({prompt.tolist()[w] for w, *_ in expected})


def test_dtypes_and_many_prompts() -> None:
    """Three pairs a prompt, of 400 prompts: weights of a third, whose fp32 sum is not a whole number."""
    prompt = torch.arange(400).repeat_interleave(3)
    pairs = make_pairs(prompt, torch.arange(3).repeat(400), rule=PairRule.all, ties=PairTies.drop)
    assert (pairs.winner.dtype, pairs.loser.dtype) == (torch.int64, torch.int64)
    assert (pairs.label.dtype, pairs.weight.dtype) == (torch.float32, torch.float32)
    assert len(pairs.winner) == 1200
    number = num_prompts_with_pairs(pairs)
    assert number == 400
    assert isinstance(number, int)


def test_best_responses() -> None:
    assert best_responses(PROMPT, RANKS).tolist() == [False, True, True, False, False, False]
    assert best_responses(whole(1, 0, 1, 0), whole(3, 5, 3, 2)).tolist() == [True, False, False, True]
    assert best_responses(whole(), whole()).tolist() == []


def test_response_logprobs_by_hand(assert_close: Callable[..., None]) -> None:
    # Response 0: -1 and -3; response 1: none; response 2: -0.5; out of order.
    logprobs = torch.tensor([-1.0, -0.5, -3.0], requires_grad=True)
    sequence = whole(0, 2, 0)
    sums = response_logprobs(logprobs, sequence, 3, reduction=Reduction.sum)
    assert_close(sums, torch.tensor([-4.0, 0.0, -0.5]), rtol=1e-6)
    means = response_logprobs(logprobs, sequence, 3, reduction=Reduction.mean)
    assert_close(means, torch.tensor([-2.0, 0.0, -0.5]), rtol=1e-6)
    (means * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.5, 100, 0.5]


@pytest.mark.parametrize("reduction", list(Reduction))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_response_logprobs_of_nothing_are_connected(reduction: Reduction, dtype: torch.dtype) -> None:
    weight = torch.ones(2, dtype=dtype, requires_grad=True)
    for number in (0, 2):
        logprobs = response_logprobs(weight[:0], whole(), number, reduction=reduction)
        assert (logprobs.dtype, logprobs.tolist()) == (dtype, [0.0] * number)
        logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 0]
