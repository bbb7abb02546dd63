"""Verdicts of judges that give every answer a number of its own, whatever it is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_pipeline.judging.pairs import Answer, Outcome, Pair

DIGITS = 9  # of a difference: 0.4 - 0.3 is not more than 0.1

Key = tuple[tuple[tuple[str, str], ...], str, bool]  # of an answer to a prompt: its messages, text, finished


def key(pair: Pair, answer: Answer) -> Key:
    return tuple((message.role, message.content) for message in pair.prompt), answer.text, answer.finished


def distinct(pairs: Sequence[Pair]) -> dict[Key, tuple[Pair, Answer]]:
    """Every answer to every prompt once, with the first pair that it is in."""
    found: dict[Key, tuple[Pair, Answer]] = {}
    for pair in pairs:
        for answer in (pair.a, pair.b):
            found.setdefault(key(pair, answer), (pair, answer))
    return found


def outcome(a: float, b: float, tie: float) -> Outcome:
    """The higher score wins; no further apart than `tie`, they tie."""
    if round(abs(a - b), DIGITS) <= tie:
        return Outcome.tie
    return Outcome.a if a > b else Outcome.b
