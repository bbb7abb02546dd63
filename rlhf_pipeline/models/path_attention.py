"""Attention along the paths of packed trees, path by path: what a CPU should do instead of a dense mask.

A row of 2,048 tokens that holds fifteen trees has 4 M query-key pairs, of which some 5 % are allowed. A dense mask
computes them all; here every prompt with its first response is one causal attention, and every further response one
over its prompt and itself: in batches (`segment_batches`) where these are faster, else one by one. A GPU has block masks
for this.

transformers hands keyword arguments of a forward on to its attention functions; the paths travel that way. A model
that does not hand them on fails the self-check and gets the dense mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf_pipeline.data.packing import Segment
from rlhf_pipeline.models.segment_batches import (
    Queries,
    attend,
    keys_before,
    plan_batches,
    softmax,
    those_read,
    whole,
)

NAME = "rlhf_paths"
# Up to this many query-key pairs a segment is short: in a batch with others it is faster than torch's fused kernel for
# each, where there are MANY of them (docs/benchmarks.md).
SHORT = 2048
MANY = 16
# Up to this many queries, bf16 attention is batches of plain matrix products: without AMX, the fused CPU kernel is three
# times slower from 64 to 512 tokens (docs/benchmarks.md). Beyond, its memory counts.
LONGEST_MATRIX = 1024


def register() -> None:
    """Make `NAME` an attention implementation of transformers; without paths it is sdpa."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, path_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def path_attention(  # noqa: PLR0913 - as transformers calls it
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_segments: tuple[Segment, ...] | None = None,
    read_states: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """query [B, heads, T, D], key and value [B, key heads, T, D] -> [B, T, heads, D].

    `tree_segments` lists the runs of tokens that the B * T positions consist of. In the last layer only what
    `read_states` names (`last_layer`) is computed, and the rest of the result may hold anything.
    """
    if tree_segments is None and query.shape[2] == 1 and query.device.type == "cpu" and not dropout:
        return one_query(query, key, value, attention_mask, scaling), None
    if tree_segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest
        )
    rows, heads, width, _ = query.shape
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    chosen = whole(tree_segments)
    if read_states is not None and is_last(module):
        chosen = those_read(tree_segments, read_states.cpu().numpy()) or chosen  # of padding alone nothing is read
    batched, others = _split(tree_segments, chosen, query.dtype)
    out = _one_by_one(query, key, value, tree_segments, others, scale=scale, dropout=dropout) if others else None
    if batched or sum(one.count for one in chosen) < rows * width:
        plan = plan_batches(tree_segments, batched, others, query.dtype, query.device)
        q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
        out = attend(q, k, v, plan, others=out, scale=scale, dropout=dropout)
    assert out is not None
    return out.view(rows, width, heads, -1), None


def one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """query [B, heads, 1, D], key and value [B, key heads, S, D], mask additive or bool [B, 1, 1, S] -> [B, 1, heads, D].

    What decoding does. As plain products it is up to 2.8 times faster on a CPU than the fused kernels, and query heads
    that share a key head share its product (docs/benchmarks.md).
    """
    rows, heads, _, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width) * scale
    scores = grouped @ key.transpose(2, 3)  # [B, key heads, group, S]
    if mask is not None and mask.dtype == torch.bool:  # True is seen
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return (softmax(scores) @ value).reshape(rows, 1, heads, value.shape[3])


def is_last(module: Any) -> bool:
    """Whether this attention is that of the last layer."""
    return getattr(module, "layer_idx", None) == getattr(module.config, "num_hidden_layers", 0) - 1


@lru_cache(maxsize=3)  # every layer of a forward pass asks for the same, and the last for its own
def _split(
    segments: tuple[Segment, ...], chosen: tuple[Queries, ...], dtype: torch.dtype
) -> tuple[tuple[Queries, ...], tuple[Queries, ...]]:
    """Queries that are computed in batches, and those whose segments are taken one by one."""
    if dtype == torch.bfloat16:
        is_batched = [one.count <= LONGEST_MATRIX for one in chosen]
    else:
        is_batched = [one.count * (keys_before(segments, one) + one.count) <= SHORT for one in chosen]
        if sum(is_batched) < MANY:
            return (), chosen
    pairs = list(zip(chosen, is_batched, strict=True))
    return tuple(one for one, yes in pairs if yes), tuple(one for one, yes in pairs if not yes)


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[Segment, ...],
    chosen: tuple[Queries, ...],
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    """As `path_attention`, for the `chosen` queries alone, one after the other, by torch's fused kernel: [n, heads, D]."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = _flat(query), _repeated(_flat(key), groups), _repeated(_flat(value), groups)
    outputs = []
    for one, here, seen in _places(segments, chosen):
        q, k, v = query[:, here], _rows(key, seen), _rows(value, seen)
        before = keys_before(segments, one)
        mask = _causal(before, one.count, q) if before else None
        out = scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scale
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _places(segments: tuple[Segment, ...], chosen: tuple[Queries, ...]) -> Iterator[tuple[Queries, slice, list[slice]]]:
    """For each of the `chosen`: where its queries are, and the places of the keys that they see."""
    starts = list(accumulate((segment.length for segment in segments), initial=0))
    for one in chosen:
        segment, start = segments[one.segment], starts[one.segment]
        end = start + one.first + one.count
        seen = [slice(start, end)]
        if segment.trunk is not None:
            prompt = starts[segment.trunk]
            seen.insert(0, slice(prompt, prompt + segment.prompt_length))
        yield one, slice(start + one.first, end), seen


def _rows(tensor: Tensor, places: list[slice]) -> Tensor:
    parts = [tensor[:, place] for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _flat(tensor: Tensor) -> Tensor:
    """[B, heads, T, D] -> [heads, B * T, D]."""
    return tensor[0] if len(tensor) == 1 else tensor.transpose(0, 1).flatten(1, 2)


def _repeated(tensor: Tensor, groups: int) -> Tensor:
    """[key heads, T, D] -> [heads, T, D]: every key head serves `groups` query heads."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=0)


def _causal(before: int, count: int, like: Tensor) -> Tensor:
    """[count, before + count] additive mask: all that lies before, and of themselves what came earlier."""
    mask = torch.full((count, before + count), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device)
    return mask.triu_(before + 1)
