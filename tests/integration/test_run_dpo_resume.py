"""`rlhf dpo` killed or paused anywhere and started again ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers_dpo import CASES, DPO, FILES, KTO, LIVE, made, make_folder, said
from helpers_runs import (
    Forks,
    assert_same_end,
    copy_run,
    files_below,
    metrics,
    relative_difference,
    series,
    states,
    weights,
)

KILLED = int(signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("dpo_resume"))


@pytest.mark.parametrize("case", [*CASES][:3])
@pytest.mark.parametrize("attempt", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 6))])
def test_kill_9_at_a_random_change_of_its_files(rlhf: Forks, folder: Path, base: Path, case: str, attempt: int) -> None:
    """Bit for bit the undisturbed end: with the reference on disk, beside every batch, and with KTO's point."""
    whole = made(rlhf, folder, base, case, *CASES[case])
    changes = re.findall(r"^change \d+: (.*)$", said(whole), re.MULTILINE)
    assert len(changes) > 40
    seed = int(os.environ.get("RLHF_TEST_SEED") or random.SystemRandom().randrange(10**6))
    number = random.Random(f"{case} {attempt} {seed}").randrange(len(changes)) + 1
    print(f"killed before change {number}: {changes[number - 1]} (RLHF_TEST_SEED={seed})")
    name = f"killed_{case}_{attempt}"
    command, run = [*DPO, f"model.path={base}", f"name={name}", *CASES[case]], folder / f"runs/{name}/dpo"
    rlhf.start(folder, *command, crash=number).wait(-KILLED)
    rlhf.run(folder, *command)
    assert_same_end(run, whole)
    assert not [one for one in files_below(run) if ".partial" in one or ".old" in one or ".tmp" in one]


def test_a_pause_is_not_seen_in_the_end(rlhf: Forks, folder: Path, base: Path) -> None:
    """Of KTO between two states, in the middle of an epoch; what is asked on the way may change meanwhile."""
    whole = made(rlhf, folder, base, "kto", *KTO)
    paused = made(rlhf, folder, base, "kto_paused", *KTO, "train.stop_after=5")
    assert states(paused) == [4, 5]
    job = rlhf.run(folder, *DPO, f"model.path={base}", "name=kto_paused", *KTO)
    assert "resumed after step 5" in job.output and "warning" not in job.output
    assert_same_end(paused, whole)


def test_it_goes_on_with_a_live_reference(rlhf: Forks, folder: Path, base: Path) -> None:
    """The cache is no part of what a run is; to rounding the end is the same."""
    whole = made(rlhf, folder, base, "cached")
    run = copy_run(whole, folder / "runs/goes_on/dpo")
    for name in ("artifact", "artifacts/epoch_2", "artifacts/epoch_3", "state/step_00000008", "state/step_00000009"):
        shutil.rmtree(run / name)
    assert states(run) == [4]
    job = rlhf.run(folder, *DPO, f"model.path={base}", "name=goes_on", *LIVE, "engine=zero2")
    assert "resumed after step 4" in job.output and FILES not in job.output
    assert series(run, "train/loss") == pytest.approx(series(whole, "train/loss"), abs=1e-5)
    assert relative_difference(weights(run / "artifact"), weights(whole / "artifact")) < 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.beta=0.2", "objective.beta: was 0.1, is now 0.2"),
        ("reference.path=other", "reference.path: was None, is now 'other'"),
    ],
)
def test_another_objective_is_another_run(rlhf: Forks, folder: Path, base: Path, override: str, message: str) -> None:
    run = made(rlhf, folder, base, "cached")
    before = metrics(run)
    job = rlhf.run(folder, *DPO, f"model.path={base}", "name=cached", override, code=2)
    assert message in job.output and "Traceback" not in job.output
    assert metrics(run) == before
