"""Which examples make which global batch: a pure function of the seed and the step, so that any step can be resumed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def permutation(size: int, *, seed: int, epoch: int, salt: int = 0) -> np.ndarray:
    """The order of an epoch, int64 [size]."""
    order = np.random.default_rng([seed, salt, epoch]).permutation(size)
    order.setflags(write=False)  # it is cached
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """The global batches of a run. Batch b of an epoch is `starts[e][b]:starts[e][b + 1]` of that epoch's order."""

    size: int
    seed: int
    starts: tuple[np.ndarray, ...]  # one int64 [batches + 1] an epoch

    @property
    def num_steps(self) -> int:
        return sum(len(starts) - 1 for starts in self.starts)

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of step 0..num_steps-1."""
        for epoch, starts in enumerate(self.starts):
            if step < len(starts) - 1:
                return epoch, step
            step -= len(starts) - 1
        raise IndexError("step is past the last epoch")

    def indices(self, step: int) -> np.ndarray:
        """The examples of a step's global batch."""
        epoch, batch = self.place(step)
        starts = self.starts[epoch]
        return permutation(self.size, seed=self.seed, epoch=epoch)[starts[batch] : starts[batch + 1]]

    def size_before(self, step: int) -> int:
        """How many examples the steps before `step` used, all epochs counted."""
        epoch, batch = self.place(step) if step < self.num_steps else (len(self.starts), 0)
        return epoch * self.size + (int(self.starts[epoch][batch]) if batch else 0)

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` is the last of its epoch."""
        epoch, batch = self.place(step)
        return batch == len(self.starts[epoch]) - 2


def by_examples(size: int, *, batch: int, epochs: int, seed: int) -> BatchOrder:
    """Global batches of `batch` examples; the last of an epoch holds what is left."""
    starts = np.append(np.arange(0, size, batch), size)
    return BatchOrder(size=size, seed=seed, starts=(starts,) * epochs)


def by_tokens(lengths: np.ndarray, *, batch: int, epochs: int, seed: int) -> BatchOrder:
    """Global batches of whole examples: each is closed by the example that reaches `batch` tokens."""
    starts = []
    for epoch in range(epochs):
        total = np.cumsum(lengths[permutation(len(lengths), seed=seed, epoch=epoch)])
        cuts, reached = [0], 0
        while cuts[-1] < len(lengths):
            end = min(int(np.searchsorted(total, reached + batch)) + 1, len(lengths))
            cuts.append(end)
            reached = int(total[end - 1])
        starts.append(np.asarray(cuts))
    return BatchOrder(size=len(lengths), seed=seed, starts=tuple(starts))


def mixed_in(before: int, after: int, *, ratio: float, size: int, seed: int) -> np.ndarray:
    """Examples of a second data set for one step, so that `ratio` of all examples so far come from it.

    `before` and `after` count the first set's examples up to the step and with it. The second set is gone through in
    a new order each time round.
    """
    rate = ratio / (1 - ratio)
    numbers = range(int(before * rate), int(after * rate))
    return np.asarray([permutation(size, seed=seed, epoch=i // size, salt=1)[i % size] for i in numbers], np.int64)
