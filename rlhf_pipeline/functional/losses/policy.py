"""The losses of PPO, token by token: the clipped surrogate objective, the clipped value loss, and what weighs tokens.

They return a number for each token, so that the caller can weigh, sum and divide once, globally; `token_weights` has
the weights. Without any token a loss is empty, and its sum 0 and still connected to the model.

Shapes: N scored tokens of a micro-batch, flat; R responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_pipeline.config.ppo import Mean


def ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """p(token) under the policy over p(token) when it was drawn: [N], [N] -> [N]."""
    return (logprobs - old_logprobs).exp()


def clipped_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) of each token (Schulman et al. 2017, equation 7): [N] -> [N].

    Where the ratio is 1, as on the first pass over an episode, the gradient is the policy gradient -A d log p.
    """
    plain, clipped = _surrogates(logprobs, old_logprobs, advantages, clip)
    return -torch.minimum(plain, clipped)


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """1 for a token whose gradient the clip takes away, else 0: [N] -> [N], without a gradient; the mean is the share.

    A ratio that left the range on the side that lowers the objective is not clipped, and not counted.
    """
    plain, clipped = _surrogates(logprobs, old_logprobs, advantages, clip)
    return (clipped < plain).to(plain.dtype)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """max((v - R)^2, (v_clipped - R)^2) / 2 of each token, v_clipped within +-clip of the old value: [N] -> [N].

    From OpenAI's PPO2 and lm-human-preferences; no paper has it (Huang et al. 2022, "The 37 implementation details of
    PPO"). Without `clip` it is (v - R)^2 / 2.
    """
    errors = (values - returns).square()
    if clip is not None:
        clipped = values.clamp(old_values - clip, old_values + clip)
        errors = torch.maximum(errors, (clipped - returns).square())
    return errors / 2


def token_weights(sequence: Tensor, num_sequences: int, *, mean: Mean) -> tuple[Tensor, Tensor]:
    """Weights fp32 [N] and a count, int64 scalar: sum(weights * losses) / global count is the mean that `mean` names.

    sequence int64 [N]: the response, 0..num_sequences-1, that a token belongs to; all tokens of a response are in one
    micro-batch. `tokens`: 1 each, and their number. `sequences`: 1 / the number of tokens of its response, and the
    number of responses that have tokens (Shao et al. 2024, equation 3).
    """
    ones = torch.ones(len(sequence), device=sequence.device)
    if mean is Mean.tokens:
        return ones, torch.tensor(len(sequence), device=sequence.device)
    lengths = torch.zeros(num_sequences, device=sequence.device).index_add(0, sequence, ones)
    return 1 / lengths[sequence], (lengths > 0).sum()


def _surrogates(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    ratios = ratio(logprobs, old_logprobs)
    return ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages
