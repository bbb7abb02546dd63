from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf_pipeline.data.records import BadRow, Demonstration, Feedback, Message, Prompt, Ranking, Text

USER, ASSISTANT = Message("user", "hi"), Message("assistant", "yes")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Text(" \n"), "the text is empty"),
        (lambda: Text(3), "the text is not a string: int"),
        (lambda: Text("a\ud800"), "the text is not valid Unicode: a lone surrogate at character 1"),
        (lambda: Message("user", ""), "the user message is empty"),
        (lambda: Message("assistant", None), "the assistant message is not a string: NoneType"),
        (lambda: Message("<|im_start|>system", "hi"), "unknown role: '<|im_start|>system'; known are system, user"),
        (lambda: Demonstration((USER,)), "the last message is not the assistant's"),
        (lambda: Demonstration(()), "the last message is not the assistant's"),
        (lambda: Demonstration((ASSISTANT,)), "the prompt has no user message"),
        (lambda: Ranking((), ("a", "b"), (0, 1)), "the prompt has no user message"),
        (lambda: Ranking((USER,), ("a",), (0,)), "fewer than two responses"),
        (lambda: Ranking((USER,), ("a", "\t"), (0, 1)), "a response is empty"),
        (lambda: Ranking((USER,), ("a", "b"), (0,)), "ranks do not fit the responses: (0,) for 2"),
        (lambda: Ranking((USER,), ("a", "b"), (1, 2)), "ranks do not fit the responses: (1, 2) for 2"),
        (lambda: Ranking((USER,), ("a", "b"), (0, 1), (1.0,)), "scores do not fit the responses: (1.0,) for 2"),
        (lambda: Ranking((USER,), ("a", "b"), (0, 1), (1.0, float("nan"))), "a score is not a finite number"),
        (lambda: Ranking((USER,), ("a", "b"), (0, 1), (float("inf"), 1.0)), "a score is not a finite number"),
        (lambda: Ranking((USER,), ("a", "b"), (0, 1), (1.0, -1e39)), "a score is not a finite number"),  # in 32 bits
        (lambda: Ranking((USER,), ("a", "b", "a"), (0, 1, 0)), "two responses are the same: numbers 1 and 3, 'a'"),
        (lambda: Ranking((USER,), ("a", "b", " b\n"), (0, 1, 1)), "two responses are the same: numbers 2 and 3, 'b'"),
        (lambda: Feedback((USER,), "a", 1), "the label is not true or false: 1"),
        (lambda: Feedback((USER,), "", True), "the response is empty"),
        (lambda: Prompt((USER, ASSISTANT)), "the prompt ends with the assistant's message"),
        (lambda: Prompt(()), "the prompt has no user message"),
    ],
)
def test_unfit_content_is_refused(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(BadRow) as error:
        make()
    assert str(error.value).startswith(reason)


def test_reason_is_free_of_the_particular_case_so_that_rows_can_be_counted_by_it() -> None:
    with pytest.raises(BadRow) as error:
        Message("bot", "hi")
    assert error.value.reason == "unknown role"


def test_fit_content_is_accepted() -> None:
    Demonstration((Message("system", "be nice"), USER, ASSISTANT, USER, ASSISTANT))
    Ranking((USER,), ("a", "b", "c"), (0, 0, 1), (2.0, 2.0, -1.0))  # a tie
    Ranking((USER,), ("a", "A", "a b"), (0, 1, 2))  # alike, not the same
    Feedback((USER,), "a", False)
    Prompt((USER, ASSISTANT, USER))


def test_comparisons_of_a_ranking_by_hand() -> None:
    """Six pairs of four answers; b and c tie. The better answer comes first, whatever its place."""
    found = Ranking((USER,), ("a", "b", "c", "d"), (2, 1, 1, 0), (1.0, 4.0, 4.0, 7.0)).comparisons()
    assert [(pair.responses, pair.scores) for pair in found] == [
        (("b", "a"), (4.0, 1.0)),
        (("c", "a"), (4.0, 1.0)),
        (("d", "a"), (7.0, 1.0)),
        (("d", "b"), (7.0, 4.0)),
        (("d", "c"), (7.0, 4.0)),
    ]
    assert all(pair.prompt == (USER,) and pair.ranks == (0, 1) for pair in found)
    assert Ranking((USER,), ("a", "b"), (0, 1)).comparisons() == [Ranking((USER,), ("a", "b"), (0, 1))]
    assert Ranking((USER,), ("a", "b", "c"), (0, 0, 0)).comparisons() == []
