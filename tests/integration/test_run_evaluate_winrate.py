"""`rlhf evaluate kind=winrate` and `kind=rank` as a user runs them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import Forks, write_jsonl
from helpers_scoring import make_reward_model
from test_run_evaluate import answers, reference

from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.data.lab.judge import judge
from rlhf_pipeline.data.lab.sets import rows

COUNT = 40
PROMPTS = ["prompts.path=prompts.jsonl", "sampling.max_new_tokens=8", "runtime.threads=1"]


def nonsense(prompt: Any) -> str:
    return "The moon is"


def some_right(prompt: Any) -> str:
    """Right for every second of the lab's held-out prompts."""
    place = [row["prompt"] for row in rows("heldout_prompts", count=COUNT)].index(prompt)
    return reference(prompt) if place % 2 else "The moon is"


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_lab_s_judge_between_files(rlhf: Forks, tmp_path: Path) -> None:
    for name, respond in {"good": reference, "mixed": some_right, "bad": nonsense}.items():
        answers(tmp_path / f"{name}.jsonl", respond, count=COUNT)
    systems = "systems={bad:bad.jsonl,mixed:mixed.jsonl,good:good.jsonl}"
    gold = "+rewards.gold.program=rlhf_pipeline.data.lab.scorer:gold"
    job = rlhf.run(tmp_path, "evaluate", "kind=winrate", "baseline=bad", systems, gold)
    folder = tmp_path / "runs/default/evaluate/winrate/gold"
    found = results(folder)
    assert (found["kind"], found["prompts"], found["judge"]["kind"]) == ("winrate", COUNT, "gold")
    mixed, good = found["comparisons"]
    assert (good["system"], good["baseline"], good["win_rate"]["mean"]) == ("good", "bad", 1.0)
    assert (mixed["wins"], mixed["ties"], mixed["losses"], mixed["disagreed"]) == (COUNT // 2, COUNT // 2, 0, 0)
    assert mixed["win_rate"]["mean"] == 0.75 and mixed["win_rate"]["low"] < 0.75 < mixed["win_rate"]["high"]
    assert found["scores"]["good"]["gold"]["mean"] == 1.0
    kept = lines(folder / "verdicts.jsonl")
    row = list(rows("heldout_prompts", count=COUNT))[3]
    assert len(kept) == COUNT and kept[3]["category"] == row["category"]
    assert kept[3]["answers"]["bad"]["scores"]["gold"] == judge(row["prompt"], "The moon is").score
    assert [one["outcome"] for one in kept[3]["rulings"][1]["verdicts"]] == ["a", "b"]
    assert "1.000 [1.000, 1.000]" in job.output and (folder / "win_rates.png").stat().st_size > 1000


def test_rank_orders_all(rlhf: Forks, tmp_path: Path) -> None:
    for name, respond in {"mixed": some_right, "bad": nonsense, "good": reference}.items():
        answers(tmp_path / f"{name}.jsonl", respond, count=COUNT)
    rlhf.run(tmp_path, "evaluate", "kind=rank", "systems={mixed:mixed.jsonl,bad:bad.jsonl,good:good.jsonl}")
    folder = tmp_path / "runs/default/evaluate/rank/gold"
    found = results(folder)
    elo = {name: one["elo"] for name, one in found["ranking"].items()}
    assert elo["good"] > elo["mixed"] > elo["bad"] and elo["good"] > 1000 > elo["bad"]
    assert len(found["comparisons"]) == 3
    assert (folder / "strengths.png").is_file() and (folder / "matrix.png").is_file()


def test_models_answer_and_another_judge_judges_the_same_answers(rlhf: Forks, tmp_path: Path, base: Path) -> None:
    """Every temperature has answers of its own; the reward model that judges then asks for no new ones."""
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"The old {i} cat?"} for i in range(12)])
    make_reward_model(tmp_path / "reward", base, kind=Kind.reward_model, shift=0.0, scale=1.0)
    recorded = [
        {"prompt": f"The old {i} cat?", "response_a": "x", "response_b": "y", "verdict": "a"} for i in range(12)
    ]
    write_jsonl(tmp_path / "verdicts.jsonl", recorded)
    by_model = ["judge=reward_model", "judge.model.path=reward"]
    line = ["evaluate", "kind=winrate", f"systems={{one:{base},two:{base}}}", "baseline=one", *PROMPTS]
    first = rlhf.run(tmp_path, *line, *by_model, "temperatures=[0,2]")
    folder = tmp_path / "runs/default/evaluate/winrate"
    found = results(folder / "reward_model")
    # The same model with the same random numbers says the same
    assert found["comparisons"][0]["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "count": 12, "prompts": 12}
    assert found["comparisons"][0]["ties"] == 12 and found["comparisons"][0]["length_controlled"] is None
    with (folder / "reward_model/temperatures.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["system"], float(row["temperature"])) for row in table] == [("two", 0.0), ("two", 2.0)]
    assert [float(row["win_rate"]) for row in table] == [
        one["mean"] for one in found["temperatures"]["two"]
    ] and "by sampling temperature" in first.output
    again = rlhf.run(tmp_path, *line, *by_model, "judge.name=strict", "judge.tie=100")
    assert "12 of 12 answers are there already" in again.output and (folder / "strict/results.json").is_file()
    refused = rlhf.run(tmp_path, *line, "judge=recorded", "judge.path=verdicts.jsonl", code=2)
    assert "Traceback" not in refused.output and not (folder / "recorded/results.json").exists()


def test_answers_of_people_decide(rlhf: Forks, tmp_path: Path) -> None:
    """Prompts that one side lacks are counted; recorded verdicts serve both orders; what nobody judged is no verdict."""
    for name, places in {"a": range(6), "b": range(2, 8)}.items():
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [
                {
                    "index": i,
                    "sample": 0,
                    "prompt": [{"role": "user", "content": f"Question {i}"}],
                    "response": f"{name} says {i}",
                    "finish_reason": "stop",
                }
                for i in places
            ],
        )
    verdicts = [("a says 2", "b says 2", "a"), ("b says 3", "a says 3", "b"), ("a says 4", "b says 4", "tie")]
    write_jsonl(
        tmp_path / "people.jsonl",
        [
            {"prompt": f"Question {one[-1]}", "response_a": one, "response_b": other, "verdict": verdict}
            for one, other, verdict in verdicts
        ],
    )
    line = ["evaluate", "kind=winrate", "systems={b:b.jsonl,a:a.jsonl}", "baseline=b"]
    job = rlhf.run(tmp_path, *line, "judge=recorded", "judge.path=people.jsonl")
    found = results(tmp_path / "runs/default/evaluate/winrate/recorded")
    (one,) = found["comparisons"]
    assert found["unmatched"] == {"b": 2, "a": 2} and found["prompts"] == 4
    assert (one["wins"], one["ties"], one["losses"], one["malformed"]) == (2, 1, 0, 1)
    assert one["win_rate"]["mean"] == pytest.approx(2.5 / 3) and "2 prompts that not all systems answered" in job.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no answers"),
        ('{"index": 0, "sample": 0, "prompt": []}\n', "a line has no 'response'"),
        (
            '{"index": 0, "sample": 0, "prompt": [{"role": "user", "content": "Another?"}], "response": "a", '
            '"finish_reason": "stop"}\n',
            "no prompt was answered by all of them",
        ),
    ],
)
def test_mistakes(rlhf: Forks, tmp_path: Path, content: str, message: str) -> None:
    answers(tmp_path / "good.jsonl", reference, count=COUNT)
    (tmp_path / "mine.jsonl").write_text(content)
    job = rlhf.run(tmp_path, "evaluate", "kind=winrate", "systems={good:good.jsonl,mine:mine.jsonl}", code=2)
    assert message in job.output and "Traceback" not in job.output
