"""From data sets to the packed micro-batches of a step: order, mixture, split over ranks, packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlhf_pipeline.data.order import BatchOrder, mixed_in
from rlhf_pipeline.data.packing import PackedTrees, pack, plan
from rlhf_pipeline.data.tree import Tree


class Trees(Protocol):
    """What a data set has to offer here; `data.dataset.TreeDataset` does."""

    lengths: np.ndarray  # int64 [size], tokens of each tree

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Tree: ...
    def origin(self, index: int) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Memory layout of micro-batches and this process's share of them."""

    row_length: int
    micro_rows: int
    width_multiple: int
    rank: int
    num_ranks: int


Example = tuple[int, int]  # which data set, which of its trees


def micro_batches(data: Sequence[Trees], examples: Sequence[Example], layout: Layout) -> list[PackedTrees]:
    """This rank's micro-batches of a global batch; equally many on every rank, filled up with empty ones."""
    lengths = [int(data[group].lengths[index]) for group, index in examples]
    mine = plan(lengths, num_ranks=layout.num_ranks, row_length=layout.row_length, micro_rows=layout.micro_rows)[
        layout.rank
    ]
    return [
        pack(
            [[data[examples[i][0]][examples[i][1]] for i in row] for row in rows],
            groups=[[examples[i][0] for i in row] for row in rows],
            width_multiple=layout.width_multiple,
        )
        for rows in mine
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeStream:
    """The global batches of a run over one data set, with `mix_ratio` of all examples from a second one."""

    data: Sequence[Trees]  # the data set, and the one mixed in where there is one
    order: BatchOrder
    layout: Layout
    mix_ratio: float = 0.0

    def examples(self, step: int) -> list[Example]:
        """(data set, index) of every example of a step's global batch."""
        chosen = [(0, int(i)) for i in self.order.indices(step)]
        if self.mix_ratio:
            extra = mixed_in(
                self.order.size_before(step),
                self.order.size_before(step + 1),
                ratio=self.mix_ratio,
                size=len(self.data[1]),
                seed=self.order.seed,
            )
            chosen += [(1, int(i)) for i in extra]
        return chosen

    def micro_batches(self, step: int) -> list[PackedTrees]:
        return micro_batches(self.data, self.examples(step), self.layout)

    def origins(self, step: int) -> list[str]:
        """Where the examples of a step come from, file:line."""
        return [self.data[group].origin(index) for group, index in self.examples(step)]
