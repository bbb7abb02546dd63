"""What both orders of a pair come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from helpers_chat import pair

from rlhf_pipeline.judging.pairs import Outcome, Pair, Verdict, rule

A, B, TIE, MALFORMED = Outcome.a, Outcome.b, Outcome.tie, Outcome.malformed


class Says:
    """A judge that gives these verdicts in turn."""

    name = "says"

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = outcomes
        self.identity: dict[str, Any] = {}
        self.calls: list[list[Pair]] = []

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        self.calls.append([*pairs])
        return [Verdict(outcome=one, reason=f"number {i}") for i, one in enumerate(self.outcomes)]


@pytest.mark.parametrize(
    ("first", "second", "value", "agreed"),
    [
        (A, B, 1.0, True),  # the second order has the letters the other way round
        (B, A, 0.0, True),
        (TIE, TIE, 0.5, True),
        (A, A, 0.5, False),  # whatever stands first
        (B, B, 0.5, False),
        (A, TIE, 0.5, False),
        (TIE, A, 0.5, False),
        (TIE, B, 0.5, False),
        (B, TIE, 0.5, False),
        (MALFORMED, A, None, False),
        (B, MALFORMED, None, False),
        (MALFORMED, MALFORMED, None, False),
    ],
)
def test_all_verdicts_on_two_orders(first: Outcome, second: Outcome, value: float | None, agreed: bool) -> None:
    (ruling,) = rule(Says(first, second), [pair("x", "y")])
    assert (ruling.value, ruling.agreed) == (value, agreed)
    assert [verdict.outcome for verdict in ruling.verdicts] == [first, second]


def test_one_call_has_both_orders_of_every_pair() -> None:
    judge = Says(A, B, B, A)
    pairs = [pair("x", "y", origin="one"), pair("u", "v", "And blue?", origin="two")]
    rulings = rule(judge, pairs)
    assert [[(one.a.text, one.b.text, one.origin) for one in call] for call in judge.calls] == [
        [("x", "y", "one"), ("u", "v", "two"), ("y", "x", "one"), ("v", "u", "two")]
    ]
    assert [one.prompt for one in judge.calls[0][2:]] == [one.prompt for one in pairs]
    assert [[verdict.reason for verdict in ruling.verdicts] for ruling in rulings] == [
        ["number 0", "number 2"],
        ["number 1", "number 3"],
    ]
    assert [ruling.value for ruling in rulings] == [1.0, 0.0]


def test_no_pairs() -> None:
    assert rule(Says(), []) == []


def test_a_judge_that_leaves_verdicts_out_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="1 verdicts on 2 pairs"):
        rule(Says(A), [pair("x", "y")])
