"""Ranking losses: by hand, against plain double loops, and what must not matter (order, company, number of answers)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_pipeline.functional.losses.ranking import (
    centring_loss,
    comparisons,
    initial_log_tie,
    num_correct,
    num_prompts,
    pairwise_loss,
    plackett_luce_loss,
    soft_label_loss,
)

Loss = Callable[..., Tensor]
Check = Callable[..., None]
NAN = math.nan

# name -> loss(rewards, prompt, ranks, scores, log tie), and the same of one prompt by loops over its responses.
LOSSES: dict[str, Loss] = {
    "pairwise": lambda r, p, k, s, t: pairwise_loss(r, p, k),
    "literal": lambda r, p, k, s, t: pairwise_loss(r, p, k, literal=True),
    "margin": lambda r, p, k, s, t: pairwise_loss(r, p, k, scores=s, margin=0.7),
    "smoothing": lambda r, p, k, s, t: pairwise_loss(r, p, k, label_smoothing=0.2),
    "ties": lambda r, p, k, s, t: pairwise_loss(r, p, k, log_tie=t),
    "everything": lambda r, p, k, s, t: pairwise_loss(
        r, p, k, scores=s, margin=0.3, label_smoothing=0.1, literal=True, log_tie=t
    ),
    "soft labels": lambda r, p, k, s, t: soft_label_loss(r, p, k, s, scale=0.6),
    "soft and literal": lambda r, p, k, s, t: soft_label_loss(r, p, k, s, scale=0.6, literal=True),
    "plackett_luce": lambda r, p, k, s, t: plackett_luce_loss(r, p, k),
    "centring": lambda r, p, k, s, t: centring_loss(r, p, k),
}
REFERENCES: dict[str, Callable[..., float]] = {
    "pairwise": lambda r, k, s, t: pairs(r, k, s),
    "literal": lambda r, k, s, t: pairs(r, k, s, literal=True),
    "margin": lambda r, k, s, t: pairs(r, k, s, margin=0.7),
    "smoothing": lambda r, k, s, t: pairs(r, k, s, smoothing=0.2),
    "ties": lambda r, k, s, t: pairs(r, k, s, nu=math.exp(t)),
    "everything": lambda r, k, s, t: pairs(r, k, s, margin=0.3, smoothing=0.1, literal=True, nu=math.exp(t)),
    "soft labels": lambda r, k, s, t: soft_pairs(r, k, s, scale=0.6),
    "soft and literal": lambda r, k, s, t: soft_pairs(r, k, s, scale=0.6, literal=True),
    "plackett_luce": lambda r, k, s, t: choices(r, k),
    "centring": lambda r, k, s, t: mean([(r[w] + r[x]) ** 2 for w, x in ordered(k)]),
}
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def ordered(ranks: list[int]) -> list[tuple[int, int]]:
    return [(w, x) for w in range(len(ranks)) for x in range(len(ranks)) if ranks[w] < ranks[x]]


def pairs(
    rewards: list[float],
    ranks: list[int],
    scores: list[float],
    *,
    margin: float = 0.0,
    smoothing: float = 0.0,
    literal: bool = False,
    nu: float = 0.0,
) -> float:
    """Davidson's probabilities as he prints them; nu = 0 is Bradley-Terry, in which ties cannot be."""
    total, kept = 0.0, 0
    for w, x in ordered(ranks):
        missing = math.isnan(scores[w]) or math.isnan(scores[x])
        one = math.exp(rewards[w] - (0.0 if missing else margin * (scores[w] - scores[x])))
        other = math.exp(rewards[x])
        whole = one + other + nu * math.sqrt(one * other)
        total -= (1 - smoothing) * math.log(one / whole) + smoothing * math.log(other / whole)
        kept += 1
    for i, j in combinations(range(len(ranks)), 2):
        if nu and ranks[i] == ranks[j]:
            one, other = math.exp(rewards[i]), math.exp(rewards[j])
            tie = nu * math.sqrt(one * other)
            total -= math.log(tie / (one + other + tie))
            kept += 1
    return total / (math.comb(len(ranks), 2) if literal else kept) if kept else 0.0


def soft_pairs(
    rewards: list[float], ranks: list[int], scores: list[float], *, scale: float, literal: bool = False
) -> float:
    """Targets as odds: e^scale a point. A pair without its scores has the label of its ranks."""
    total, kept, number = 0.0, 0, len(ranks)
    for i, j in combinations(range(number), 2):
        one, other = math.exp(rewards[i]), math.exp(rewards[j])
        if math.isnan(scores[i]) or math.isnan(scores[j]):
            if ranks[i] == ranks[j]:
                continue
            target = 1.0 if ranks[i] < ranks[j] else 0.0
        else:
            odds = math.exp(scale * scores[i]) / math.exp(scale * scores[j])
            target = odds / (1 + odds)
        total -= target * math.log(one / (one + other)) + (1 - target) * math.log(other / (one + other))
        kept += 1
    return total / (math.comb(number, 2) if literal else kept) if kept else 0.0


def choices(rewards: list[float], ranks: list[int]) -> float:
    losses = []
    for i, rank in enumerate(ranks):
        below = [math.exp(rewards[j]) for j in range(len(ranks)) if ranks[j] > rank]
        if below:
            losses.append(-math.log(math.exp(rewards[i]) / (math.exp(rewards[i]) + sum(below))))
    return mean(losses)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(seed: int, count: int = 14) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rewards, prompts (not every number used), ranks with ties, scores of which some are missing, log nu."""
    generator = torch.Generator().manual_seed(seed)
    rewards = 2 * torch.randn(count, generator=generator, dtype=torch.float64)
    prompt = torch.randint(0, 5, (count,), generator=generator)
    ranks = torch.randint(0, 3, (count,), generator=generator)
    scores = torch.randn(count, generator=generator, dtype=torch.float64)
    scores[torch.rand(count, generator=generator) < 0.2] = NAN
    return rewards.requires_grad_(), prompt, ranks, scores, double(0.4).squeeze().requires_grad_()


# One prompt, four answers: a best, b and c tied, d worst. exp(reward) = 36, 4, 9, 1.
HAND = (double(36, 4, 9, 1).log(), torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 1, 2]))
# a > b, a > c, a > d, b > d, c > d: 36 / (36 + 4) and so on
ODDS = [36 / 40, 36 / 45, 36 / 37, 4 / 5, 9 / 10]


def test_which_responses_are_compared() -> None:
    better, tied = comparisons(torch.tensor([7, 7, 3, 7, 7, 3]), torch.tensor([0, 1, 0, 1, 2, 0]))
    assert [tuple(pair) for pair in better.nonzero().tolist()] == [(0, 1), (0, 3), (0, 4), (1, 4), (3, 4)]
    assert [tuple(pair) for pair in tied.nonzero().tolist()] == [(1, 3), (2, 5)]


def test_pairwise_by_hand() -> None:
    total = -sum(math.log(p) for p in ODDS)
    assert float(pairwise_loss(*HAND)) == pytest.approx(total / 5, rel=1e-12)
    assert float(pairwise_loss(*HAND, literal=True)) == pytest.approx(total / 6, rel=1e-12)  # 4 over 2


def test_ties_by_hand() -> None:
    # nu = 2: 36 + 4 + 2 sqrt(36 * 4) = (6 + 2)^2, and so on; the tie is 2 sqrt(4 * 9) / (2 + 3)^2
    outcomes = [36 / 64, 36 / 81, 36 / 49, 4 / 9, 9 / 16, 12 / 25]
    expected = -sum(math.log(p) for p in outcomes) / 6
    log_tie = torch.tensor(math.log(2), dtype=torch.float64)
    for literal in (False, True):
        assert float(pairwise_loss(*HAND, log_tie=log_tie, literal=literal)) == pytest.approx(expected, rel=1e-12)


def test_margin_by_hand() -> None:
    # log 2 a point: the odds of w over l are halved for every point between them, 36 : 4 with 2 points is 9 : 4.
    scores = double(4, 2, 2, 1)
    expected = -sum(math.log(p) for p in [9 / 13, 1 / 2, 9 / 11, 2 / 3, 9 / 11]) / 5
    assert float(pairwise_loss(*HAND, scores=scores, margin=math.log(2))) == pytest.approx(expected, rel=1e-12)
    scores[2] = NAN  # c without a score: a > c and c > d without a margin
    expected = -sum(math.log(p) for p in [9 / 13, 36 / 45, 9 / 11, 2 / 3, 9 / 10]) / 5
    assert float(pairwise_loss(*HAND, scores=scores, margin=math.log(2))) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="needs scores"):
        pairwise_loss(*HAND, margin=1.0)


def test_smoothing_by_hand() -> None:
    expected = -sum(0.9 * math.log(p) + 0.1 * math.log(1 - p) for p in ODDS) / 5
    assert float(pairwise_loss(*HAND, label_smoothing=0.1)) == pytest.approx(expected, rel=1e-12)


def test_plackett_luce_by_hand() -> None:
    # a before all others; b and c, tied, each before d only; nothing is below d.
    expected = -(math.log(36 / 50) + math.log(4 / 5) + math.log(9 / 10)) / 3
    assert float(plackett_luce_loss(*HAND)) == pytest.approx(expected, rel=1e-12)


def test_centring_by_hand() -> None:
    expected = sum(math.log(product) ** 2 for product in [36 * 4, 36 * 9, 36 * 1, 4 * 1, 9 * 1]) / 5
    assert float(centring_loss(*HAND)) == pytest.approx(expected, rel=1e-12)


def test_accuracy_by_hand() -> None:
    rewards = double(2, 2, 3, 1, 5, 6)
    prompt, ranks = torch.tensor([0, 0, 0, 0, 4, 4]), torch.tensor([0, 1, 1, 2, 0, 1])
    # a = b: half; a < c: wrong; a > d, b > d, c > d. The other prompt: wrong.
    assert float(num_correct(rewards, prompt, ranks)) == pytest.approx(3.5 / 5 + 0, rel=1e-12)
    assert int(num_prompts(prompt, ranks)) == 2


@EVERY_LOSS
@pytest.mark.parametrize("seed", range(12))
def test_against_loops(name: str, seed: int, assert_close: Check) -> None:
    rewards, prompt, ranks, scores, log_tie = batch(seed, count=seed * 3)
    expected = 0.0
    for number in set(prompt.tolist()):
        own = (prompt == number).nonzero()[:, 0]
        values = [column[own].tolist() for column in (rewards, ranks, scores)]
        expected += REFERENCES[name](*values, log_tie.item())
    actual = LOSSES[name](rewards, prompt, ranks, scores, log_tie)
    assert_close(actual, double(expected).squeeze(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", range(12))
def test_counts_against_loops(seed: int, assert_close: Check) -> None:
    rewards, prompt, ranks, scores, _ = batch(seed, count=seed * 3)
    rewards = rewards.detach().round()  # some are equal
    with_order, with_any, with_label, right = 0, 0, 0, 0.0
    for number in set(prompt.tolist()):
        own = (prompt == number).nonzero()[:, 0]
        r, k = rewards[own].tolist(), ranks[own].tolist()
        with_order += len(set(k)) > 1
        with_any += len(k) > 1
        with_label += len(set(k)) > 1 or sum(not math.isnan(s) for s in scores[own].tolist()) > 1
        right += mean([1.0 if r[w] > r[x] else 0.5 if r[w] == r[x] else 0.0 for w, x in ordered(k)])
    assert int(num_prompts(prompt, ranks)) == with_order
    assert int(num_prompts(prompt, ranks, ties_count=True)) == with_any
    assert int(num_prompts(prompt, ranks, soft_scores=scores)) == with_label
    assert_close(num_correct(rewards, prompt, ranks), double(right).squeeze(), rtol=1e-12)


@EVERY_LOSS
@pytest.mark.parametrize("count", [0, 1, 9])
def test_gradcheck(name: str, count: int) -> None:
    rewards, prompt, ranks, scores, log_tie = batch(3, count)
    assert torch.autograd.gradcheck(lambda r, t: LOSSES[name](r, prompt, ranks, scores, t), (rewards, log_tie))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_responses_are_exactly_bradley_terry(dtype: torch.dtype) -> None:
    prompt, ranks = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1])
    for gap in (-40.0, -1.3, 0.0, 0.7, 17.0, 40.0):
        rewards = torch.tensor([gap + 0.2, 0.2], dtype=dtype)
        expected = -logsigmoid(rewards[0] - rewards[1])
        assert pairwise_loss(rewards, prompt, ranks).item() == expected.item()
        assert plackett_luce_loss(rewards, prompt, ranks).item() == expected.item()


@EVERY_LOSS
def test_a_prompt_of_two_and_one_of_nine_weigh_the_same(name: str, assert_close: Check) -> None:
    rewards, _, _, scores, log_tie = batch(0, count=11)
    prompt, ranks = torch.tensor([5] * 2 + [2] * 9), torch.tensor([1, 0, *range(9)])
    alone = [
        LOSSES[name](rewards[own], prompt[own], ranks[own], scores[own], log_tie) for own in (slice(0, 2), slice(2, 11))
    ]
    assert_close(LOSSES[name](rewards, prompt, ranks, scores, log_tie), sum(alone), rtol=1e-12)
    assert int(num_prompts(prompt, ranks)) == 2


def test_equal_rewards_cost_ln_2_a_prompt_whatever_its_answers() -> None:
    prompt, ranks = torch.tensor([5] * 2 + [2] * 9), torch.tensor([1, 0, *range(9)])
    rewards = torch.full((11,), 0.3, dtype=torch.float64, requires_grad=True)
    loss = pairwise_loss(rewards, prompt, ranks)
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-12)
    # The winner of two is pulled by 1/2, that of nine by eight of 36 comparisons at 1/2 each.
    (grad,) = torch.autograd.grad(loss, rewards)
    assert float(grad[1]) == pytest.approx(-1 / 2, rel=1e-12)
    assert float(grad[2]) == pytest.approx(-8 / 36 / 2, rel=1e-12)


@EVERY_LOSS
def test_order_and_numbering_do_not_matter(name: str, assert_close: Check) -> None:
    rewards, prompt, ranks, scores, log_tie = batch(1)
    loss = LOSSES[name](rewards, prompt, ranks, scores, log_tie)
    (grad,) = torch.autograd.grad(loss, rewards)
    other = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))
    renumbered = torch.tensor([3, 0, 4, 1, 2])[prompt]
    shuffled = LOSSES[name](rewards[other], renumbered[other], ranks[other] * 5, scores[other], log_tie)
    (shuffled_grad,) = torch.autograd.grad(shuffled, rewards)
    assert_close(shuffled, loss, rtol=1e-12)
    assert_close(shuffled_grad, grad, rtol=1e-10, atol=1e-14)


@EVERY_LOSS
def test_two_micro_batches_add_up_to_one(name: str, assert_close: Check) -> None:
    rewards, prompt, ranks, scores, log_tie = batch(2)
    parts = [prompt < 2, prompt >= 2]
    sums = [LOSSES[name](rewards[own], prompt[own], ranks[own], scores[own], log_tie) for own in parts]
    assert_close(sum(sums), LOSSES[name](rewards, prompt, ranks, scores, log_tie), rtol=1e-12)
    counts = [int(num_prompts(prompt[own], ranks[own])) for own in parts]
    assert 0 < counts[0] < sum(counts) == int(num_prompts(prompt, ranks))


@EVERY_LOSS
def test_only_centring_sees_a_shift_of_all_rewards(name: str) -> None:
    rewards, prompt, ranks, scores, log_tie = batch(4)
    before, after = (LOSSES[name](rewards + by, prompt, ranks, scores, log_tie).item() for by in (0.0, 3.0))
    assert (after == pytest.approx(before, rel=1e-12)) is (name != "centring")


@EVERY_LOSS
@pytest.mark.parametrize("prompts", [[], [4], [0, 1, 2], [0, 0, 0]])
def test_nothing_to_compare_is_zero_and_connected(name: str, prompts: list[int]) -> None:
    """No response, one, one a prompt, all tied."""
    count, modelled = len(prompts), name in ("ties", "everything") and prompts == [0, 0, 0]
    rewards = torch.linspace(-1, 1, count, dtype=torch.float64, requires_grad=True)
    log_tie = double(0.5).squeeze().requires_grad_()
    prompt, ranks = torch.tensor(prompts, dtype=torch.int64), torch.full((count,), 2)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either, that a mask then hides
        loss = LOSSES[name](rewards, prompt, ranks, double(*[NAN] * count), log_tie)
        loss.backward()
    assert rewards.grad is not None
    assert rewards.grad.shape == (count,)
    if modelled:
        assert loss.item() > 0
        assert rewards.grad.any()
    else:
        assert loss.item() == 0
        assert rewards.grad.tolist() == [0] * count
        assert log_tie.grad is None or float(log_tie.grad) == 0
    assert int(num_prompts(prompt, ranks)) == 0
    assert int(num_prompts(prompt, ranks, ties_count=True)) == (prompts == [0, 0, 0])
    assert float(num_correct(rewards, prompt, ranks)) == 0


@EVERY_LOSS
def test_a_response_that_is_compared_with_none_does_not_count(name: str, assert_close: Check) -> None:
    """Not even where its reward is infinite: neither in the loss nor in a gradient."""
    rewards, prompt, ranks, scores, log_tie = batch(5)
    prompt[6] = 9
    loss = LOSSES[name](rewards, prompt, ranks, scores, log_tie)
    broken = rewards.detach().index_fill(0, torch.tensor([6]), math.inf).requires_grad_()
    broken_loss = LOSSES[name](broken, prompt, ranks, scores, log_tie)
    assert_close(broken_loss, loss, rtol=1e-12)
    grads = torch.autograd.grad(loss + broken_loss, (rewards, broken))
    assert_close(grads[1], grads[0], rtol=1e-12)


@EVERY_LOSS
def test_extreme_rewards_stay_finite(name: str) -> None:
    rewards = torch.tensor([1e4, -1e4, 0.0, -1e4, 1e4, 1e4], requires_grad=True)
    prompt, ranks = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 0, 1, 1])
    log_tie = torch.tensor(-1.0, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        loss = LOSSES[name](rewards, prompt, ranks, torch.full((6,), NAN), log_tie)
        loss.backward()
    loss_of_rated = LOSSES[name](rewards.detach(), prompt, ranks, torch.tensor([1e4, 0, -1e4, 3, 3, 3]), log_tie)
    assert loss.isfinite() and loss_of_rated.isfinite()
    assert rewards.grad is not None
    assert rewards.grad.isfinite().all()
    assert rewards.grad.any()


def test_davidson_probabilities_sum_to_one() -> None:
    prompt, log_tie = torch.zeros(2, dtype=torch.int64), double(0.7).squeeze()
    for gap in (-30.0, -2.0, 0.0, 0.4, 30.0):
        outcomes = [(0, 1), (1, 0), (0, 0)]
        losses = [pairwise_loss(double(gap, 0), prompt, torch.tensor(o), log_tie=log_tie) for o in outcomes]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("rate", [1e-6, 0.1, 1 / 3, 0.9])
def test_initial_log_tie_is_the_tie_rate_of_equal_answers(rate: float) -> None:
    log_tie = torch.tensor(initial_log_tie(rate), dtype=torch.float64)
    loss = pairwise_loss(double(0.8, 0.8), torch.tensor([0, 0]), torch.tensor([0, 0]), log_tie=log_tie)
    assert math.exp(-loss) == pytest.approx(rate, rel=1e-12)
    for wrong in (0.0, 1.0, -0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="tie_rate"):
            initial_log_tie(wrong)


@EVERY_LOSS
def test_results_have_the_dtype_of_the_rewards(name: str) -> None:
    rewards, prompt, ranks, scores, log_tie = batch(6)
    for dtype, other in [(torch.float32, torch.float64), (torch.float64, torch.float32)]:
        loss = LOSSES[name](rewards.to(dtype), prompt, ranks, scores.to(other), log_tie.to(other))
        assert (loss.dtype, loss.shape) == (dtype, ())


@EVERY_LOSS
def test_no_shape_depends_on_the_data(name: str) -> None:
    """Tensors on `meta` have shapes and no data: whatever had to look at numbers, and wait for a GPU, would fail."""
    rewards, prompt, ranks, scores, log_tie = (t.detach().to("meta") for t in batch(7))
    rewards.requires_grad_()
    LOSSES[name](rewards, prompt, ranks, scores, log_tie).backward()
    assert num_prompts(prompt, ranks, soft_scores=scores).shape == num_correct(rewards, prompt, ranks).shape == ()
