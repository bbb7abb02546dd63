"""What `rlhf rm` puts together: terms and their counts, the zero and unit of rewards, rewards in the data's order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_rankings import plain_objective
from torch import Tensor

from rlhf_pipeline.config.ranking import Comparisons, RankingConfig, RankingLoss, Ties
from rlhf_pipeline.config.schema import EvaluationConfig
from rlhf_pipeline.data.loader import Layout
from rlhf_pipeline.data.packing import PackedTrees, pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.rankings import HeldOutRankings, Scored
from rlhf_pipeline.functional.terms import Term, add_counts, objective
from rlhf_pipeline.models.scalar_head import TieStrength
from rlhf_pipeline.models.tree_model import TreeBatch
from rlhf_pipeline.recipes.rm import check_scores, loss_counts, loss_terms, shift_and_scale

CPU = torch.device("cpu")

# Terms


RANKS = [
    (0, 1),
    (1, 0, 0, 2),
    (0, 0, 0),
    (2, 1, 0),
    (0,),
    (0, 0, 0),
]  # 1, 5, 0, 3, 0 and 0 ordered comparisons; 0, 1, 3, 0, 0 and 3 ties
SCORES = [(3.0, 1.5), (2.0, 4.0, 4.0, 0.0), (math.nan,) * 3, (math.nan, 1.0, 2.0), (1.0,), (2.0, math.nan, 2.0)]
LOG_TIE = -0.3
OBJECTIVES: dict[str, RankingConfig] = {
    "as published": RankingConfig(),
    "literal": RankingConfig(divide_by=Comparisons.literal),
    "ties": RankingConfig(ties=Ties.model),
    "margin": RankingConfig(margin=0.4),
    "smoothing": RankingConfig(label_smoothing=0.1),
    "soft labels": RankingConfig(soft_labels=0.35, centring=0.05),
    "soft and literal": RankingConfig(soft_labels=0.35, divide_by=Comparisons.literal),
    "centring": RankingConfig(centring=0.05),
    "plackett_luce": RankingConfig(loss=RankingLoss.plackett_luce),
    "all": RankingConfig(ties=Ties.model, margin=0.4, label_smoothing=0.1, centring=0.05),
}


def trees_of(ranks: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> list[Tree]:
    one = np.ones(1, np.int32)
    return [
        Tree(
            prompt=one,
            responses=(one,) * len(places),
            scored=(one.astype(bool),) * len(places),
            index=i,
            ranks=np.asarray(places, np.int32),
            scores=np.asarray(given, np.float32),
        )
        for i, (places, given) in enumerate(zip(ranks, scores, strict=True))
    ]


def packed(trees: Sequence[Tree]) -> PackedTrees:
    return pack([trees])


def terms_of(trees: Sequence[Tree], rewards: Sequence[float], config: RankingConfig) -> dict[str, Term]:
    log_tie = torch.tensor(LOG_TIE, dtype=torch.float64) if config.ties is Ties.model else None
    output = (torch.tensor(rewards, dtype=torch.float64, requires_grad=True), log_tie)
    return loss_terms(output, TreeBatch.of(packed(trees), CPU), config)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_on_any_split_is_the_one_by_hand(name: str) -> None:
    """Counts are of prompts with a comparison: not of responses, not of prompts that tie throughout, unless ties are
    modelled or, with soft labels, have scores.
    """
    config, trees = OBJECTIVES[name], trees_of(RANKS, SCORES)
    rng = np.random.default_rng(3)
    rewards: list[list[float]] = [rng.normal(size=len(places)).tolist() for places in RANKS]
    log_tie = torch.tensor(LOG_TIE, dtype=torch.float64) if config.ties is Ties.model else None
    plain = [torch.tensor(one, dtype=torch.float64) for one in rewards]
    expected = float(plain_objective(plain, RANKS, SCORES, config, log_tie))
    for split in ([6], [1, 1, 1, 1, 1, 1], [2, 4], [3, 0, 3]):
        ends = np.cumsum([0, *split])
        parts = [list(range(a, b)) for a, b in pairwise(ends.tolist())]
        counts = add_counts(loss_counts(packed([trees[i] for i in part]), config) for part in parts)
        assert counts["loss"] == (5 if config.ties is Ties.model else 4 if config.soft_labels else 3)
        assert counts["accuracy"] == 3 and counts["reward"] == 16
        total = 0.0
        for part in parts:
            terms = terms_of([trees[i] for i in part], [r for i in part for r in rewards[i]], config)
            assert terms.keys() == counts.keys()
            assert {n: t.count for n, t in terms.items()} == loss_counts(packed([trees[i] for i in part]), config)
            value = objective(terms, counts)
            value.backward()
            total += float(value.detach())
        assert total == pytest.approx(expected, rel=1e-12), split


def test_what_is_logged_is_not_trained() -> None:
    terms = terms_of(trees_of(RANKS, SCORES), list(range(16)), OBJECTIVES["all"])
    assert {name for name, term in terms.items() if term.weight == 0} == {"accuracy", "reward"}
    assert not terms["accuracy"].sum.requires_grad and not terms["reward"].sum.requires_grad
    assert float(terms["reward"].sum) == sum(range(16))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_without_a_comparison(name: str) -> None:
    """Nothing but ties: 0 where they are dropped, and a number with a finite gradient everywhere.

    With soft labels those of the first prompt have a loss, and that of the second, which lacks a score, has none.
    """
    config = OBJECTIVES[name]
    trees = trees_of([(0, 0, 0), (1, 1)], [(1.0, 1.0, 1.0), (math.nan, 2.0)])
    rewards = torch.tensor([0.5, -1.0, 2.0, 3.0, 3.0], dtype=torch.float64, requires_grad=True)
    log_tie = torch.tensor(LOG_TIE, dtype=torch.float64) if config.ties is Ties.model else None
    terms = loss_terms((rewards, log_tie), TreeBatch.of(packed(trees), CPU), config)
    value = objective(terms, {name: term.count for name, term in terms.items()})
    value.backward()
    assert rewards.grad is not None and torch.isfinite(rewards.grad).all()
    if config.ties is Ties.model:
        assert terms["loss"].count == 2 and float(value.detach()) > 0 and rewards.grad[:3].any()
    elif config.soft_labels:
        assert terms["loss"].count == 1 and float(value.detach()) > 0
        assert rewards.grad[:3].any() and not rewards.grad[3:].any()
    else:
        assert terms["loss"].count == 0 and float(value.detach()) == 0 and not rewards.grad.any()


@pytest.mark.parametrize("name", ["as published", "plackett_luce"])
def test_equal_rewards_cost_what_a_guess_costs(name: str) -> None:
    """ln 2 a comparison of two; a choice among n + 1 equals ln(n + 1)."""
    terms = terms_of(trees_of([(0, 1, 2)], [(math.nan,) * 3]), [0.7] * 3, OBJECTIVES[name])
    expected = math.log(2) if name == "as published" else (math.log(3) + math.log(2)) / 2
    assert float(terms["loss"].sum.detach()) == pytest.approx(expected, rel=1e-12)
    assert float(terms["accuracy"].sum) == 0.5


def test_the_tie_strength_moves_in_bfloat16_too() -> None:
    """A step of 0.01 would be rounded away beside a start of 2.7."""
    tie = TieStrength(2.7, torch.bfloat16)
    assert tie().dtype == torch.float32 and float(tie().detach()) == pytest.approx(2.7, rel=1e-6)
    with torch.no_grad():
        tie.moved.sub_(0.001)
    assert float(tie().detach()) == pytest.approx(2.699, abs=1e-5)


@pytest.mark.parametrize("scores", [[(1.0, math.nan), (math.nan, math.nan)], []])
def test_soft_labels_are_made_of_scores(scores: list[tuple[float, ...]]) -> None:
    def stored(scores: list[tuple[float, ...]]) -> Any:
        return Stored(trees_of([(0, 1)] * len(scores), scores))

    with pytest.raises(UserError, match=r"objective.soft_labels: no two answers.*use 0"):
        check_scores(stored(scores))
    check_scores(stored([*scores, (2.0, 1.0)]))


# Zero and unit


def test_shift_and_scale() -> None:
    found = shift_and_scale(np.array([1.0, 3.0, 5.0, 7.0]))
    assert found == {"reward_shift": 4.0, "reward_scale": math.sqrt(5)}
    assert shift_and_scale(np.array([2.5, 2.5])) == {"reward_shift": 2.5, "reward_scale": 1.0}
    assert shift_and_scale(np.array([-2.0])) == {"reward_shift": -2.0, "reward_scale": 1.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_zero_is_made_of_what_is_no_number(bad: float) -> None:
    with pytest.raises(UserError, match=r"not finite.*optim\.lr"):
        shift_and_scale(np.array([1.0, bad]))


@pytest.mark.parametrize("row_length", [3, 30, 1000])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_rewards_come_back_in_the_order_of_the_data(row_length: int, num_ranks: int) -> None:
    """Whatever way they were packed and shared out. The stand-in for an engine gives a response its tokens' sum."""
    rng = np.random.default_rng(1)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(1, 90, count).astype(np.int32)

    trees = []
    for i in range(12):
        responses = tuple(tokens(int(n)) for n in rng.integers(1, 9, rng.integers(1, 6)))
        ones = tuple(np.ones(len(r), bool) for r in responses)
        trees.append(Tree(prompt=tokens(4), responses=responses, scored=ones, index=i))
    found = np.zeros(sum(len(tree.responses) for tree in trees[:11]))
    for rank in range(num_ranks):
        layout = Layout(row_length=row_length, micro_rows=2, width_multiple=1, rank=rank, num_ranks=num_ranks)
        scored = Scored(Stored(trees), layout, examples=11)  # type: ignore[arg-type]
        engine: Any = Sums()
        found += scored.rewards(engine)[0]
        assert engine.training, "as it was before"
    expected = [float(response.sum()) for tree in trees[:11] for response in tree.responses]
    assert found.tolist() == expected
    assert scored.length.tolist() == [len(response) for tree in trees[:11] for response in tree.responses]


def test_rewards_that_are_no_numbers_are_not_taken_for_a_loss_of_zero(tmp_path: Path) -> None:
    """Of held-out answers that all tie the loss would be 0, whatever the rewards are."""

    class Broken(Sums):
        def __call__(self, batch: TreeBatch) -> tuple[Tensor, None]:
            return torch.full((len(batch.last),), math.nan), None

    data: Any = Stored(trees_of([(0, 0)], [(1.0, 1.0)]))
    layout = Layout(row_length=30, micro_rows=1, width_multiple=1, rank=0, num_ranks=1)
    held_out = HeldOutRankings(data, layout, EvaluationConfig(), folder=tmp_path)
    engine: Any = Broken()
    tracker: Any = None
    found = held_out.evaluate(engine, lambda output, batch: loss_terms(output, batch, RankingConfig()), 1, tracker)
    assert math.isnan(found["eval/loss"])


class Stored(list[Tree]):
    """What `Scored` asks of a data set."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(tree) for tree in self])


class Sums:
    """An engine whose model adds up the tokens of each response."""

    device = CPU
    training = True

    def train(self, mode: bool = True) -> None:
        self.training = mode

    evaluating = Engine.evaluating

    def __call__(self, batch: TreeBatch) -> tuple[Tensor, None]:
        assert not self.training
        flat, last = batch.tokens.flatten(), batch.last.tolist()
        tree, branch = batch.tree.flatten(), batch.branch.flatten()
        width = batch.tokens.shape[1]
        rows = torch.arange(len(flat)) // width
        same = [(rows == rows[at]) & (tree == tree[at]) & (branch == branch[at]) for at in last]
        return torch.stack([flat[one].sum() for one in same]).float() if last else torch.zeros(0), None
