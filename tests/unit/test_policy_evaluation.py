"""A policy on held-out prompts: figures by hand, the reference's answers, and that nothing but the policy changes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pipeline.data.records import Message
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.judged import judged_by, measured
from rlhf_pipeline.evaluation.policy import HeldOutPrompts, Policy, measure
from rlhf_pipeline.generation.prompts import Asked
from rlhf_pipeline.judging.pairs import Outcome, Pair, Ruling, Verdict
from rlhf_pipeline.rollout import Rollout
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.scoring.sources import Source
from rlhf_pipeline.tracking import Tracker
from rlhf_pipeline.tracking.sinks import Sink

NAN = math.nan


def test_the_figures_of_an_evaluation() -> None:
    total, reference_total = np.array([1.0, 3.0, 2.0, 0.0]), np.array([0.0, 3.0, 5.0, -1.0])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]], dtype=torch.bool)
    logprobs = torch.tensor([[-1.0, -1.0], [-1.0, NAN], [-0.5, -0.5], [-1.0, 4.0]])
    reference = torch.tensor([[-2.0, -1.5], [-1.0, 3.0], [-0.5, -0.25], [-0.25, NAN]])
    found = measure(
        {"rm": 2 * total, "other": -total}, total, reference_total, logprobs=logprobs, reference=reference, mask=mask,
        finished=torch.tensor([True, False, True, True]),
    )  # fmt: skip
    assert found.pop("eval/win_rate_low") < 0.625 < found.pop("eval/win_rate_high")
    assert found == {
        "eval/score": 1.5,
        "eval/score_rm": 3.0,
        "eval/score_other": -1.5,
        "eval/kl": pytest.approx((1.5 + 0 - 0.25 - 0.75) / 4),
        "eval/win_rate": 0.625,  # two won, one tied, one lost
        "eval/length": 1.5,
        "eval/ended": 0.75,
    }


def test_the_interval_is_that_of_a_share() -> None:
    """60 of 100: the normal approximation has 0.6 +- 1.96 sqrt(0.6 * 0.4 / 100)."""
    total = np.array([1.0] * 60 + [-1.0] * 40)
    ones = torch.zeros(100, 1)
    found = measure({}, total, np.zeros(100), logprobs=ones, reference=ones, mask=ones == 0, finished=torch.ones(100))
    half = 1.96 * math.sqrt(0.24 / 100)
    assert found["eval/win_rate_low"] == pytest.approx(0.6 - half, abs=0.015)
    assert found["eval/win_rate_high"] == pytest.approx(0.6 + half, abs=0.015)


class Recorded(Sink):
    def __init__(self) -> None:
        self.taken: list[tuple[int, list[Mapping[str, str]]]] = []

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        self.taken.append((step, list(rows)))


class Pretended:
    """A policy that says its word as often as the prompt's number and the seed say; each token has one log-prob."""

    def __init__(self, word: str, logprob: float) -> None:
        self.word, self.logprob = word, logprob
        self.calls: list[tuple[int, int]] = []  # (prompts, seed)

    def answer(self, asked: Sequence[Asked], seed: int) -> Rollout:
        self.calls.append((len(asked), seed))
        lengths = [1 + (one.index + seed) % 3 for one in asked]
        mask = torch.arange(3)[None] < torch.tensor(lengths)[:, None]
        trees = [
            Tree(
                prompt=one.tokens,
                responses=(np.full(n, len(self.word), np.int32),),
                scored=(np.ones(n, bool),),
                index=i,
            )
            for i, (one, n) in enumerate(zip(asked, lengths, strict=True))
        ]
        return Rollout(
            asked=list(asked),
            trees=trees,
            texts=[" ".join([self.word] * n) for n in lengths],
            finished=mask[:, 0],
            sampled=mask * self.logprob,
            mask=mask,
        )

    def logprobs(self, trees: list[Tree]) -> Tensor:
        return torch.full((len(trees), 3), self.logprob)

    @property
    def policy(self) -> Policy:
        return Policy(answer=self.answer, logprobs=self.logprobs)


def asked(count: int) -> list[Asked]:
    return [
        Asked(
            index=i,
            origin=f"file:{i + 1}",
            messages=(Message("user", f"Question {i}"),) if i else (Message("system", "s"), Message("user", "q")),
            columns={"wanted": "yes"},
            tokens=np.array([i + 5], np.int32),
        )
        for i in range(count)
    ]


def sources() -> dict[str, Source]:
    """One counts words like the wanted one, the other words."""

    def like(episodes: Sequence[Episode], counts: Any) -> np.ndarray:
        return np.array([float(one.columns["wanted"] in one.response) for one in episodes])

    def words(episodes: Sequence[Episode], counts: Any) -> np.ndarray:
        return np.array([float(len(one.response.split())) for one in episodes])

    return {
        "like": Source(name="like", weight=2.0, what="", run=like),
        "words": Source(name="words", weight=-0.5, what="", run=words),
    }


def test_evaluations_differ_by_the_policy_alone() -> None:
    mine, reference = Pretended("yes", -1.0), Pretended("no", -1.5)
    sink = Recorded()
    held_out = HeldOutPrompts(
        asked(4), policy=mine.policy, reference=reference.policy, sources=sources(), samples=2, seed=7
    )
    with Tracker([sink]) as tracker:
        first = held_out.evaluate(0, tracker)
        again = held_out.evaluate(5, tracker)
        mine.word = "no"
        other = held_out.evaluate(10, tracker)
    assert mine.calls == [(4, 7)] * 3 and reference.calls == [(4, 7)]  # the reference answers once
    lengths = [1 + (i + 7) % 3 for i in range(4)]  # 2, 3, 1, 2
    assert again == first
    assert first["eval/score_like"] == 1 and first["eval/score_words"] == 2.0
    assert first["eval/score"] == pytest.approx(2.0 - 0.5 * np.mean(lengths))
    assert first["eval/kl"] == pytest.approx(0.5 * np.mean(lengths))
    assert [first[f"eval/win_rate{end}"] for end in ("", "_low", "_high")] == [1, 1, 1]
    assert [other[f"eval/win_rate{end}"] for end in ("", "_low", "_high")] == [0.5, 0.5, 0.5]
    assert [step for step, _ in sink.taken] == [0, 5, 10]
    assert sink.taken[0][1] == [
        {
            "prompt": "system: s\nuser: q",
            "response": "yes yes",
            "score": "1",
            "reference": "no no",
            "reference_score": "-1",
        },
        {
            "prompt": "Question 1",
            "response": "yes yes yes",
            "score": "0.5",
            "reference": "no no no",
            "reference_score": "-1.5",
        },
    ]


def test_no_samples() -> None:
    mine = Pretended("yes", -1.0)
    sink = Recorded()
    held_out = HeldOutPrompts(asked(3), policy=mine.policy, reference=mine.policy, sources=sources(), samples=0, seed=0)
    with Tracker([sink]) as tracker:
        assert held_out.evaluate(0, tracker)["eval/win_rate"] == 0.5
    assert mine.calls == [(3, 0), (3, 0)] and sink.taken == [(0, [])]


@pytest.mark.parametrize("has_reference", [True, False])
@pytest.mark.parametrize("has_sources", [True, False])
def test_what_is_missing_is_left_out(has_reference: bool, has_sources: bool) -> None:
    """No KL and no win rate without a reference, no score and no win rate without a scorer; never a NaN in their place."""
    mine, reference = Pretended("yes", -1.0), Pretended("no", -1.25)
    sink = Recorded()
    held_out = HeldOutPrompts(
        asked(3),
        policy=mine.policy,
        reference=reference.policy if has_reference else None,
        sources=sources() if has_sources else {},
        samples=1,
        seed=0,
    )
    with Tracker([sink]) as tracker:
        found = held_out.evaluate(0, tracker)
        assert held_out.evaluate(1, tracker) == found
    expected = {"eval/length": 2.0, "eval/ended": 1.0}  # 1, 2 and 3 tokens
    # "yes", "yes yes", "yes yes yes": six words, three pairs, a triple, all the same
    expected |= {"eval/distinct_1": 1 / 6, "eval/distinct_2": 1 / 3, "eval/distinct_3": 1.0}
    shown = {"prompt": "system: s\nuser: q", "response": "yes"}
    if has_sources:
        expected |= {"eval/score": 1.0, "eval/score_like": 1.0, "eval/score_words": 2.0}  # 2 - 1/2 of each word
        shown |= {"score": "1.5"}
    if has_reference:
        expected |= {"eval/kl": 0.5}
        shown |= {"reference": "no"}
    if has_reference and has_sources:
        expected |= {f"eval/win_rate{end}": 1.0 for end in ("", "_low", "_high")}
        shown |= {"reference_score": "-0.5"}
    assert found == expected
    assert sink.taken == [(0, [shown]), (1, [shown])]
    assert reference.calls == ([(3, 0)] if has_reference else [])


class Longer:
    """A judge that likes the longer answer, and fails when it is told to."""

    name = "longer"
    identity: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.asked: list[Pair] = []
        self.is_down = False

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        if self.is_down:
            raise UserError("the server does not answer")
        self.asked += pairs
        longer = [len(pair.a.text) - len(pair.b.text) for pair in pairs]
        outcomes = [Outcome.a if more > 0 else Outcome.b if more < 0 else Outcome.tie for more in longer]
        return [Verdict(outcome=one, reason="") for one in outcomes]


def test_a_judge_compares_with_the_reference() -> None:
    mine, reference = Pretended("yes", -1.0), Pretended("no", -1.5)
    judge, told = Longer(), list[str]()
    held_out = HeldOutPrompts(
        asked(3),
        policy=mine.policy,
        reference=reference.policy,
        sources={},
        judge=judged_by(judge, seed=0, tell=told.append),  # type: ignore[arg-type]
        samples=0,
        seed=7,
    )
    with Tracker([]) as tracker:
        found = held_out.evaluate(0, tracker)
        mine.word = "no"
        same = held_out.evaluate(1, tracker)
        judge.is_down = True
        without = held_out.evaluate(2, tracker)
    first, turned = judge.asked[0], judge.asked[3]
    assert (first.a.text, first.b.text, turned.a.text, turned.b.text) == ("yes yes", "no no", "no no", "yes yes")
    assert [message.content for message in first.prompt] == ["s", "q"]
    ends = ("", "_low", "_high")
    assert [found[f"eval/judge_win_rate{end}"] for end in ends] == [1, 1, 1]
    assert [same[f"eval/judge_win_rate{end}"] for end in ends] == [0.5, 0.5, 0.5]
    assert not [name for name in without if "judge" in name] and without["eval/kl"] == same["eval/kl"]
    assert told == ["no verdicts at this evaluation: the server does not answer"]


def test_what_verdicts_come_to() -> None:
    no = Verdict(outcome=Outcome.malformed, reason="")
    values = [
        (1.0, True),
        (1.0, True),
        (0.5, False),
        (0.5, True),
        (0.0, True),
        (None, False),
        (1.0, True),
        (None, False),
    ]
    rulings = [Ruling(value=value, agreed=agreed, verdicts=(no, no)) for value, agreed in values]
    found = measured(rulings)
    low, high = found.pop("eval/judge_win_rate_low"), found.pop("eval/judge_win_rate_high")
    assert found == {
        "eval/judge_win_rate": pytest.approx(4 / 6),
        "eval/judge_malformed": 2 / 8,
        "eval/judge_disagreed": 1 / 8,
    }
    assert 0 < low < 4 / 6 < high <= 1
    assert measured(rulings[5:6]) == {"eval/judge_malformed": 1.0, "eval/judge_disagreed": 0.0}
