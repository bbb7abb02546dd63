"""Advantages: by hand, against loops over floats, the identities of gamma and lambda, and what must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.functional.advantages import (
    explained_variance,
    gae,
    grpo,
    no_spread,
    reinforce,
    rewards_to_go,
    rloo,
    running_mean,
    sequence_returns,
    whiten,
    with_spread,
)

Check = Callable[..., None]


def doubles(values: list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ragged(seed: int, *, rows: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """rewards, values [R, L] with NaN for padding, mask [R, L]: lengths 1..R in random order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randperm(rows, generator=generator) + 1
    mask = torch.arange(rows) < lengths[:, None]
    numbers = torch.randn(2, rows, rows, generator=generator, dtype=torch.float64)
    rewards, values = numbers.masked_fill(~mask, math.nan)
    return rewards, values, mask


def rows_of(x: Tensor, mask: Tensor) -> list[list[float]]:
    return [row[here].tolist() for row, here in zip(x, mask, strict=True)]


def padded(rows: list[list[float]], width: int) -> Tensor:
    return doubles([row + [0.0] * (width - len(row)) for row in rows])


def test_gae_by_hand() -> None:
    # gamma 1/2, lambda 1/2, a response of three tokens and one of two:
    #   delta = (1 + 4/2 - 2, 2 + 8/2 - 4, 3 + 0 - 8) = (1, 2, -5)
    #   A = (1 + 0.75/4, 2 - 5/4, -5) = (1.1875, 0.75, -5)
    #   delta = (0 + 2/2 - 6, 4 + 0 - 2) = (-5, 2);   A = (-5 + 2/4, 2) = (-4.5, 2)
    rewards = doubles([[1.0, 2.0, 3.0], [0.0, 4.0, 77.0]])
    values = doubles([[2.0, 4.0, 8.0], [6.0, 2.0, 55.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.1875, 0.75, -5.0], [-4.5, 2.0, 0.0]]
    assert returns.tolist() == [[3.1875, 4.75, 3.0], [1.5, 4.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.5, 0.0), (0.8, 1.0), (0.0, 0.5)])
def test_gae_against_the_sum_in_the_paper(gamma: float, lam: float, assert_close: Check) -> None:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, term by term: no recursion."""
    rewards, values, mask = ragged(0)
    expected, returns = [], []
    for r, v in zip(rows_of(rewards, mask), rows_of(values, mask), strict=True):
        deltas = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
        row = [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(r))) for t in range(len(r))]
        expected.append(row)
        returns.append([a + b for a, b in zip(row, v, strict=True)])
    actual = gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert_close(actual[0], padded(expected, mask.shape[1]), rtol=1e-12, atol=1e-14)
    assert_close(actual[1], padded(returns, mask.shape[1]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_is_reward_to_go_less_value(gamma: float, assert_close: Check) -> None:
    rewards, values, mask = ragged(1)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    to_go = rewards_to_go(rewards, mask, gamma)
    assert_close(returns, to_go, rtol=1e-12, atol=1e-13)
    assert_close(advantages, to_go - values.nan_to_num(nan=0.0), rtol=1e-12, atol=1e-13)


def test_lambda_zero_is_the_temporal_difference_error(assert_close: Check) -> None:
    rewards, values, mask = ragged(2)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    r, v = rewards.nan_to_num(nan=0.0), values.nan_to_num(nan=0.0)
    target = r + 0.9 * torch.cat((v[:, 1:], torch.zeros(len(v), 1, dtype=torch.float64)), dim=1)
    assert_close(returns, target, rtol=1e-12, atol=1e-14)
    assert_close(advantages, target - v, rtol=1e-12, atol=1e-14)


def test_a_perfect_value_leaves_no_advantage(assert_close: Check) -> None:
    """A score at the end and gamma 1: the value of every token is the score. A shift by a token would show."""
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    rewards = doubles([[0.0, 0.0, 0.0, 5.0], [0.0, 3.0, 0.0, 0.0]])
    values = doubles([[5.0] * 4, [3.0] * 4])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert not advantages.any()
    assert returns.tolist() == [[5.0] * 4, [3.0, 3.0, 0.0, 0.0]]


def test_rewards_to_go_by_hand(assert_close: Check) -> None:
    # gamma 1/2: 1 + 2/2 + 4/4, 2 + 4/2, 4;  and 8 + 6/2, 6
    rewards, mask = doubles([[1.0, 2.0, 4.0], [8.0, 6.0, 77.0]]), torch.tensor([[True] * 3, [True, True, False]])
    assert rewards_to_go(rewards, mask, 0.5).tolist() == [[3.0, 4.0, 4.0], [11.0, 6.0, 0.0]]
    assert sequence_returns(rewards, mask).tolist() == [7.0, 14.0]
    everything, _, ones = ragged(3)
    assert_close(rewards_to_go(everything, ones, 1.0)[:, 0], sequence_returns(everything, ones), rtol=1e-12)


def test_reinforce_by_hand() -> None:
    rewards, mask = doubles([[1.0, 2.0, 4.0], [8.0, 6.0, 77.0]]), torch.tensor([[True] * 3, [True, True, False]])
    assert reinforce(rewards, mask, gamma=0.5, baseline=3.0).tolist() == [[0.0, 1.0, 1.0], [8.0, 3.0, 0.0]]


def test_running_mean() -> None:
    first = running_mean(None, doubles([1.0, 2.0, 6.0]), 0.9)
    assert first == 3.0
    # 0.9 * 3 + 0.1 * 8
    assert running_mean(first, doubles([8.0]), 0.9) == pytest.approx(3.5, rel=1e-12)
    assert running_mean(0.0, doubles([8.0]), 0.75) == 2.0  # a mean of 0 is a mean, not the lack of one


def test_whiten_by_hand(assert_close: Check) -> None:
    # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    x, mask = doubles([[1.0, 7.0, 99.0], [3.0, 5.0, math.nan]]), torch.tensor([[True, True, False]] * 2)
    root = math.sqrt(5)
    expected = doubles([[-3 / root, 3 / root, 0.0], [-1 / root, 1 / root, 0.0]])
    assert_close(whiten(x, mask), expected, rtol=1e-8)


def test_whiten_is_over_the_whole_iteration(assert_close: Check) -> None:
    x, _, mask = ragged(4)
    white = whiten(1e3 + 50 * x, mask)
    counted = white[mask]
    assert float(counted.mean()) == pytest.approx(0.0, abs=1e-10)
    assert float(counted.square().mean()) == pytest.approx(1.0, rel=1e-9)
    assert not white[~mask].any()
    assert_close(whiten(x, mask), white, rtol=1e-6)
    assert not math.isclose(float(white[0][mask[0]].mean()), 0.0, abs_tol=1e-3)  # rows are not whitened apart


def test_whiten_many_large_numbers_in_fp32(assert_close: Check) -> None:
    """1e6 and 1e6 + 2 by turns: the mean is 1e6 + 1 and the variance 1. Sums in fp32 would lose both."""
    x = (1e6 + torch.tensor([0.0, 2.0])).repeat(100_001)[None]
    assert_close(whiten(x, torch.ones_like(x, dtype=torch.bool)), x - 1_000_001, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 7])
def test_whiten_without_spread(count: int, dtype: torch.dtype) -> None:
    x = torch.full((1, 9), 0.1, dtype=dtype)
    white = whiten(x, torch.arange(9)[None] < count)
    assert white.dtype == dtype
    assert float(white.abs().max()) < 1e-11


def test_rloo_by_hand() -> None:
    # Returns 1, 2, 6 of the first prompt and 4, 4, 1 of the second; each less the mean of the other two.
    rewards = doubles([[0.5, 0.5], [2.0, 99.0], [1.0, 5.0], [4.0, 99.0], [3.0, 1.0], [-1.0, 2.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, False], [True, True], [True, True]])
    expected = [[-3.0, -3.0], [-1.5, 0.0], [4.5, 4.5], [1.5, 0.0], [1.5, 1.5], [-3.0, -3.0]]
    assert rloo(rewards, mask, 3).tolist() == expected


def test_grpo_by_hand(assert_close: Check) -> None:
    # Returns 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7. The second prompt's are all 4.
    rewards = doubles([[0.5, 0.5], [2.0, 99.0], [1.0, 5.0], [4.0, 99.0], [3.0, 1.0], [4.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, False], [True, True], [True, True]])
    below = math.sqrt(7) + 1e-4
    expected = [[-2 / below] * 2, [-1 / below, 0.0], [3 / below] * 2, [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert_close(grpo(rewards, mask, 3), doubles(expected), rtol=1e-12)


@pytest.mark.parametrize("samples", [2, 4])
def test_groups_against_a_loop(samples: int, assert_close: Check) -> None:
    rewards, _, mask = ragged(5)
    returns = [sum(row) for row in rows_of(rewards, mask)]
    one_out, standardised = [], []
    for r in range(len(returns)):
        first = r // samples * samples
        group = returns[first : first + samples]
        others = [x for i, x in enumerate(group) if first + i != r]
        mean = sum(group) / samples
        deviation = math.sqrt(sum((x - mean) ** 2 for x in group) / (samples - 1))
        length = int(mask[r].sum())
        one_out.append([returns[r] - sum(others) / len(others)] * length)
        standardised.append([(returns[r] - mean) / (deviation + 1e-4)] * length)
    assert_close(rloo(rewards, mask, samples), padded(one_out, mask.shape[1]), rtol=1e-11)
    assert_close(grpo(rewards, mask, samples), padded(standardised, mask.shape[1]), rtol=1e-11)


@pytest.mark.parametrize("estimator", [rloo, grpo])
def test_a_group_of_equal_returns_teaches_nothing(estimator: Callable[..., Tensor]) -> None:
    """0.1 seven times, in fp32: the mean and the deviation are off by rounding, and 1e-4 below would blow that up."""
    advantages = estimator(torch.full((7, 1), 1000.1), torch.ones(7, 1, dtype=torch.bool), 7)
    if estimator is grpo:
        assert not advantages.any()
    assert float(advantages.abs().max()) < 1e-3


@pytest.mark.parametrize("estimator", [rloo, grpo])
def test_the_other_prompts_do_not_matter(estimator: Callable[..., Tensor], assert_close: Check) -> None:
    rewards, _, mask = ragged(6)
    together = estimator(rewards, mask, 4)
    for rows in (slice(0, 4), slice(4, 8)):
        assert_close(estimator(rewards[rows], mask[rows], 4), together[rows], rtol=1e-12)
    order = torch.tensor([2, 0, 3, 1, 7, 4, 6, 5])  # among the samples of each prompt
    assert_close(estimator(rewards[order], mask[order], 4), together[order], rtol=1e-11)
    group_sums = together[:, 0].reshape(2, 4).sum(1)
    assert_close(group_sums, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", [rloo, grpo])
def test_one_sample_has_nobody_to_be_compared_with(estimator: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="samples=1"):
        estimator(torch.ones(4, 1), torch.ones(4, 1, dtype=torch.bool), 1)


def test_no_spread() -> None:
    # The first prompt's scores differ, the other two's do not; then by twos, of which (1, 1) and (2, 2) do not.
    assert no_spread(doubles([1.0, 1.0, 2.0, 5.0, 5.0, 5.0, 0.0, 0.0, 0.0]), 3) == pytest.approx(2 / 3, rel=1e-12)
    assert no_spread(doubles([1.0, 1.0, 2.0, 3.0, 2.0, 2.0, 1.0, 2.0]), 2) == 0.5
    assert no_spread(doubles([1.0, 2.0]), 2) == 0.0
    assert no_spread(doubles([1.0, 1.0]), 1) is None
    assert no_spread(doubles([]), 2) is None


def test_with_spread() -> None:
    scores = doubles([1.0, 1.0, 2.0, 5.0, 5.0, 5.0, 0.1 + 0.2, 0.3, 0.3])
    assert with_spread(scores, 3).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="samples=1"):
        with_spread(scores, 1)


def test_explained_variance_by_hand() -> None:
    # Returns 1, 3, 5, 7 have variance 5. Values 2, 3, 5, 6: errors -1, 0, 0, 1 with variance 1/2.
    returns = doubles([[1.0, 3.0], [5.0, math.nan], [7.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    assert explained_variance(doubles([[2.0, 3.0], [5.0, 99.0], [6.0, math.nan]]), returns, mask) == pytest.approx(0.9)
    assert explained_variance(returns + 10, returns, mask) == 1.0  # a constant error is not variance
    assert explained_variance(doubles([[4.0, 4.0]] * 3), returns, mask) == 0.0
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)  # worse than a constant: 1 - 4


@pytest.mark.parametrize("count", [0, 1, 5])
def test_explained_variance_of_returns_that_do_not_vary(count: int) -> None:
    values = torch.arange(5, dtype=torch.float64)[None]
    assert explained_variance(values, torch.full((1, 5), 0.1), torch.arange(5)[None] < count) is None


# name -> advantages(rewards, values, mask), for what must hold of all of them
EVERY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gae": lambda r, v, m: gae(r, v, m, gamma=0.9, lam=0.8)[0],
    "returns": lambda r, v, m: gae(r, v, m, gamma=0.9, lam=0.8)[1],
    "rewards_to_go": lambda r, v, m: rewards_to_go(r, m, 0.9),
    "reinforce": lambda r, v, m: reinforce(r, m, gamma=0.9, baseline=0.3),
    "rloo": lambda r, v, m: rloo(r, m, 4),
    "grpo": lambda r, v, m: grpo(r, m, 4),
    "whiten": lambda r, v, m: whiten(r, m),
}
EVERY_ONE = pytest.mark.parametrize("of", EVERY.values(), ids=EVERY)


@EVERY_ONE
def test_padding_does_not_matter(of: Callable[..., Tensor], assert_close: Check) -> None:
    rewards, values, mask = ragged(7)
    before = rewards.clone(), values.clone()
    result = of(rewards, values, mask)
    assert not result[~mask].any()  # NaN would be True
    assert bool((result[mask] != 0).all())
    assert torch.equal(rewards.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(values.nan_to_num(), before[1].nan_to_num())
    wide = [torch.nn.functional.pad(x, (0, 3), value=math.inf) for x in (rewards, values)]
    wide[0][~torch.nn.functional.pad(mask, (0, 3))] = -1e9
    wider = of(*wide, torch.nn.functional.pad(mask, (0, 3)))
    assert_close(wider, torch.nn.functional.pad(result, (0, 3)), rtol=1e-12, atol=1e-14)


@EVERY_ONE
def test_the_order_of_prompts_does_not_matter(of: Callable[..., Tensor], assert_close: Check) -> None:
    rewards, values, mask = ragged(8)
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    expected = of(rewards, values, mask)[order]
    assert_close(of(rewards[order], values[order], mask[order]), expected, rtol=1e-12, atol=1e-14)


@EVERY_ONE
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)])
def test_nothing_to_do(of: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    assert of(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)).shape == shape


@EVERY_ONE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(of: Callable[..., Tensor], dtype: torch.dtype) -> None:
    rewards, values, mask = ragged(9)
    assert of(rewards.to(dtype), values.to(dtype), mask).dtype == dtype
