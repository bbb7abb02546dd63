"""KL estimators: by hand, and exactly over a whole distribution what each is an estimate of; the adaptive controller."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.functional.kl import adaptive_beta, k1, k2, k3

Estimator = Callable[[Tensor, Tensor], Tensor]
ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}
EVERY_ESTIMATOR = pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def policy_and_reference() -> tuple[Tensor, Tensor]:
    """Logits and logprobs of two distributions over five words."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), other.log_softmax(0)


def test_by_hand(assert_close: Callable[..., None]) -> None:
    # p = 1/2 and q = 1/4: d = log 2. p = 1/4 and q = 1/2: d = -log 2. p = q: 0.
    logprobs, reference = doubles(0.5, 0.25, 0.3).log(), doubles(0.25, 0.5, 0.3).log()
    log_2 = 0.6931471805599453
    assert_close(k1(logprobs, reference), doubles(log_2, -log_2, 0.0), rtol=1e-12)
    assert_close(k2(logprobs, reference), doubles(log_2**2 / 2, log_2**2 / 2, 0.0), rtol=1e-12)
    # 1/2 - 1 + log 2, and 2 - 1 - log 2
    assert_close(k3(logprobs, reference), doubles(0.1931471805599453, 0.3068528194400547, 0.0), rtol=1e-12)


def test_means_over_the_policy(assert_close: Callable[..., None]) -> None:
    """k1 and k3 have KL(p || q) for their mean, k2 has not; the variance is what k3 is for."""
    logits, reference = policy_and_reference()
    near = (0.9 * reference + 0.1 * logits.detach()).log_softmax(0)  # close to the reference, as a policy is
    p = near.exp()
    kl = float(sum(float(a) * math.log(float(a) / math.exp(float(b))) for a, b in zip(p, reference, strict=True)))
    assert float(p @ k1(near, reference)) == pytest.approx(kl, rel=1e-12)
    assert float(p @ k3(near, reference)) == pytest.approx(kl, rel=1e-12)
    assert float(p @ k2(near, reference)) == pytest.approx(kl, rel=0.1)
    assert float(p @ k2(near, reference)) != pytest.approx(kl, rel=1e-3)
    variance = [float(p @ (k(near, reference) - p @ k(near, reference)).square()) for k in (k1, k2, k3)]
    assert max(variance[1:]) < variance[0] / 20


def test_mean_gradients_over_the_policy(assert_close: Callable[..., None]) -> None:
    """As a loss: k1 gives nothing, k2 the gradient of KL(p || q), k3 that of KL(q || p)."""
    logits, reference = policy_and_reference()
    q = reference.exp()

    def gradient(of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(of(logits.log_softmax(0)), logits)[0]

    def mean(estimate: Estimator) -> Tensor:  # samples are drawn from p; no gradient goes through the drawing
        return gradient(lambda logprobs: (logprobs.detach().exp() * estimate(logprobs, reference)).sum())

    forward = gradient(lambda logprobs: (q * (reference - logprobs)).sum())
    reverse = gradient(lambda logprobs: (logprobs.exp() * (logprobs - reference)).sum())
    assert float((forward - reverse).abs().max()) > 0.1  # the two are not the same thing
    assert_close(mean(k1), torch.zeros_like(logits), rtol=0, atol=1e-14)
    assert_close(mean(k2), reverse, rtol=1e-12, atol=1e-14)
    assert_close(mean(k3), forward, rtol=1e-12, atol=1e-14)


@EVERY_ESTIMATOR
def test_gradcheck(estimate: Estimator) -> None:
    logprobs = doubles(-0.1, -1.0, -3.0, -9.0).requires_grad_()
    reference = doubles(-0.2, -1.0, -2.0, -4.0).requires_grad_()
    assert torch.autograd.gradcheck(estimate, (logprobs, reference))


@EVERY_ESTIMATOR
def test_no_tokens(estimate: Estimator) -> None:
    logprobs = torch.zeros(3, requires_grad=True)
    result = estimate(logprobs[:0], torch.zeros(0))
    assert result.shape == (0,)
    result.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0, 0, 0]


def test_k3_of_a_small_difference_in_fp32(assert_close: Callable[..., None]) -> None:
    """exp(-d) - 1 + d in fp32 gives 0 or 1.2e-7 here; the truth is d^2 / 2 (1 - d / 3 + ..)."""
    d = torch.tensor([2e-4, -2e-4, 1e-3])
    exact = doubles(2e-4**2 / 2 * (1 - 2e-4 / 3), 2e-4**2 / 2 * (1 + 2e-4 / 3), 1e-6 / 2 * (1 - 1e-3 / 3))
    assert_close(k3(d, torch.zeros(3)), exact.float(), rtol=1e-3)


def test_k3_is_never_negative() -> None:
    d = torch.arange(-8000, 8001) / 1000
    assert float(k3(d, torch.zeros_like(d)).min()) == 0.0


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 512 / 10_000)),  # a tenth over
        (5.4, 0.1 * (1 - 0.1 * 512 / 10_000)),
        (60.0, 0.1 * (1 + 0.2 * 512 / 10_000)),  # far over: clipped
        (-1.0, 0.1 * (1 - 0.2 * 512 / 10_000)),  # an estimate may be negative
    ],
)
def test_adaptive_beta(kl: float, expected: float) -> None:
    assert adaptive_beta(0.1, kl=kl, target=6.0, horizon=10_000, episodes=512) == pytest.approx(expected, rel=1e-12)


def test_adaptive_beta_of_a_kl_that_is_not_a_number() -> None:
    assert math.isnan(adaptive_beta(0.1, kl=math.nan, target=6.0, horizon=10_000, episodes=512))


@pytest.mark.parametrize(
    ("target", "horizon", "name"),
    [(0.0, 100, "target"), (-1.0, 100, "target"), (6.0, 0, "horizon"), (6.0, 2, "horizon")],
)
def test_adaptive_beta_refuses(target: float, horizon: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        adaptive_beta(0.1, kl=1.0, target=target, horizon=horizon, episodes=10)


def test_the_shortest_horizon_leaves_beta_positive() -> None:
    # 10 episodes, horizon 3: 1 - 0.2 * 10 / 3 = 1/3
    assert adaptive_beta(0.3, kl=0.0, target=6.0, horizon=3, episodes=10) == pytest.approx(0.1, rel=1e-12)
