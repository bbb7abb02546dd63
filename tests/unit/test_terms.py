"""Terms: one division by the global count, however the examples are cut into micro-batches."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.functional.terms import Term, add_counts, objective


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_weighted_sums_divided_by_their_own_counts() -> None:
    terms = {"nll": Term(sum=scalar(6.0), count=2), "ptx": Term(sum=scalar(10.0), count=3, weight=0.5)}
    # 6 / 4 + 0.5 * 10 / 8
    assert float(objective(terms, {"nll": 4.0, "ptx": 8.0})) == pytest.approx(2.125, rel=1e-12)


def test_a_term_of_weight_zero_is_only_logged() -> None:
    infinite = Term(sum=scalar(float("inf")), count=1, weight=0.0)
    terms = {"nll": Term(sum=scalar(6.0), count=2), "entropy": infinite}
    assert float(objective(terms, {"nll": 2.0, "entropy": 1.0})) == 3.0


def test_a_term_without_a_count_adds_nothing_and_connects_the_graph() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = objective({"nll": Term(sum=(weight * 2)[:0].sum(), count=0)}, {"nll": 0.0})
    assert loss.item() == 0.0
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("cuts", [[7], [1, 6], [3, 0, 2, 2], [1] * 7])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(cuts: list[int]) -> None:
    values = torch.arange(1.0, 8.0, dtype=torch.float64)
    weight = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (weight * values).pow(2).mean().backward()
    whole = float(weight.grad)  # type: ignore[arg-type]

    weight.grad = None
    parts = values.split(cuts)
    total = add_counts({"square": float(len(part))} for part in parts)
    for part in parts:
        objective({"square": Term(sum=(weight * part).pow(2).sum(), count=len(part))}, total).backward()
    # 2 * 1.5 * mean of 1, 4, .., 49 = 3 * 20
    assert whole == pytest.approx(60.0, rel=1e-12)
    assert float(weight.grad) == pytest.approx(whole, rel=1e-12)  # type: ignore[arg-type]


def test_counts_add_up_by_name() -> None:
    assert add_counts([{"nll": 3.0}, {"nll": 4.0, "ptx": 1.0}, {}, {"ptx": 0.5}]) == {"nll": 7.0, "ptx": 1.5}
    assert add_counts([]) == {}
