"""Rows of answers: which are recognised, what becomes of each, and that the bad ones keep their place."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.config.schema import AnswersConfig, LabConfig, OnBadRow
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.scoring.answers import Answered, Answers, read_answers

REAL = os.environ.get("RLHF_TEST_DATA", "")
ASKED = "\n\nHuman: Why?\n\nAssistant:"
MESSAGES = [{"role": "user", "content": "Why?"}]
SAID = {"role": "assistant", "content": "So."}


def read(folder: Path, rows: list[Any], *, skip: bool = False, **settings: Any) -> Answers:
    path = folder / "answers.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    policy = OnBadRow.skip if skip else OnBadRow.error
    return read_answers(AnswersConfig(path=str(path), on_bad_row=policy, **settings))


def one(folder: Path, row: dict[str, Any], **settings: Any) -> Answered:
    (found,) = read(folder, [row], **settings).rows
    return found


def asked(found: Answered) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in found.prompt]


SINGLE: list[dict[str, Any]] = [
    {"messages": [*MESSAGES, SAID]},
    {"prompt": "Why?", "response": "So."},
    {"prompt": MESSAGES, "response": "So."},
    {"prompt": "Why?", "completion": "So."},
    {"prompt": ASKED, "response": " So."},
    {"prompt": MESSAGES, "response": "So.", "label": False},  # an answer that nobody wanted is scored as well
    {"messages": [*MESSAGES, SAID], "label": False},
    {"instruction": "Why?", "input": "", "output": "So."},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    {"question": "Why?", "answer": "So."},
]


@pytest.mark.parametrize("row", SINGLE, ids=lambda row: "+".join(row))
def test_one_answer(tmp_path: Path, row: dict[str, Any]) -> None:
    found = one(tmp_path, row)
    assert (asked(found), found.responses) == ([("user", "Why?")], ("So.",))
    assert (found.many, found.ranks, found.scores, found.finished) == (False, None, None, (True,))
    assert (found.index, found.origin, found.row) == (0, f"{tmp_path}/answers.jsonl:1", row)


SEVERAL: list[tuple[dict[str, Any], tuple[int, ...] | None, tuple[float, ...] | None]] = [
    ({"prompt": "Why?", "chosen": "A.", "rejected": "B."}, (0, 1), None),
    ({"chosen": f"{ASKED} A.", "rejected": f"{ASKED} B."}, (0, 1), None),
    ({"prompt": "Why?", "chosen": "A.", "rejected": "B.", "score_chosen": 2, "score_rejected": 2}, (0, 0), (2.0, 2.0)),
    ({"prompt": "Why?", "responses": ["A.", "B."], "scores": [1, 3]}, (1, 0), (1.0, 3.0)),
    ({"prompt": MESSAGES, "responses": ["A.", "B."], "ranks": [2, 1]}, (1, 0), None),
    ({"prompt": "Why?", "responses": ["A.", "B."]}, None, None),
    ({"prompt": "Why?", "responses": ["A.", "B."], "scores": {"helpful": 1}}, None, None),
    ({"instruction": "Why?", "completions": [{"response": "A.", "overall_score": 1}, {"response": "B.",
      "overall_score": 2}]}, (1, 0), (1.0, 2.0)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "ranks", "scores"), SEVERAL)
def test_several_answers_in_the_order_of_the_row(
    tmp_path: Path, row: dict[str, Any], ranks: tuple[int, ...] | None, scores: tuple[float, ...] | None
) -> None:
    found = one(tmp_path, row)
    assert (asked(found), found.responses) == ([("user", "Why?")], ("A.", "B."))
    assert (found.many, found.ranks, found.scores) == (True, ranks, scores)


def test_a_list_of_one_and_the_same_answer_twice(tmp_path: Path) -> None:
    found = one(tmp_path, {"prompt": "Why?", "responses": ["A."], "scores": [3]})
    assert (found.responses, found.many, found.ranks) == (("A.",), True, (0,))
    found = one(tmp_path, {"prompt": "Why?", "responses": ["A.", "A."]})
    assert (found.responses, found.many, found.ranks) == (("A.", "A."), True, None)


def test_rows_of_generate_are_what_was_sampled_whatever_else_they_hold(tmp_path: Path) -> None:
    row = {"index": 0, "sample": 0, "prompt": MESSAGES, "response": "So.", "finish_reason": "length",
           "messages": [*MESSAGES, SAID], "label": True, "responses": ["A.", "B."], "scores": [1, 2],
           "chosen": f"{ASKED} A.", "rejected": f"{ASKED} B."}  # fmt: skip
    found = one(tmp_path, row)
    assert (asked(found), found.responses, found.finished) == ([("user", "Why?")], ("So.",), (False,))
    assert not found.many and found.row == row
    found = one(tmp_path, {**row, "finish_reason": "stop"}, format="hh")
    assert found.responses == ("A.", "B."), "a format that is named is taken"
    found = one(tmp_path, {"prompt": ASKED, "response": "So.", "finish_reason": "stop"})  # no row of ours
    assert asked(found) == [("user", "Why?")]


def test_each_answer_of_a_list_may_have_been_cut_off(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "responses": ["A.", "B."]}
    assert one(tmp_path, {**row, "finish_reason": ["stop", "length"]}).finished == (True, False)
    assert one(tmp_path, {**row, "finish_reason": "length"}).finished == (False, False)
    with pytest.raises(UserError, match="finish_reason does not fit the responses: 1 for 2"):
        one(tmp_path, {**row, "finish_reason": ["stop"]})


@pytest.mark.parametrize("silence", ["", " \n"])
def test_an_empty_answer_is_an_answer(tmp_path: Path, silence: str) -> None:
    for row in (
        {"prompt": MESSAGES, "response": silence, "finish_reason": "stop"},
        {"prompt": ASKED, "response": silence},
        {"prompt": "Why?", "completion": silence},
        {"prompt": "Why?", "response": silence, "label": False},
        {"question": "Why?", "answer": silence},
        {"instruction": "Why?", "output": silence},
    ):
        found = one(tmp_path, row)
        assert (asked(found), found.responses) == ([("user", "Why?")], ("",)), row
    assert one(tmp_path, {"prompt": "Why?", "responses": [silence, "B."]}).responses == (silence, "B.")
    with pytest.raises(UserError, match="a response is empty"):  # in a pair it was no sample but a mistake
        one(tmp_path, {"prompt": "Why?", "chosen": "A.", "rejected": silence})


def test_earlier_turns_belong_to_the_prompt(tmp_path: Path) -> None:
    turns = [*MESSAGES, SAID, {"role": "user", "content": "And?"}]
    found = one(tmp_path, {"messages": [*turns, {"role": "assistant", "content": "Yes."}]})
    assert asked(found) == [("user", "Why?"), ("assistant", "So."), ("user", "And?")]
    assert found.responses == ("Yes.",) and not any(m.scored for m in found.prompt if m.role == "assistant")
    found = one(tmp_path, {"system": "Be kind.", "prompt": "Why?", "responses": ["A."]})
    assert asked(found) == [("system", "Be kind."), ("user", "Why?")]


BAD: list[Any] = [
    {"prompt": "Why?", "responses": ["A.", "B."], "scores": [1, 2]},
    "no json",
    {"prompt": "Why?", "responses": []},
    {"prompt": "Why?", "responses": ["A.", 7]},
    {"prompt": "", "responses": ["A."]},
    {"prompt": "Why?", "responses": ["A.", "B."], "scores": [1]},
    {"prompt": [SAID], "responses": ["A."]},
    {"prompt": "Why?", "responses": ["\ud800"]},
    "[1]",
    {"prompt": "Why?"},
    {"responses": ["A."]},
    {"prompt": "Why?", "responses": "A."},
    {"prompt": "Why?", "responses": ["C."]},
]


def test_bad_rows_keep_their_place_and_are_named(tmp_path: Path) -> None:
    found = read(tmp_path, BAD, skip=True)
    assert [row.index for row in found.rows] == [0, 12] and [row.index for row in found.bad] == list(range(1, 12))
    assert found.size == len(BAD) == 13
    assert [row.row for row in found.bad] == [row if isinstance(row, dict) else {} for row in BAD[1:12]]
    reasons = [row.why for row in found.bad]
    for reason, expected in zip(
        reasons,
        ["not JSON", "the list of responses is empty", "a response is not a string: int", "the user message is empty",
         "ranks do not fit the responses", "the prompt has no user message", "not valid Unicode", "not a JSON object",
         "no field 'responses'", "no field 'prompt'", "responses is not a list"],
        strict=True,
    ):  # fmt: skip
        assert expected in reason
    assert found.bad[0].origin == f"{tmp_path}/answers.jsonl:2"
    (note,) = found.notes
    assert note.startswith("11 rows cannot be scored and have no reward:") and note.endswith("and 1 more")
    with pytest.raises(UserError) as error:
        read(tmp_path, BAD)
    text = str(error.value)
    assert text.startswith(f"11 rows of data.path={tmp_path}/answers.jsonl cannot be scored:")
    assert text.count("answers.jsonl:") == 10 and "data.on_bad_row=skip" in text


def test_the_first_row_that_has_an_answer_shows_the_format(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?"}, {"prompt": "Why?", "response": "So."}]
    found = read(tmp_path, rows, skip=True)
    assert [row.index for row in found.rows] == [1] and "no answer is found" in found.bad[0].why
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/answers.jsonl:1: no answer is found in the row.*prompt \(a string\)"
    ):
        read(tmp_path, rows[:1], skip=True)
    with pytest.raises(UserError, match="no answer in it to score"):
        read(tmp_path, [])


def test_columns_formats_and_several_sources(tmp_path: Path) -> None:
    found = one(tmp_path, {"q": "Why?", "a": "So."}, columns={"prompt": "q", "response": "a"})
    assert (asked(found), found.responses, found.row) == ([("user", "Why?")], ("So.",), {"q": "Why?", "a": "So."})
    found = one(tmp_path, {"q": "Why?", "a": ["A.", "B."]}, columns={"prompt": "q", "responses": "a"})
    assert found.responses == ("A.", "B.") and found.ranks is None
    with pytest.raises(UserError, match="no format has a field 'qq'"):
        one(tmp_path, {"q": "Why?"}, columns={"qq": "q"})
    with pytest.raises(UserError, match=r"data\.format=nonesuch: there is no such format"):
        one(tmp_path, SINGLE[1], format="nonesuch")
    with pytest.raises(UserError, match=r"data\.format=prompt: holds no answers"):
        one(tmp_path, SINGLE[1], format="prompt")
    assert one(tmp_path, {"prompt": "Why?", "responses": ["A."], "scores": [1]}, format="responses").ranks is None
    (tmp_path / "other.jsonl").write_text(json.dumps({"text1": "Why?", "text2": "No."}) + "\n")
    mapped = {"path": str(tmp_path / "other.jsonl"), "columns": {"prompt": "text1", "response": "text2"}}
    both = read_answers(AnswersConfig(path=[str(tmp_path / "answers.jsonl"), mapped]))
    assert [(row.index, row.responses) for row in both.rows] == [(0, ("A.",)), (1, ("No.",))]
    with pytest.raises(UserError, match="has a weight"):
        read_answers(AnswersConfig(path=[{**mapped, "weight": 2}]))


def test_answers_to_several_prompts_in_one_row_are_refused(tmp_path: Path) -> None:
    def reply(text: str, rank: int, **more: Any) -> dict[str, Any]:
        return {"role": "assistant", "text": text, "rank": rank, "replies": [], **more}

    follow_up = {"role": "prompter", "text": "And?", "replies": [reply("C.", 0), reply("D.", 1)]}
    tree = {"text": "Why?", "role": "prompter", "replies": [reply("A.", 1), reply("B.", 0)]}
    found = one(tmp_path, {"prompt": tree})
    assert (found.responses, found.ranks) == (("A.", "B."), (1, 0))
    tree["replies"] = [reply("A.", 1, replies=[follow_up]), reply("B.", 0)]
    with pytest.raises(UserError, match="answers to several prompts in one row: 2 prompts"):
        one(tmp_path, {"prompt": tree})


def test_at_most_so_many_rows_and_a_fingerprint_of_what_is_scored(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "response": "So.", "note": "x"} for i in range(5)]
    first = read(tmp_path, rows)
    assert len(read(tmp_path, rows, max_examples=3).rows) == 3
    assert read(tmp_path, rows, max_examples=3).fingerprint != first.fingerprint
    assert read(tmp_path, [{**row, "note": "y"} for row in rows]).fingerprint == first.fingerprint
    assert read(tmp_path, [{**row, "response": "No."} for row in rows]).fingerprint != first.fingerprint
    assert read(tmp_path, [{**row, "finish_reason": "length"} for row in rows]).fingerprint != first.fingerprint


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '\ufeff{"prompt": "Why?", "response": "So."}\n\nnonsense\n{"prompt": "Why?", "response": "No."}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    found = read_answers(AnswersConfig(path="-", on_bad_row=OnBadRow.skip))
    assert [(row.index, row.origin, row.responses) for row in found.rows] == [
        (0, "stdin:1", ("So.",)), (2, "stdin:4", ("No.",))]  # fmt: skip
    assert [(row.index, row.origin, row.why[:8]) for row in found.bad] == [(1, "stdin:3", "not JSON")]


def test_the_lab(tmp_path: Path) -> None:
    config = AnswersConfig(path="lab:heldout_rankings", lab=LabConfig(heldout_rankings=5), cache_dir=str(tmp_path))
    found = read_answers(config)
    assert len(found.rows) == 5 and all(row.many and row.ranks and len(row.responses) > 1 for row in found.rows)


@pytest.mark.skipif(not REAL, reason="RLHF_TEST_DATA names no folder with real data")
@pytest.mark.parametrize(
    ("file", "rows", "bad", "answers", "many", "ranked"),
    [
        ("hh_harmless.jsonl.gz", 2312, 9, 4606, True, True),
        ("alpaca_kwise.jsonl.gz", 300, 0, 1931, True, True),
        ("llmbar.jsonl.gz", 419, 0, 838, True, True),
        ("ultrafeedback_eval.jsonl.gz", 200, 1, 398, True, True),
        ("lima.jsonl.gz", 1030, 1, 1029, False, False),
        ("kto_demo.json.gz", 300, 0, 300, False, False),
    ],
)
def test_real_files(file: str, rows: int, bad: int, answers: int, many: bool, ranked: bool) -> None:
    found = read_answers(AnswersConfig(path=f"{REAL}/{file}", on_bad_row=OnBadRow.skip))
    assert (found.size, len(found.bad), sum(len(row.responses) for row in found.rows)) == (rows, bad, answers)
    assert {row.many for row in found.rows} == {many} and {row.ranks is not None for row in found.rows} == {ranked}
    assert sorted(row.index for row in (*found.rows, *found.bad)) == list(range(rows))
