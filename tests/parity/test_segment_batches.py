"""Attention over batches of short segments, against each segment by itself in float64: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.data.packing import Segment
from rlhf_pipeline.models import path_attention as paths_module
from rlhf_pipeline.models import segment_batches

ONE_RESPONSE = (Segment(5), Segment(9), Segment(2))
RANKINGS = (
    Segment(7),
    Segment(3, 0, prompt_length=4),
    Segment(1, 0, prompt_length=4),
    Segment(12),
    Segment(6, 3, prompt_length=10),
    Segment(4),  # padding of the row
    Segment(3),
    Segment(5, 6, prompt_length=1),
)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], scale: float) -> Tensor:
    """[1, h, N, D] and [1, key heads, N, D] -> [1, N, h, D]: soft-max of every query by itself, written out."""
    groups = query.shape[1] // key.shape[1]
    starts = [sum(segment.length for segment in segments[:i]) for i in range(len(segments))]
    outputs = []
    for start, segment in zip(starts, segments, strict=True):
        prompt = [] if segment.trunk is None else [starts[segment.trunk] + j for j in range(segment.prompt_length)]
        for i in range(segment.length):
            seen = [*prompt, *range(start, start + i + 1)]
            for head in range(query.shape[1]):
                scores = key[0, head // groups, seen] @ query[0, head, start + i] * scale
                outputs.append(scores.softmax(0) @ value[0, head // groups, seen])
    return torch.stack(outputs).view(1, -1, query.shape[1], value.shape[-1])


@pytest.mark.parametrize("waste", [0, 30, 10_000])  # a batch for each size, some, one for each kind
@pytest.mark.parametrize("short", [25, 10_000])  # some are short, all
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("segments", [(Segment(1),), (Segment(6),), ONE_RESPONSE, RANKINGS])
def test_batches_are_each_segment_by_itself(
    segments: tuple[Segment, ...],
    key_heads: int,
    short: int,
    waste: int,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
) -> None:
    monkeypatch.setattr(paths_module, "SHORT", short)
    monkeypatch.setattr(paths_module, "MANY", 1)
    monkeypatch.setattr(segment_batches, "WASTE", waste)
    segment_batches.plan_batches.cache_clear()
    generator = torch.Generator().manual_seed(1)
    count = sum(segment.length for segment in segments)
    query, key, value = (
        torch.randn(1, heads, count, width, generator=generator, dtype=torch.float64).requires_grad_()
        for heads, width in ((4, 6), (key_heads, 6), (key_heads, 3))  # values may have another width
    )
    grad = torch.randn(1, count, 4, 3, generator=generator, dtype=torch.float64)

    expected = one_by_one(query, key, value, segments, 0.4)
    actual, _ = paths_module.path_attention(None, query, key, value, None, tree_segments=segments, scaling=0.4)
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    expected_gradients = torch.autograd.grad(expected, (query, key, value), grad)
    for one, other in zip(torch.autograd.grad(actual, (query, key, value), grad), expected_gradients, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-12)
    segment_batches.plan_batches.cache_clear()


@pytest.mark.parametrize("short", [0, 25, 10_000])  # none is short, some, all
@pytest.mark.parametrize("read", [[0], [6, 9, 10, 11], [3, 4, 25], list(range(7, 27))])
def test_the_last_layer_computes_what_is_read(
    read: list[int], short: int, monkeypatch: pytest.MonkeyPatch, assert_close: Callable[..., None]
) -> None:
    monkeypatch.setattr(paths_module, "SHORT", short)
    monkeypatch.setattr(paths_module, "MANY", 1)
    generator = torch.Generator().manual_seed(2)
    count = sum(segment.length for segment in RANKINGS)
    states = [torch.randn(1, 2, count, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    grad = torch.zeros(1, count, 2, 4, dtype=torch.float64)
    grad[:, read] = torch.randn(1, len(read), 2, 4, generator=generator, dtype=torch.float64)
    last = SimpleNamespace(layer_idx=2, config=SimpleNamespace(num_hidden_layers=3))
    first = SimpleNamespace(layer_idx=0, config=last.config)
    options = {"tree_segments": RANKINGS, "read_states": torch.tensor(read), "scaling": 0.4}

    whole, _ = paths_module.path_attention(first, *states, None, **options)
    assert_close(whole, one_by_one(*states, RANKINGS, 0.4), rtol=1e-9, atol=1e-12)
    some, _ = paths_module.path_attention(last, *states, None, **options)
    assert_close(some[:, read], whole[:, read], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(some, whole)  # it did leave something out
    expected = torch.autograd.grad(whole, states, grad)
    for one, other in zip(torch.autograd.grad(some, states, grad), expected, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_softmax_by_way_of_fp32_is_torchs_own(assert_close: Callable[..., None]) -> None:
    scores = (3 * torch.randn(5, 7, 31, generator=torch.Generator().manual_seed(0))).bfloat16()
    scores[0, 0, 3:] = torch.finfo(torch.bfloat16).min
    assert_close(segment_batches.softmax(scores), scores.softmax(-1), rtol=0, atol=0)


@pytest.mark.parametrize(("count", "batched"), [(15, False), (16, True)])
def test_few_short_segments_are_not_batched(count: int, batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = False
    attend = paths_module.attend

    def told(*args: Any, **rest: Any) -> Tensor:
        nonlocal called
        called = True
        return attend(*args, **rest)

    monkeypatch.setattr(paths_module, "attend", told)
    segments = (*(Segment(3) for _ in range(count)), Segment(100))  # the last one is long
    tensor = torch.randn(1, 1, 3 * count + 100, 4)
    paths_module.path_attention(None, tensor, tensor, tensor, None, tree_segments=segments)
    assert called is batched


def test_dropout_drops_probabilities_and_keeps_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that sees itself alone has the probability 1: half of the outputs are 0, half are doubled."""
    torch.manual_seed(0)
    segments = tuple(Segment(1) for _ in range(4000))
    ones = torch.ones(1, 1, 4000, 2)
    out, _ = paths_module.path_attention(None, ones, ones, ones, None, tree_segments=segments, dropout=0.5)
    assert set(out.flatten().tolist()) == {0.0, 2.0}
    assert abs(float(out.mean()) - 1.0) < 0.1


def test_gradients_under_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against differences, each of the same draws."""
    monkeypatch.setattr(paths_module, "MANY", 1)

    def attention(*states: Tensor) -> Tensor:
        torch.manual_seed(1)
        return paths_module.path_attention(None, *states, None, tree_segments=RANKINGS[:3], dropout=0.4)[0]

    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(1, 2, 11, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(attention, states)


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 1), (16, 16), (17, 18), (31, 32), (33, 36), (128, 128), (129, 144), (1000, 1024)]
)
def test_lengths_are_rounded_to_few(length: int, expected: int) -> None:
    assert segment_batches.rounded(length, torch.bfloat16) == expected
    assert segment_batches.rounded(length, torch.float32) == length


def test_like_sizes_share_a_batch_and_beginnings_are_apart() -> None:
    chosen = tuple(segment_batches.whole(RANKINGS)[i] for i in (0, 1, 2, 7))
    plan = segment_batches.plan_batches(RANKINGS, chosen, (), torch.float32, torch.device("cpu"))
    assert [tuple(batch.mask.shape) for batch in plan.batches] == [(1, 1, 1, 7, 7), (3, 1, 1, 5, 7)]
    assert [41 in row for row in plan.batches[1].key_grads.view(3, 7).tolist()] == [False, True, True]  # padding
    # Prompt and segment of 1: the first four tokens of segment 0, then the three of its own.
    assert [row for row in plan.batches[1].keys.tolist() if row[0] == 0] == [
        [0, 1, 2, 3, 7, 8, 9],
        [0, 1, 2, 3, 10, 0, 0],
    ]
