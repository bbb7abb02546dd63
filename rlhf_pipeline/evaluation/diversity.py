"""How much a system's answers differ, from prompt to prompt and from sample to sample; and how long they are.

A policy that has collapsed says the same to everybody. Words are what white space separates, so that systems with
different tokenizers compare. The entropy of a policy is no property of its answers and is measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rlhf_pipeline.evaluation.matching import CUT, Line, Matched


@dataclass(frozen=True, slots=True, kw_only=True)
class Diversity:
    """Of the answers of one system. None: nothing to measure it on."""

    answers: int
    tokens: float | None  # of an answer, on average, by the system's own tokenizer; None where lines do not say
    characters: float
    finished: float  # share of the answers that came to their end
    distinct_1: float | None  # share of the words of all answers together that are different ones
    distinct_2: float | None  # the same of word pairs,
    distinct_3: float | None  # and of triples
    identical: float | None  # share of the pairs of answers to one prompt that are the same text
    similarity: float | None  # of those pairs, the mean share of their different word pairs that both have (Jaccard)


def diversity(matched: Matched) -> dict[str, Diversity]:
    """Of every system.

    distinct-n (Li et al. 2016) falls as a text grows, for words come again. It is therefore taken over as many answers of
    each system: to the matched prompts, the first k samples each, k being the least that any system has of any prompt. The
    other figures are over the same answers. distinct-n falls with the length of answers too; compare it where `tokens` are
    about the same. Identical answers and similarity want two samples of a prompt.
    """
    least = min(len(mine) for asked in matched.prompts for mine in asked.samples.values())
    return {
        system: _measure([asked.samples[system][:least] for asked in matched.prompts]) for system in matched.systems
    }


def distinct(texts: Sequence[str], size: int) -> float | None:
    """Different n-grams of words by all n-grams; None where no text has as many words."""
    found = [gram for text in texts for gram in _grams(text, size)]
    return len(set(found)) / len(found) if found else None


def similarity(one: str, other: str) -> float:
    """Of the different word pairs in two texts, the share that both have. Texts without any: 1 where they are the same."""
    mine, theirs = set(_grams(one, 2)), set(_grams(other, 2))
    if not mine | theirs:
        return float(one.split() == other.split())
    return len(mine & theirs) / len(mine | theirs)


def _grams(text: str, size: int) -> Iterator[tuple[str, ...]]:
    words = text.split()
    return zip(*(words[start:] for start in range(size)), strict=False)


def _measure(prompts: Sequence[Sequence[Line]]) -> Diversity:
    lines = [line for samples in prompts for line in samples]
    texts = [line["response"] for line in lines]
    tokens = [line.get("response_tokens") for line in lines]
    twins = [(one["response"], other["response"]) for samples in prompts for one, other in combinations(samples, 2)]
    return Diversity(
        answers=len(lines),
        tokens=None if None in tokens else float(np.mean(tokens)),  # type: ignore[arg-type]
        characters=float(np.mean([len(text) for text in texts])),
        finished=float(np.mean([line["finish_reason"] != CUT for line in lines])),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        distinct_3=distinct(texts, 3),
        identical=float(np.mean([one.strip() == other.strip() for one, other in twins])) if twins else None,
        similarity=float(np.mean([similarity(*pair) for pair in twins])) if twins else None,
    )
