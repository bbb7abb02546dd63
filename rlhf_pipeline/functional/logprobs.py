"""Log-probabilities of given tokens, and entropies, from hidden states, without ever holding logits for all of them.

Shapes: N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

CHUNK_ELEMENTS = 2**22  # logits computed at a time, 512 rows of 8,192 words
KEEP_ELEMENTS = 2**24  # up to this many logits are kept for the backward pass instead of computed twice


def token_logprobs(logits: Tensor, target: Tensor) -> Tensor:
    """log softmax(logits)[target] in fp32 (fp64 for fp64 logits); logits [N, V], target int64 [N] -> [N]."""
    return -cross_entropy(logits.to(_wide(logits)), target, reduction="none")


def token_entropy(logits: Tensor) -> Tensor:
    """-sum_v p_v log p_v, p = softmax(logits), in nats: logits [N, V], finite -> fp32 [N] (fp64 for fp64 logits)."""
    logprobs = logits.to(_wide(logits)).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def linear_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """token_logprobs(hidden @ weight.T, target), chunk by chunk; many logits are computed again in the backward pass.

    hidden [N, H], weight [V, H], target int64 [N] -> fp32 [N] (fp64 for fp64 weights). The matrix products run in the
    dtype of `hidden`; soft-max, and the sum of the weight's gradient over chunks, run in fp32.
    """
    return _LinearLogProbs.apply(hidden, weight, target)


def linear_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
    """token_entropy(hidden @ weight.T), chunk by chunk; logits are computed again in the backward pass.

    hidden [N, H], weight [V, H] -> fp32 [N] (fp64 for fp64 weights). What runs in which dtype: see `linear_logprobs`.
    """
    return _LinearEntropy.apply(hidden, weight)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(count: int, vocabulary: int) -> list[slice]:
    size = max(16, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logprobs = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        keeps = any(ctx.needs_input_grad) and len(hidden) * len(weight) <= KEEP_ELEMENTS
        kept = []
        for part in _chunks(len(hidden), len(weight)):
            logits = hidden[part] @ weight.T
            logprobs[part] = token_logprobs(logits, target[part])
            if keeps:
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, target, logprobs, *kept)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # With g the gradient of a log-probability, p = softmax(logits) and t the target's word:
        #   d/d hidden = g ((1 - p_t) W_t - sum_{v != t} p_v W_v),   d/d W_v = g (1[v = t] - p_v) hidden.
        # The target's part is computed apart, in fp32: where p_t is nearly 1, 1 - p_t would be lost in bf16.
        hidden, weight, target, logprobs, *kept = ctx.saved_tensors
        wide = logprobs.dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for i, part in enumerate(_chunks(len(hidden), len(weight))):
            states, words, g = hidden[part], target[part], grads[0][part, None]
            others = (kept[i] if kept else states @ weight.T).softmax(-1)
            others.scatter_(-1, words[:, None], 0.0)
            missing = -torch.expm1(logprobs[part, None])  # 1 - p_t
            if grad_hidden is not None:
                pull = missing * weight[words].to(wide) - (others @ weight).to(wide)
                grad_hidden[part] = (g * pull).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight -= others.T @ (g * states).to(hidden.dtype)
                grad_weight.index_add_(0, words, g * missing * states.to(wide))
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


class _LinearEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        entropy = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        for part in _chunks(len(hidden), len(weight)):
            entropy[part] = token_entropy(hidden[part] @ weight.T)
        ctx.save_for_backward(hidden, weight, entropy)
        return entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        # With E the entropy: d E / d logit_v = -p_v (log p_v + E).
        hidden, weight, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=entropy.dtype) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(hidden), len(weight)):
            states, g = hidden[part], grads[0][part, None]
            logprobs = (states @ weight.T).to(entropy.dtype).log_softmax(-1)
            slopes = (-g * logprobs.exp() * (logprobs + entropy[part, None])).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slopes @ weight
            if grad_weight is not None:
                grad_weight += slopes.T @ states
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
