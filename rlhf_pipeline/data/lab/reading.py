"""Reading an answer by program: its words, its sentences, what it names, and how much of it is right."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rlhf_pipeline.data.lab.lexicon import ITEMS, KINDS

_WORD = re.compile(r"[a-z]+")
_BREAK = re.compile(r"(?<=[.!?])\s+")
NEGATIONS = frozenset(("not", "no", "never", "nobody", "cannot", "none"))


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a criterion is met, from 0 to 1, and why, in one plain sentence."""

    share: float
    why: str


def words(text: str) -> list[str]:
    """Its words in small letters; Ada's is two, `ada` and `s`."""
    return _WORD.findall(text.lower())


def sentences(text: str) -> list[str]:
    """Its sentences, by full stops, question and exclamation marks."""
    return [part for part in _BREAK.split(text.strip()) if part]


def named(text: str, universe: Collection[str] = ITEMS) -> list[str]:
    """The words of `universe` in the order in which the text names them, repeats included."""
    return [word for word in words(text) if word in universe]


def names_just(
    answer: str, wanted: Sequence[str], *, may: Sequence[str] = (), universe: Collection[str] = ITEMS
) -> Mark:
    """Right parts less wrong ones, as a share of those wanted.

    Every wanted word counts once; every other word of `universe` that is not in `may` costs as much as a right one
    brings, so that naming all candidates brings nothing. An answer that says no says the opposite.
    """
    wanted_set = {word.lower() for word in wanted}
    said = set(named(answer, universe))
    right = len(said & wanted_set)
    wrong = sorted(said - wanted_set - {word.lower() for word in may})
    if NEGATIONS & set(words(answer)):
        return Mark(0.0, "it says no, which is not the answer")
    return parts(right, len(wrong), len(wanted_set), wrong)


def parts(right: int, wrong: int, wanted: int, examples: Sequence[str] = ()) -> Mark:
    """The mark of `right` parts of `wanted` with `wrong` ones beside them."""
    share = max(0.0, (right - wrong) / wanted)
    beside = f" and names {', '.join(examples[:3])}, which is wrong" if wrong and examples else ""
    beside = f" and has {wrong} wrong" if wrong and not examples else beside
    return Mark(share, f"it has {right} of {wanted} parts{beside}")


def bare(text: str) -> bool:
    """Whether it has no words but those that name something: a list, no sentence."""
    return all(word in ITEMS or word in ("a", "an", "the", "and", "word") for word in words(text))


def in_words(mark: Mark, answer: str) -> Mark:
    """The mark; a quarter of it where the answer only lists words and says nothing of them."""
    if bare(answer):
        return Mark(mark.share / 4, f"{mark.why}, but it says nothing about them")
    return mark


def in_order(answer: str, wanted: Sequence[str], *, universe: Collection[str]) -> Mark:
    """As `names_just`, but the words have to come in the order of `wanted`, and none twice."""
    said, target = named(answer, universe), [word.lower() for word in wanted]
    right = _common(said, target)
    if NEGATIONS & set(words(answer)):
        return Mark(0.0, "it says no, which is not the answer")
    return parts(right, len(said) - right, len(target))


def attributed(answer: str, values: dict[str, str]) -> Mark:
    """Whether each person (the keys) is named and given the own value; anything else that is named is wrong."""
    wanted = {name.lower(): value.lower() for name, value in values.items()}
    right, wrong, who = set(), 0, ""
    for word in named(answer):
        if word in wanted:
            who = word
        elif wanted.get(who) == word:
            right.add(who)
        else:
            wrong += 1
    if NEGATIONS & set(words(answer)):
        return Mark(0.0, "it says no, which is not the answer")
    return parts(len(right), wrong, len(wanted))


def _common(left: list[str], right: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for one in left:
        before = 0
        for j, other in enumerate(right, 1):
            before, row[j] = row[j], before + 1 if one == other else max(row[j], row[j - 1])
    return row[-1]


KIND_ITEMS = ITEMS | frozenset(KINDS)
