"""Pairs of answers, verdicts on them, and rulings: what both orders of a pair together say about it.

Who gives verdicts is the business of the other modules; nothing here knows a judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from rlhf_pipeline.data.records import Message


class Outcome(StrEnum):
    """Of one verdict."""

    a = "a"
    b = "b"
    tie = "tie"
    malformed = "malformed"  # no verdict can be read in what the judge said; none is guessed


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str
    finished: bool = True  # it came to its end, and was not cut off
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to a prompt, in the order in which a judge sees them."""

    prompt: tuple[Message, ...]
    a: Answer
    b: Answer
    origin: str = ""  # of the prompt, for messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    outcome: Outcome
    reason: str


class Judge(Protocol):
    """Says of pairs which answer is better. Each pair is judged as it stands, without the other order."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What the verdicts depend on, fit for JSON."""

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruling:
    """What the verdicts on a pair in its two orders come to."""

    value: float | None  # of a: 1 wins, 0.5 ties, 0 loses; None: a verdict was malformed, and nobody can say
    agreed: bool  # the same answer won in both orders, or a tie did
    verdicts: tuple[Verdict, Verdict]  # of (a, b) and of (b, a), each in the letters of its own order


_TURNED = {Outcome.a: Outcome.b, Outcome.b: Outcome.a}
_VALUES = {Outcome.a: 1.0, Outcome.tie: 0.5, Outcome.b: 0.0}


def rule(judge: Judge, pairs: Sequence[Pair]) -> list[Ruling]:
    """Rulings on `pairs`, in their order; the judge is asked about both orders of them all in one call.

    A judge whose verdicts on the two orders differ has not seen a difference between the answers: that is a tie.
    """
    turned = [Pair(prompt=pair.prompt, a=pair.b, b=pair.a, origin=pair.origin) for pair in pairs]
    verdicts = judge([*pairs, *turned])
    if len(verdicts) != 2 * len(pairs):
        raise ValueError(f"judge {judge.name}: {len(verdicts)} verdicts on {2 * len(pairs)} pairs")
    return [_ruling(*both) for both in zip(verdicts[: len(pairs)], verdicts[len(pairs) :], strict=True)]


def _ruling(first: Verdict, second: Verdict) -> Ruling:
    if Outcome.malformed in (first.outcome, second.outcome):
        return Ruling(value=None, agreed=False, verdicts=(first, second))
    agreed = first.outcome is _TURNED.get(second.outcome, second.outcome)
    return Ruling(value=_VALUES[first.outcome] if agreed else 0.5, agreed=agreed, verdicts=(first, second))
