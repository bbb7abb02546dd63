"""The lab's program as a judge, and how scores become verdicts."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from helpers_chat import pair

from rlhf_pipeline.data.lab import VERSION
from rlhf_pipeline.data.lab import judge as lab
from rlhf_pipeline.data.lab.tasks import make
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.judging import gold
from rlhf_pipeline.judging.gold import GoldJudge
from rlhf_pipeline.judging.pairs import Answer, Outcome, Pair, rule
from rlhf_pipeline.judging.scores import outcome

TASK = make(random.Random(3))
RIGHT, WRONG = TASK.references[0], "I do not know that at all."
SCORES = {text: lab.judge(TASK.messages, text).score for text in (RIGHT, WRONG)}


def about(a: str, b: str, *, finished: bool = True) -> Pair:
    return Pair(prompt=TASK.messages, a=Answer(text=a), b=Answer(text=b, finished=finished), origin="lab:7")


def test_the_better_answer_wins_in_both_orders() -> None:
    assert SCORES[RIGHT] > SCORES[WRONG] + 0.3
    (ruling,) = rule(GoldJudge(name="gold", tie=0.0), [about(RIGHT, WRONG)])
    assert ruling.value == 1.0 and ruling.agreed
    reason = ruling.verdicts[0].reason
    assert reason.startswith(f"scores {SCORES[RIGHT]:.3f} and {SCORES[WRONG]:.3f}; most in correct: 0.600 (")


def test_the_same_answer_ties() -> None:
    (ruling,) = rule(GoldJudge(name="gold", tie=0.0), [about(RIGHT, RIGHT)])
    assert ruling.value == 0.5 and ruling.agreed
    assert ruling.verdicts[0].reason.endswith("alike in every criterion")


def test_an_answer_that_was_cut_off_is_another_one() -> None:
    cut = lab.judge(TASK.messages, RIGHT, finished=False).score
    assert cut < SCORES[RIGHT]
    (verdict,) = GoldJudge(name="gold", tie=0.0)([about(RIGHT, RIGHT, finished=False)])
    assert verdict.outcome is Outcome.a and "most in ends" in verdict.reason


def test_scores_within_the_tie() -> None:
    apart = SCORES[RIGHT] - SCORES[WRONG]
    (verdict,) = GoldJudge(name="gold", tie=apart)([about(RIGHT, WRONG)])
    assert verdict.outcome is Outcome.tie
    (verdict,) = GoldJudge(name="gold", tie=apart - 1e-6)([about(RIGHT, WRONG)])
    assert verdict.outcome is Outcome.a


@pytest.mark.parametrize(
    ("a", "b", "tie", "expected"),
    [
        (0.4, 0.3, 0.1, Outcome.tie),  # 0.10000000000000003 in floating point
        (0.3, 0.4, 0.1, Outcome.tie),
        (0.4, 0.3, 0.0999, Outcome.a),
        (-2.0, 1.5, 0.0, Outcome.b),
        (0.7, 0.7, 0.0, Outcome.tie),
    ],
)
def test_the_higher_score_wins(a: float, b: float, tie: float, expected: Outcome) -> None:
    assert outcome(a, b, tie) is expected


def test_every_answer_is_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()
    real = lab.judge

    def counting(prompt: lab.Prompt, response: str, *, finished: bool = True) -> lab.Verdict:
        asked[response] += 1
        return real(prompt, response, finished=finished)

    monkeypatch.setattr(gold.lab, "judge", counting)
    judge = GoldJudge(name="gold", tie=0.0)
    rule(judge, [about(RIGHT, WRONG), about("Yes.", RIGHT)])
    rule(judge, [about(WRONG, "Yes.")])
    assert asked == {RIGHT: 1, WRONG: 1, "Yes.": 1}


def test_prompts_of_others_are_refused_with_their_place() -> None:
    with pytest.raises(UserError, match=r"^mine:4: the lab's judge cannot judge the prompt 'What is red\?'"):
        GoldJudge(name="gold", tie=0.0)([pair("x", "y", origin="mine:4")])


def test_identity() -> None:
    assert GoldJudge(name="g", tie=0.1).identity == {"kind": "gold", "lab": VERSION, "tie": 0.1}
