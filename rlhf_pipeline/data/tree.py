"""The token tree: a prompt with its responses as branches, the one example type of every stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """One example, tokenised. SFT has one response, a preference pair two, a ranking of K answers K.

    `scored[k][j]` says that token j of response k is a training target. The first token of a response is
    predicted by the last token of the prompt, so the prompt is never empty.
    """

    prompt: np.ndarray  # int32 [P], P >= 1
    responses: tuple[np.ndarray, ...]  # K x int32 [L_k], L_k >= 1
    scored: tuple[np.ndarray, ...]  # K x bool [L_k]
    index: int  # position in its data set: the example's identity for seeds, caches and error messages

    def __len__(self) -> int:
        """Tokens that the tree occupies in a packed row (the prompt once)."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

    def path(self, k: int) -> np.ndarray:
        """Prompt and response k, one after the other."""
        return np.concatenate([self.prompt, self.responses[k]])
