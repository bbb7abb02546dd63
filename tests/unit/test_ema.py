"""The moving average by hand, on an engine of two tensors; the real engines are in test_ranks_engines.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.ema import EMA, Ema
from rlhf_pipeline.engine import MASTER, Engine, Slice


class TwoTensors:
    """Owns elements [0, 2) of "a" and [3, 4) of "b"; the weights are the masters in bf16."""

    def __init__(self, a: Sequence[float], b: float) -> None:
        self.masters = [torch.tensor(a), torch.tensor([b])]
        self.weights: list[Tensor] = []
        self.synchronise()

    def slices(self) -> list[Slice]:
        moments = torch.zeros(2), torch.zeros(1)
        places = zip(("a", "b"), (0, 3), self.masters, moments, strict=True)
        return [Slice(name, start, {MASTER: m.view(-1), "exp_avg": zero}) for name, start, m, zero in places]

    def synchronise(self) -> None:
        self.weights = [m.to(torch.bfloat16) for m in self.masters]

    def set(self, a: Sequence[float], b: float) -> None:
        self.masters[0].copy_(torch.tensor(a))
        self.masters[1].fill_(b)
        self.synchronise()


def average_of(engine: Any, decay: float) -> Ema:
    return Ema(cast(Engine, engine), decay)


def values(ema: Ema) -> list[list[float]]:
    return [s.tensors[EMA].tolist() for s in ema.slices()]


def test_two_updates_by_hand() -> None:
    engine = TwoTensors([1.0, -2.0], 0.5)
    ema = average_of(engine, 0.9)
    assert values(ema) == [[1.0, -2.0], [0.5]]
    engine.set([2.0, 0.0], 0.5)
    ema.update()
    engine.set([3.0, 0.0], -0.5)
    ema.update()
    # 0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3; 0.81 * -2; 0.9 * 0.5 - 0.1 * 0.5
    assert values(ema)[0] == pytest.approx([1.29, -1.62], rel=1e-6)
    assert values(ema)[1] == pytest.approx([0.4], rel=1e-6)
    assert [t.tolist() for t in engine.masters] == [[3.0, 0.0], [-0.5]], "the masters are not touched"


def test_it_follows_masters_that_have_moved() -> None:
    engine = TwoTensors([1.0, 1.0], 1.0)
    ema = average_of(engine, 0.5)
    engine.masters = [torch.tensor([2.0, 3.0]), torch.tensor([5.0])]
    ema.update()
    assert values(ema) == [[1.5, 2.0], [3.0]]


def test_slices_say_whose_elements_they_are_and_are_written_in_place() -> None:
    engine = TwoTensors([1.0, 2.0], 3.0)
    ema = average_of(engine, 0.9)
    assert [(s.name, s.start, s.numel, list(s.tensors)) for s in ema.slices()] == [
        ("a", 0, 2, [EMA]),
        ("b", 3, 1, [EMA]),
    ]
    ema.slices()[1].tensors[EMA].fill_(7.0)
    with ema.in_place():
        assert engine.masters[1].tolist() == [7.0]


def test_in_place_and_back_bit_for_bit() -> None:
    engine = TwoTensors([0.1, -1e-30], 1 / 3)
    ema = average_of(engine, 0.992)
    engine.set([0.1234567, 3e8], -0.0)
    ema.update()
    masters, weights = [t.clone() for t in engine.masters], [t.clone() for t in engine.weights]
    averages = [s.tensors[EMA].clone() for s in ema.slices()]
    with ema.in_place():
        assert [t.tolist() for t in engine.masters] == [t.tolist() for t in averages]
        assert [t.tolist() for t in engine.weights] == [t.bfloat16().tolist() for t in averages]
    for now, before in zip([*engine.masters, *engine.weights], [*masters, *weights], strict=True):
        size = {4: torch.int32, 2: torch.int16}[now.element_size()]
        assert torch.equal(now.view(size), before.view(size)), "as bits, so that -0.0 is not 0.0"
    assert values(ema) == [t.tolist() for t in averages]


def test_back_after_an_error_too() -> None:
    engine = TwoTensors([1.0, 2.0], 3.0)
    ema = average_of(engine, 0.5)
    engine.set([3.0, 2.0], 3.0)
    ema.update()
    with pytest.raises(KeyError), ema.in_place():
        raise KeyError
    assert engine.masters[0].tolist() == engine.weights[0].tolist() == [3.0, 2.0]
    assert values(ema)[0] == [2.0, 2.0]


def test_what_would_mix_the_two_up_is_refused_while_it_is_in_place() -> None:
    ema = average_of(TwoTensors([1.0, 2.0], 3.0), 0.5)
    with ema.in_place():
        with pytest.raises(AssertionError):
            ema.update()
        with pytest.raises(AssertionError):
            ema.slices()
        with pytest.raises(AssertionError), ema.in_place():
            pass
    ema.update()
