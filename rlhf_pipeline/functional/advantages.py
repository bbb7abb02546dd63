"""From rewards to advantages: how much better than expected a token was, by four estimators, over a whole iteration.

Shapes: P prompts, K samples a prompt, R = P * K responses (response k of prompt p is row p * K + k), L tokens of the
longest. Padded tensors are [R, L], padded on the right; `mask` bool [R, L] is True where there is a token. What lies
outside the mask never matters, NaN included, and results are 0 there. The dtype is that of what comes in.
"""

from __future__ import annotations

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8  # added to the variance, as in lm-human-preferences
GRPO_EPSILON = 1e-4  # added to the standard deviation, as in TRL


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16), and the returns that values learn from.

    rewards, values, mask [R, L] -> advantages, returns [R, L]:
        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   returns = A + V.
    `values[:, t]` is what is expected of token t and the rest, seen before token t is drawn; after the last token
    the value is 0.
    """
    values = torch.where(mask, values, 0.0)
    after = torch.zeros_like(values)
    after[:, :-1] = values[:, 1:]
    deltas = torch.where(mask, rewards + gamma * after - values, 0.0)
    advantages = _discounted_sums(deltas, gamma * lam)
    return advantages, advantages + values


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """sum_{s >= t} gamma^(s - t) r_s at every token t: rewards, mask [R, L] -> [R, L]."""
    return _discounted_sums(torch.where(mask, rewards, 0.0), gamma)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """To mean 0 and variance 1 over all tokens of the mask: (x - mean) / sqrt(variance + 1e-8), 0 outside.

    The variance divides by the number of tokens, as in lm-human-preferences, and is computed in fp64. A single token,
    or tokens that are all equal, become 0.
    """
    counted = x[mask].double()
    mean = counted.mean()
    variance = (counted - mean).square().mean()
    return torch.where(mask, ((x.double() - mean) * (variance + WHITEN_EPSILON).rsqrt()).to(x.dtype), 0.0)


def reinforce(rewards: Tensor, mask: Tensor, *, gamma: float, baseline: float) -> Tensor:
    """Reward-to-go less a baseline that does not depend on the response (Williams 1992): [R, L] -> [R, L]."""
    return torch.where(mask, rewards_to_go(rewards, mask, gamma) - baseline, 0.0)


def running_mean(old: float | None, returns: Tensor, decay: float) -> float:
    """The baseline of `reinforce`: decay * old + (1 - decay) * mean(returns); the first call takes the mean itself.

    returns [R], of whole sequences: `sequence_returns`, or where gamma is not 1 the first column of `rewards_to_go`.
    The mean of the iteration at hand depends on its responses, so a baseline is used first and moved afterwards.
    """
    mean = float(returns.double().mean())
    return mean if old is None else decay * old + (1 - decay) * mean


def sequence_returns(rewards: Tensor, mask: Tensor) -> Tensor:
    """The sum of a response's rewards, undiscounted: rewards, mask [R, L] -> [R]."""
    return torch.where(mask, rewards, 0.0).sum(1)


def rloo(rewards: Tensor, mask: Tensor, samples: int) -> Tensor:
    """A response's return less the mean return of the prompt's other K - 1 samples, the same at each of its tokens.

    (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024, "Back to basics".)
    rewards, mask [R, L] -> [R, L]. Raises ValueError for fewer than two samples.
    """
    returns = _by_prompt(sequence_returns(rewards, mask), samples)
    others = (returns.sum(1, keepdim=True) - returns) / (samples - 1)
    return _at_every_token(returns - others, mask)


def grpo(rewards: Tensor, mask: Tensor, samples: int) -> Tensor:
    """(return - mean) / (standard deviation + 1e-4) among the prompt's K samples, the same at each token of a response.

    (Shao et al. 2024, DeepSeekMath, section 4.1.2, which leaves the kind of deviation open.) The variance divides by
    K - 1, as in TRL and verl. A prompt whose returns are all equal has advantages of exactly 0.
    rewards, mask [R, L] -> [R, L]. Raises ValueError for fewer than two samples.
    """
    returns = _by_prompt(sequence_returns(rewards, mask), samples)
    centred = returns - returns.mean(1, keepdim=True)
    deviation = (centred.square().sum(1, keepdim=True) / (samples - 1)).sqrt()
    return _at_every_token(torch.where(_has_spread(returns), centred / (deviation + GRPO_EPSILON), 0.0), mask)


def no_spread(scores: Tensor, samples: int) -> float | None:
    """The share of prompts whose samples all have the same score: they teach rloo and grpo nothing.

    scores [R]; None where a prompt has one sample or there is no prompt.
    """
    if samples < 2 or not len(scores):
        return None
    return 1 - float(with_spread(scores, samples).double().mean())


def with_spread(scores: Tensor, samples: int) -> Tensor:
    """Whether the scores of a prompt's samples differ: scores [R] -> bool [P]. Raises ValueError for fewer than two."""
    return _has_spread(_by_prompt(scores, samples))[:, 0]


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns) over the tokens of the mask: 1 is perfect, 0 as good as a constant.

    values, returns, mask [R, L]. None where the returns do not vary.
    """
    values, returns = values[mask].double(), returns[mask].double()
    if not len(returns) or returns.min() == returns.max():
        return None
    return 1 - float((returns - values).var(correction=0) / returns.var(correction=0))


def _discounted_sums(x: Tensor, factor: float) -> Tensor:
    """y_t = x_t + factor y_{t+1}, for all rows at once, from the last column backwards."""
    sums = torch.empty_like(x)
    later = x.new_zeros(len(x))
    for t in reversed(range(x.shape[1])):
        later = x[:, t] + factor * later
        sums[:, t] = later
    return sums


def _by_prompt(numbers: Tensor, samples: int) -> Tensor:
    """[R] -> [P, K]."""
    if samples < 2:
        raise ValueError(f"samples={samples}: a comparison among a prompt's samples needs two")
    return numbers.reshape(len(numbers) // samples, samples)


def _has_spread(grouped: Tensor) -> Tensor:
    """[P, K] -> bool [P, 1]. Not by the deviation, which rounding keeps from 0."""
    return grouped.amax(1, keepdim=True) > grouped.amin(1, keepdim=True)


def _at_every_token(grouped: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, grouped.reshape(-1, 1), 0.0)
