"""What `rlhf dpo` makes of a micro-batch: every objective's terms and counts, whatever the split, against loops in fp64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers_direct import WITH_REFERENCE, pairs_of, plain_objective, whole
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
from rlhf_pipeline.data.packing import PackedTrees, pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.direct.objectives import loss_counts, loss_terms, reward_scale, start_value
from rlhf_pipeline.functional.terms import Term, add_counts, objective
from rlhf_pipeline.models.tree_model import TreeBatch

CPU = torch.device("cpu")
MEAN, SUM = Reduction.mean, Reduction.sum
RELATIVE = 1e-6  # a pair's weight is 1 / its prompt's number of pairs in fp32; the rest is fp64

# One to five responses, with ties of two and of all.
RANKINGS = [(0, 1), (1, 0, 0, 2), (0, 0, 0), (2, 1, 0), (0,), (1, 3, 0, 1, 2), (0, 0), (1,)]
WITH_ORDER, PREFERRED = 4, 5  # prompts with an ordered pair; and with (0,), whose only response was wanted
VERDICTS = [(0,), (1,), (1,), (0,), (0,), (1,), (0,), (0,)]
POINT = 0.37
CASES = {
    "dpo": DirectConfig(name=Objective.dpo, beta=0.3),
    "dpo mean": DirectConfig(name=Objective.dpo, beta=5.0, reduction=MEAN),
    "dpo with ties": DirectConfig(name=Objective.dpo, beta=0.3, ties=PairTies.half),
    "dpo best and worst": DirectConfig(name=Objective.dpo, beta=0.3, pairs=PairRule.best_worst, ties=PairTies.half),
    "dpo adjacent": DirectConfig(name=Objective.dpo, beta=0.3, pairs=PairRule.adjacent),
    "dpo with likelihood": DirectConfig(
        name=Objective.dpo, beta=0.3, likelihood=0.7, likelihood_reduction=SUM, pairs=PairRule.best_worst
    ),
    "cdpo": DirectConfig(name=Objective.cdpo, beta=0.3, label_smoothing=0.2),
    "cdpo with ties": DirectConfig(
        name=Objective.cdpo, beta=0.3, label_smoothing=0.2, ties=PairTies.half, pairs=PairRule.adjacent
    ),
    "ipo": DirectConfig(name=Objective.ipo, tau=0.2),
    "ipo mean": DirectConfig(name=Objective.ipo, tau=0.6, reduction=MEAN, pairs=PairRule.best_worst),
    "rdpo": DirectConfig(name=Objective.rdpo, beta=0.3, alpha=0.25),
    "rdpo mean": DirectConfig(name=Objective.rdpo, beta=2.0, alpha=0.25, reduction=MEAN),
    "plackett_luce": DirectConfig(name=Objective.plackett_luce, beta=0.4),
    "plackett_luce mean": DirectConfig(
        name=Objective.plackett_luce, beta=2.0, reduction=MEAN, likelihood=0.3, likelihood_reduction=MEAN
    ),
    "slic": DirectConfig(name=Objective.slic, delta=3.0, likelihood=0.1, likelihood_reduction=SUM),
    "rrhf": DirectConfig(name=Objective.rrhf, reduction=MEAN, likelihood=1.0, likelihood_reduction=MEAN),
    "cpo": DirectConfig(name=Objective.cpo, beta=0.1, likelihood=1.0, likelihood_reduction=MEAN),
    "orpo": DirectConfig(name=Objective.orpo, beta=0.6, reduction=MEAN, likelihood=1.0, likelihood_reduction=MEAN),
    "simpo": DirectConfig(name=Objective.simpo, beta=2.0, gamma=0.5, reduction=MEAN),
    "unlikelihood": DirectConfig(
        name=Objective.unlikelihood, alpha=0.4, form=UnlikelihoodForm.token, likelihood=1.0, likelihood_reduction=MEAN
    ),
    "unlikelihood mean": DirectConfig(
        name=Objective.unlikelihood, alpha=0.4, form=UnlikelihoodForm.token, reduction=MEAN, pairs=PairRule.adjacent
    ),
    "unlikelihood of sequences": DirectConfig(
        name=Objective.unlikelihood, alpha=0.2, form=UnlikelihoodForm.sequence, likelihood=1.0, likelihood_reduction=SUM
    ),
    "preferred_ft": DirectConfig(name=Objective.preferred_ft, reduction=MEAN),
    "preferred_ft sum": DirectConfig(name=Objective.preferred_ft, likelihood=0.5, likelihood_reduction=MEAN),
    "kto": DirectConfig(name=Objective.kto, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7),
    "kto mean": DirectConfig(
        name=Objective.kto,
        beta=2.0,
        desirable_weight=1.0,
        undesirable_weight=1.5,
        reduction=MEAN,
        likelihood=0.5,
        likelihood_reduction=SUM,
    ),
}


def ranks_for(config: DirectConfig) -> list[tuple[int, ...]]:
    return VERDICTS if TRAITS[config.name].unit is Unit.verdicts else RANKINGS


def trees_of(ranks: Sequence[Sequence[int]], *, with_reference: bool = True) -> list[Tree]:
    """Responses of 2 to 7 tokens, of which one is not scored; the reference gives every token a log-prob of its own."""
    rng = np.random.default_rng(5)
    trees = []
    for i, places in enumerate(ranks):
        lengths = rng.integers(2, 8, len(places)).tolist()
        scored = [np.arange(n) != rng.integers(0, n) for n in lengths]
        reference = tuple(-rng.gamma(1.5, 1.0, n).astype(np.float32) for n in lengths)
        trees.append(
            Tree(
                prompt=np.ones(1 + i % 3, np.int32),
                responses=tuple(np.ones(n, np.int32) for n in lengths),
                scored=tuple(scored),
                index=i,
                ranks=np.asarray(places, np.int32),
                numbers={"reference": reference} if with_reference else {},
            )
        )
    return trees


def logprobs_of(trees: Sequence[Tree], seed: int = 8) -> list[list[Tensor]]:
    """The policy's, of the scored tokens of every response; one set for all tests."""
    rng = np.random.default_rng(seed)
    return [
        [torch.tensor(-rng.gamma(1.2, 1.0, int(scored.sum())), requires_grad=True) for scored in tree.scored]
        for tree in trees
    ]


def reference_of(trees: Sequence[Tree]) -> list[list[Tensor]]:
    return [
        [torch.tensor(n[s].astype(np.float64)) for n, s in zip(t.numbers["reference"], t.scored, strict=True)]
        for t in trees
    ]


def flat(many: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.cat([one for some in many for one in some]) if many else torch.zeros(0, dtype=torch.float64)


def packed(trees: Sequence[Tree]) -> PackedTrees:
    return pack([trees])


def terms_of(trees: Sequence[Tree], logprobs: Tensor, config: DirectConfig) -> dict[str, Term]:
    return loss_terms(logprobs, TreeBatch.of(packed(trees), CPU), config, POINT)


# The value


@pytest.mark.parametrize("name", CASES)
def test_the_objective_on_any_split_is_the_one_by_hand(name: str) -> None:
    """And so is its gradient; what micro-batches are counted for is known before them."""
    config = CASES[name]
    ranks = ranks_for(config)
    trees = trees_of(ranks)
    policy = logprobs_of(trees)
    loss, likelihood = plain_objective(policy, reference_of(trees), ranks, config, POINT)
    expected = loss + config.likelihood * likelihood
    gradient = torch.autograd.grad(expected, [one for some in policy for one in some], allow_unused=True)
    slopes = [torch.zeros_like(one) if g is None else g for one, g in zip(sum(policy, []), gradient, strict=True)]  # noqa: RUF017
    assert float(torch.cat(slopes).abs().max()) > 1e-3
    for split in ([8], [1] * 8, [2, 6], [4, 0, 4]):
        ends = np.cumsum([0, *split])
        parts = [list(range(a, b)) for a, b in pairwise(ends.tolist())]
        counts = add_counts(loss_counts(packed([trees[i] for i in part]), config) for part in parts)
        total, found = {"loss": 0.0, "likelihood": 0.0, "objective": 0.0}, []
        for part in parts:
            logprobs = flat([policy[i] for i in part]).detach().requires_grad_()
            terms = terms_of([trees[i] for i in part], logprobs, config)
            assert {n: t.count for n, t in terms.items()} == loss_counts(packed([trees[i] for i in part]), config)
            value = objective(terms, counts)
            value.backward()
            total["objective"] += float(value.detach())
            for term in total.keys() & terms.keys():
                total[term] += float(terms[term].sum.detach()) / counts[term]
            assert logprobs.grad is not None
            found.append(logprobs.grad)
        assert total["objective"] == pytest.approx(float(expected.detach()), rel=RELATIVE), split
        assert total["loss"] == pytest.approx(float(loss.detach()), rel=RELATIVE), split
        if config.likelihood:
            assert total["likelihood"] == pytest.approx(float(likelihood.detach()), rel=RELATIVE), split
        assert torch.cat(found).numpy() == pytest.approx(torch.cat(slopes).numpy(), rel=RELATIVE, abs=1e-9), split


@pytest.mark.parametrize("name", CASES)
def test_what_is_counted(name: str) -> None:
    """Prompts with a pair; of KTO responses; of fine-tuning the preferred. Never responses or pairs."""
    config = CASES[name]
    counts = loss_counts(packed(trees_of(ranks_for(config))), config)
    if config.name is Objective.kto:
        assert (counts["loss"], counts["reward_chosen"], counts["reward_rejected"]) == (8, 5, 3)
        assert counts.get("likelihood", 5) == 5 and "accuracy" not in counts
        return
    with_pairs = WITH_ORDER + 2 * (config.ties is PairTies.half)  # two prompts of nothing but ties
    assert counts["loss"] == (PREFERRED if config.name is Objective.preferred_ft else with_pairs)
    assert counts.get("likelihood", PREFERRED) == PREFERRED
    assert ("likelihood" in counts) == (config.likelihood > 0)
    assert counts["accuracy"] == counts["margin"] == WITH_ORDER


def test_every_objective_is_tried() -> None:
    assert {config.name for config in CASES.values()} == set(Objective) == set(TRAITS)
    assert {name.value for name, traits in TRAITS.items() if traits.reference} == set(WITH_REFERENCE)


def test_cases_differ() -> None:
    """Or a rule that does nothing would not be missed."""
    values = {}
    for name, config in CASES.items():
        trees = trees_of(ranks_for(config))
        terms = terms_of(trees, flat(logprobs_of(trees)), config)
        values[name] = round(float(terms["loss"].sum.detach()) / terms["loss"].count, 6)
    assert len(set(values.values())) == len(values), values


# What is logged


@pytest.mark.parametrize("name", [name for name, config in CASES.items() if config.name is not Objective.kto])
def test_implicit_rewards_of_ordered_pairs(name: str) -> None:
    """Every prompt weighs the same; beta or tau scales. Of responses that tie none is the better one."""
    config = CASES[name]
    scale = {"ipo": config.tau, "orpo": 1.0}.get(config.name.value, config.beta) or 1.0
    assert reward_scale(config) == scale
    trees = trees_of(RANKINGS)
    policy, reference = logprobs_of(trees), reference_of(trees)
    expected: dict[str, list[float]] = {}
    rule = config.pairs if TRAITS[config.name].unit is Unit.pairs else PairRule.all
    for mine, theirs, places in zip(policy, reference, RANKINGS, strict=True):
        gap = float(config.name.value in WITH_REFERENCE)
        rewards = [
            scale * float((whole(a, config.reduction) - gap * whole(b, config.reduction)).detach())
            for a, b in zip(mine, theirs, strict=True)
        ]
        pairs = [(rewards[i], rewards[j]) for i, j, _ in pairs_of(places, rule, PairTies.drop)]
        if pairs:
            figures = {
                "accuracy": [float(better > worse) for better, worse in pairs],
                "margin": [better - worse for better, worse in pairs],
                "reward_chosen": [better for better, _ in pairs],
                "reward_rejected": [worse for _, worse in pairs],
            }
            for figure, values in figures.items():
                expected.setdefault(figure, []).append(float(np.mean(values)))
    terms = terms_of(trees, flat(policy), config)
    for figure, means in expected.items():
        term = terms[figure]
        assert (term.weight, term.sum.requires_grad, term.count) == (0.0, False, len(means))
        assert float(term.sum) / term.count == pytest.approx(np.mean(means), rel=RELATIVE), figure
    assert set(terms) - {"likelihood"} == {"loss", *expected}


def test_implicit_rewards_of_verdicts() -> None:
    config = CASES["kto"]
    trees = trees_of(VERDICTS)
    policy, reference = logprobs_of(trees), reference_of(trees)
    rewards = [0.3 * float((a[0].sum() - b[0].sum()).detach()) for a, b in zip(policy, reference, strict=True)]
    terms = terms_of(trees, flat(policy), config)
    for figure, place in (("reward_chosen", 0), ("reward_rejected", 1)):
        values = [reward for reward, (rank,) in zip(rewards, VERDICTS, strict=True) if rank == place]
        assert float(terms[figure].sum) / terms[figure].count == pytest.approx(np.mean(values), rel=RELATIVE)
        assert terms[figure].weight == 0 and not terms[figure].sum.requires_grad
    assert float(terms["reference_point"].sum) / terms["reference_point"].count == pytest.approx(POINT, rel=RELATIVE)
    assert set(terms) == {"loss", "reference_point", "reward_chosen", "reward_rejected"}


def test_equal_rewards_are_right_half_of_the_time() -> None:
    config = CASES["dpo"]
    trees = trees_of([(0, 1), (0, 1, 2)])
    terms = terms_of(trees, flat(reference_of(trees)), config)
    assert float(terms["accuracy"].sum) == pytest.approx(1.0, rel=RELATIVE) and terms["accuracy"].count == 2


# Where the policy is its reference


@pytest.mark.parametrize("name", CASES)
def test_start_values(name: str) -> None:
    """Whatever the data: other lengths, and ties."""
    config = CASES[name]
    known = {
        "dpo": math.log(2),
        "cdpo": math.log(2),
        "ipo": 1 / (4 * (config.tau or 1.0) ** 2),
    }
    assert start_value(config) == known.get(config.name.value)
    if config.name.value in known:
        trees = trees_of(RANKINGS)
        loss = terms_of(trees, flat(reference_of(trees)), config)["loss"]
        assert float(loss.sum) / loss.count == pytest.approx(known[config.name.value], rel=RELATIVE)


def test_other_start_values() -> None:
    """Of Plackett and Luce ln 2 where there are two responses; of KTO half of the weights, if z0 is 0."""
    trees = trees_of([(0, 1), (1, 0)])
    loss = terms_of(trees, flat(reference_of(trees)), CASES["plackett_luce"])["loss"]
    assert float(loss.sum) / loss.count == pytest.approx(math.log(2), rel=RELATIVE)
    trees = trees_of([(0,), (1,)])
    batch = TreeBatch.of(packed(trees), CPU)
    loss = loss_terms(flat(reference_of(trees)), batch, CASES["kto"])["loss"]
    assert float(loss.sum) == pytest.approx(1.2 / 2 + 0.7 / 2, rel=RELATIVE)


# Gradients


def test_two_responses_are_what_dpo_makes_of_them() -> None:
    """A ranking of two is a pair, in value and in gradient."""
    trees = trees_of([(0, 1), (1, 0), (0, 1)])
    found = []
    for config in (CASES["dpo"], dataclasses.replace(CASES["plackett_luce"], beta=0.3)):
        logprobs = flat(logprobs_of(trees)).detach().requires_grad_()
        loss = terms_of(trees, logprobs, config)["loss"].sum
        loss.backward()
        assert logprobs.grad is not None
        found.append([float(loss.detach()), *logprobs.grad.tolist()])
    assert found[0] == pytest.approx(found[1], rel=RELATIVE)


@pytest.mark.parametrize("name", [name for name, config in CASES.items() if config.name.value not in WITH_REFERENCE])
def test_no_reference_is_looked_at_where_there_is_none(name: str) -> None:
    """What a batch without its numbers says of them is NaN."""
    config = CASES[name]
    trees = trees_of(RANKINGS)
    bare = trees_of(RANKINGS, with_reference=False)
    logprobs = flat(logprobs_of(trees))
    assert torch.isnan(TreeBatch.of(packed(bare), CPU).number("reference")).all()
    with_numbers, without = (terms_of(some, logprobs, config) for some in (trees, bare))
    assert {n: float(t.sum.detach()) for n, t in with_numbers.items()} == {
        n: float(t.sum.detach()) for n, t in without.items()
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [[], [(0, 0, 0), (1,)]])
def test_nothing_to_compare(name: str, ranks: list[tuple[int, ...]]) -> None:
    """No trees at all, or nothing but a tie: finite, counted for nothing, and connected to the model all the same."""
    config = CASES[name]
    if config.name is Objective.kto or config.ties is PairTies.half:
        ranks = []
    trees = trees_of(ranks)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    logprobs = flat(logprobs_of(trees)).detach() * weight
    batch = TreeBatch.of(pack([]) if not trees else packed(trees), CPU)
    terms = loss_terms(logprobs, batch, config, POINT)
    counts = loss_counts(pack([]) if not trees else packed(trees), config)
    assert {n: t.count for n, t in terms.items()} == counts == dict.fromkeys(counts, 0.0)
    value = objective(terms, counts)
    value.backward()
    assert float(value.detach()) == 0.0 and weight.grad is not None and float(weight.grad) == 0.0
    assert all(float(term.sum.detach()) == 0.0 for term in terms.values())
