"""Attention along the paths of packed trees, path by path: what a CPU should do instead of a dense mask.

A row of 2,048 tokens that holds fifteen trees has 4 M query-key pairs, of which some 5 % are allowed. A dense mask
computes them all; here every prompt with its first response is one causal attention, and every further response one
over its prompt and itself: long ones one by one, short ones in batches (`segment_batches`). A GPU has block masks for
this.

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
# Up to this many query-key pairs a segment is short: in a batch with others it is faster than by itself, where there are
# MANY of them (docs/benchmarks.md). Less is short to the fused kernel, which does not keep what it computes in between.
SHORT = 2048
SHORT_MATRIX = 8192
MANY = 16
# Up to this many queries, bf16 attention is plain matrix products: without AMX, the fused CPU kernel is three times
# slower from 64 to 512 tokens (docs/benchmarks.md). Beyond, its memory counts.
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
    limit = SHORT_MATRIX if query.dtype == torch.bfloat16 else SHORT
    short, long = _short_and_long(tree_segments, chosen, limit, MANY)
    out = _one_by_one(query, key, value, tree_segments, long, scale=scale, dropout=dropout) if long else None
    if short or sum(one.count for one in chosen) < rows * width:
        plan = plan_batches(tree_segments, short, long, query.dtype, query.device)
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
def _short_and_long(
    segments: tuple[Segment, ...], chosen: tuple[Queries, ...], limit: int, many: int
) -> tuple[tuple[Queries, ...], tuple[Queries, ...]]:
    """Queries that are computed in batches, and those whose segments are taken one by one."""
    pairs = [one.count * (keys_before(segments, one) + one.count) for one in chosen]
    short = tuple(one for one, size in zip(chosen, pairs, strict=True) if size <= limit)
    if len(short) < many:
        return (), chosen
    return short, tuple(one for one, size in zip(chosen, pairs, strict=True) if size > limit)


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
    """As `path_attention`, for the `chosen` queries alone, one after the other: [n, heads, D]."""
    groups = query.shape[1] // key.shape[1]
    flat = _flat(query), _repeated(_flat(key), groups), _repeated(_flat(value), groups)
    longest = max(one.count for one in chosen)
    if query.dtype == torch.bfloat16 and longest <= LONGEST_MATRIX and not dropout:
        out: Tensor = _MatrixAttention.apply(*flat, segments, chosen, scale)
        return out
    return _fused(*flat, segments, chosen, scale=scale, dropout=dropout)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[Segment, ...],
    chosen: tuple[Queries, ...],
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    """[heads, T, D] each -> [n, heads, D], by torch's own kernel."""
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


class _MatrixAttention(torch.autograd.Function):
    """The same by plain matrix products, [heads, T, D] each -> [n, heads, D]; keeps the probabilities of each path."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: tuple[Segment, ...],
        chosen: tuple[Queries, ...],
        scale: float,
    ) -> Tensor:
        outputs, kept = [], []
        for one, here, seen in _places(segments, chosen):
            k, v = _rows(key, seen), _rows(value, seen)
            mask = _causal(keys_before(segments, one), one.count, query)
            probabilities = softmax(torch.baddbmm(mask, query[:, here], k.transpose(1, 2), alpha=scale))
            outputs.append(torch.bmm(probabilities, v).transpose(0, 1))
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.segments, ctx.chosen, ctx.scale = segments, chosen, scale
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        parts = grads[0].transpose(0, 1).split([one.count for one in ctx.chosen], dim=1)  # [heads, count, D] each
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (_, here, seen), probabilities, g in zip(_places(ctx.segments, ctx.chosen), kept, parts, strict=True):
            k, v = _rows(key, seen), _rows(value, seen)
            grad_scores = torch._softmax_backward_data(
                torch.bmm(g, v.transpose(1, 2)), probabilities, -1, probabilities.dtype
            ).mul_(ctx.scale)
            grad_query[:, here] = torch.bmm(grad_scores, k)
            _add_rows(grad_key, seen, torch.bmm(grad_scores.transpose(1, 2), query[:, here]))
            _add_rows(grad_value, seen, torch.bmm(probabilities.transpose(1, 2), g))
        return grad_query, grad_key, grad_value, None, None, None


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


def _add_rows(total: Tensor, places: list[slice], values: Tensor) -> None:
    start = 0
    for place in places:
        length = place.stop - place.start
        total[:, place] += values[:, start : start + length]
        start += length


def _flat(tensor: Tensor) -> Tensor:
    """[B, heads, T, D] -> [heads, B * T, D]."""
    return tensor[0] if len(tensor) == 1 else tensor.transpose(0, 1).flatten(1, 2)


def _repeated(tensor: Tensor, groups: int) -> Tensor:
    """[key heads, T, D] -> [heads, T, D]: every key head serves `groups` query heads."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=0)


def _causal(before: int, count: int, like: Tensor) -> Tensor:
    """[count, before + count] additive mask: all that lies before, and of themselves what came earlier."""
    mask = torch.zeros(count, before + count, dtype=like.dtype, device=like.device)
    blocked = torch.ones(mask.shape, dtype=torch.bool, device=like.device).triu_(before + 1)
    return mask.masked_fill_(blocked, torch.finfo(like.dtype).min)
