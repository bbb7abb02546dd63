"""The sections of `rlhf rm`: the ranking loss, and what rewards are normalised by."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class RankingLoss(StrEnum):
    pairwise = "pairwise"  # Bradley-Terry over all pairs (Ouyang et al. 2022, equation 1)
    plackett_luce = "plackett_luce"  # the whole order at once


class Comparisons(StrEnum):
    """By what the sum over a prompt's comparisons is divided."""

    kept = "kept"  # those that are not left out as ties
    literal = "literal"  # K over 2, as printed


class Ties(StrEnum):
    drop = "drop"  # as InstructGPT
    model = "model"  # Davidson (1970): a tie is an outcome with a probability of its own


@dataclass(kw_only=True, slots=True)
class RankingConfig:
    """The reward model's loss; see docs/reward-model.md."""

    loss: RankingLoss = RankingLoss.pairwise
    divide_by: Comparisons = Comparisons.kept
    ties: Ties = Ties.drop
    margin: float = 0.0  # times the difference of the two scores (Llama 2); a row's own margin counts as that
    label_smoothing: float = 0.0
    soft_labels: float = 0.0  # c of the label sigmoid(c * (score_i - score_j)) of every two answers; 0: labels of 1
    centring: float = 0.0  # weight of (r_w + r_l)^2 (Eisenstein et al. 2023)


@dataclass(kw_only=True, slots=True)
class NormaliseConfig:
    """Demonstrations whose mean reward becomes the zero, and whose spread the unit, of all rewards (InstructGPT, 3.5)."""

    train: Any = None  # as data.train; null: the preferred answers of data.train
    format: str = "auto"
    split: str = "train"
    examples: int = 512  # at most
