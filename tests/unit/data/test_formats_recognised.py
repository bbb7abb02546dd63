"""Which format a row has: by its shape, by columns of one's own, and as the documentation says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers_formats import ASKED, BINARIZED, HH, OPENAI, PAIR, SAFE, SHP, Q, answer, order, said, user

from rlhf_pipeline.data.formats import FORMATS, Kind, detect, renamed, to_records
from rlhf_pipeline.data.records import BadRow, Prompt, Ranking, Record, Text
from rlhf_pipeline.errors import UserError

# Recognising


@pytest.mark.parametrize(
    ("kind", "row", "format"),
    [
        ("ranking", PAIR, "pair"),
        ("ranking", HH, "hh"),
        ("ranking", HH | {"prompt": "a pun?"}, "hh"),
        ("ranking", PAIR | {"chosen": "Human: no\n\nAssistant: a", "rejected": "b"}, "pair"),  # one dialogue is none
        ("ranking", PAIR | {"chosen": "Assistant: a", "rejected": "The Human: b\n\nAssistant:"}, "pair"),
        ("demonstration", {"prompt": f"{ASKED} and then?", "response": "a"}, "prompt_response"),  # quotes a dialogue
        ("ranking", PAIR | {"conversations": "an id"}, "pair"),
        ("ranking", BINARIZED, "pair"),
        ("ranking", {"chosen": BINARIZED["chosen"], "rejected": BINARIZED["rejected"]}, "conversation_pair"),
        ("demonstration", PAIR | {"response": "x"}, "pair"),
        ("demonstration", {"prompt": "q", "messages": [user(), said()]}, "messages"),
        ("demonstration", {"messages": [user(), said()], "label": 3}, "messages"),  # a class, not a verdict
        ("demonstration", {"messages": [user(), said()], "label": True}, "messages_feedback"),
        ("demonstration", {"messages": "[...]", "prompt": "q", "completion": "a"}, "prompt_completion"),
        ("demonstration", {"text": "x", "instruction": "i", "input": "", "output": "o"}, "alpaca"),
        ("text", {"text": "x", "instruction": "i", "input": "", "output": "o"}, "text"),
        ("prompt", {"prompt": "q", "completion": None}, "prompt"),  # as Parquet fills columns up
        ("prompt", {"prompt": "Human: is a word", "response": "a"}, "prompt_response"),
        ("feedback", {"prompt": "q", "completion": "a", "label": True, "chosen": "a", "rejected": "b"}, "pair"),
    ],
)
def test_shapes_decide_where_names_overlap(kind: Kind, row: dict[str, Any], format: str) -> None:
    assert detect(row, kind) == format


def test_two_plain_texts_are_not_taken_for_a_pair_with_a_hidden_prompt() -> None:
    with pytest.raises(
        UserError, match=r"no format makes a ranking of rows with the fields query \(a string\)"
    ) as error:
        detect({"query": "q", "chosen": "q a", "rejected": "q b"}, "ranking")
    lines = str(error.value).splitlines()
    assert "  pair lacks prompt (a string or messages)" in lines
    assert lines[-1].startswith("Say which of your columns are meant with data.columns={our field: your column}, or ")


def test_nothing_fits() -> None:
    row = {"prompt": {"text": "q"}, "responses": ["a", "b"], "n": 3, "x": None}
    with pytest.raises(UserError) as error:
        detect(row, "ranking")
    assert str(error.value).startswith(
        "no format makes a ranking of rows with the fields prompt (an object), responses (strings), n (a number), "
        "x (empty). Nearest:\n  kwise lacks scores (numbers), prompt as a string or messages\n"
    )


def test_unknown_format_and_a_kind_it_cannot_make() -> None:
    with pytest.raises(UserError, match=r"unknown format 'hhh'; known are text, hh_prompt, hh, "):
        to_records({}, "text", "hhh")
    with pytest.raises(UserError, match=r"the format 'alpaca' makes no ranking; hh_prompt, hh, pair, "):
        to_records({}, "ranking", "alpaca")


# Columns of one's own


@pytest.mark.parametrize(
    ("kind", "columns", "row", "format", "expected"),
    [
        ("text", {"text": "review"}, {"review": "x", "id": 1}, "text", [Text("x")]),
        (
            "demonstration",
            {"prompt": "Question", "response": "Best Answer"},
            {"Question": "q", "Best Answer": "a", "chosen": "x", "rejected": "y"},  # another format must not get in
            "prompt_response",
            answer(),
        ),
        (
            "ranking",
            {"prompt": "q", "chosen": "x", "rejected": "y", "chosen_score": "s.0", "rejected_score": "s.1"},
            {"q": "q", "x": "a", "y": "b", "s": {"0": 2, "1": 1}, "prompt": "no"},
            "pair",
            order(scores=(2.0, 1.0)),
        ),
        ("prompt", {"prompt": "prompt.text"}, {"prompt": {"text": "q"}}, "prompt", [Prompt(Q)]),
        ("ranking", {"better_response_id": "safer_response_id"}, SAFE, "safe_rlhf", order(ranks=(1, 0))),
        ("prompt", {"prompt": "a.b"}, {"a.b": "q", "a": {"b": "x"}}, "prompt", [Prompt(Q)]),  # its very name goes first
        (
            "demonstration",
            {"prompt": "response", "response": "prompt"},
            {"prompt": "a", "response": "q"},
            None,
            answer(),
        ),
    ],
)
def test_columns(
    kind: Kind, columns: dict[str, str], row: dict[str, Any], format: str | None, expected: list[Record]
) -> None:
    found = detect(row, kind, columns=columns)
    assert found == (format or "prompt_response")
    assert to_records(row, kind, found, columns=columns) == expected


def test_renamed_takes_the_old_name_away_and_leaves_the_row_as_it_is() -> None:
    row = {"a": 1, "b": 2}
    assert renamed(row, {"prompt": "a"}) == {"b": 2, "prompt": 1} and row == {"a": 1, "b": 2}
    assert renamed(row, None) == row


def test_a_column_that_is_not_there() -> None:
    row = {"Question": "q", "meta": {"id": "x"}, "n": 7}
    with pytest.raises(BadRow, match=r"no column 'question': there is Question, meta, n"):
        to_records(row, "prompt", "prompt", columns={"prompt": "question"})
    with pytest.raises(UserError, match=r"data.columns: no column 'question': there is Question, meta, n"):
        detect(row, "prompt", columns={"prompt": "question"})
    with pytest.raises(BadRow, match=r"no column 'meta.name': there is id"):
        renamed(row, {"prompt": "meta.name"})
    with pytest.raises(BadRow, match=r"no column 'n.x': it is a number"):
        renamed(row, {"prompt": "n.x"})


def test_a_field_that_no_format_has() -> None:
    with pytest.raises(UserError, match=r"data.columns: no format has a field 'promt'; known are .*, prompt, "):
        renamed({"a": "q"}, {"promt": "a"})
    with pytest.raises(
        UserError, match=r"data.columns: no format makes a ranking of the fields prompt, output together"
    ):
        detect({"a": "q", "b": "x"}, "ranking", columns={"prompt": "a", "output": "b"})


@pytest.mark.parametrize("row", [PAIR | {"by": 2}, OPENAI | {"by": 2}, SHP | {"by": 2}])
def test_a_margin_may_have_another_name(row: dict[str, Any]) -> None:
    columns = {"margin": "by"}
    (found,) = to_records(row, "ranking", detect(row, "ranking", columns=columns), columns=columns)
    assert isinstance(found, Ranking) and found.scores == (2.0, 0.0)


# The documentation


def test_the_documented_rows_are_recognised_and_every_format_is_there() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data-formats.md").read_text(encoding="utf-8")
    section = page.split("## What rows mean")[1].split("\n## ")[0]
    table = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    kinds = {name: line[3] for line in table for name in re.findall(r"`(\w+)`", line[1])}
    assert list(kinds) == list(FORMATS)
    letters: dict[Kind, str] = {"demonstration": "D", "ranking": "R", "feedback": "F", "prompt": "P", "text": "text"}
    for name, format in FORMATS.items():
        made = {kind for kind in letters if format.adapter(kind)}
        assert {kind for kind, letter in letters.items() if re.search(rf"\b{letter}\b", kinds[name])} == made, name
    rows = [json.loads(line) for line in section.split("```json\n")[1].split("\n```")[0].splitlines()]
    found = {detect(row, kind) for row in rows for kind in letters if _is_made(row, kind)}
    assert found == {name for name, format in FORMATS.items() if not format.named_only}
    for row in rows:
        assert any(_is_made(row, kind) for kind in letters) or to_records(row, "ranking", "text_pair")


def _is_made(row: dict[str, Any], kind: Kind) -> bool:
    try:
        return bool(to_records(row, kind, detect(row, kind)))
    except (UserError, BadRow):  # a row of unwanted feedback is no demonstration
        return False
