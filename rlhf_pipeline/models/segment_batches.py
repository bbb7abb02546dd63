"""Attention along short paths, many at a time: segments of like size are padded and computed as one batch.

One by one, short segments are nothing but overhead: a ranking's answers of ten tokens are a hundred calls a layer, each
of which takes longer to begin than to compute. `path_attention` decides which segments are short.

Shapes: S segments of a batch, Q queries and K keys each, h heads, D their width, N tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlhf_pipeline.data.packing import Segment

# A batch is split where padding its segments to the longest would compute more query-key pairs in vain than this: by
# then another batch costs less.
WASTE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBatch:
    """Segments side by side. Padding repeats token 0, whose keys are blocked and whose outputs nobody reads."""

    queries: Tensor  # int64 [S, Q], places among the N tokens
    keys: Tensor  # int64 [S, K]: the prompt, where it lies apart, and then the segment itself
    mask: Tensor  # [S, 1, Q, K], additive


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBatches:
    """What the layers of one forward and backward pass share."""

    batches: tuple[SegmentBatch, ...]
    places: Tensor  # int64 [N]: where each token is among the padded outputs and, after them, others'; of the rest 0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SegmentBatches,
    *,
    others: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """query [N, h, D], key [N, key heads, D], value [N, key heads, V] -> [N, h, V].

    `others` [n, h, V] are the outputs of the plan's other queries. Tokens that are in neither get what is not theirs.

    The gathers are embeddings: their backward adds rows up, on a CPU several times faster than that of indexing.
    """
    groups = query.shape[1] // key.shape[1]
    query = query * scale
    outputs = []
    for batch in plan.batches:
        q, k, v = _gather(query, batch.queries), _gather(key, batch.keys), _gather(value, batch.keys)
        if groups > 1:
            k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        probabilities = softmax(torch.matmul(q, k.transpose(2, 3)).add_(batch.mask))
        out = torch.matmul(functional.dropout(probabilities, dropout), v)
        outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
    if others is not None:
        outputs.append(others.flatten(1))
    return functional.embedding(plan.places, torch.cat(outputs)).unflatten(-1, (query.shape[1], value.shape[2]))


def _gather(tensor: Tensor, places: Tensor) -> Tensor:
    """[N, h, D] at [S, L] -> [S, h, L, D]."""
    rows = functional.embedding(places, tensor.flatten(1))
    return rows.unflatten(-1, tensor.shape[1:]).transpose(1, 2)


@dataclass(frozen=True, slots=True, order=True)
class Queries:
    """`count` tokens of a segment, from its token `first` on: those whose attention is computed."""

    segment: int
    first: int
    count: int


def whole(segments: Sequence[Segment]) -> tuple[Queries, ...]:
    """All tokens of every segment."""
    return tuple(Queries(i, 0, segment.length) for i, segment in enumerate(segments))


def those_read(segments: Sequence[Segment], read: np.ndarray) -> tuple[Queries, ...]:
    """Of every segment from the first token that is `read` to the last; `read` are sorted places among the N tokens."""
    starts = np.cumsum([0, *(segment.length for segment in segments)])
    begin, end = np.searchsorted(read, starts[:-1]), np.searchsorted(read, starts[1:])
    return tuple(
        Queries(i, int(read[a] - starts[i]), int(read[b - 1] - read[a] + 1))
        for i, (a, b) in enumerate(zip(begin, end, strict=True))
        if b > a
    )


def places_of(segments: Sequence[Segment], chosen: Sequence[Queries]) -> np.ndarray:
    """Of the chosen queries, one after the other, the places among the N tokens."""
    starts = np.cumsum([0, *(segment.length for segment in segments)])
    parts = [starts[one.segment] + one.first + np.arange(one.count) for one in chosen]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def keys_before(segments: Sequence[Segment], one: Queries) -> int:
    """Keys that the first of the queries sees before its own."""
    return prompt_before(segments[one.segment]) + one.first


@lru_cache(maxsize=3)  # every layer of a forward pass asks for the same one, and the last for one of its own
def plan_batches(
    segments: tuple[Segment, ...],
    chosen: tuple[Queries, ...],
    others: tuple[Queries, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> SegmentBatches:
    """How to batch the `chosen` among the N tokens that the segments are; the `others` are computed by somebody else."""
    starts = np.cumsum([0, *(segment.length for segment in segments)])
    batches, place, offset = [], np.zeros(starts[-1], np.int64), 0
    for members in _alike(segments, chosen):
        count = np.array([one.count for one in members])[:, None]
        before = np.array([keys_before(segments, one) for one in members])[:, None]
        prompt = np.array([prompt_before(segments[one.segment]) for one in members])[:, None]
        start = np.array([starts[one.segment] for one in members])[:, None]
        first = start + np.array([one.first for one in members])[:, None]
        prompt_start = np.array([starts[segments[one.segment].trunk or 0] for one in members])[:, None]
        q, k = np.arange(count.max()), np.arange((before + count).max())
        queries = np.where(q < count, first + q, 0)
        keys = np.where(k < prompt, prompt_start + k, np.where(k < before + count, start + k - prompt, 0))
        # Blocks padding too for every query that counts: it comes after the segment's last token.
        blocked = torch.from_numpy(k > (before + q)[:, :, None])
        mask = torch.zeros(blocked.shape, dtype=dtype).masked_fill_(blocked, torch.finfo(dtype).min)
        place[queries[q < count]] = offset + np.flatnonzero(q < count)
        offset += queries.size
        batches.append(
            SegmentBatch(
                queries=torch.from_numpy(queries).to(device),
                keys=torch.from_numpy(keys).to(device),
                mask=mask[:, None].to(device),
            )
        )
    elsewhere = places_of(segments, others)
    place[elsewhere] = offset + np.arange(len(elsewhere))
    return SegmentBatches(batches=tuple(batches), places=torch.from_numpy(place).to(device))


def prompt_before(segment: Segment) -> int:
    """Keys that a segment sees before its own: those of a prompt that lies in another segment."""
    return segment.prompt_length if segment.trunk is not None else 0


def _alike(segments: Sequence[Segment], chosen: Sequence[Queries]) -> list[list[Queries]]:
    """In groups of like size. Beginnings of trees, square, are not mixed with further responses."""
    groups: list[list[Queries]] = []
    for further in (False, True):
        members: list[Queries] = []
        longest = most = 0
        sized = [
            (keys_before(segments, one) + one.count, one.count, one)
            for one in chosen
            if (segments[one.segment].trunk is not None) == further
        ]
        for keys, queries, one in sorted(sized, reverse=True):
            padded = (len(members) + 1) * max(longest, queries) * max(most, keys)
            waste = padded - len(members) * longest * most - queries * keys
            if members and waste > WASTE:
                groups.append(members)
                members, longest, most = [], 0, 0
            members = [*members, one]
            longest, most = max(longest, queries), max(most, keys)
        if members:
            groups.append(members)
    return groups


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension. In bf16 a CPU takes three times as long as for the same by way of fp32."""
    if scores.dtype != torch.bfloat16 or scores.device.type != "cpu":
        return scores.softmax(-1)
    out: Tensor = _Softmax.apply(scores)
    return out


class _Softmax(torch.autograd.Function):
    """Keeps the rounded probabilities alone, as torch's own does."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
        ctx.save_for_backward(probabilities)
        return probabilities

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (probabilities,) = ctx.saved_tensors
        return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)
