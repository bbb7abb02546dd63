"""The token tree: a prompt with its responses as branches, the one example type of every stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """One example, tokenised. SFT has one response, a preference pair two, a ranking of K answers K.

    `scored[k][j]` says that token j of response k is a training target. The first token of a response is
    predicted by the last token of the prompt, so the prompt is never empty. A prompt that waits for an answer has
    no response; it is sampled from, not packed.

    `ranks` is 0 for the best response of a ranking, higher for worse ones, equal for a tie; 0 for a demonstration and
    a document; of feedback 0 for a wanted answer and 1 for an unwanted. `scores` is NaN where there are none.

    `numbers` are what a loss needs to know of each response token beside its id, by name: an old log-probability, an
    advantage, a reference's log-probability. On disk data sets have none.
    """

    prompt: np.ndarray  # int32 [P], P >= 1
    responses: tuple[np.ndarray, ...]  # K x int32 [L_k], L_k >= 1
    scored: tuple[np.ndarray, ...]  # K x bool [L_k]
    index: int  # position in its data set: the example's identity for seeds, caches and error messages
    ranks: np.ndarray = None  # type: ignore[assignment]  # int32 [K]; left out: all 0
    scores: np.ndarray = None  # type: ignore[assignment]  # float32 [K]; left out: all NaN
    numbers: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)  # K x float32 [L_k] each

    def __post_init__(self) -> None:
        if self.ranks is None:
            object.__setattr__(self, "ranks", np.zeros(len(self.responses), np.int32))
        if self.scores is None:
            object.__setattr__(self, "scores", np.full(len(self.responses), np.nan, np.float32))

    def __len__(self) -> int:
        """Tokens that the tree occupies in a packed row (the prompt once)."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

    def path(self, k: int) -> np.ndarray:
        """Prompt and response k, one after the other."""
        return np.concatenate([self.prompt, self.responses[k]])
