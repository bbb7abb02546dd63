"""Diversity of answers, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_pipeline.evaluation.diversity import distinct, diversity, similarity
from rlhf_pipeline.evaluation.matching import match


def line(question: str, response: str, **others: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "response": response, "finish_reason": "stop", "response_tokens": 4, **others}


def test_distinct_n_by_hand() -> None:
    texts = ["the cat saw the cat", "the  dog\n", ""]
    # Words: the x3, cat x2, saw, dog: 4 of 7. Pairs: the cat x2, cat saw, saw the, the dog: 4 of 5; none across texts.
    assert distinct(texts, 1) == pytest.approx(4 / 7)
    assert distinct(texts, 2) == pytest.approx(4 / 5)
    assert distinct(texts, 3) == pytest.approx(3 / 3)
    assert distinct(texts, 6) is None


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("a b c", "b c d", 1 / 3),  # ab bc, bc cd
        ("a b a b", "b a b", 1.0),  # ab ba, ba ab: pairs that come again count once
        ("a b", "c d", 0.0),
        ("yes", " yes", 1.0),
        ("yes", "no", 0.0),
        ("yes", "yes sir", 0.0),
    ],
)
def test_similarity_by_hand(one: str, other: str, share: float) -> None:
    assert similarity(one, other) == similarity(other, one) == pytest.approx(share)


def test_one_sample_a_prompt() -> None:
    one = [line("p", "a b"), line("q", "a b c d", finish_reason="length", response_tokens=7), line("r", "not in two")]
    two = [line("p", "x"), line("q", "x") | {"response_tokens": None}]
    found = diversity(match({"one": one, "two": two}))
    mine = found["one"]
    assert (mine.answers, mine.tokens, mine.characters, mine.finished) == (2, 5.5, 5.0, 0.5)
    assert (mine.distinct_1, mine.distinct_2, mine.distinct_3) == (4 / 6, 3 / 4, 1.0)
    assert mine.identical is None and mine.similarity is None
    other = found["two"]
    assert (other.tokens, other.distinct_1, other.distinct_2) == (None, 0.5, None)


def test_samples_of_a_prompt_beside_each_other() -> None:
    texts = {"p": ["a b", "a b ", "a c"], "q": ["d e", "d e", "d e"]}
    one = [line(question, text, sample=i) for question, mine in texts.items() for i, text in enumerate(mine)]
    mine = diversity(match({"one": one, "two": one}))["one"]
    assert mine.answers == 6
    assert mine.identical == pytest.approx((1 + 0 + 0 + 3) / 6)
    assert mine.similarity == pytest.approx((1 + 0 + 0 + 3) / 6)


def test_distinct_is_over_as_many_answers_of_each_system() -> None:
    """The same policy, asked four times as often, would look less diverse."""
    many = [line("p", text, sample=i) for i, text in enumerate(["a b", "b a", "a a", "b b"])]
    few = [line("p", text, sample=i) for i, text in enumerate(["a b", "b a"])]
    found = diversity(match({"many": many, "few": few}))
    assert found["many"] == found["few"]
    assert (found["many"].answers, found["many"].distinct_1) == (2, 0.5)
