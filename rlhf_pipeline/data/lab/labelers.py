"""Simulated labelers: people of different taste and attention who rate answers on a scale of 1 to 7.

Each weighs the judge's criteria in an own way, has a liking for length, and errs by an own, seeded noise, which is set
so that two of them agree as often as those of InstructGPT: 72.6 +/- 1.5 % (Ouyang et al. 2022, section 5.1).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from rlhf_pipeline.data.lab.judge import Prompt, as_messages, judge
from rlhf_pipeline.data.lab.reading import words

LOWEST, HIGHEST = 1, 7  # the Likert scale of InstructGPT's overall quality
NOISE = 2.3  # points of the scale, one standard deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Labeler:
    """`taste` multiplies the judge's points by criterion; `length` is points of the scale for each ten words."""

    name: str
    taste: Mapping[str, float] = field(default_factory=dict)
    length: float = 0.0
    noise: float = NOISE

    def scores(self, prompt: Prompt, responses: Sequence[str], key: str | int = "") -> list[int]:
        """A rating from 1 to 7 for each answer; the same for the same prompt, answer and `key`.

        Raises:
            UserError: when the prompt is not one of the lab's.
        """
        return [self._score(prompt, response, str(key)) for response in responses]

    def _score(self, prompt: Prompt, response: str, key: str) -> int:
        criteria = judge(prompt, response).criteria
        most = sum(self.taste.get(c.name, 1.0) * c.out_of for c in criteria)
        share = sum(self.taste.get(c.name, 1.0) * c.points for c in criteria) / most
        turns = "|".join(message.content for message in as_messages(prompt))
        noise = random.Random(f"{self.name}|{key}|{turns}|{response}").gauss(0.0, self.noise)
        liking = self.length * min(len(words(response)), 30) / 10
        return round(min(HIGHEST, max(LOWEST, LOWEST + (HIGHEST - LOWEST) * share + liking + noise)))


LABELERS = (
    Labeler(name="even"),
    Labeler(name="strict", taste={"polite": 6.0, "format": 1.5}),
    Labeler(name="wordy", length=0.5),
    Labeler(name="terse", length=-0.3, taste={"ends": 2.0}),
    Labeler(name="exact", taste={"correct": 1.5, "polite": 0.5}),
    Labeler(name="reader", taste={"fluent": 3.0}, noise=1.3 * NOISE),
)


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Rank 0 for the best; equal scores share a rank, and no rank is left out."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]


def agreement(
    rows: Iterable[Mapping[str, object]], labelers: Sequence[Labeler] = LABELERS, *, key: str | int = "agreement"
) -> dict[str, float]:
    """How often two labelers prefer the same of two answers, over all pairs of labelers and of a row's answers.

    Counted over the pairs that both have ranked: where one of them gave both answers the same rating, the pair is
    left out.

    Args:
        rows: rows of a rankings set (`prompt`, `responses`).

    Returns:
        `agreement`; `pairs`, how many were counted; `ties`, the share that was left out.
    """
    same = counted = every = 0
    for row in rows:
        rated = [labeler.scores(row["prompt"], row["responses"], key) for labeler in labelers]  # type: ignore[arg-type]
        for one, two in combinations(rated, 2):
            for i, j in combinations(range(len(one)), 2):
                every += 1
                if one[i] != one[j] and two[i] != two[j]:
                    counted += 1
                    same += (one[i] > one[j]) == (two[i] > two[j])
    return {"agreement": same / counted, "pairs": float(counted), "ties": 1 - counted / every}
