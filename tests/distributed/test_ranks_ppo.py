"""`rlhf ppo` in several processes, at every ZeRO stage: the plain loop's numbers; killed, moved, and gone on with.

Every process draws its share, and what is drawn does not depend on who draws it: the iterations are the same ones.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers_plain_ppo import plain_runs
from helpers_ppo import CASES, compare, iterations, made, make_folder
from helpers_runs import (
    Forks,
    assert_same_end,
    copy_run,
    is_alive,
    metrics,
    relative_difference,
    states,
    wait_for,
    weights,
)

SLOW = pytest.mark.slow
PLACES = [(ranks, stage) for ranks in (1, 2) for stage in range(4)] + [(3, 1), (3, 3)]
FAST = {("grpo", (2, 2))}
EVERY = [(case, place) for case in CASES for place in PLACES]
LONGER = ["train.epochs=2", "train.max_steps=4", "checkpoint.every=2"]
Layout = tuple[int, int]  # processes, ZeRO stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("ppo_ranks"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return plain_runs(folder, CASES)


@pytest.mark.parametrize(("case", "place"), [one if one in FAST else pytest.param(*one, marks=SLOW) for one in EVERY])
def test_the_numbers_of_the_plain_loop(folder: Path, rlhf: Forks, plain: Any, case: str, place: Layout) -> None:
    run = made(rlhf, folder, f"{case}_{place[0]}_{place[1]}", CASES[case], f"engine=zero{place[1]}", ranks=place[0])
    compare(run, plain(case))


@pytest.mark.slow
@pytest.mark.parametrize("place", [(1, 3), (2, 0), (2, 3)])
def test_evaluations_are_those_of_one_process(folder: Path, rlhf: Forks, place: Layout) -> None:
    one = made(rlhf, folder, "gae_1_1", CASES["gae"], "engine=zero1")
    run = made(rlhf, folder, f"gae_{place[0]}_{place[1]}", CASES["gae"], f"engine=zero{place[1]}", ranks=place[0])
    for found, expected in zip(metrics(run), metrics(one), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("case", "stage", "place"),
    [
        pytest.param("gae", 2, "rlhf_pipeline.rollout:completions:7", marks=SLOW),
        pytest.param("gae", 3, "rlhf_pipeline.ppo.updates:update:28", marks=SLOW),
        *(
            pytest.param(case, stage, place, marks=SLOW)
            for case in ("gae", "reinforce")
            for stage in range(4)
            for place in ("points:words:7", "rlhf_pipeline.resume:publish:1", "rlhf_pipeline.ppo.updates:update:7")
        ),
    ],
)
def test_kill_9_is_not_seen_in_the_end(folder: Path, rlhf: Forks, case: str, stage: int, place: str) -> None:
    """The first process at an exact place; the other, which waits for it, after it."""
    command = [*CASES[case], *LONGER, f"engine=zero{stage}"]
    whole = made(rlhf, folder, f"whole_{case}_{stage}", command, ranks=2)
    run = folder / "runs/killed/ppo"
    job = rlhf.start(folder, *command, "name=killed", ranks=2, DIE_AT=f"{place}:{int(signal.SIGKILL)}")
    wait_for(lambda: not is_alive(job.pids[0]), job)
    if is_alive(job.pids[1]):
        job.signal(signal.SIGKILL, rank=1)
    job.wait(-signal.SIGKILL, 1, 2)
    assert job.codes[0] == -signal.SIGKILL and len(iterations(run)) < 4
    rlhf.run(folder, *command, "name=killed", ranks=2)
    assert_same_end(run, whole)
    shutil.rmtree(run.parent)


MOVES = [
    ((1, 1), (2, 2)),
    ((2, 2), (1, 3)),
    ((2, 3), (1, 1)),
    ((1, 3), (2, 0)),
    ((3, 1), (2, 3)),
    ((2, 1), (1, 3)),
    ((1, 1), (2, 3)),
]


@pytest.mark.parametrize(
    ("before", "after"), [((2, 3), (1, 1)), *(pytest.param(*move, marks=SLOW) for move in MOVES if move != MOVES[2])]
)
def test_another_layout_goes_on(folder: Path, rlhf: Forks, before: Layout, after: Layout) -> None:
    """From a state of two engines and an average; all numbers to 1e-5, weights to 1e-6."""
    stages = [f"engine=zero{stage}" for _, stage in (before, after)]
    command = [*CASES["gae"], *LONGER]
    whole = made(rlhf, folder, f"whole_gae_{before[1]}" if before[0] == 2 else f"whole_{before}", [*command, stages[0]],
                 ranks=before[0])  # fmt: skip
    name = f"paused_{before[0]}_{before[1]}"
    paused = made(rlhf, folder, name, [*command, stages[0]], "train.stop_after=2", ranks=before[0])
    assert states(paused) == [2]
    moved = copy_run(paused, folder / f"runs/moved_{before[0]}{before[1]}_{after[0]}{after[1]}/ppo")
    job = rlhf.run(folder, *command, stages[1], f"name={moved.parent.name}", ranks=after[0])
    assert "resumed after step 2" in job.output and "may differ in the last bits" in job.output
    for found, expected in zip(iterations(moved), iterations(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert relative_difference(weights(moved / "artifact"), weights(whole / "artifact")) < 1e-6
