"""Verdicts that people have given, in files as people make them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers_chat import pair

from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.judging.pairs import Answer, Outcome, Pair, Verdict, rule
from rlhf_pipeline.judging.recorded import RecordedJudge, open_recorded_judge

A, B, TIE, MALFORMED = Outcome.a, Outcome.b, Outcome.tie, Outcome.malformed


def row(verdict: str, a: str = "x", b: str = "y", **more: Any) -> dict[str, Any]:
    return {"prompt": "What is red?", "response_a": a, "response_b": b, "verdict": verdict, **more}


def judge_of(folder: Path, *rows: dict[str, Any]) -> RecordedJudge:
    file = folder / "verdicts.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return open_recorded_judge(str(file), name="people")


def refusal(folder: Path, *rows: Any) -> str:
    file = folder / "verdicts.jsonl"
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    with pytest.raises(UserError) as raised:
        open_recorded_judge(str(file), name="people")
    start = f"judge.path={file}: "
    assert str(raised.value).startswith(start)
    return str(raised.value).removeprefix(start).replace(str(file), "FILE")


@pytest.mark.parametrize(("word", "value"), [("a", 1.0), ("b", 0.0), ("tie", 0.5)])
def test_one_row_serves_both_orders(tmp_path: Path, word: str, value: float) -> None:
    judge = judge_of(tmp_path, row(word, reason="it is shorter", rater="anna"))
    (ruling,) = rule(judge, [pair("x", "y")])
    assert (ruling.value, ruling.agreed) == (value, True)
    (turned,) = rule(judge, [pair("y", "x")])
    assert (turned.value, turned.agreed) == (1 - value, True)
    assert ruling.verdicts[0].reason == f"1 for {word}; anna: it is shorter"
    assert turned.verdicts[0].reason.endswith("; anna: it is shorter (of the other order)")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "a", "b"], A),
        (["b", "tie", "b"], B),
        (["a", "b"], TIE),
        (["a", "a", "b", "tie"], TIE),  # two of four are no majority
        (["tie", "tie", "a"], TIE),
        (["a", "b", "tie"], TIE),
    ],
)
def test_several_raters(tmp_path: Path, words: list[str], expected: Outcome) -> None:
    (verdict,) = judge_of(tmp_path, *(row(word, rater=i) for i, word in enumerate(words)))([pair("x", "y")])
    assert verdict.outcome is expected


def test_raters_who_saw_different_orders_are_counted_together(tmp_path: Path) -> None:
    judge = judge_of(tmp_path, row("a", rater="anna"), row("b", "y", "x", rater="ben"), row("a", "y", "x", rater=3))
    assert judge([pair("x", "y"), pair("y", "x")]) == [
        Verdict(outcome=A, reason="2 for a, 1 for b; anna; ben (of the other order); 3 (of the other order)"),
        Verdict(outcome=B, reason="1 for a, 2 for b; anna (of the other order); ben; 3"),
    ]


def test_words_for_verdicts(tmp_path: Path) -> None:
    words = [("A", A), (" Response_A ", A), ("left", A), ("second", B), ("b", B), ("Draw", TIE), ("neither", TIE)]
    judge = judge_of(tmp_path, *(row(word, f"x{i}") for i, (word, _) in enumerate(words)))
    found = judge([pair(f"x{i}", "y") for i in range(len(words))])
    assert [verdict.outcome for verdict in found] == [outcome for _, outcome in words]


def test_the_same_answer_twice_has_one_vote(tmp_path: Path) -> None:
    (verdict,) = judge_of(tmp_path, row("tie", "x", "x"))([pair("x", "x")])
    assert verdict == Verdict(outcome=TIE, reason="1 for tie")


def test_a_spreadsheet(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.csv"
    turns = [("user", "Hm?"), ("assistant", "Yes?"), ("user", "1+1?")]
    several = json.dumps([{"role": role, "content": content} for role, content in turns])
    with file.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, ["prompt", "response_a", "response_b", "verdict", "reason"])
        writer.writeheader()
        writer.writerow({**row("b", " two\r\nlines, \n", "y"), "reason": ""})
        writer.writerow({**row("a"), "prompt": several})
        writer.writerow({**row("a"), "prompt": "[{}, is that JSON?"})
    judge = open_recorded_judge(str(file), name="people")
    conversation = (Message("user", "Hm?"), Message("assistant", "Yes?", scored=False), Message("user", "1+1?"))
    found = judge(
        [
            pair("two\nlines,", "y"),
            Pair(prompt=conversation, a=Answer(text="x"), b=Answer(text="y\n")),
            pair("x", "y", "[{}, is that JSON?"),
        ]
    )
    assert [verdict.outcome for verdict in found] == [B, A, A]


def test_prompts_are_told_apart_by_all_of_their_messages(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is red?"}]
    judge = judge_of(tmp_path, row("a"), {**row("b"), "prompt": prompt})
    with_system = (Message("system", "Be brief."), Message("user", "What is red?"))
    found = judge([pair("x", "y"), Pair(prompt=with_system, a=Answer(text="x"), b=Answer(text="y"))])
    assert [verdict.outcome for verdict in found] == [A, B]


def test_pairs_that_are_not_there(tmp_path: Path) -> None:
    judge = judge_of(tmp_path, row("a"))
    first, second = rule(judge, [pair("x", "y"), pair("x", "z")])
    assert first.value == 1.0 and second.value is None
    assert second.verdicts[0] == Verdict(outcome=MALFORMED, reason="not in the file")
    with pytest.raises(UserError, match=r"verdicts.jsonl: has no verdict on any of the 2 pairs; its prompts"):
        judge([pair("x", "z"), pair("x", "y", "And blue?")])
    assert judge([]) == []


def test_bad_rows_are_all_named(tmp_path: Path) -> None:
    told = refusal(
        tmp_path,
        row("a"),
        row("maybe"),
        {"prompt": "x", "response_a": "y", "verdict": "a"},
        "{not json",
        {**row("a"), "prompt": [{"role": "user"}]},
        {**row("a"), "verdict": 1},
        *[row("c")] * 6,
    )
    lines = told.split("\n")
    assert lines[0] == "11 rows hold no verdict:" and lines[-1] == "  and 1 more" and len(lines) == 12
    assert lines[1].startswith("  FILE:2: an unknown verdict: 'maybe'; known are a, response_a, first, left, b, ")
    assert lines[2] == "  FILE:3: no field 'response_b': there is prompt, response_a, verdict"
    assert lines[3].startswith("  FILE:4: ") and lines[4].startswith("  FILE:5: no field 'content'")
    assert lines[5] == "  FILE:6: verdict is not a string: int"


def test_files_without_rows(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "no rows in it"
    with pytest.raises(UserError, match=r"^judge.path=/nowhere.jsonl: "):
        open_recorded_judge("/nowhere.jsonl", name="people")


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    first, second = judge_of(tmp_path, row("a")).identity, judge_of(tmp_path, row("b")).identity
    assert first["kind"] == "recorded" and first["path"] == second["path"] and first != second
