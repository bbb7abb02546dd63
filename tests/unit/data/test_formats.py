from __future__ import annotations

from typing import Any

import pytest

from rlhf_pipeline.data.formats import FORMATS, detect, to_record
from rlhf_pipeline.data.records import BadRow, Demonstration, Message, Ranking, Text
from rlhf_pipeline.errors import UserError

HH = {
    "chosen": "\n\nHuman: hello there\n\nAssistant: Hi! \n\nHuman: a pun?\n\nAssistant: I am a punny one.",
    "rejected": "\n\nHuman: hello there\n\nAssistant: Hi! \n\nHuman: a pun?\n\nAssistant: I am not.\n\nSorry.",
}
HH_PROMPT = (
    Message("user", "hello there", scored=False),
    Message("assistant", "Hi!", scored=False),
    Message("user", "a pun?", scored=False),
)


def one_turn(question: str, answer: str) -> Demonstration:
    return Demonstration((Message("user", question), Message("assistant", answer)))


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("text", {"text": "A document.", "label": 1}, Text("A document.")),
        ("alpaca", {"instruction": "Add.", "input": "1 and 2", "output": "3"}, one_turn("Add.\n\n1 and 2", "3")),
        ("alpaca", {"instruction": "Say hi.", "input": "", "output": "hi"}, one_turn("Say hi.", "hi")),
        ("prompt_response", {"prompt": "p", "response": "r"}, one_turn("p", "r")),
        ("prompt_completion", {"prompt": "p", "completion": "c"}, one_turn("p", "c")),
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a", "weight": 0},
                    {"role": "user", "content": "v", "name": "ignored"},
                    {"role": "assistant", "content": "b", "weight": 1},
                ]
            },
            Demonstration(
                (
                    Message("system", "s"),
                    Message("user", "u"),
                    Message("assistant", "a", scored=False),
                    Message("user", "v"),
                    Message("assistant", "b"),
                )
            ),
        ),
        ("hh", HH, Demonstration((*HH_PROMPT, Message("assistant", "I am a punny one.")))),
        ("hh_rejected", HH, Demonstration((*HH_PROMPT, Message("assistant", "I am not.\n\nSorry.")))),
    ],
)
def test_record_of_a_row(format: str, row: dict[str, Any], expected: Any) -> None:
    kind = "text" if format == "text" else "demonstration"
    assert to_record(row, kind, format) == expected
    if format != "hh_rejected":
        assert detect(row, kind) == format


def test_hh_ranking_splits_at_the_last_shared_assistant_turn() -> None:
    expected = Ranking(HH_PROMPT, ("I am a punny one.", "I am not.\n\nSorry."), (0, 1))
    assert to_record(HH, "ranking", "hh") == expected
    assert detect(HH, "ranking") == "hh"


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("text", {"txt": "a"}, "no field 'text': there is txt"),
        ("text", {"text": None}, "text is not a string: NoneType"),
        ("messages", {"messages": "hi"}, "messages is not a list: str"),
        ("messages", {"messages": ["hi"]}, "a message is not an object: str"),
        ("messages", {"messages": [{"role": "user"}]}, "no field 'content': there is role"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content is not a string: list"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0.5}]},
            "a message's weight is neither 0 nor 1: 0.5",
        ),
        ("messages", {"messages": [{"role": "user", "content": "u"}]}, "the last message is not the assistant's"),
        ("alpaca", {"instruction": "i", "output": "o"}, "no field 'input'"),
        ("alpaca", {"instruction": "i", "input": "", "output": " "}, "the assistant message is empty"),
        ("prompt_response", {"prompt": "", "response": "r"}, "the user message is empty"),
        ("hh", {"chosen": "\n\nHuman: a\n\nAssistant: b"}, "no field 'rejected'"),
        ("hh", {"chosen": "a", "rejected": "b"}, "chosen and rejected share no beginning up to an Assistant turn"),
        (
            "hh",
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: e",
            },
            "chosen and rejected part before their last turn",
        ),
        (
            "hh",
            {"chosen": "Preface\n\nHuman: a\n\nAssistant: b", "rejected": "Preface\n\nHuman: a\n\nAssistant: c"},
            "the dialogue does not begin with a turn: 'Preface'",
        ),
        (
            "hh",
            {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            "the assistant message is empty",
        ),
    ],
)
def test_bad_row(format: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as error:
        to_record(row, "text" if format == "text" else "demonstration", format)
    assert str(error.value).startswith(reason)


def test_fields_decide_the_format_and_the_kind_settles_a_row_that_fits_two() -> None:
    row = {"text": "Below is an instruction ...", "instruction": "i", "input": "", "output": "o"}
    assert detect(row, "text") == "text"
    assert detect(row, "demonstration") == "alpaca"
    with pytest.raises(
        UserError, match=r"no format makes a ranking of rows with the fields text, instruction"
    ) as error:
        detect(row, "ranking")
    assert "hh: chosen, rejected (whole dialogues" in str(error.value)


def test_unknown_format_and_a_kind_it_cannot_make() -> None:
    with pytest.raises(UserError, match=r"unknown format 'hhh'; known are text, messages, hh"):
        to_record({}, "text", "hhh")
    with pytest.raises(UserError, match=r"the format 'alpaca' makes no ranking; hh do"):
        to_record({}, "ranking", "alpaca")


def test_every_format_makes_something() -> None:
    for name, format in FORMATS.items():
        assert format.text or format.demonstration or format.ranking, name
