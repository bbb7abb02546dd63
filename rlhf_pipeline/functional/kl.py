"""The KL divergence between policy and reference, estimated from what the policy sampled, and the control of its weight.

The estimators are elementwise: a token, or a whole response whose logprobs are summed. Each is a function of
d = log p - log q, with p the policy that sampled and q the reference; KL(p || q) is the mean of d under p.
Source: Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).

As a term of the loss they are something else than as a number: the gradient of an estimate is not an estimate of the
gradient (Tang and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL"). On the policy's own
samples the mean gradient is 0 for k1, that of KL(p || q) for k2, and that of KL(q || p) for k3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """d: without bias, of high variance, negative for every token that the reference likes better."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """d^2 / 2: never negative and of low variance; biased, by the third order of d."""
    return (logprobs - reference).square() / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(-d) - 1 + d: without bias and never negative; of low variance while p and q are close.

    The KL term of GRPO's loss (Shao et al. 2024, equation 4). Its variance has no bound: a token that the reference
    likes far better than the policy makes exp(-d) large.
    """
    d = logprobs - reference
    return torch.expm1(-d) + d  # exp(-d) - 1 would round a small d away


def adaptive_beta(beta: float, *, kl: float, target: float, horizon: int, episodes: int) -> float:
    """The next beta: up where the KL was over its target, down where it was under (Ziegler et al. 2019, section 2.2).

    error = clip(kl / target - 1, -0.2, 0.2); beta * (1 + error * episodes / horizon). `kl` and `target` are nats a
    response, `episodes` the responses of the iteration that `kl` is the mean of. A KL that is NaN gives NaN.

    Raises:
        ValueError: for target or horizon <= 0, and for a horizon of a fifth of `episodes` or less: beta could reach 0,
            where it would stay, or change sign.
    """
    if target <= 0:
        raise ValueError(f"target={target}: must be above 0")
    if horizon <= 0 or 0.2 * episodes >= horizon:
        raise ValueError(f"horizon={horizon}: must be above 0 and above a fifth of the episodes of an iteration")
    error = min(max(kl / target - 1, -0.2), 0.2)  # in this order NaN stays NaN
    return beta * (1 + error * episodes / horizon)
