"""One optimiser update over micro-batches: what the offline stages' loop and PPO share.

1 counts, 2 forward and backward of every micro-batch, 3 refuse what is not finite, 4 update. It does not choose the
learning rate, log, or seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline import runtime
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.functional.terms import Term, add_counts, objective
from rlhf_pipeline.models.tree_model import TreeBatch

Loss = Callable[[Any, TreeBatch], Mapping[str, Term]]  # of what the module returns
Counts = Callable[[PackedTrees], Mapping[str, float]]
Failed = Callable[[str, list[float]], Exception]  # what is not finite, and its values -> the error to raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated:
    """What an update came to, over all ranks."""

    means: dict[str, float]  # of every term that anything was counted for, and of "loss"
    norm: float  # of the gradient, before clipping
    tokens: float  # in the micro-batches


def update(
    engine: Engine,
    micro_batches: Sequence[PackedTrees],
    loss: Loss,
    counts: Counts,
    *,
    learning_rate: float,
    failed: Failed,
) -> Updated:
    """Make one update from this rank's micro-batches, of which every rank has the same number.

    Args:
        loss: terms of one micro-batch from the module's output.
        counts: the same terms' counts, from the integers alone, so that they can be added up before the first backward.
        failed: the error for a loss or a gradient norm that is not finite. For a loss the weights are as they were; for
            a norm they are spoilt already.
    """
    global_counts = runtime.sum_over_ranks(add_counts(counts(micro) for micro in micro_batches))
    sums: dict[str, Tensor] = {}
    for i, micro in enumerate(micro_batches):
        batch = TreeBatch.of(micro, engine.device)
        terms = loss(engine(batch), batch)
        engine.backward(objective(terms, global_counts), last=i == len(micro_batches) - 1)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.sum.detach()
    local = dict(zip(sums, torch.stack(list(sums.values())).double().tolist(), strict=True))
    local["tokens"] = float(sum(micro.num_tokens for micro in micro_batches))
    total = runtime.sum_over_ranks(local)
    tokens = total.pop("tokens")
    # What nothing in this batch is counted for has no mean; but an update always has a loss.
    counted = {name: count or 1.0 for name, count in global_counts.items() if count or name == "loss"}
    means = {name: value / counted[name] for name, value in total.items() if name in counted}
    _require_finite("loss", list(means.values()), failed)
    norm = engine.step(learning_rate)
    _require_finite("gradient norm", [norm], failed)
    return Updated(means=means, norm=norm, tokens=tokens)


def _require_finite(what: str, values: list[float], failed: Failed) -> None:
    if not all(math.isfinite(value) for value in values):
        raise failed(what, values)
