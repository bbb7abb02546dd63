"""What a loss returns: named terms, each a sum and the count that divides it once, globally.

A mean of micro-batch means is not the mean of the big batch where counts differ; a sum over everything divided by a
count over everything is, on any number of processes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Term:
    """`weight * sum / (global count)` is this term's share of the loss; a term of weight 0 is only logged."""

    sum: Tensor  # scalar
    count: float  # of what `sum` adds up, in this micro-batch on this rank
    weight: float = 1.0


def objective(terms: Mapping[str, Term], global_counts: Mapping[str, float]) -> Tensor:
    """The scalar to differentiate: terms divided by their global counts, weighted and added.

    A term that nobody has a count for adds nothing, and still connects the graph: on every rank each micro-batch
    must run its backward pass.
    """
    weighted = [t.weight * t.sum / (global_counts[name] or 1.0) for name, t in terms.items() if t.weight]
    return torch.stack(weighted).sum()


def add_counts(many: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Counts of several micro-batches, added by name."""
    total: dict[str, float] = {}
    for counts in many:
        for name, count in counts.items():
            total[name] = total.get(name, 0.0) + count
    return total
