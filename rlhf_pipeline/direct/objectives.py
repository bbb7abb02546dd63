"""From a micro-batch's log-probs to the terms of an objective: the one place where `TRAITS` meet the losses.

A new objective is a pure function in `functional.losses.preference`, an entry in one of the three tables below and in
`config.direct.TRAITS`, and a file in conf/objective/.

Shapes: N scored tokens, R responses, M pairs, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline.config.direct import (
    TRAITS,
    DirectConfig,
    Objective,
    PairRule,
    PairTies,
    Reduction,
    Unit,
    UnlikelihoodForm,
)
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.functional.losses import preference
from rlhf_pipeline.functional.losses.ranking import num_prompts, plackett_luce_loss
from rlhf_pipeline.functional.pairs import Pairs, best_responses, make_pairs, num_prompts_with_pairs, response_logprobs
from rlhf_pipeline.functional.terms import Term
from rlhf_pipeline.models.tree_model import TreeBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """What an objective may know of R responses; log-probs by its reduction."""

    logprob: Tensor  # fp32 [R], of the policy
    ratio: Tensor  # fp32 [R], less the reference's; the log-prob itself where the objective has no reference
    unlikely: Tensor  # fp32 [R], -log(1 - p) of the tokens
    length: Tensor  # [R], scored tokens
    prompt: Tensor  # int64 [R]
    rank: Tensor  # int64 [R]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The same of M pairs, the winner's and the loser's."""

    chosen: Tensor
    rejected: Tensor
    margin: Tensor  # of the ratios
    unlikely: Tensor  # the loser's
    longer: Tensor  # by how many tokens the winner is
    label: Tensor


# Parameters come as the objective's config: those that it takes are numbers, the check has seen to that.
PAIRS: dict[Objective, Callable[[Compared, Any], Tensor]] = {
    Objective.dpo: lambda of, p: preference.dpo_loss(of.margin, of.label, beta=p.beta),
    Objective.cdpo: lambda of, p: preference.dpo_loss(
        of.margin, of.label + p.label_smoothing * (1 - 2 * of.label), beta=p.beta
    ),
    Objective.ipo: lambda of, p: preference.ipo_loss(of.margin, tau=p.tau),
    Objective.rdpo: lambda of, p: preference.rdpo_loss(of.margin, of.longer, beta=p.beta, alpha=p.alpha),
    Objective.slic: lambda of, p: preference.slic_loss(of.chosen, of.rejected, delta=p.delta),
    Objective.cpo: lambda of, p: preference.cpo_loss(of.chosen, of.rejected, beta=p.beta),
    Objective.orpo: lambda of, p: preference.orpo_loss(of.chosen, of.rejected, beta=p.beta),
    Objective.simpo: lambda of, p: preference.simpo_loss(of.chosen, of.rejected, beta=p.beta, gamma=p.gamma),
    Objective.unlikelihood: lambda of, p: (
        p.alpha * of.unlikely
        if p.form is UnlikelihoodForm.token
        else preference.unlikelihood_sequence_loss(of.rejected, alpha=p.alpha)
    ),
}
RANKINGS: dict[Objective, Callable[[Responses, Any], Tensor]] = {  # sums over prompts
    Objective.plackett_luce: lambda of, p: plackett_luce_loss(p.beta * of.ratio, of.prompt, of.rank),
    Objective.rrhf: lambda of, p: preference.rrhf_loss(of.logprob, of.prompt, of.rank),
    Objective.preferred_ft: lambda of, p: -of.logprob[_preferred(of.prompt, of.rank)].sum(),
}
VERDICTS: dict[Objective, Callable[[Responses, Tensor, Any], Tensor]] = {  # [R], with the reference point
    Objective.kto: lambda of, point, p: preference.kto_loss(
        of.ratio,
        of.rank == 0,
        point,
        beta=p.beta,
        desirable_weight=p.desirable_weight,
        undesirable_weight=p.undesirable_weight,
    ),
}


def loss_terms(
    logprobs: Tensor, batch: TreeBatch, objective: DirectConfig, point: Tensor | float = 0.0
) -> dict[str, Term]:
    """The objective's terms, and to be logged, what the comparisons of the micro-batch come to.

    Args:
        logprobs: fp32 [N], of the policy; the reference's are the batch's `number("reference")`.
        point: KTO's z0.
    """
    traits = TRAITS[objective.name]
    of = _responses(logprobs, batch, objective, with_reference=traits.reference)
    pairs = _pairs(batch.prompt, batch.rank, objective)
    counts = _counts(batch.prompt, batch.rank, pairs, objective)
    if traits.unit is Unit.pairs:
        loss = (pairs.weight * PAIRS[objective.name](_compared(of, pairs), objective)).sum()
    elif traits.unit is Unit.rankings:
        loss = RANKINGS[objective.name](of, objective)
    else:
        reference_point = torch.as_tensor(point, dtype=of.ratio.dtype, device=of.ratio.device)
        loss = VERDICTS[objective.name](of, reference_point, objective).sum()
    terms = {"loss": Term(loss, counts["loss"])}
    if traits.unit is Unit.verdicts:
        terms["reference_point"] = Term(reference_point * counts["loss"], counts["loss"], weight=0.0)
    if objective.likelihood:
        whole = response_logprobs(logprobs, batch.sequence, len(batch.last), reduction=objective.likelihood_reduction)
        likely = -whole[_preferred(batch.prompt, batch.rank)].sum()
        terms["likelihood"] = Term(likely, counts["likelihood"], weight=objective.likelihood)
    return terms | _logged(of, pairs, counts, objective)


def loss_counts(micro: PackedTrees, objective: DirectConfig) -> dict[str, float]:
    """The counts of `loss_terms`, before any forward pass."""
    prompt, rank = torch.from_numpy(micro.prompt), torch.from_numpy(micro.rank)
    return _counts(prompt, rank, _pairs(prompt, rank, objective), objective)


def start_value(objective: DirectConfig) -> float | None:
    """The loss where the policy is its reference, whatever the data; None where it depends on them."""
    match objective.name:
        case Objective.dpo | Objective.cdpo:
            return math.log(2)
        case Objective.ipo:
            assert objective.tau is not None
            return 1 / (4 * objective.tau**2)
    return None


def _responses(logprobs: Tensor, batch: TreeBatch, objective: DirectConfig, *, with_reference: bool) -> Responses:
    def of_tokens(values: Tensor, reduction: Reduction = objective.reduction) -> Tensor:
        return response_logprobs(values, batch.sequence, len(batch.last), reduction=reduction)

    token_form = objective.form is UnlikelihoodForm.token
    return Responses(
        logprob=of_tokens(logprobs),
        ratio=of_tokens(logprobs - batch.number("reference") if with_reference else logprobs),
        unlikely=of_tokens(preference.unlikely(logprobs) if token_form else torch.zeros_like(logprobs)),
        length=of_tokens(torch.ones_like(logprobs), Reduction.sum),
        prompt=batch.prompt,
        rank=batch.rank,
    )


def _compared(of: Responses, pairs: Pairs) -> Compared:
    winner, loser = pairs.winner, pairs.loser
    return Compared(
        chosen=of.logprob[winner],
        rejected=of.logprob[loser],
        margin=of.ratio[winner] - of.ratio[loser],
        unlikely=of.unlikely[loser],
        longer=of.length[winner] - of.length[loser],
        label=pairs.label.to(of.logprob.dtype),
    )


def _pairs(prompt: Tensor, rank: Tensor, objective: DirectConfig) -> Pairs:
    """Those that are learnt from; of rankings and verdicts all ordered ones, to be logged."""
    if TRAITS[objective.name].unit is Unit.pairs:
        return make_pairs(prompt, rank, rule=objective.pairs, ties=objective.ties)
    return make_pairs(prompt, rank, rule=PairRule.all, ties=PairTies.drop)


def _counts(prompt: Tensor, rank: Tensor, pairs: Pairs, objective: DirectConfig) -> dict[str, float]:
    ordered = float(num_prompts(prompt, rank))
    preferred = float(_preferred(prompt, rank).sum())
    unit = TRAITS[objective.name].unit
    if unit is Unit.verdicts:
        loss = float(len(rank))
    elif objective.name is Objective.preferred_ft:
        loss = preferred
    else:
        loss = float(num_prompts_with_pairs(pairs)) if unit is Unit.pairs else ordered
    counts = {"loss": loss} | ({"likelihood": preferred} if objective.likelihood else {})
    if unit is Unit.verdicts:
        wanted = float((rank == 0).sum())
        return counts | {"reference_point": loss, "reward_chosen": wanted, "reward_rejected": len(rank) - wanted}
    return counts | dict.fromkeys(("accuracy", "margin", "reward_chosen", "reward_rejected"), ordered)


def _logged(of: Responses, pairs: Pairs, counts: dict[str, float], objective: DirectConfig) -> dict[str, Term]:
    """Terms of weight 0: implicit rewards, beta log pi / pi_ref, of the better and the worse, and how they compare."""
    with torch.no_grad():
        reward = of.ratio * reward_scale(objective)
        if TRAITS[objective.name].unit is Unit.verdicts:
            wanted = of.rank == 0
            sums = {"reward_chosen": reward[wanted].sum(), "reward_rejected": reward[~wanted].sum()}
        else:
            if objective.ties is PairTies.half:  # of two that tie neither is the better one
                pairs = make_pairs(of.prompt, of.rank, rule=objective.pairs, ties=PairTies.drop)
            better, worse = reward[pairs.winner], reward[pairs.loser]
            right = (better > worse).to(reward.dtype) + 0.5 * (better == worse).to(reward.dtype)
            every = {"accuracy": right, "margin": better - worse, "reward_chosen": better, "reward_rejected": worse}
            sums = {name: (pairs.weight * value).sum() for name, value in every.items()}
    return {name: Term(total, counts[name], weight=0.0) for name, total in sums.items()}


def reward_scale(objective: DirectConfig) -> float:
    """What makes implicit rewards of log ratios: beta, IPO's tau, or 1."""
    if objective.name is Objective.orpo:
        return 1.0  # its beta weighs a term
    return objective.beta or objective.tau or 1.0


def _preferred(prompt: Tensor, rank: Tensor) -> Tensor:
    """Bool [R]: the best response of each prompt that is better than another, and a single one that was wanted."""
    same = prompt[:, None] == prompt[None, :]
    distinguished = (same & (rank[:, None] < rank[None, :])).any(dim=1)
    single = (same.sum(dim=1) == 1) & (rank == 0)
    return best_responses(prompt, rank) & (distinguished | single)
