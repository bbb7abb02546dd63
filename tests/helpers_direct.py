"""The direct objectives in plain torch, one response and one pair at a time, and a training loop over transformers' model.

Nothing here calls the package's losses, pairs, packing or reference. Log-probs come as one tensor a response.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_pipeline.config.direct import DirectConfig, Objective, PairRule, PairTies, Reduction, UnlikelihoodForm

Tokens = Sequence[Sequence[Tensor]]  # log-probs of the scored tokens of every response of every prompt
WITH_REFERENCE = ("dpo", "cdpo", "ipo", "rdpo", "plackett_luce", "kto")


# Losses


def pairs_of(ranks: Sequence[int], rule: PairRule, ties: PairTies) -> list[tuple[int, int, float]]:
    """(winner, loser, label) of every pair of one prompt."""
    count, places = len(ranks), sorted(set(ranks))
    ordered = [(i, j) for i in range(count) for j in range(count) if ranks[i] < ranks[j]]
    tied = [(i, j) for j in range(count) for i in range(j) if ranks[i] == ranks[j]]
    if rule is PairRule.adjacent:
        ordered = [(i, j) for i, j in ordered if places.index(ranks[j]) == places.index(ranks[i]) + 1]
    elif rule is PairRule.best_worst:
        last = max(i for i in range(count) if ranks[i] == places[-1])
        extremes = (ranks.index(places[0]), last)
        ordered, tied = [one for one in ordered if one == extremes], [one for one in tied if one == extremes]
    halves = [(i, j, 0.5) for i, j in tied] if ties is PairTies.half else []
    return [(i, j, 1.0) for i, j in ordered] + halves


def best_of(ranks: Sequence[int]) -> int | None:
    """The first of the best responses; none where all tie, or where the only one was not wanted."""
    if len(ranks) == 1:
        return 0 if ranks[0] == 0 else None
    return None if len(set(ranks)) == 1 else list(ranks).index(min(ranks))


def whole(tokens: Tensor, reduction: Reduction) -> Tensor:
    return tokens.sum() if reduction is Reduction.sum or not len(tokens) else tokens.mean()


def pair_loss(
    config: Any,
    w: Tensor,
    l: Tensor,  # noqa: E741 - the papers' letter
    ref_w: Tensor,
    ref_l: Tensor,
    label: float,
) -> Tensor:
    """Of the tokens of the winner and of the loser; for an objective with a reference also of its log-probs."""
    win, lose = whole(w, config.reduction), whole(l, config.reduction)
    margin = (win - whole(ref_w, config.reduction)) - (lose - whole(ref_l, config.reduction))
    match config.name:
        case Objective.dpo:
            return -label * logsigmoid(config.beta * margin) - (1 - label) * logsigmoid(-config.beta * margin)
        case Objective.cdpo:
            right = label * (1 - config.label_smoothing) + (1 - label) * config.label_smoothing
            return -right * logsigmoid(config.beta * margin) - (1 - right) * logsigmoid(-config.beta * margin)
        case Objective.ipo:
            return (margin - 1 / (2 * config.tau)) ** 2
        case Objective.rdpo:
            return -logsigmoid(config.beta * margin + config.alpha * (len(w) - len(l)))
        case Objective.slic:
            return torch.clamp(config.delta - win + lose, min=0)
        case Objective.cpo:
            return -logsigmoid(config.beta * (win - lose))
        case Objective.orpo:
            odds = [one - torch.log1p(-one.exp()) for one in (win, lose)]
            return -config.beta * logsigmoid(odds[0] - odds[1])
        case Objective.simpo:
            return -logsigmoid(config.beta * (win - lose) - config.gamma)
        case Objective.unlikelihood:
            if config.form is UnlikelihoodForm.sequence:
                return config.alpha * lose
            return config.alpha * whole(-torch.log1p(-l.exp()), config.reduction)
    raise AssertionError(config.name)


def plain_objective(
    policy: Tokens, reference: Tokens, ranks: Sequence[Sequence[int]], config: DirectConfig, point: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(loss, likelihood) of a global batch, the second before its weight; 0 where nothing is compared.

    `reference` is looked at by an objective that has one, and may be anything else otherwise.
    """
    each: list[Tensor] = []
    likely: list[Tensor] = []
    if config.name.value not in WITH_REFERENCE:
        reference = [[torch.zeros_like(one) for one in many] for many in policy]
    for mine, theirs, places in zip(policy, reference, ranks, strict=True):
        sums = [whole(one, config.reduction) for one in mine]
        ratios = [one - whole(other, config.reduction) for one, other in zip(sums, theirs, strict=True)]
        best = best_of(places)
        if best is not None:
            likely.append(-whole(mine[best], config.likelihood_reduction))
        ordered = pairs_of(places, PairRule.all, PairTies.drop)
        if config.name is Objective.kto:
            each += [
                verdict_loss(config, ratio, place == 0, point) for ratio, place in zip(ratios, places, strict=True)
            ]
        elif config.name is Objective.preferred_ft:
            each += [-sums[best]] if best is not None else []
        elif config.name is Objective.plackett_luce and ordered:
            each.append(_choices(config, ratios, places))
        elif config.name is Objective.rrhf and ordered:
            each.append(torch.stack([torch.clamp(sums[j] - sums[i], min=0) for i, j, _ in ordered]).sum())
        elif config.name not in (Objective.plackett_luce, Objective.rrhf):
            pairs = pairs_of(places, config.pairs, config.ties)
            costs = [pair_loss(config, mine[i], mine[j], theirs[i], theirs[j], label) for i, j, label in pairs]
            each += [torch.stack(costs).mean()] if costs else []
    nothing = 0 * torch.cat([one for many in policy for one in many]).sum()
    return (torch.stack(each).mean() if each else nothing, torch.stack(likely).mean() if likely else nothing)


def verdict_loss(config: Any, ratio: Tensor, wanted: bool, point: float) -> Tensor:
    if wanted:
        return config.desirable_weight * (1 - torch.sigmoid(config.beta * (ratio - point)))
    return config.undesirable_weight * (1 - torch.sigmoid(config.beta * (point - ratio)))


def _choices(config: Any, ratios: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    costs = []
    for i, place in enumerate(ranks):
        behind = [ratios[j] for j in range(len(ranks)) if ranks[j] > place]
        if behind:
            chances = torch.stack([ratios[i], *behind]) * config.beta
            costs.append(-(chances[0].exp() / chances.exp().sum()).log())
    return torch.stack(costs).mean()


# Text and models


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One prompt: the tokens of the conversation with each answer, and where the answers begin."""

    paths: list[list[int]]
    start: int
    ranks: list[int]
    prompt: str


def read_rows(file: Path, tokenizer: Any) -> list[Compared]:
    """Rows with `responses` and `scores`, or with `response` and `label`, as transformers renders them."""
    found = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        asked = [{"role": "user", "content": row["prompt"]}]
        answers = row["responses"] if "responses" in row else [row["response"]]
        chats = [[*asked, {"role": "assistant", "content": answer}] for answer in answers]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        best_first = sorted({-score for score in row.get("scores", [])})
        found.append(
            Compared(
                paths=[list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts],
                start=len(tokenizer(before, add_special_tokens=False)["input_ids"]),
                ranks=[best_first.index(-s) for s in row["scores"]] if "scores" in row else [int(not row["label"])],
                prompt=row["prompt"],
            )
        )
    return found


def token_logprobs(model: Any, path: Sequence[int], start: int) -> Tensor:
    """Of the tokens from `start` on, [L]: one forward of transformers' model on one path."""
    tokens = torch.tensor([list(path)])
    logits = model(input_ids=tokens).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens[0, start:, None])[:, 0]


def all_logprobs(model: Any, rows: Sequence[Compared]) -> list[list[Tensor]]:
    return [[token_logprobs(model, path, row.start) for path in row.paths] for row in rows]


def frozen_logprobs(model: Any, rows: Sequence[Compared]) -> list[list[Tensor]]:
    with torch.no_grad():
        return all_logprobs(model, rows)


def partner_rows(rows: Sequence[Compared], seed: int) -> list[Compared]:
    """KTO's: each prompt with the answer of another row, by the rule that docs/dpo.md gives."""
    groups: dict[str, list[int]] = {}
    for i in np.random.default_rng([seed, 1]).permutation(len(rows)).tolist():
        groups.setdefault(rows[i].prompt, []).append(i)
    order = [i for group in groups.values() for i in group]
    shift = max(len(group) for group in groups.values()) % len(rows) or 1
    found: dict[int, Compared] = {}
    for place, i in enumerate(order):
        mine, other = rows[i], rows[order[(place + shift) % len(order)]]
        path = mine.paths[0][: mine.start] + other.paths[0][other.start :]
        found[i] = Compared(paths=[path], start=mine.start, ranks=[0], prompt=mine.prompt)
    return [found[i] for i in range(len(rows))]


# Training


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a plain run came to."""

    losses: list[float]
    likelihoods: list[float]
    norms: list[float]
    drifts: list[float]  # KTO's z0 before each update, where that is not negative
    weights: dict[str, Tensor]


def plain_training(
    base: Path,
    file: Path,
    config: DirectConfig,
    *,
    seed: int,
    batch: int,
    epochs: int,
    optimizer: Callable[[Any], torch.optim.Optimizer],
    max_grad_norm: float,
    reference: Path | None = None,
    max_steps: int | None = None,
) -> Curve:
    """Every response in a forward pass of its own; the reference is computed anew at every step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = read_rows(file, AutoTokenizer.from_pretrained(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    frozen = AutoModelForCausalLM.from_pretrained(reference or base, dtype=torch.float32).eval()
    others = partner_rows(rows, seed) if config.name is Objective.kto else []
    optimizer_of = optimizer(model)
    curve = Curve(losses=[], likelihoods=[], norms=[], drifts=[], weights={})
    steps = [
        np.random.default_rng([seed, 0, epoch]).permutation(len(rows))[start : start + batch].tolist()
        for epoch in range(epochs)
        for start in range(0, len(rows), batch)
    ]
    for chosen in steps[:max_steps]:
        some = [rows[i] for i in chosen]
        drift = 0.0
        if others:
            drawn = [others[i] for i in chosen]
            policy, held_to = (frozen_logprobs(one, drawn) for one in (model, frozen))
            gaps = [float((a[0].double() - b[0].double()).sum()) for a, b in zip(policy, held_to, strict=True)]
            drift = math.fsum(gaps) / len(gaps)
        policy, held_to, ranks = all_logprobs(model, some), frozen_logprobs(frozen, some), [one.ranks for one in some]
        loss, likelihood = plain_objective(policy, held_to, ranks, config, max(0.0, drift))
        (loss + config.likelihood * likelihood).backward()
        curve.losses.append(float(loss.detach()))
        curve.likelihoods.append(float(likelihood.detach()))
        curve.drifts.append(drift)
        curve.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
        optimizer_of.step()
        optimizer_of.zero_grad()
    curve.weights.update({name: tensor.detach() for name, tensor in model.state_dict().items()})
    return curve
