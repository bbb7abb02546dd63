"""What a report finds in a folder: stages and evaluations wherever they lie, and messages for what it cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_report import write, write_recipe, write_stage

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report import collect as reading
from rlhf_pipeline.report.collect import collect
from rlhf_pipeline.report.models import system_of


def test_stages_come_in_the_recipes_order_from_any_depth(tmp_path: Path) -> None:
    for place, stage in {"a/ppo": "ppo", "z/10/sft": "sft", "z/9/sft": "sft", "base": "pretrain"}.items():
        write_stage(tmp_path / place, stage)
    found = collect(tmp_path)
    assert [(one.stage, one.label) for one in found.stages] == [
        ("pretrain", "base"),
        ("sft", "z/9/sft"),
        ("sft", "z/10/sft"),
        ("ppo", "a/ppo"),
    ]
    assert found.notes == []


def test_a_runs_own_epochs_states_and_caches_are_no_runs(tmp_path: Path) -> None:
    write_stage(tmp_path / "sft", "sft")
    for place in ("artifact", "artifacts/epoch_1", "state", "cache", "wandb", ".hidden"):
        write_stage(tmp_path / "sft" / place, "sft")
    assert [one.label for one in collect(tmp_path).stages] == ["sft"]


def test_a_run_itself_can_be_told_of(tmp_path: Path) -> None:
    write_stage(tmp_path / "sft", "sft", digest="s" * 64)
    (one,) = collect(tmp_path / "sft").stages
    assert (one.label, one.hash, one.parameters) == ("sft", "s" * 64, 1200)


def test_what_else_lies_there_is_passed_over(tmp_path: Path) -> None:
    write_stage(tmp_path / "sft", "sft")
    write_stage(tmp_path / "said", "generate")
    write(tmp_path / "bench" / "results.json", {"tokens": 3})
    write(tmp_path / "list" / "results.json", [1, 2])
    found = collect(tmp_path)
    assert [one.label for one in found.stages] == ["sft"]
    assert found.evaluations == []


def test_too_many_runs_are_cut_off_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_STAGES", 2)
    for i in range(5):
        write_stage(tmp_path / f"run_{i}", "sft")
    found = collect(tmp_path)
    assert [one.label for one in found.stages] == ["run_0", "run_1"]
    assert found.notes == ["3 more training runs lie in the folder; a report on a part of it has them"]


def test_evaluations_know_their_judge_and_their_models(tmp_path: Path) -> None:
    found = collect(write_recipe(tmp_path / "runs"))
    assert [(one.kind, one.judge, one.label) for one in found.evaluations] == [
        ("frontier", None, "evaluate/frontier"),
        ("gold", None, "evaluate/gold"),
        ("winrate", "gold", "evaluate/winrate/gold"),
    ]
    assert len({one.place for one in found.evaluations}) == 1
    winrate = found.evaluations[-1]
    assert {one.label: system_of(winrate, one) for one in found.stages} == {
        "pretrain": None,
        "sft": "sft",
        "rm": None,
        "ppo": "ppo",
    }


def test_secrets_are_hidden_as_they_are_read(tmp_path: Path) -> None:
    (ppo,) = collect(write_recipe(tmp_path)).of("ppo")
    assert ppo.manifest["config"] == {"hub": {"access_token": "***"}}


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: there is no such folder; name one that holds runs"):
        collect(tmp_path / "nowhere")


def test_nothing_usable(tmp_path: Path) -> None:
    write(tmp_path / "results.json", {"tokens": 3})
    with pytest.raises(UserError, match=r"holds no run that has trained a step and no results of rlhf evaluate"):
        collect(tmp_path)


@pytest.mark.parametrize("name", ["sft/artifact/artifact.json", "evaluate/gold/results.json", "rm/evaluation.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    write_recipe(tmp_path)
    (tmp_path / name).write_text('{"kind": ')
    with pytest.raises(UserError, match=rf"{name}: is not valid JSON .*; remove it, or make it again"):
        collect(tmp_path)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with (tmp_path / "evaluate/gold/verdicts.jsonl").open("a") as file:
        file.write("{torn")
    with pytest.raises(UserError, match=r"verdicts.jsonl, line 4: is not valid JSON"):
        collect(tmp_path)
