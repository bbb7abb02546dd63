"""Ranking losses of the reward model, as sums over prompts: pairwise, with ties, margins or soft labels, and listwise.

All responses of a micro-batch lie flat and are compared in dense [R, R] masks: R is some hundreds at most, and no
shape depends on the data, so a GPU never waits. Every loss is a sum over prompts of a mean within the prompt, so
that a prompt weighs the same whatever the number of its responses; `num_prompts`, added up globally, divides it.
Without any comparison a loss is 0 and still connected to the rewards.

Shapes: R responses. `rewards` fp32 [R] (fp64 stays fp64); `prompt` int64 [R], equal for responses to the same prompt;
`ranks` int [R], 0 for the best, equal for a tie; `scores` fp32 [R], higher is better, NaN where there is none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def comparisons(prompt: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Which responses i, j of the same prompt are compared: `better` and `tied`, bool [R, R].

    better[i, j]: i is ranked above j. tied[i, j]: their ranks are equal and i < j, so that each tie counts once.
    """
    same = _same_prompt(prompt)
    better = same & (ranks[:, None] < ranks[None, :])
    tied = same & (ranks[:, None] == ranks[None, :])
    return better, tied.triu(diagonal=1)


def pairwise_loss(
    rewards: Tensor,
    prompt: Tensor,
    ranks: Tensor,
    *,
    scores: Tensor | None = None,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    literal: bool = False,
    log_tie: Tensor | None = None,
) -> Tensor:
    """Sum over prompts of the mean over its comparisons of -log sigmoid(r_w - r_l) (Ouyang et al. 2022, equation 1).

    The mean divides by the number of comparisons kept or, with `literal`, by K over 2 as printed, K being the
    number of the prompt's responses; the two differ where there are ties.

    `log_tie`, a scalar, is log nu of Davidson (1970, "On extending the Bradley-Terry model to accommodate ties in
    paired comparison experiments"): with d = r_i - r_j, P(i wins), P(j wins) and P(tie) are the softmax of
    (d / 2, -d / 2, log nu). A tie then costs -log P(tie) and is a comparison kept; without `log_tie` ties are dropped.

    `margin` * (score_w - score_l) is subtracted from r_w - r_l (Touvron et al. 2023, Llama 2, equation 2), never from
    a tie's d. A pair of which a score is NaN has margin 0.
    `label_smoothing` e: (1 - e) * loss(w beats l) + e * loss(l beats w), for labels of which a share e is wrong
    (Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO").
    Raises ValueError where a margin is asked for without `scores`.
    """
    better, tied = comparisons(prompt, ranks)
    gap = _differences(rewards, better | tied)
    if margin:
        if scores is None:
            raise ValueError(f"margin={margin} needs scores")
        gap = gap - margin * _differences(scores, better).nan_to_num(nan=0.0).to(gap.dtype)

    if log_tie is None:
        kept, win, lose, tie = better, logsigmoid(gap), logsigmoid(-gap), torch.zeros_like(gap)
    else:
        outcomes = torch.stack((gap / 2, -gap / 2, log_tie.to(gap.dtype).expand_as(gap)), dim=-1)
        kept, (win, lose, tie) = better | tied, outcomes.log_softmax(-1).unbind(-1)

    logprobs = torch.where(better, (1 - label_smoothing) * win + label_smoothing * lose, tie)
    # `better` and `tied` together hold every two responses to a prompt once: K over 2.
    return _sum_of_means(torch.where(kept, -logprobs, 0.0), prompt, counted=better | tied if literal else kept)


def soft_label_loss(
    rewards: Tensor, prompt: Tensor, ranks: Tensor, scores: Tensor, *, scale: float, literal: bool = False
) -> Tensor:
    """Sum over prompts of the mean over its comparisons of -p log sigmoid(d) - (1 - p) log sigmoid(-d), with d = r_i - r_j
    and the target p = sigmoid(scale * (score_i - score_j)): ratings say by how much an answer is better, ranks only that.

    p = 1 is `pairwise_loss`. A tie is a comparison too, with target 1/2, and the least loss is the entropy of the targets,
    not 0. A pair of which a score is NaN keeps the label of its ranks: 1 where they differ, left out where it ties.
    The mean divides by the number of comparisons kept or, with `literal`, by K over 2.

    A cross-entropy with soft labels, as Lee et al. 2023 (RLAIF, arXiv 2309.00267) train reward models with a labeling
    model's probabilities. For soft preference labels in DPO see Furuta et al. 2024 (arXiv 2409.06691), who propose another
    loss, a geometric mean of likelihoods; this one is Mitchell's (`label_smoothing` above) with a noise of each pair's own.
    """
    better, tied = comparisons(prompt, ranks)
    rated = _both_rated(scores)
    kept = better | (tied & rated)
    gap = _differences(rewards, kept)
    log_odds = scale * _differences(scores, rated).to(gap.dtype)
    loss = -torch.where(rated, log_odds.sigmoid(), 1.0) * logsigmoid(gap)
    loss = loss - torch.where(rated, (-log_odds).sigmoid(), 0.0) * logsigmoid(-gap)
    return _sum_of_means(torch.where(kept, loss, 0.0), prompt, counted=better | tied if literal else kept)


def plackett_luce_loss(rewards: Tensor, prompt: Tensor, ranks: Tensor) -> Tensor:
    """Sum over prompts of the mean over its choices of -log (exp(r_i) / (exp(r_i) + sum_j exp(r_j))).

    A choice is a response i with responses j ranked below it (Luce 1959; Plackett 1975; as a loss ListMLE, Xia et
    al. 2008). Tied responses are not in each other's choice: no order between them is made up. The mean divides by
    the number of choices. Two responses give the pairwise loss.
    """
    below, _ = comparisons(prompt, ranks)
    chooses = below.any(dim=1)
    # log sum_j exp(r_j - r_i). A row without a choice holds zeros: the gradient of a row of -inf is NaN.
    behind = _differences(-rewards, below).masked_fill(~below & chooses[:, None], -math.inf)
    losses = torch.where(chooses, -logsigmoid(-behind.logsumexp(dim=1)), 0.0)
    return _sum_of_means(losses[:, None], prompt, counted=chooses[:, None])


def centring_loss(rewards: Tensor, prompt: Tensor, ranks: Tensor) -> Tensor:
    """Sum over prompts of the mean over its ordered comparisons of (r_w + r_l)^2: pulls the mean reward to zero.

    Comparisons leave the zero of a prompt's rewards open (Eisenstein et al. 2023, "Helping or herding?", equation 2;
    TRL's `center_rewards_coefficient`).
    """
    better, _ = comparisons(prompt, ranks)
    sums = rewards[:, None] + rewards[None, :]
    return _sum_of_means(torch.where(better, sums, 0.0).square(), prompt, counted=better)


def num_correct(rewards: Tensor, prompt: Tensor, ranks: Tensor) -> Tensor:
    """Sum over prompts of the share of its ordered comparisons whose winner has the higher reward; equal counts half.

    Divided by `num_prompts`, the accuracy. It has no gradient.
    """
    better, _ = comparisons(prompt, ranks)
    over, under = rewards[:, None], rewards[None, :]
    right = (over > under).to(rewards.dtype) + 0.5 * (over == under).to(rewards.dtype)
    return _sum_of_means(torch.where(better, right, 0.0), prompt, counted=better)


def num_prompts(
    prompt: Tensor, ranks: Tensor, *, ties_count: bool = False, soft_scores: Tensor | None = None
) -> Tensor:
    """How many prompts have a comparison, int64 scalar: what divides the sums above, once added up globally.

    `ties_count` where ties are modelled: a prompt of nothing but ties then has one. `soft_scores`, the scores of
    `soft_label_loss`: so has one of nothing but ties if both answers of one of them have a score.
    """
    better, tied = comparisons(prompt, ranks)
    counted = better | tied if ties_count else better
    if soft_scores is not None:
        counted = counted | (tied & _both_rated(soft_scores))
    same = _same_prompt(prompt)
    is_first = ~same.tril(diagonal=-1).any(dim=1)
    return (is_first & (_per_prompt(counted.sum(1), same) > 0)).sum()


def initial_log_tie(tie_rate: float) -> float:
    """Davidson's log nu for which two equally good answers tie with probability `tie_rate` = nu / (2 + nu).

    Raises ValueError unless 0 < tie_rate < 1.
    """
    if not 0 < tie_rate < 1:
        raise ValueError(f"tie_rate={tie_rate}: must be between 0 and 1, both excluded")
    return math.log(2 * tie_rate / (1 - tie_rate))


def _same_prompt(prompt: Tensor) -> Tensor:
    return prompt[:, None] == prompt[None, :]


def _both_rated(scores: Tensor) -> Tensor:
    """Bool [R, R]: neither score is NaN."""
    return ~(scores.isnan()[:, None] | scores.isnan()[None, :])


def _differences(values: Tensor, mask: Tensor) -> Tensor:
    """values_i - values_j where `mask`, else 0: whatever the others are, they reach neither value nor gradient."""
    return torch.where(mask, values[:, None] - values[None, :], 0.0)


def _per_prompt(counts: Tensor, same: Tensor) -> Tensor:
    """For each response the sum of `counts` int64 [R] over the responses to its prompt."""
    return torch.where(same, counts[None, :], 0).sum(1)


def _sum_of_means(values: Tensor, prompt: Tensor, *, counted: Tensor) -> Tensor:
    """Sum over prompts of (sum of its `values`) / (number of its `counted`); row i of both [R, X] is response i's.

    `values` are 0 where they do not count.
    """
    number = _per_prompt(counted.sum(1), _same_prompt(prompt)).clamp(min=1)
    return (values.sum(1) / number).sum()
