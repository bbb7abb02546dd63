"""An exponential moving average of the weights that an engine trains (Polyak averaging; InstructGPT decays by 0.992).

It follows the fp32 masters, of which every process averages what it owns: bf16 would lose the small changes. Weights
that are not trained are not averaged; they stay. When to update it, and what to use it for, is the recipe's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rlhf_pipeline.engine import MASTER, Engine, Slice

EMA = "ema"


class Ema:
    """average <- decay * average + (1 - decay) * master, after each update; it starts as the masters."""

    def __init__(self, engine: Engine, decay: float) -> None:
        assert 0 <= decay <= 1, decay
        self.engine = engine
        self._blend = get_ema_multi_avg_fn(decay)
        self._averages = [Slice(s.name, s.start, {EMA: s.tensors[MASTER].clone()}) for s in engine.slices()]
        self._is_in_place = False

    def update(self) -> None:
        """Follow the masters; called once after each of the engine's updates."""
        assert not self._is_in_place, "the masters are the average now"
        averages, masters = self._pairs()
        if averages:  # a process may own nothing
            self._blend(averages, masters, None)

    def slices(self) -> list[Slice]:
        """What a resume state holds of it: `engine.slices()` with one tensor, EMA, that is read or written in place."""
        assert not self._is_in_place, "the average is in the masters now"
        return self._averages

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the engine's weights are the average; afterwards they are, bit for bit, what they were.

        For evaluation, sampling and `engine.weights`; not for updates or resume states. Called by every rank.
        """
        assert not self._is_in_place, "the average is in place already"
        self._swap()
        self._is_in_place = True
        try:
            yield
        finally:
            self._swap()
            self._is_in_place = False

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(*self._pairs(), strict=True):
            kept = master.clone()  # one tensor at a time, and not a third copy of the model
            master.copy_(average)
            average.copy_(kept)
        self.engine.synchronise()

    def _pairs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Averages and masters. The masters' views are taken anew: an engine may move its tensors."""
        return [s.tensors[EMA] for s in self._averages], [s.tensors[MASTER] for s in self.engine.slices()]
