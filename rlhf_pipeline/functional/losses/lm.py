"""Language-model loss: the negative log-likelihood of scored tokens, as sums."""

from __future__ import annotations

from torch import Tensor


def negative_log_likelihood(logprobs: Tensor) -> Tensor:
    """-sum_i log p(token_i | tokens before it); logprobs [N] -> scalar (Ouyang et al. 2022, section 3.5, SFT)."""
    return -logprobs.sum()
