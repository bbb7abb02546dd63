"""Answers side by side: verdicts about the same answers become one sample, and winners are who no other reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers_report import verdict_row, write_gold, write_recipe, write_winrate

from rlhf_pipeline.report import samples as module
from rlhf_pipeline.report.collect import collect
from rlhf_pipeline.report.samples import samples


def read(folder: Path, limit: int = 300) -> dict[str, Any]:
    return samples(collect(folder).evaluations, limit=limit)


def test_judges_of_the_same_answers_share_a_sample(tmp_path: Path) -> None:
    found = read(write_recipe(tmp_path))
    assert found["total"] == 3
    assert found["systems"] == ["sft", "ppo"]
    assert found["judges"] == ["gold", "winrate, judge gold"]
    assert found["categories"] == ["chat", "summarising"]
    hello = found["samples"][0]
    assert hello["prompt"] == [["user", "Say hello."]]
    sft, ppo = hello["answers"]
    assert (sft["system"], sft["text"], sft["gold"], sft["tokens"]) == ("sft", "Hello!", 0.2, 1)
    assert sft["criteria"] == [["correct", 0.2, 1.0, "it is <0.2>"]]
    assert ppo["text"].startswith("</script>")
    (ruling,) = hello["rulings"]
    assert (ruling["system"], ruling["baseline"], ruling["value"]) == ("ppo", "sft", 1.0)
    assert ruling["verdicts"] == [["a", "because"], ["b", "turned"]]
    assert [one["winners"] for one in found["samples"]] == [
        {"gold": "ppo", "winrate, judge gold": "ppo"},
        {"gold": "sft", "winrate, judge gold": "sft"},
        {"gold": "", "winrate, judge gold": ""},
    ]


def test_other_answers_to_a_prompt_are_another_sample(tmp_path: Path) -> None:
    write_gold(tmp_path, [("Say hello.", "chat", {"sft": ("Hello!", 1.0)})])
    write_winrate(tmp_path, [verdict_row(0, "Say hello.", "chat", {"ppo": "Hi.", "sft": "Good day."}, 1.0)])
    found = read(tmp_path)
    assert [[answer["text"] for answer in one["answers"]] for one in found["samples"]] == [
        ["Hello!"],
        ["Hi.", "Good day."],
    ]


def test_a_prompt_that_stands_in_a_set_twice_is_two_samples(tmp_path: Path) -> None:
    rows = [verdict_row(i, "Again.", "chat", {"ppo": f"{i}", "sft": "x"}, 1.0) for i in (0, 1)]
    write_winrate(tmp_path, rows)
    assert [one["answers"][0]["text"] for one in read(tmp_path)["samples"]] == ["0", "1"]


def test_a_verdict_that_cannot_be_read_makes_no_winner(tmp_path: Path) -> None:
    write_winrate(tmp_path, [verdict_row(0, "What?", "chat", {"ppo": "a", "sft": "b"}, None)])
    (one,) = read(tmp_path)["samples"]
    assert one["winners"] == {}
    assert one["rulings"][0]["value"] is None


def test_few_samples_are_of_every_category(tmp_path: Path) -> None:
    categories = ["chat"] * 5 + ["qa"] * 2
    rows = [verdict_row(i, f"{i}", category, {"ppo": "a", "sft": "b"}, 1.0) for i, category in enumerate(categories)]
    write_winrate(tmp_path, rows)
    found = read(tmp_path, limit=3)
    assert [one["prompt"][0][1] for one in found["samples"]] == ["0", "1", "5"]
    assert found["total"] == 7
    assert read(tmp_path, limit=0) == {}


def test_samples_fit_the_page(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 3000)
    rows = [verdict_row(i, f"{i}", "chat", {"ppo": "a" * 400, "sft": "b"}, 1.0) for i in range(10)]
    write_winrate(tmp_path, rows)
    found = read(tmp_path)
    assert 1 <= len(found["samples"]) <= 4
    assert found["total"] == 10


def test_rows_that_lack_things(tmp_path: Path) -> None:
    row: dict[str, Any] = {"prompt": "a text", "category": None, "answers": {"ppo": {"response": "x"}}}
    write_winrate(tmp_path, [row])
    (one,) = read(tmp_path)["samples"]
    assert one["prompt"] == [["", "a text"]]
    assert (one["category"], one["rulings"], one["winners"]) == ("", [], {})
