"""Which examples make which global batch: a pure function of the seed and the step, so that any step can be resumed."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

MIXED_IN = 1  # salts keep the orders that are drawn from one seed apart; 0 is that of an epoch
FIRST_SOURCE = 2


@lru_cache(maxsize=16)
def permutation(size: int, *, seed: int, epoch: int, salt: int = 0) -> np.ndarray:
    """The order of an epoch, int64 [size]."""
    order = np.random.default_rng([seed, salt, epoch]).permutation(size)
    order.setflags(write=False)  # it is cached
    return order


@dataclass(frozen=True, slots=True)
class Part:
    """The examples of one source: how many, and how often each is seen in an epoch."""

    size: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """The global batches of a run. Batch b of an epoch is `starts[e][b]:starts[e][b + 1]` of that epoch's order."""

    parts: tuple[Part, ...]  # the data set's examples, one source after the other
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
        return epoch_order(self.parts, seed=self.seed, epoch=epoch)[starts[batch] : starts[batch + 1]]

    def size_before(self, step: int) -> int:
        """How many examples the steps before `step` used, all epochs counted."""
        epoch, batch = self.place(step) if step < self.num_steps else (len(self.starts), 0)
        whole = sum(int(starts[-1]) for starts in self.starts[:epoch])
        return whole + (int(self.starts[epoch][batch]) if batch else 0)

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` is the last of its epoch."""
        epoch, batch = self.place(step)
        return batch == len(self.starts[epoch]) - 2


@lru_cache(maxsize=4)
def epoch_order(parts: tuple[Part, ...], *, seed: int, epoch: int) -> np.ndarray:
    """The examples of an epoch, int64, each as often as its source's weight has it, all sources shuffled together.

    A source of n examples and weight w has an endless row of permutations of its own; the epoch takes the positions
    e*w*n to (e+1)*w*n of it. So its examples are used up before one repeats, whatever the weight: two epochs of weight
    0.5 see each once. With every weight 1 this is one permutation of everything.
    """
    chosen: list[np.ndarray] = []
    first = 0
    for number, part in enumerate(parts):
        times = _times(part, seed=seed, epoch=epoch, salt=FIRST_SOURCE + number)
        chosen.append(np.repeat(np.arange(first, first + part.size), times))
        first += part.size
    examples = np.concatenate(chosen)
    order = examples[permutation(len(examples), seed=seed, epoch=epoch)]
    order.setflags(write=False)
    return order


def epoch_size(part: Part, epoch: int) -> int:
    """How many examples of a source an epoch has."""
    start, end = _span(part, epoch)
    return end - start


def _span(part: Part, epoch: int) -> tuple[int, int]:
    share = Fraction(str(part.weight)) * part.size  # as it was typed: in floats 0.29 * 100 is less than 29
    return int(share * epoch), int(share * (epoch + 1))


def _times(part: Part, *, seed: int, epoch: int, salt: int) -> np.ndarray:
    """How often each example of a source comes in an epoch, int64 [size]."""
    times = np.zeros(part.size, np.int64)
    start, end = _span(part, epoch)
    at = start
    while at < end:
        round_number, skipped = divmod(at, part.size)
        taken = min(end - at, part.size - skipped)
        if taken == part.size:
            times += 1
        else:
            times[permutation(part.size, seed=seed, epoch=round_number, salt=salt)[skipped : skipped + taken]] += 1
        at += taken
    return times


def by_examples(size: int, *, batch: int, epochs: int, seed: int, parts: tuple[Part, ...] = ()) -> BatchOrder:
    """Global batches of `batch` examples; the last of an epoch holds what is left. Without `parts`, all are seen once."""
    parts = _whole(parts, size)
    starts = []
    for epoch in range(epochs):
        size = sum(epoch_size(part, epoch) for part in parts)
        starts.append(np.append(np.arange(0, size, batch), size))
    return BatchOrder(parts=parts, seed=seed, starts=tuple(starts))


def by_tokens(lengths: np.ndarray, *, batch: int, epochs: int, seed: int, parts: tuple[Part, ...] = ()) -> BatchOrder:
    """Global batches of whole examples: each is closed by the example that reaches `batch` tokens."""
    parts = _whole(parts, len(lengths))
    starts = []
    for epoch in range(epochs):
        total = np.cumsum(lengths[epoch_order(parts, seed=seed, epoch=epoch)])
        cuts, reached = [0], 0
        while cuts[-1] < len(total):
            end = min(int(np.searchsorted(total, reached + batch)) + 1, len(total))
            cuts.append(end)
            reached = int(total[end - 1])
        starts.append(np.asarray(cuts))
    return BatchOrder(parts=parts, seed=seed, starts=tuple(starts))


def _whole(parts: tuple[Part, ...], size: int) -> tuple[Part, ...]:
    parts = parts or (Part(size),)
    assert sum(part.size for part in parts) == size, (parts, size)
    return parts


def mixed_in(before: int, after: int, *, ratio: float, size: int, seed: int) -> np.ndarray:
    """Examples of a second data set for one step, so that `ratio` of all examples so far come from it.

    `before` and `after` count the first set's examples up to the step and with it. The second set is gone through in
    a new order each time round.
    """
    rate = ratio / (1 - ratio)
    numbers = range(int(before * rate), int(after * rate))
    return np.asarray(
        [permutation(size, seed=seed, epoch=i // size, salt=MIXED_IN)[i % size] for i in numbers], np.int64
    )
