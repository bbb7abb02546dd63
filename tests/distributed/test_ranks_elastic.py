"""What else may change under a run: pretraining moved between processes and ZeRO stages, PPO in other micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_plain_ppo import plain_runs
from helpers_ppo import CASES, compare, made, make_folder
from helpers_runs import (
    TINY_RUN,
    TINY_SHAPE,
    Forks,
    copy_run,
    relative_difference,
    series,
    states,
    texts,
    weights,
    write_jsonl,
)

pytestmark = pytest.mark.slow
Layout = tuple[int, int]  # processes, ZeRO stage

# 12 steps in 2 epochs of text, whose batches are counted in tokens.
PRETRAIN = [
    "pretrain",
    "data.train=text.jsonl",
    "data.max_length=64",
    "data.heldout_fraction=0.1",
    "batch.tokens=130",
    "batch.row_length=48",
    "batch.micro_rows=2",
    "train.epochs=2",
    "checkpoint.every=4",
    "evaluation.every=3",
    *TINY_SHAPE,
    *TINY_RUN,
]
PAUSE = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    write_jsonl(folder / "text.jsonl", texts(56))
    return folder


@pytest.mark.parametrize(
    ("before", "after"), [((2, 1), (1, 3)), ((1, 1), (2, 3)), ((2, 3), (1, 1)), ((1, 0), (2, 2)), ((2, 1), (2, 3))]
)
def test_pretraining_goes_on_in_another_layout(folder: Path, rlhf: Forks, before: Layout, after: Layout) -> None:
    """Every step's loss is that of the run that was never moved: the same batches in the same order."""

    def run(name: str, layout: Layout, *overrides: str) -> Path:
        path = folder / "runs" / name / "pretrain"
        if (not (path / "artifact").exists() and not overrides) or not path.exists():
            rlhf.run(folder, *PRETRAIN, f"name={name}", f"engine=zero{layout[1]}", *overrides, ranks=layout[0])
        return path

    whole = run(f"whole_{before[0]}_{before[1]}", before)
    paused = run(f"paused_{before[0]}_{before[1]}", before, f"train.stop_after={PAUSE}")
    assert states(paused)[-1] == PAUSE
    name = f"moved_{before[0]}{before[1]}_{after[0]}{after[1]}"
    copy_run(paused, folder / "runs" / name / "pretrain")
    moved = run(name, after)
    losses, expected = series(moved, "train/loss"), series(whole, "train/loss")
    assert losses[:PAUSE] == expected[:PAUSE]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert series(moved, "eval/loss") == pytest.approx(series(whole, "eval/loss"), rel=1e-6)
    assert series(moved, "train/lr") == series(whole, "train/lr")
    assert relative_difference(weights(moved / "artifact"), weights(whole / "artifact")) < 1e-5


@pytest.fixture(scope="module")
def ppo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("ppo_micro"))


@pytest.fixture(scope="module")
def plain(ppo_folder: Path) -> Any:
    return plain_runs(ppo_folder, CASES)


@pytest.mark.parametrize("rows", [("2", "1"), ("60", "3"), ("4000", "1")])
@pytest.mark.parametrize("place", [(1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("case", ["gae", "grpo"])
def test_ppo_in_other_micro_batches(
    ppo_folder: Path, rlhf: Forks, plain: Any, case: str, place: Layout, rows: tuple[str, str]
) -> None:
    """One example each, some, all in one: the numbers of the plain loop. The rollouts are the same tokens in all of them."""
    overrides = [f"engine=zero{place[1]}", f"batch.row_length={rows[0]}", f"batch.micro_rows={rows[1]}"]
    name = f"{case}_{place[0]}_{place[1]}_{rows[0]}"
    compare(made(rlhf, ppo_folder, name, CASES[case], *overrides, ranks=place[0]), plain(case))
