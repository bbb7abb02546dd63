"""From rankings to pairs: which two responses to a prompt are compared, what each pair weighs, and which one is the best.

Also a response's log-probability from its tokens'. What is done with a pair is in `losses.preference`.

Pairs are made from integers alone, so they can be made before the forward pass, on the CPU; how many there are depends
on the data, so on a GPU `make_pairs` waits for it. Their order is fixed: by winner, then by loser.

Shapes: N scored tokens, R responses, M pairs. `prompt` int64 [R], equal for responses to the same prompt; `ranks`
int64 [R], 0 for the best, equal for a tie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_pipeline.config.direct import PairRule, PairTies, Reduction
from rlhf_pipeline.functional.losses.ranking import comparisons


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """M pairs of responses. Of a tie, the response that comes first counts as the winner."""

    winner: Tensor  # int64 [M], which response
    loser: Tensor  # int64 [M]
    label: Tensor  # fp32 [M], the probability that the winner is the better one: 1, or 1/2 for a tie
    weight: Tensor  # fp32 [M], 1 / the number of pairs of the prompt: a prompt's pairs weigh 1 together


def response_logprobs(logprobs: Tensor, sequence: Tensor, num_responses: int, *, reduction: Reduction) -> Tensor:
    """The sum or the mean over each response's scored tokens: [N] -> [R]; 0 for a response without any.

    sequence int64 [N]: the response, 0..num_responses-1, that a token belongs to.
    """
    sums = torch.zeros(num_responses, dtype=logprobs.dtype, device=logprobs.device).index_add(0, sequence, logprobs)
    if reduction is Reduction.sum:
        return sums
    return sums / torch.bincount(sequence, minlength=num_responses).clamp(min=1)


def make_pairs(prompt: Tensor, ranks: Tensor, *, rule: PairRule, ties: PairTies) -> Pairs:
    """The pairs of every prompt; a prompt of one response, or of nothing but ties that are dropped, has none.

    `all`: every two responses of different rank. `best_worst`: the first response of the best rank and the last of the
    worst. `adjacent`: every two whose ranks follow each other among the ranks that the prompt has.
    `ties=half` adds every two of equal rank, with the label 1/2; under `best_worst`, first and last where all tie.
    """
    better, tied = comparisons(prompt, ranks)
    if ties is PairTies.drop:
        tied = torch.zeros_like(tied)
    chosen = better | tied
    same = prompt[:, None] == prompt[None, :]
    if rule is PairRule.best_worst:
        first, last = _first(~better.any(dim=0), same), _last(~better.any(dim=1), same)
        chosen = chosen & first[:, None] & last[None, :]
    elif rule is PairRule.adjacent:
        steps = better.float()
        chosen = chosen & ~(steps @ steps > 0)  # no response ranks between the two

    winner, loser = chosen.nonzero(as_tuple=True)
    number = torch.where(same, chosen.sum(1)[None, :], 0).sum(1)
    return Pairs(
        winner=winner,
        loser=loser,
        label=torch.where(better, 1.0, 0.5)[winner, loser],
        weight=1 / number[winner].float(),
    )


def num_prompts_with_pairs(pairs: Pairs) -> int:
    """How many prompts have a pair: what divides a sum weighted with `pairs.weight`, once added up globally."""
    return round(pairs.weight.double().sum().item())  # thirds do not add up to exactly 1


def best_responses(prompt: Tensor, ranks: Tensor) -> Tensor:
    """Bool [R]: the first response of the best rank of each prompt."""
    better, _ = comparisons(prompt, ranks)
    return _first(~better.any(dim=0), prompt[:, None] == prompt[None, :])


def _first(mask: Tensor, same: Tensor) -> Tensor:
    """Where `mask` [R] holds for the first time in a prompt."""
    return mask & ~(same & mask[None, :]).tril(diagonal=-1).any(dim=1)


def _last(mask: Tensor, same: Tensor) -> Tensor:
    return mask & ~(same & mask[None, :]).triu(diagonal=1).any(dim=1)
