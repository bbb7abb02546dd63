"""Attention along short paths, many at a time: segments of like size are padded and computed as one batch.

One by one, short segments are nothing but overhead: a ranking's answers of ten tokens are a hundred calls a layer, each
of which takes longer to begin than to compute. `path_attention` decides which segments are short.

Shapes: S segments of a batch, Q queries and K keys each, h heads, D their width, N tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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
    places: Tensor  # int64 [N]: where each token is among the padded outputs and, after them, those of other segments


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

    `others` [n, h, V] are the outputs of the segments that the plan leaves out, in their order.

    The gathers are embeddings: their backward adds rows up, on a CPU several times faster than that of indexing.
    """
    groups = query.shape[1] // key.shape[1]
    query = query * scale
    outputs = []
    for batch in plan.batches:
        q, k, v = _gather(query, batch.queries), _gather(key, batch.keys), _gather(value, batch.keys)
        if groups > 1:
            k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
        probabilities = torch.matmul(q, k.transpose(2, 3)).add_(batch.mask).softmax(-1)
        out = torch.matmul(functional.dropout(probabilities, dropout), v)
        outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
    if others is not None:
        outputs.append(others.flatten(1))
    return functional.embedding(plan.places, torch.cat(outputs)).unflatten(-1, (query.shape[1], value.shape[2]))


def _gather(tensor: Tensor, places: Tensor) -> Tensor:
    """[N, h, D] at [S, L] -> [S, h, L, D]."""
    rows = functional.embedding(places, tensor.flatten(1))
    return rows.unflatten(-1, tensor.shape[1:]).transpose(1, 2)


@lru_cache(maxsize=2)  # every layer of a forward pass asks for the same one
def plan_batches(
    segments: tuple[Segment, ...], chosen: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> SegmentBatches:
    """How to batch the `chosen` among the segments that the N tokens consist of."""
    starts = np.cumsum([0, *(segment.length for segment in segments)])
    batches, place, offset = [], np.full(starts[-1], -1), 0
    for members in _alike(segments, chosen):
        length = np.array([segments[i].length for i in members])[:, None]
        prompt = np.array([prompt_before(segments[i]) for i in members])[:, None]
        start = starts[list(members)][:, None]
        prompt_start = starts[[segments[i].trunk or 0 for i in members]][:, None]
        q, k = np.arange(length.max()), np.arange((prompt + length).max())
        queries = np.where(q < length, start + q, 0)
        keys = np.where(k < prompt, prompt_start + k, np.where(k < prompt + length, start + k - prompt, 0))
        # Blocks padding too for every query that counts: it comes after the segment's last token.
        blocked = torch.from_numpy(k > (prompt + q)[:, :, None])
        mask = torch.zeros(blocked.shape, dtype=dtype).masked_fill_(blocked, torch.finfo(dtype).min)
        place[queries[q < length]] = offset + np.flatnonzero(q < length)
        offset += queries.size
        batches.append(
            SegmentBatch(
                queries=torch.from_numpy(queries).to(device),
                keys=torch.from_numpy(keys).to(device),
                mask=mask[:, None].to(device),
            )
        )
    others = place < 0
    place[others] = offset + np.arange(others.sum())
    return SegmentBatches(batches=tuple(batches), places=torch.from_numpy(place).to(device))


def prompt_before(segment: Segment) -> int:
    """Keys that a segment sees before its own: those of a prompt that lies in another segment."""
    return segment.prompt_length if segment.trunk is not None else 0


def _alike(segments: Sequence[Segment], chosen: Sequence[int]) -> list[list[int]]:
    """Numbers of segments in groups of like size. Beginnings of trees, square, are not mixed with further responses."""
    groups: list[list[int]] = []
    for further in (False, True):
        members: list[int] = []
        longest = most = 0
        sized = [
            (prompt_before(segments[i]) + segments[i].length, segments[i].length, i)
            for i in chosen
            if (segments[i].trunk is not None) == further
        ]
        for keys, queries, i in sorted(sized, reverse=True):
            padded = (len(members) + 1) * max(longest, queries) * max(most, keys)
            waste = padded - len(members) * longest * most - queries * keys
            if members and waste > WASTE:
                groups.append(members)
                members, longest, most = [], 0, 0
            members = [*members, i]
            longest, most = max(longest, queries), max(most, keys)
        if members:
            groups.append(members)
    return groups
