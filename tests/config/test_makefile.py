"""`make demo` and `make recipe`: which stages run, in which order, and what an interrupted recipe goes on with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def commands(runs: Path, *arguments: str) -> list[str]:
    """What make would run of ours, without its paths' beginnings."""
    line = ["make", "-n", "-C", str(ROOT), *arguments, f"RUNS={runs}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    said = subprocess.run(line, check=True, capture_output=True, text=True, env=environment).stdout
    found = re.findall(r"(?:bin/rlhf|bin/python scripts/)\s*(.*)", said)
    return [one.replace(f" runs={runs}", "").replace(f"{runs}/", "").strip() for one in found]


def make_all(folder: Path, *places: str) -> None:
    """These files, each a second newer than the one before."""
    for age, place in enumerate(places):
        file = folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1_700_000_000 + age,) * 2)


DEMO = [
    *(f"demo/{stage}/artifact/artifact.json" for stage in ("pretrain", "sft")),
    "demo/generate/responses.jsonl",
    "demo/own_rankings.jsonl",
    *(f"demo/{stage}/artifact/artifact.json" for stage in ("rm", "ppo", "dpo")),
    "demo/heldout/responses.jsonl",
    "demo/heldout_rankings.jsonl",
    *(f"demo/evaluated/demo_{name}evaluate" for name in ("", "frontier_", "rm_", "winrate_")),
]


def test_the_demo_is_the_whole_recipe(tmp_path: Path) -> None:
    ran = commands(tmp_path, "demo")
    assert ran[:7] == [
        "pretrain experiment=demo_pretrain",
        "sft experiment=demo_sft",
        "generate experiment=demo_samples_generate",
        "lab_label.py demo/generate/responses.jsonl demo/own_rankings.jsonl --by panel",
        "rm experiment=demo_rm",
        "ppo experiment=demo_ppo",
        "dpo experiment=demo_dpo",
    ]
    evaluations = [one for one in ran[7:] if one.startswith("evaluate")]
    assert evaluations == [f"evaluate experiment=demo_{name}evaluate" for name in ("", "frontier_", "rm_", "winrate_")]
    assert ran[-1] == "report demo"


def test_what_is_made_is_not_made_again(tmp_path: Path) -> None:
    make_all(tmp_path, *DEMO)
    assert commands(tmp_path, "demo") == ["report demo"]
    (tmp_path / "demo/ppo/artifact/artifact.json").unlink()  # killed there
    ran = commands(tmp_path, "demo")
    assert ran[0] == "ppo experiment=demo_ppo" and not {"rm", "sft", "dpo"} & {one.split()[0] for one in ran}
    assert sum(one.startswith("evaluate") for one in ran) == 4


def test_a_newer_parent_makes_its_children_again(tmp_path: Path) -> None:
    make_all(tmp_path, *DEMO)
    os.utime(tmp_path / "demo/own_rankings.jsonl")
    ran = [one.split()[0] for one in commands(tmp_path, "demo")]
    assert ran[:3] == ["rm", "ppo", "dpo"] and "sft" not in ran


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        (
            "instructgpt_1b",
            [
                "sft experiment=instructgpt_1b_sft",
                "rm experiment=instructgpt_6b_rm",
                "sft experiment=instructgpt_1b_ppo_init_sft",
                "ppo experiment=instructgpt_1b_ppo",
            ],
        ),
        ("zephyr_7b", ["dpo experiment=zephyr_7b_dpo"]),
        ("hh", ["sft experiment=hh_sft", "rm experiment=hh_rm", "dpo experiment=hh_dpo"]),
        ("dem", []),  # takes nothing of a recipe whose name begins as its own
    ],
)
def test_other_recipes(tmp_path: Path, experiment: str, expected: list[str]) -> None:
    assert commands(tmp_path, "recipe", f"EXP={experiment}") == [*expected, f"report {experiment}"]


def test_arguments_and_processes(tmp_path: Path) -> None:
    more = ["GPUS=8", "ARGS=seed=1", "ARGS_dpo=model.path=m data.train=pairs.jsonl"]
    (train, _) = commands(tmp_path, "recipe", "EXP=zephyr_7b", *more)
    assert re.sub(" +", " ", train) == (
        "launch --num-processes 8 dpo experiment=zephyr_7b_dpo seed=1 model.path=m data.train=pairs.jsonl"
    )
