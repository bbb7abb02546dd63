"""The best of N answers to a prompt, by what scorers give them: answers come in as they are drawn, one a prompt goes on.

What is chosen for a prompt depends on that prompt's answers alone, so that it is the same in any batch and after any
interruption. Drawing them, and writing the one down, is the business of `recipes.generate`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_pipeline.generation.decode import Completion
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.scoring.sources import Source, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """Which of a prompt's answers was chosen, and for what."""

    place: int  # among the prompt's answers
    score: float  # the weighted sum
    scores: dict[str, float]  # by scorer, without weights


def kl_upper_bound(n: int) -> float:
    """log n - (n - 1) / n: KL(best of n || what the n are drawn from) is at most that, in nats a prompt.

    Stiennon et al. 2020 give it as the KL itself; Beirami et al. 2024 show that it is a bound, reached where no answer is
    drawn twice and no two have the same score, and far too high where few answers are likely.
    """
    return math.log(n) - (n - 1) / n


def by_prompt(batches: Iterable[Sequence[Completion]], n: int) -> Iterator[list[list[Completion]]]:
    """After each batch the prompts whose n answers are all there, each with them in their order; never an empty list.

    Answers to one prompt may come in several batches.
    """
    waiting: dict[int, list[Completion]] = defaultdict(list)
    for batch in batches:
        for one in batch:
            waiting[one.id].append(one)
        whole = [id for id, found in waiting.items() if len(found) == n]
        if whole:
            yield [sorted(waiting.pop(id), key=lambda one: one.sample) for id in whole]


def choose(
    sources: Mapping[str, Source], prompts: Sequence[Sequence[Episode]], counts: Mapping[str, Counter[str]]
) -> list[Best]:
    """The answer with the highest score of each prompt, the first of those that share it.

    Args:
        prompts: the answers to each; as many to one as to another.
        counts: by scorer; they get what it counts, see `sources.COUNTS`.

    Raises:
        UserError: when a score cannot be had or is not finite.
    """
    scores = {name: _scores(source, prompts, counts[name]) for name, source in sources.items()}
    sums = total(scores, sources).reshape(len(prompts), -1)
    found = []
    for row, place in enumerate(np.argmax(sums, axis=1).tolist()):  # the first of the largest
        each = {name: float(mine[row * sums.shape[1] + place]) for name, mine in scores.items()}
        found.append(Best(place=place, score=float(sums[row, place]), scores=each))
    return found


def _scores(source: Source, prompts: Sequence[Sequence[Episode]], counts: Counter[str]) -> np.ndarray:
    """Float64 [prompts * n]. A model reads each prompt's answers by themselves: what else is in its batch would change the
    last bits of a score, and with them the file that a resumed run writes. Programs and servers take all at once."""
    if source.model is not None:
        return np.concatenate([source.score(answers, counts) for answers in prompts])
    return source.score([one for answers in prompts for one in answers], counts)
