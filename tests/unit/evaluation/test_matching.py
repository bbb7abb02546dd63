"""Answers of several systems put together by prompt, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.matching import match, pairs


def line(question: str, response: str, **others: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "response": response,
        "finish_reason": "stop",
        "response_tokens": 3,
        **others,
    }


def test_prompts_are_matched_in_the_first_systems_order() -> None:
    one = [line("p", "1", index=5), line("q", "2", index=6), line("only one", "3", index=7), line("r", "4", index=8)]
    two = [line("r", "5"), line("p", "6"), line("only two", "7"), line("never", "8"), line("q", "9")]
    found = match({"one": one, "two": two})
    assert [asked.messages for asked in found.prompts] == [(Message("user", text),) for text in "pqr"]
    assert [asked.index for asked in found.prompts] == [5, 6, 8]
    answers = [(asked.answer("one")["response"], asked.answer("two")["response"]) for asked in found.prompts]
    assert answers == [("1", "6"), ("2", "9"), ("4", "5")]
    assert (found.systems, found.unmatched) == (("one", "two"), {"one": 1, "two": 2})


def test_the_nth_time_a_prompt_is_asked_matches_the_nth() -> None:
    one = [line("p", "first"), line("q", "x"), line("p", "second"), line("p", "third")]
    two = [line("p", "erste"), line("p", "zweite"), line("q", "y")]
    found = match({"one": one, "two": two})
    answers = [(asked.answer("one")["response"], asked.answer("two")["response"]) for asked in found.prompts]
    assert answers == [("first", "erste"), ("x", "y"), ("second", "zweite")]
    assert found.unmatched == {"one": 1, "two": 0}
    assert found.same().tolist() == [0, 1, 0]
    assert [asked.index for asked in found.prompts] == [0, 1, 2]  # of lines without one


def test_a_prompt_is_all_its_messages() -> None:
    def told(system: str) -> dict[str, Any]:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": "p"}]
        return line("p", f"told {system}") | {"prompt": turns}

    found = match({"one": [told("x"), told("y")], "two": [told("y")]})
    assert [asked.answer("one")["response"] for asked in found.prompts] == ["told y"]


def test_the_first_sample_is_compared_and_the_others_are_kept() -> None:
    one = [line("p", "p1", sample=1), line("p", "p0", sample=0), line("p", "again 0", sample=0)]
    two = [line("p", "x"), line("p", "y")]
    first, second = match({"one": one, "two": two}).prompts
    assert [answer["response"] for answer in first.samples["one"]] == ["p0", "p1"]
    assert (first.answer("one")["response"], first.answer("two")["response"]) == ("p0", "x")
    assert [answer["response"] for answer in second.samples["one"]] == ["again 0"]


def test_the_category_is_the_first_column_that_is_there() -> None:
    one = [line("p", "1", use_case="chat", subset="b"), line("q", "2", category=""), line("r", "3")]
    two = [line("p", "4"), line("q", "5", subset="easy"), line("r", "6")]
    assert [asked.category for asked in match({"one": one, "two": two}).prompts] == ["chat", "easy", None]


def test_what_a_judge_is_asked() -> None:
    one = [line("p", "mine", finish_reason="length", origin="file:3")]
    two = [line("p", "theirs", response_tokens=7)]
    (pair,) = pairs(match({"one": one, "two": two}), "two", "one")
    assert (pair.prompt, pair.a.text, pair.b.text) == ((Message("user", "p"),), "theirs", "mine")
    assert (pair.a.finished, pair.b.finished, pair.a.tokens, pair.b.tokens) == (True, False, 7, 3)
    (turned,) = pairs(match({"one": one, "two": two}), "one", "two")
    assert turned.origin == "file:3"


@pytest.mark.parametrize(
    ("two", "said"),
    [
        ([], "systems.two: holds no answers"),
        ([{"prompt": "p", "response": "x"}], "systems.two: a line has no 'finish_reason'"),
        ([line("p", "x") | {"prompt": "p"}], "not a list of messages"),
        ([line("p", "x") | {"prompt": [{"role": "judge", "content": "p"}]}], "unknown role"),
        ([line("q", "x")], r"no prompt was answered by all of them \(prompts: one 2, two 1\)"),
        ([line("p", "x", sample=1)], r"\(prompts: one 2, two 0\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(two: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        match({"one": [line("p", "1"), line("r", "2")], "two": two})
