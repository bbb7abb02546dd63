"""`rlhf evaluate kind=gold` as a user runs it: on files of answers, and on models that answer first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import TINY_RUN, TINY_SHAPE, Forks

from rlhf_pipeline.data.lab.judge import judge, task_of
from rlhf_pipeline.data.lab.sets import rows

SMALL = "prompts.lab.heldout_prompts=40"


def answers(file: Path, respond: Any, *, count: int = 40) -> None:
    """A file as `rlhf generate` writes it; `respond(prompt)` is the answer to each of the lab's held-out prompts."""
    lines = [
        {**row, "index": i, "sample": 0, "response": respond(row["prompt"]), "finish_reason": "stop"}
        for i, row in enumerate(rows("heldout_prompts", count=count))
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def reference(prompt: list[dict[str, str]]) -> str:
    return task_of(prompt).references[0]


def test_files_of_answers(rlhf: Forks, tmp_path: Path) -> None:
    answers(tmp_path / "good.jsonl", reference)
    answers(tmp_path / "bad.jsonl", lambda prompt: "The moon is")
    job = rlhf.run(tmp_path, "evaluate", "systems={bad:bad.jsonl,good:good.jsonl}", "samples=2")
    results = json.loads((tmp_path / "runs/default/evaluate/gold/results.json").read_text())
    assert results["systems"]["good"]["score"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 40}
    bad = [judge(row["prompt"], "The moon is").score for row in rows("heldout_prompts", count=40)]
    assert results["systems"]["bad"]["score"]["mean"] == pytest.approx(sum(bad) / 40)
    assert results["differences"]["good - bad"]["mean"] == pytest.approx(1 - sum(bad) / 40)
    assert "clear of chance" in job.output and "headroom above good: 0.000 of 1" in job.output
    lines = [
        json.loads(line) for line in (tmp_path / "runs/default/evaluate/gold/verdicts.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 40
    one = lines[7]["answers"]["good"]
    assert [criterion["name"] for criterion in one["criteria"]] == ["correct", "format", "polite", "fluent", "ends"]
    assert all(criterion["why"] for criterion in one["criteria"])


def test_models_answer_first_and_their_answers_are_kept(rlhf: Forks, tmp_path: Path) -> None:
    overrides = [
        "data.train=lab:documents",
        "data.lab.documents=100",
        "data.max_length=96",
        "tokenizer.train_documents=100",
    ]
    rlhf.run(tmp_path, "pretrain", *overrides, "train.max_steps=2", "batch.tokens=500", *TINY_SHAPE, *TINY_RUN)
    line = ["systems={base:runs/default/pretrain/artifact}", SMALL, "sampling.max_new_tokens=8", "runtime.threads=1"]
    first = rlhf.run(tmp_path, "evaluate", *line)
    results = json.loads((tmp_path / "runs/default/evaluate/gold/results.json").read_text())
    assert results["systems"]["base"]["score"]["count"] == 40
    assert results["systems"]["base"]["score"]["mean"] < 0.2, "two steps teach nothing"
    again = rlhf.run(tmp_path, "evaluate", *line)
    assert "40 of 40 answers are there already" in again.output and "40 of 40" not in first.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file; name a model, or a file of rlhf generate"),
        ("", "holds no answers"),
        ('{"index": 0, "sample": 0, "prompt": []}\n', "a line has no 'response'"),
        (
            '{"index": 0, "sample": 1, "prompt": [], "response": "a", "finish_reason": "stop"}\n',
            "holds several answers",
        ),
        (
            '{"index": 0, "sample": 0, "prompt": [{"role": "user", "content": "Why?"}], "response": "a", '
            '"finish_reason": "stop"}\n',
            "the lab's judge cannot judge the prompt 'Why?'",
        ),
    ],
)
def test_mistakes(rlhf: Forks, tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "mine.jsonl").write_text(content)
    job = rlhf.run(tmp_path, "evaluate", "systems={mine:mine.jsonl}", code=2)
    assert message in job.output and "Traceback" not in job.output


def test_answers_to_other_prompts_are_not_compared(rlhf: Forks, tmp_path: Path) -> None:
    answers(tmp_path / "all.jsonl", reference)
    answers(tmp_path / "some.jsonl", reference, count=39)
    job = rlhf.run(tmp_path, "evaluate", "systems={all:all.jsonl,some:some.jsonl}", code=2)
    assert "all and some answered other prompts (40 and 39)" in job.output


def test_a_system_that_cannot_be_opened_is_named(rlhf: Forks, tmp_path: Path) -> None:
    job = rlhf.run(tmp_path, "evaluate", "systems={mine:./nowhere}", code=2)
    assert "systems.mine=./nowhere: " in job.output and "there is no such folder" in job.output
