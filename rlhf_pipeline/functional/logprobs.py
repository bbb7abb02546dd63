"""Log-probabilities of given tokens from hidden states, without ever holding logits for all of them.

Shapes: N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**21  # logits computed at a time: 256 rows of 8,192 words; larger chunks gained nothing on CPU


def token_logprobs(logits: Tensor, target: Tensor) -> Tensor:
    """log softmax(logits)[target] in fp32 (fp64 for fp64 logits); logits [N, V], target int64 [N] -> [N]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)


def linear_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """token_logprobs(hidden @ weight.T, target), chunk by chunk, recomputing the logits in the backward pass.

    hidden [N, H], weight [V, H], target int64 [N] -> fp32 [N] (fp64 for fp64 weights). The matrix products run in the
    dtype of `hidden`; soft-max and the sum of the weight's gradient over chunks run in fp32.
    """
    return _LinearLogProbs.apply(hidden, weight, target)


def _chunks(count: int, vocabulary: int) -> list[slice]:
    size = max(16, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        logsumexp = torch.empty_like(logprobs)
        for part in _chunks(len(hidden), len(weight)):
            logits = (hidden[part] @ weight.T).to(wide)
            logsumexp[part] = logits.logsumexp(-1)
            logprobs[part] = logits.gather(-1, target[part, None])[:, 0] - logsumexp[part]
        ctx.save_for_backward(hidden, weight, target, logsumexp)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad = grads[0]  # [N], of the log-probabilities
        hidden, weight, target, logsumexp = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=logsumexp.dtype) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(hidden), len(weight)):
            # d logprob / d logits = onehot(target) - softmax(logits)
            grad_logits = (hidden[part] @ weight.T).to(logsumexp.dtype).sub_(logsumexp[part, None]).exp_()
            grad_logits.mul_(-grad[part, None])
            grad_logits.scatter_add_(-1, target[part, None], grad[part, None])
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None
