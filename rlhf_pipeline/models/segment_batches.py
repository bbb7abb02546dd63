"""Attention along paths, many at a time: segments of like size are padded and computed as one batch of matrix products.

One by one, segments are overhead above all: a ranking's answers of ten tokens are a hundred calls a layer, each of which
takes longer to begin than to compute. `path_attention` decides which segments are batched.

Shapes: S segments of a batch, Q queries and K keys each; h heads, k key heads, g = h / k, D their width; N tokens of all
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline.data.packing import Segment

# A segment begins another batch where padded to the size of this one it would compute more query-key pairs in vain than
# this, and than this share of all of its pairs: by then another batch costs less.
WASTE = 2048
WASTED_SHARE = 0.1
# In bf16, a product of a shape that was not seen before compiles a kernel, for longer than a batch takes: lengths are
# rounded up to one of so many between a power of two and the next.
SIZES = 8
MOST_PAIRS = 2**18  # of a batch, unless a segment alone has more: what is there at a time, for every head


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBatch:
    """Segments side by side. Padding reads token 0, blocked as a key; gradients have a token N for it, which is dropped."""

    queries: Tensor  # int64 [S, Q], places among the N tokens
    keys: Tensor  # int64 [S, K]: the prompt, where it lies apart, and then the segment itself
    query_grads: Tensor  # `queries` with N for padding
    key_grads: Tensor  # int64 [S * K], `keys` likewise
    mask: Tensor  # [S or 1, 1, 1, Q, K], additive
    shares_keys: bool  # a token may be a key of several segments


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBatches:
    """What the layers of one forward and backward pass share."""

    batches: tuple[SegmentBatch, ...]
    places: Tensor  # int64 [N]: where each token is among the padded outputs; of tokens that are not computed 0
    others: Tensor  # int64 [n]: tokens that are computed elsewhere


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
    """query [N, h, D], key [N, k, D], value [N, k, V] -> [N, h, V].

    `others` [n, h, V] are the outputs of the plan's other queries. Tokens that are in neither get what is not theirs.
    """
    if plan.batches:
        out: Tensor = _Attend.apply(query, key, value, plan, scale, dropout)
    else:
        out = query.new_zeros(*query.shape[:2], value.shape[2])
    return out if others is None else out.index_copy(0, plan.others, others)


class _Attend(torch.autograd.Function):
    """Keeps what it gathered and the probabilities; a batch at a time, so that little is there at once."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: SegmentBatches, scale: float, dropout: float
    ) -> Tensor:
        count, heads, key_heads = len(query), query.shape[1], key.shape[1]
        outputs, kept = [], []
        for batch in plan.batches:
            q = _gather(query, batch.queries, key_heads).mul_(scale)  # [S * k, g * Q, D]
            k, v = _gather(key, batch.keys, key_heads), _gather(value, batch.keys, key_heads)
            scores = torch.bmm(q, k.transpose(1, 2)).view(len(batch.queries), key_heads, -1, *batch.mask.shape[3:])
            probabilities = softmax(scores.add_(batch.mask)).view(len(q), -1, k.shape[1])
            drop = torch.empty_like(probabilities).bernoulli_(1 - dropout).div_(1 - dropout) if dropout else None
            out = torch.bmm(probabilities if drop is None else probabilities * drop, v)
            outputs.append(_ungather(out, batch.queries, key_heads))
            kept += [q, k, v, probabilities, drop]
        ctx.save_for_backward(*kept)
        ctx.plan, ctx.scale, ctx.shapes = plan, scale, (query.shape, key.shape, value.shape)
        return torch.cat(outputs).index_select(0, plan.places).view(count, heads, -1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (count, heads, width), (_, key_heads, _), (_, _, value_width) = ctx.shapes
        saved = ctx.saved_tensors  # once: checkpointing computes them at each look
        grad = torch.cat([outer[0], outer[0].new_zeros(1, heads, value_width)])  # of padding: nothing
        of_query = grad.new_zeros(count + 1, heads * width)
        of_pair = grad.new_zeros(count + 1, key_heads * (width + value_width))  # of keys and values
        for i, batch in enumerate(ctx.plan.batches):
            q, k, v, probabilities, drop = saved[5 * i : 5 * i + 5]
            g = _gather(grad, batch.query_grads, key_heads)
            of_probabilities = torch.bmm(g, v.transpose(1, 2))
            seen = probabilities if drop is None else probabilities * drop
            if drop is not None:
                of_probabilities *= drop
            of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, q.dtype)
            part = _ungather(torch.bmm(of_scores, k), batch.queries, key_heads).mul_(ctx.scale)
            of_query.index_copy_(0, batch.query_grads.flatten(), part)
            pair = [
                _ungather(torch.bmm(of_scores.transpose(1, 2), q), batch.keys, key_heads),
                _ungather(torch.bmm(seen.transpose(1, 2), g), batch.keys, key_heads),
            ]
            if batch.shares_keys:  # an embedding's gradient: on a CPU several times faster than index_add_
                add = torch.ops.aten.embedding_dense_backward
                of_pair += add(torch.cat(pair, 1), batch.key_grads, count + 1, -1, False)
            else:  # beginnings of trees, which come first
                of_pair.index_copy_(0, batch.key_grads, torch.cat(pair, 1))
        of_key, of_value = of_pair[:-1].split([key_heads * width, key_heads * value_width], 1)
        grads = (one.reshape(shape) for one, shape in zip((of_query[:-1], of_key, of_value), ctx.shapes, strict=True))
        return (*grads, None, None, None)


def _gather(tensor: Tensor, places: Tensor, key_heads: int) -> Tensor:
    """[N, h, D] at [S, L] -> [S * k, g * L, D]: heads that share a key head are further queries of it."""
    rows = tensor.index_select(0, places.flatten()).view(*places.shape, key_heads, -1, tensor.shape[2])
    return rows.permute(0, 2, 3, 1, 4).reshape(len(places) * key_heads, -1, tensor.shape[2])


def _ungather(tensor: Tensor, places: Tensor, key_heads: int) -> Tensor:
    """[S * k, g * L, D] -> [S * L, h * D]."""
    count, length = places.shape
    rows = tensor.view(count, key_heads, -1, length, tensor.shape[2]).permute(0, 3, 1, 2, 4)
    return rows.reshape(count * length, -1)


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
    batches, place, offset, padding = [], np.zeros(starts[-1], np.int64), 0, int(starts[-1])
    for members in _alike(segments, chosen, dtype):
        count = np.array([one.count for one in members])[:, None]
        before = np.array([keys_before(segments, one) for one in members])[:, None]
        prompt = np.array([prompt_before(segments[one.segment]) for one in members])[:, None]
        start = np.array([starts[one.segment] for one in members])[:, None]
        first = start + np.array([one.first for one in members])[:, None]
        prompt_start = np.array([starts[segments[one.segment].trunk or 0] for one in members])[:, None]
        q, k = (np.arange(rounded(int(most), dtype)) for most in (count.max(), (before + count).max()))
        queries = np.where(q < count, first + q, padding)
        keys = np.where(k < prompt, prompt_start + k, np.where(k < before + count, start + k - prompt, padding))
        # Blocks padding too for every query that counts: it comes after the segment's last token.
        blocked = torch.from_numpy(k > (before + q)[:, :, None])
        if len(np.unique(before)) == 1:
            blocked = blocked[:1]
        mask = torch.zeros(blocked.shape, dtype=dtype).masked_fill_(blocked, torch.finfo(dtype).min)
        place[queries[q < count]] = offset + np.flatnonzero(q < count)
        offset += queries.size
        batches.append(
            SegmentBatch(
                queries=torch.from_numpy(queries % padding).to(device),
                keys=torch.from_numpy(keys % padding).to(device),
                query_grads=torch.from_numpy(queries).to(device),
                key_grads=torch.from_numpy(keys.ravel()).to(device),
                mask=mask[:, None, None].to(device),
                shares_keys=bool(prompt.any()),
            )
        )
    return SegmentBatches(
        batches=tuple(batches),
        places=torch.from_numpy(place).to(device),
        others=torch.from_numpy(places_of(segments, others)).to(device),
    )


def rounded(length: int, dtype: torch.dtype) -> int:
    """The length that a batch's segments are padded to."""
    step = (1 << (length - 1).bit_length()) // (2 * SIZES) if dtype == torch.bfloat16 else 1
    return -(-length // step) * step if step > 1 else length


def prompt_before(segment: Segment) -> int:
    """Keys that a segment sees before its own: those of a prompt that lies in another segment."""
    return segment.prompt_length if segment.trunk is not None else 0


def _alike(segments: Sequence[Segment], chosen: Sequence[Queries], dtype: torch.dtype) -> list[list[Queries]]:
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
            size = rounded(max(longest, queries), dtype) * rounded(max(most, keys), dtype)
            wasted = size - rounded(queries, dtype) * rounded(keys, dtype)
            if members and (wasted > max(WASTE, WASTED_SHARE * size) or (len(members) + 1) * size > MOST_PAIRS):
                groups.append(members)
                members, longest, most = [], 0, 0
            members = [*members, one]
            longest, most = max(longest, queries), max(most, keys)
        if members:
            groups.append(members)
    return groups


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; no gradient. In bf16 a CPU takes three times as long as for the same by way of fp32."""
    if scores.dtype != torch.bfloat16 or scores.device.type != "cpu":
        return scores.softmax(-1)
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
