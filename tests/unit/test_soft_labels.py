"""Soft labels by hand, where they become hard ones, and which prompts have any; `test_ranking_loss` has the loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.functional.losses.ranking import num_prompts, pairwise_loss, soft_label_loss

Check = Callable[..., None]
NAN = math.nan


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# One prompt, four answers: a best, b and c tied, d worst. exp(reward) = 36, 4, 9, 1.
HAND = (double(36, 4, 9, 1).log(), torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 1, 2]))
# a > b, a > c, a > d, b > d, c > d: 36 / (36 + 4) and so on
ODDS = [36 / 40, 36 / 45, 36 / 37, 4 / 5, 9 / 10]


def test_soft_labels_by_hand() -> None:
    # ln 2 a point: two points are odds of 4 : 1, one of 2 : 1; b and c, tied, 1 : 1.
    scores = double(4, 2, 2, 1)
    targets = [4 / 5, 4 / 5, 8 / 9, 2 / 3, 2 / 3]
    ordered_pairs = [p * math.log(q) + (1 - p) * math.log(1 - q) for p, q in zip(targets, ODDS, strict=True)]
    tie = (math.log(4 / 13) + math.log(9 / 13)) / 2
    for literal in (False, True):  # no pair is left out: both divide by 4 over 2
        loss = soft_label_loss(*HAND, scores, scale=math.log(2), literal=literal)
        assert float(loss) == pytest.approx(-(sum(ordered_pairs) + tie) / 6, rel=1e-12)
    scores[2] = NAN  # c without a score: a > c and c > d for certain, and its tie with b left out
    certain = [ordered_pairs[0], math.log(ODDS[1]), ordered_pairs[2], ordered_pairs[3], math.log(ODDS[4])]
    for literal, number in [(False, 5), (True, 6)]:
        loss = soft_label_loss(*HAND, scores, scale=math.log(2), literal=literal)
        assert float(loss) == pytest.approx(-sum(certain) / number, rel=1e-12)


def test_soft_labels_of_two() -> None:
    """The cross-entropy of a coin of sigmoid(scale * difference), least where the rewards differ by just that."""
    prompt, scale = torch.zeros(2, dtype=torch.int64), 0.35
    for ranks, scores in [((0, 1), (7.0, 2.0)), ((1, 0), (3.0, 4.0)), ((0, 0), (5.0, 5.0))]:
        apart = scale * (scores[0] - scores[1])
        target = 1 / (1 + math.exp(-apart))
        rewards = double(apart + 0.4, 0.4).requires_grad_()
        loss = soft_label_loss(rewards, prompt, torch.tensor(ranks), torch.tensor(scores), scale=scale)
        entropy = -target * math.log(target) - (1 - target) * math.log(1 - target)
        assert float(loss.detach()) == pytest.approx(entropy, rel=1e-6)
        (grad,) = torch.autograd.grad(loss, rewards)
        assert grad.tolist() == pytest.approx([0, 0], abs=1e-7)
        rewards = double(1.4, 0.4).requires_grad_()
        loss = soft_label_loss(rewards, prompt, torch.tensor(ranks), torch.tensor(scores), scale=scale)
        (grad,) = torch.autograd.grad(loss, rewards)
        assert float(grad[0]) == pytest.approx(1 / (1 + math.exp(-1.0)) - target, rel=1e-6)


@pytest.mark.parametrize("literal", [False, True])
def test_soft_labels_become_those_of_the_ranks(literal: bool, assert_close: Check) -> None:
    """With an ever larger scale, ties aside; and where no answer has a score, ties left out."""
    generator = torch.Generator().manual_seed(8)
    rewards, prompt = 2 * torch.randn(14, generator=generator, dtype=torch.float64), torch.arange(14) % 4
    ranks = torch.randperm(14, generator=generator)
    hard = float(pairwise_loss(rewards, prompt, ranks, literal=literal))
    losses = [
        float(soft_label_loss(rewards, prompt, ranks, -ranks.double(), scale=scale, literal=literal))
        for scale in (0.1, 1.0, 10.0, 1000.0)
    ]
    gaps = [abs(loss - hard) for loss in losses]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[3] < 1e-14
    tied, none = ranks // 3, torch.full_like(rewards, NAN)
    unrated = soft_label_loss(rewards, prompt, tied, none, scale=0.5, literal=literal)
    assert_close(unrated, pairwise_loss(rewards, prompt, tied, literal=literal), rtol=1e-12)


def test_prompts_that_have_a_soft_label() -> None:
    """All tie, two of three with a score; all tie, one with a score; in order, none; one answer alone."""
    prompt, ranks = torch.tensor([4, 4, 4, 1, 1, 2, 2, 0]), torch.tensor([0, 0, 0, 0, 0, 1, 0, 0])
    scores = double(3, NAN, 3, NAN, 2, NAN, NAN, 5)
    assert int(num_prompts(prompt, ranks)) == 1
    assert int(num_prompts(prompt, ranks, soft_scores=scores)) == 2
    rewards = double(1, 9, -1, 0, 3, 0.5, 0.5, 8).requires_grad_()
    loss = soft_label_loss(rewards, prompt, ranks, scores, scale=0.35)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2 + math.log(2)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    (grad,) = torch.autograd.grad(loss, rewards)
    assert [bool(one) for one in grad] == [True, False, True, False, False, True, True, False]
