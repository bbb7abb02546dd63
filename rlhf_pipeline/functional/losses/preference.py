"""The losses of the direct objectives, which learn preferences without a reward model: DPO and its relatives.

Each is elementwise, so that the caller can weigh, sum and divide once, globally, unless its docstring says otherwise.
Without any pair a loss is empty, and its sum 0 and still connected to the model. Every docstring says whether the paper
means a response's log-probability as the sum over its tokens or as their mean; the caller decides. Plackett-Luce DPO is
`ranking.plackett_luce_loss` of beta * ratios. A likelihood term beside an objective is added by the caller.

Shapes: M pairs, R responses, N scored tokens; log-probs in fp32 (fp64 stays fp64).
ratios [R]: log p - log p_ref of a response, nats.
margins [M]: ratio of the winner - ratio of the loser.
chosen, rejected [M]: log p of the winner and of the loser.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_pipeline.functional.losses.ranking import comparisons

# The log-prob nearest to 0 that a soft-max in fp32 tells from 0: a probability of 1 - 1.2e-7.
NEARLY_CERTAIN = -(2.0**-23)


def dpo_loss(margins: Tensor, labels: Tensor, *, beta: float) -> Tensor:
    """-label log sigmoid(beta m) - (1 - label) log sigmoid(-beta m): [M], [M] -> [M]. Sums.

    Label 1: Rafailov et al. 2023, equation 7; ln 2 where the policy is its reference. Label 1 - e: cDPO, for labels of
    which a share e is wrong (Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO").
    Label 1/2: a tie, which pulls the margin to 0.
    """
    logits = beta * margins
    return -labels * logsigmoid(logits) - (1 - labels) * logsigmoid(-logits)


def ipo_loss(margins: Tensor, *, tau: float) -> Tensor:
    """(m - 1 / (2 tau))^2: [M] -> [M] (Azar et al. 2023, equation 17). 1 / (4 tau^2) where the policy is its reference.

    The derivation is about whole responses: sums. TRL takes means, which its source says the authors confirmed; margins
    of means are smaller by the length, so a tau for the one is of no use for the other.
    """
    return (margins - 1 / (2 * tau)).square()


def rdpo_loss(margins: Tensor, length_differences: Tensor, *, beta: float, alpha: float) -> Tensor:
    """-log sigmoid(beta m + alpha (len_w - len_l)): [M], [M] -> [M]. Sums; lengths in tokens (Park et al. 2024).

    From the reward r - alpha len: its best policy has r = beta ratio + alpha len + a constant of the prompt. A winner
    that is longer is already explained by its length, and pushes less; one that is shorter pushes more.
    """
    return -logsigmoid(beta * margins + alpha * length_differences)


def slic_loss(chosen: Tensor, rejected: Tensor, *, delta: float) -> Tensor:
    """max(0, delta - log p_w + log p_l): [M], [M] -> [M]; 0 once the winner leads by delta.

    The calibration loss of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425), whose other term is the likelihood of a good
    response. Sums, as printed; delta is in nats of what the caller passes.
    """
    return (delta - chosen + rejected).relu()


def cpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta (log p_w - log p_l)): [M], [M] -> [M]. Sums (Xu et al. 2024, arXiv 2401.08417, equation 3).

    DPO with a uniform reference. The paper adds the winner's likelihood, with weight 1.
    """
    return -logsigmoid(beta * (chosen - rejected))


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (log p_w - log p_l) - gamma): [M], [M] -> [M]. Means (Meng et al. 2024, equation 6).

    gamma, the target margin, is not multiplied by beta; the authors' configs give gamma / beta.
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """-beta log sigmoid(log odds_w - log odds_l), odds = p / (1 - p): [M], [M] -> [M] (Hong et al. 2024, equation 7).

    log p is the mean over the tokens: p, their geometric mean, is not the response's probability, and the odds of a
    whole response would be those of a number near 0. The paper adds the winner's likelihood, with weight 1; beta is its
    lambda. For p near 1 see `log1mexp`: |log odds| has the bound 15.9, and the gradient is 1 / (1 - p) at most 8.4e6,
    of a log-prob whose own gradient vanishes as 1 - p.
    """
    return -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def unlikely(logprobs: Tensor) -> Tensor:
    """-log(1 - p) of each token of a response that is not wanted: [N] -> [N] (Welleck et al. 2019, arXiv 1908.04319).

    Never negative, and it lets go of a token that has become unlikely: its gradient is p / (1 - p). For p near 1 see
    `log1mexp`.
    """
    return -log1mexp(logprobs)


def unlikelihood_sequence_loss(rejected: Tensor, *, alpha: float) -> Tensor:
    """alpha log p_l: [M] -> [M]. Sums; the baseline of Rafailov et al. 2023, with the winner's likelihood beside it.

    It has no lower bound, an unlikely response is pushed as hard as a likely one, and the paper reports meaningless
    text on summaries and dialogue.
    """
    return alpha * rejected


def kto_loss(
    ratios: Tensor,
    wanted: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """lambda - v(ratio): [R], bool [R], scalar -> [R]. Sums (Ethayarajh et al. 2024, arXiv 2402.01306, section 4).

    wanted: lambda_D (1 - sigmoid(beta (ratio - z0))); else: lambda_U (1 - sigmoid(beta (z0 - ratio))).
    As in the paper, beta multiplies the difference, so the baseline z0 is in nats like the ratios. It is the KL
    divergence from the reference, estimated from responses to other prompts; the caller gives z0 >= 0, without a
    gradient. Half of lambda where the policy is its reference. No response needs a partner.
    """
    lead = beta * (ratios - baseline)
    return torch.where(wanted, desirable_weight * (-lead).sigmoid(), undesirable_weight * lead.sigmoid())


def rrhf_loss(logprobs: Tensor, prompt: Tensor, ranks: Tensor) -> Tensor:
    """Sum over prompts of the sum over its ordered pairs of max(0, log p_l - log p_w), no margin: [R] -> scalar.

    Means (Yuan et al. 2023, arXiv 2304.05302, equations 1 and 2); tied responses are not compared. The paper adds the
    negative log-likelihood of the best response, a sum over its tokens (equation 3), with weight 1.
    prompt int64 [R], equal for responses to the same prompt; ranks int [R], 0 for the best.
    """
    better, _ = comparisons(prompt, ranks)
    return torch.where(better, logprobs[None, :] - logprobs[:, None], 0.0).relu().sum()


def log1mexp(logprobs: Tensor) -> Tensor:
    """log(1 - p) of log p <= 0, elementwise, without cancellation.

    Its two branches are from Maechler 2012, "Accurately computing log(1 - exp(-|a|))". Above NEARLY_CERTAIN it is taken at
    NEARLY_CERTAIN, gradient included: finite, and a token that cannot get any likelier can still be pushed back.
    """
    x = logprobs - (logprobs - NEARLY_CERTAIN).clamp(min=0).detach()
    near = x > -math.log(2)
    # Each branch sees only what it can take: an infinite slope of the other one would come through `where` as NaN.
    return torch.where(
        near,
        (-torch.expm1(torch.where(near, x, -1.0))).log(),
        torch.log1p(-torch.where(near, -1.0, x).exp()),
    )


def _log_odds(logprobs: Tensor) -> Tensor:
    return logprobs - log1mexp(logprobs)
