"""One update: means over all micro-batches, the gradient of the whole, and nothing made of what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pipeline.data.packing import PackedTrees, pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.functional.terms import Term
from rlhf_pipeline.models.tree_model import TreeBatch
from rlhf_pipeline.update import Updated, update


class OneWeight:
    """Stands for an engine: the weight times each target, and plain gradient descent."""

    device = torch.device("cpu")

    def __init__(self, weight: float) -> None:
        self.weight = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
        self.lasts: list[bool] = []
        self.rates: list[float] = []

    def __call__(self, batch: TreeBatch) -> Tensor:
        return self.weight * batch.target

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.lasts.append(last)
        loss.backward()

    def step(self, learning_rate: float) -> float:
        self.rates.append(learning_rate)
        assert self.weight.grad is not None
        norm = abs(float(self.weight.grad))
        with torch.no_grad():
            self.weight -= learning_rate * self.weight.grad
        self.weight.grad = None
        return norm


def packed(*targets: int) -> PackedTrees:
    """One tree: a prompt of a token and a response that is scored throughout."""
    tokens = np.array(targets, np.int32)
    tree = Tree(prompt=np.ones(1, np.int32), responses=(tokens,), scored=(np.ones(len(tokens), bool),), index=0)
    return pack([[tree]])


def terms(output: Tensor, batch: TreeBatch) -> Mapping[str, Term]:
    odd = batch.target % 2 == 1
    return {
        "loss": Term(output.sum(), float(len(output))),
        "odd": Term(output.detach()[odd].sum(), float(odd.sum()), weight=0.0),
        "none": Term(output.detach()[:0].sum(), 0.0, weight=0.0),
    }


def counts(micro: PackedTrees) -> Mapping[str, float]:
    return {"loss": float(len(micro.target)), "odd": float((micro.target % 2 == 1).sum()), "none": 0.0}


def refuse(what: str, values: list[float]) -> Exception:
    return RuntimeError(f"{what} {values}")


def updated(
    engine: OneWeight, *micro_batches: PackedTrees, loss: Callable[[Any, TreeBatch], Mapping[str, Term]] = terms
) -> Updated:
    return update(cast(Engine, engine), micro_batches, loss, counts, learning_rate=0.5, failed=refuse)


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_means_and_gradient_do_not_depend_on_the_cut(cut: int) -> None:
    targets = (3, 4, 8, 1, 9)
    engine = OneWeight(2.0)
    micro_batches = [packed(*targets[:cut]), packed(*targets[cut:])] if cut else [packed(*targets)]
    made = updated(engine, *micro_batches)
    # 2 * 25 / 5; odd: 2 * 13 / 3; the gradient is 25 / 5, and 2 - 0.5 * 5 is left
    assert made.means == pytest.approx({"loss": 10.0, "odd": 26 / 3}, rel=1e-12)
    assert made.norm == pytest.approx(5.0, rel=1e-12)
    assert engine.weight.item() == pytest.approx(-0.5, rel=1e-12)
    assert made.tokens == 5 + len(micro_batches), "with a prompt of one token each"
    assert engine.lasts == [False] * (len(micro_batches) - 1) + [True]
    assert engine.rates == [0.5]


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(weight: float) -> None:
    engine = OneWeight(weight)
    with pytest.raises(RuntimeError, match=r"^loss \[(nan|inf), (nan|inf)\]$"):
        updated(engine, packed(3, 4))
    assert engine.rates == []


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    def steep(output: Tensor, batch: TreeBatch) -> Mapping[str, Term]:
        # The root of 0 is 0, and its slope infinite.
        return {"loss": Term((output.sum() - output.detach().sum()).clamp(min=0).sqrt(), 1.0)}

    with pytest.raises(RuntimeError, match=r"^gradient norm \[(nan|inf)\]$"):
        updated(OneWeight(1.0), packed(3), loss=steep)
