"""`rlhf report <folder>`: whatever a folder is called, the config holds its name, letter for letter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_report import write_stage

from rlhf_pipeline.config.compose import examine
from rlhf_pipeline.hydra_bridge import names_folder, quoted

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "pyarrow", "wandb"}
ODD = [
    "runs/demo",
    "runs/with a blank",
    "runs/lr=0.1,beta=2",
    "it's",
    'a "quoted" name',
    "back\\slash\\",
    "back\\'s",
    "${runs}",
    "a\\${b}",
    "${oc.env:HOME}",
    "[1,2]",
    "{a:1}",
    "null",
    "007",
    "$",
    "Läufe/三",
]


@pytest.mark.parametrize("name", ODD)
def test_a_quoted_name_is_that_name(name: str) -> None:
    config, problems = examine("report", [f"folder={quoted(name)}"])
    assert problems == []
    assert config.folder == name


@pytest.mark.parametrize("name", [*ODD, "./a=b", "/tmp/x=y"])
def test_a_path_names_a_folder(name: str) -> None:
    assert names_folder(name)


@pytest.mark.parametrize("word", ["samples=3", "+folder=x", "++a.b=c", "~title", "--cfg", "-m", "folder='runs/a b'"])
def test_arguments_of_hydra_name_none(word: str) -> None:
    assert not names_folder(word)


def test_the_folder_may_stand_before_other_arguments(rlhf: Any) -> None:
    run = rlhf("report", "runs/a=b, c", "samples=7", "--cfg", "job")
    assert run.code == 0, run.err
    assert "folder: runs/a=b, c\n" in run.out
    assert "samples: 7\n" in run.out
    assert not run.imported & {*HEAVY, "matplotlib"}


def test_a_report_needs_nothing_heavy(rlhf: Any, tmp_path: Path) -> None:
    write_stage(tmp_path / "runs" / "sft", "sft", digest="s" * 64)
    run = rlhf("report", "runs")
    assert run.code == 0, run.err
    assert (tmp_path / "runs" / "report.html").is_file()
    assert not run.imported & HEAVY
