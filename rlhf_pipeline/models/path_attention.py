"""Attention along the paths of packed trees, path by path: what a CPU should do instead of a dense mask.

A row of 2,048 tokens that holds fifteen trees has 4 M query-key pairs, of which some 5 % are allowed. A dense mask
computes them all; here every prompt with its first response is one causal attention, and every further response one
over its prompt and itself. A GPU has block masks for this.

transformers hands keyword arguments of a forward on to its attention functions; the paths travel that way. A model
that does not hand them on fails the self-check and gets the dense mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf_pipeline.data.packing import Segment

NAME = "rlhf_paths"
# Up to this many queries, bf16 attention is plain matrix products: without AMX, the fused CPU kernel is three times
# slower from 64 to 512 tokens (docs/benchmarks.md). Beyond, its memory counts.
LONGEST_MATRIX = 1024


def register() -> None:
    """Make `NAME` an attention implementation of transformers; without paths it is sdpa."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, path_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def path_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_segments: tuple[Segment, ...] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """query [B, heads, T, D], key and value [B, key heads, T, D] -> [B, T, heads, D].

    `tree_segments` lists the runs of tokens that the B * T positions consist of.
    """
    if tree_segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest
        )
    rows, _, width, _ = query.shape
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    flat = _flat(query), _repeated(_flat(key), groups), _repeated(_flat(value), groups)
    longest = max(segment.length for segment in tree_segments)
    if query.dtype == torch.bfloat16 and longest <= LONGEST_MATRIX and not dropout:
        out = _MatrixAttention.apply(*flat, tree_segments, scale)
    else:
        out = _fused(*flat, tree_segments, scale=scale, dropout=dropout)
    return out.view(rows, width, *out.shape[1:]), None


def _fused(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], *, scale: float, dropout: float
) -> Tensor:
    """[heads, T, D] each -> [T, heads, D], by torch's own kernel."""
    sizes = [segment.length for segment in segments]
    queries, keys, values = (t.split(sizes, dim=1) for t in (query, key, value))
    outputs = []
    for q, k, v, segment in zip(queries, keys, values, segments, strict=True):
        mask = None
        if segment.trunk is not None:
            k = torch.cat([keys[segment.trunk][:, : segment.prompt_length], k], dim=1)
            v = torch.cat([values[segment.trunk][:, : segment.prompt_length], v], dim=1)
            mask = _causal(segment, q)
        out = scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scale
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


class _MatrixAttention(torch.autograd.Function):
    """The same by plain matrix products, [heads, T, D] each -> [T, heads, D]; keeps the probabilities of each path."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], scale: float
    ) -> Tensor:
        out = torch.empty_like(query.transpose(0, 1), memory_format=torch.contiguous_format)
        kept = []
        for segment, here, seen in _places(segments):
            k, v = _rows(key, seen), _rows(value, seen)
            scores = torch.baddbmm(_causal(segment, query), query[:, here], k.transpose(1, 2), alpha=scale)
            probabilities = scores.softmax(-1)
            out[here] = torch.bmm(probabilities, v).transpose(0, 1)
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].transpose(0, 1)  # [heads, T, D]
        query, key, value, *kept = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (_, here, seen), probabilities in zip(_places(ctx.segments), kept, strict=True):
            k, v, g = _rows(key, seen), _rows(value, seen), grad[:, here]
            grad_scores = torch._softmax_backward_data(
                torch.bmm(g, v.transpose(1, 2)), probabilities, -1, probabilities.dtype
            ).mul_(ctx.scale)
            grad_query[:, here] = torch.bmm(grad_scores, k)
            _add_rows(grad_key, seen, torch.bmm(grad_scores.transpose(1, 2), query[:, here]))
            _add_rows(grad_value, seen, torch.bmm(probabilities.transpose(1, 2), g))
        return grad_query, grad_key, grad_value, None, None


def _places(segments: tuple[Segment, ...]) -> Iterator[tuple[Segment, slice, list[slice]]]:
    """For each segment: where its queries are, and the places of the keys that they see."""
    starts: list[int] = []
    start = 0
    for segment in segments:
        starts.append(start)
        here = slice(start, start + segment.length)
        if segment.trunk is None:
            yield segment, here, [here]
        else:
            prompt = starts[segment.trunk]
            yield segment, here, [slice(prompt, prompt + segment.prompt_length), here]
        start += segment.length


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


def _causal(segment: Segment, like: Tensor) -> Tensor:
    """[R, P + R] additive mask: all of the prompt, and of the response what came before."""
    before = segment.prompt_length if segment.trunk is not None else 0
    mask = torch.zeros(segment.length, before + segment.length, dtype=like.dtype, device=like.device)
    blocked = torch.ones(mask.shape, dtype=torch.bool, device=like.device).triu_(before + 1)
    return mask.masked_fill_(blocked, torch.finfo(like.dtype).min)
