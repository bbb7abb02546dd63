"""Held-out preferences of `rlhf dpo`: figures by hand, verdicts by a plain count, and what is said when likelihood falls."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pipeline.config.direct import Reduction
from rlhf_pipeline.data.loader import Layout
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.evaluation.direct import HeldOutPreferences, area_under_curve, fallen
from rlhf_pipeline.functional.terms import Term
from rlhf_pipeline.models.tree_model import TreeBatch

CPU = torch.device("cpu")


def tree(index: int, prompt: int, ranks: Sequence[int], *responses: tuple[Sequence[int], Sequence[float]]) -> Tree:
    """Each response is its tokens and the reference's log-probs."""
    return Tree(
        prompt=np.array([1, prompt], np.int32),
        responses=tuple(np.array(tokens, np.int32) for tokens, _ in responses),
        scored=tuple(np.ones(len(tokens), bool) for tokens, _ in responses),
        index=index,
        ranks=np.array(ranks, np.int32),
        numbers={"reference": tuple(np.array(known, np.float32) for _, known in responses)},
    )


# The stand-in for an engine gives a token the log-prob -token / 8.
RANKINGS = [
    tree(0, 50, (0, 1), ([8, 16], [-1, -1]), ([24], [-1])),  # log pi -3, -3; above the reference by -1, -2
    tree(1, 51, (1, 0, 1), ([8], [-1]), ([16, 16], [-1, -1]), ([8, 8], [-2, -2])),  # -1, -4, -2; 0, -2, 2
    tree(2, 52, (1, 0), ([8], [-2]), ([8, 8, 8, 8], [-1, -1, -1, -2])),  # -1, -4; 1, 1
    tree(3, 53, (0, 0), ([40, 40], [0, 0]), ([80], [0])),  # nobody won: in the loss alone
]


class Stored(list[Tree]):
    """What a set of held-out trees must offer."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        super().__init__(trees)
        self.lengths = np.array([len(one) for one in trees])

    def origin(self, index: int) -> str:
        return f"tree {index}"


class Eighths:
    device = CPU
    training = True

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def train(self, mode: bool = True) -> None:
        self.training = mode

    evaluating = Engine.evaluating

    def __call__(self, batch: TreeBatch) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return -self.factor * batch.target.float() / 8


def terms(logprobs: Tensor, batch: TreeBatch) -> Mapping[str, Term]:
    """A loss of tokens, and a term that is only logged."""
    return {
        "loss": Term((batch.number("reference") - logprobs).sum(), float(len(logprobs))),
        "likelihood": Term(-logprobs.sum(), float(len(batch.last)), weight=0.0),
    }


def plain_terms(logprobs: Tensor, batch: TreeBatch) -> Mapping[str, Term]:
    assert "reference" not in batch.numbers or torch.isfinite(batch.number("reference")).all()
    return {"loss": Term(-logprobs.sum(), float(len(logprobs)))}


def cached(batch: TreeBatch) -> Tensor:
    return batch.number("reference")


def held_out(trees: Sequence[Tree], folder: Path, *, row_length: int = 100, **options: Any) -> HeldOutPreferences:
    layout = Layout(row_length=row_length, micro_rows=1, width_multiple=1, rank=0, num_ranks=1)
    given: dict[str, Any] = {"examples": None, "beta": 0.5, "reduction": Reduction.sum, **options}
    return HeldOutPreferences(Stored(trees), layout, folder=folder, **given)


def evaluated(held: HeldOutPreferences, **options: Any) -> dict[str, float]:
    given: dict[str, Any] = {"terms": terms, "reference": cached, "step": 7, **options}
    engine: Any = given.pop("engine", Eighths())
    found = held.evaluate(engine, **given)
    assert engine.training, "as it was before"
    return found


def check(found: Mapping[str, float], expected: Mapping[str, float]) -> None:
    assert {name: found[f"eval/{name}"] for name in expected} == pytest.approx(dict(expected), abs=1e-9)


@pytest.mark.parametrize("row_length", [3, 12, 100])
def test_every_prompt_weighs_the_same(row_length: int, tmp_path: Path) -> None:
    """However they are packed. By comparison the accuracy would be 3/8: the second prompt has two of the four."""
    found = evaluated(held_out(RANKINGS, tmp_path, row_length=row_length))
    check(
        found,
        {
            "accuracy": (1 + 0 + 0.5) / 3,
            "margin": 0.5 * (1 - 3 + 0) / 3,
            "reward_chosen": 0.5 * (-1 - 2 + 1) / 3,
            "reward_rejected": 0.5 * (-2 + (0 + 2) / 2 + 1) / 3,
            "logprob_chosen": (-3 - 4 - 4) / 3,
            "logprob_rejected": (-3 - 1 - 2 - 1) / 4,
            "drift_chosen": (-1 - 2 + 1) / 3,
            "drift_rejected": (-2 + 0 + 2 + 1) / 4,
            "pairs": 4,
            "tied_pairs": 2,
        },
    )
    drifts, lengths = [-1, -2, 0, -2, 2, 1, 1, -10, -10], [2, 1, 1, 2, 2, 1, 4, 2, 1]
    assert found["eval/length_correlation"] == pytest.approx(np.corrcoef(drifts, lengths)[0, 1])
    assert found["eval/loss"] == pytest.approx(-sum(drifts) / sum(lengths))
    assert found["eval/likelihood"] == pytest.approx((3 + 3 + 1 + 4 + 2 + 1 + 4 + 10 + 10) / 9)
    assert found["eval/accuracy_low"] < found["eval/accuracy"] < found["eval/accuracy_high"]
    assert "eval/reward_chosen_mean" not in found


def test_the_file(tmp_path: Path) -> None:
    found = evaluated(held_out(RANKINGS, tmp_path))
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["step"] == 7 and written["accuracy"] == 0.5 and written["loss"] == found["eval/loss"]
    assert written["comparisons"]["accuracy"]["mean"] == 3 / 8 and written["comparisons"]["responses"] == 9


def test_the_first_examples_alone(tmp_path: Path) -> None:
    check(evaluated(held_out(RANKINGS, tmp_path, examples=1)), {"accuracy": 1, "margin": 0.5, "pairs": 1})


def test_the_mean_of_tokens(tmp_path: Path) -> None:
    """Only rewards are by token: what is logged of log-probs stays a sum."""
    found = evaluated(held_out(RANKINGS, tmp_path, reduction=Reduction.mean))
    check(
        found,
        {
            "accuracy": (1 + 0 + 0) / 3,
            "reward_chosen": 0.5 * (-1 / 2 - 2 / 2 + 1 / 4) / 3,
            "reward_rejected": 0.5 * (-2 + (0 + 2 / 2) / 2 + 1) / 3,
            "logprob_chosen": (-3 - 4 - 4) / 3,
            "drift_rejected": (-2 + 0 + 2 + 1) / 4,
        },
    )


def test_an_objective_without_a_reference(tmp_path: Path) -> None:
    """Numbers that the trees happen to have are not taken."""
    found = evaluated(held_out(RANKINGS, tmp_path, beta=2.0), reference=None, terms=plain_terms)
    check(
        found,
        {
            "accuracy": (0.5 + 0 + 0) / 3,
            "margin": 2 * (0 + (-3 - 2) / 2 - 3) / 3,
            "reward_chosen": 2 * (-3 - 4 - 4) / 3,
            "logprob_chosen": (-3 - 4 - 4) / 3,
        },
    )
    assert not any("drift" in name for name in found)


def test_a_live_reference_runs_once_and_its_numbers_reach_the_terms(tmp_path: Path) -> None:
    calls = []

    def live(batch: TreeBatch) -> Tensor:
        calls.append(len(batch.target))
        return torch.full(batch.target.shape, -0.25)

    held = held_out(RANKINGS, tmp_path, row_length=8)
    found = evaluated(held, reference=live)
    assert len(calls) == len(held.scored.batches) > 1
    check(found, {"drift_chosen": (-3 - 4 - 4 + 0.25 * (2 + 2 + 4)) / 3, "loss": (38 - 0.25 * 16) / 16})


@pytest.mark.parametrize("ranks", [(0, 0), (0, 0, 0)])
def test_nothing_but_ties(ranks: tuple[int, ...], tmp_path: Path) -> None:
    given = [tree(i, 50 + i, ranks, *[([8 * k + 8], [0.0]) for k in range(len(ranks))]) for i in range(2)]
    found = evaluated(held_out(given, tmp_path))
    names = ("accuracy", "margin", "chosen", "rejected")
    assert math.isfinite(found["eval/loss"]) and not any(part in name for part in names for name in found)


def test_rankings_of_one_prompt_are_drawn_together(tmp_path: Path) -> None:
    """Four rankings, half of them right: with one prompt there is nothing to draw, with four there is."""

    def interval(prompts: Sequence[int]) -> list[float]:
        given = [
            tree(i, prompt, (0, 1) if i % 2 else (1, 0), ([8], [0.0]), ([16], [0.0]))
            for i, prompt in enumerate(prompts)
        ]
        found = evaluated(held_out(given, tmp_path))
        return [found[f"eval/accuracy{end}"] for end in ("_low", "", "_high")]

    assert interval([50, 50, 50, 50]) == [0.5, 0.5, 0.5]
    assert interval([50, 51, 52, 53]) == [0, 0.5, 1]


@pytest.mark.parametrize("where", ["policy", "reference"])
def test_what_is_not_finite(where: str, tmp_path: Path) -> None:
    def broken(batch: TreeBatch) -> Tensor:
        return torch.full(batch.target.shape, math.nan)

    options: dict[str, Any] = {"engine": Eighths(math.inf)} if where == "policy" else {"reference": broken}
    found = evaluated(held_out(RANKINGS, tmp_path), **options)
    assert found.keys() == {"eval/loss"} and math.isnan(found["eval/loss"])
    assert not (tmp_path / "evaluation.json").exists()


# Verdicts


def verdicts(*given: tuple[int, int, float]) -> list[Tree]:
    """(prompt, rank, drift) each; log pi is -2."""
    return [tree(i, prompt, (rank,), ([8, 8], [-1 - drift, -1])) for i, (prompt, rank, drift) in enumerate(given)]


def test_verdicts_on_answers_to_the_same_prompt(tmp_path: Path) -> None:
    """Two prompts have both kinds: one with two comparisons, half of them right, one with a single one. The others are
    compared with nothing, and are chosen or rejected all the same.
    """
    given = verdicts((50, 0, 1.0), (51, 0, 4.0), (50, 1, 2.0), (52, 1, 9.0), (50, 1, 0.0), (51, 1, 1.0), (53, 0, -9.0))
    check(
        evaluated(held_out(given, tmp_path)),
        {
            "accuracy": (1 / 2 + 1) / 2,
            "margin": 0.5 * (0 + 3) / 2,
            "reward_chosen": 0.5 * (1 + 4) / 2,
            "reward_rejected": 0.5 * (1 + 1) / 2,
            "drift_chosen": (1 + 4 - 9) / 3,
            "drift_rejected": (2 + 9 + 0 + 1) / 4,
            "logprob_chosen": -2,
            "logprob_rejected": -2,
            "pairs": 3,
        },
    )


def test_verdicts_on_different_prompts(tmp_path: Path) -> None:
    """All wanted against all unwanted: of 6 comparisons 3 are won and 2 tied."""
    given = verdicts((50, 0, 2.0), (51, 1, 1.0), (52, 0, 1.0), (53, 1, 2.0), (54, 0, 3.0))
    found = evaluated(held_out(given, tmp_path))
    check(
        found, {"accuracy": 4 / 6, "margin": 0.5 * (2 - 1.5), "reward_chosen": 1, "reward_rejected": 0.75, "pairs": 0}
    )
    assert found["eval/accuracy_low"] <= 4 / 6 <= found["eval/accuracy_high"]


@pytest.mark.parametrize("rank", [0, 1])
def test_verdicts_of_one_kind(rank: int, tmp_path: Path) -> None:
    found = evaluated(held_out(verdicts((50, rank, 1.0), (50, rank, 3.0), (51, rank, 2.0)), tmp_path))
    side, other = ("chosen", "rejected") if rank == 0 else ("rejected", "chosen")
    check(found, {f"drift_{side}": 2.0, f"logprob_{side}": -2.0})
    assert not any(name.endswith(other) or name in ("eval/accuracy", "eval/margin") for name in found)


def test_the_area_under_the_curve_is_a_share_of_comparisons() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        reward, wanted = rng.integers(0, 6, 30).astype(float), rng.random(30) < 0.4
        wanted[:2] = [True, False]
        won = [(a > b) + (a == b) / 2 for a in reward[wanted] for b in reward[~wanted]]
        found = area_under_curve(reward, wanted, rng.integers(0, 9, 30))
        assert found.mean == pytest.approx(np.mean(won)) and found.count == len(won)


def test_its_interval() -> None:
    """That of DeLong et al. 1988 where every response has a prompt of its own; copies of a prompt's add nothing."""
    rng = np.random.default_rng(1)
    wanted = np.arange(300) < 120
    reward = rng.normal(size=300) + wanted
    above = (reward[wanted][:, None] > reward[~wanted]).astype(float)
    deviation = math.sqrt(above.mean(1).var(ddof=1) / 120 + above.mean(0).var(ddof=1) / 180)
    found = area_under_curve(reward, wanted, np.arange(300))
    assert found.low == pytest.approx(above.mean() - 1.96 * deviation, abs=0.006)
    assert found.high == pytest.approx(above.mean() + 1.96 * deviation, abs=0.006)
    four = area_under_curve(np.tile(reward, 4), np.tile(wanted, 4), np.tile(np.arange(300), 4))
    assert (four.mean, four.low, four.high) == pytest.approx((found.mean, found.low, found.high))
    assert four.prompts == 300 and four.count == 16 * 120 * 180


# Likelihood


@pytest.mark.parametrize(
    ("first", "now", "speaks"),
    [
        (-20.0, -29.9, False),  # a half more, and less than 10 nats
        (-20.0, -30.1, True),
        (-200.0, -239.0, False),  # 39 nats, and less than a fifth
        (-200.0, -241.0, True),
        (-200.0, -100.0, False),
        (-200.0, math.nan, False),  # whoever looks at the loss has said so
    ],
)
def test_a_fall_of_the_preferred_responses(first: float, now: float, speaks: bool) -> None:
    found = fallen({"eval/logprob_chosen": now}, {"eval/logprob_chosen": first})
    assert (found is not None) == speaks
    if found is not None:
        assert f"from {first:.1f} to {now:.1f} nats" in found and "objective.likelihood" in found


def test_no_fall_without_two_figures() -> None:
    known = {"eval/logprob_chosen": -1e3}
    assert fallen(known, {}) is None and fallen({"eval/loss": 1.0}, known) is None
