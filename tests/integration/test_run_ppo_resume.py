"""`rlhf ppo` killed at any place of an iteration and started again ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers_ppo import CASES, iterations, made, make_folder
from helpers_runs import (
    Forks,
    assert_same_end,
    copy_run,
    files_below,
    metrics,
    relative_difference,
    states,
    weights,
    write_jsonl,
)
from helpers_scoring import make_reward_model

from rlhf_pipeline.artifact import Kind

# Five iterations, three an epoch; the second epoch has another order. A state every two.
LONGER = ["train.epochs=2", "train.max_steps=5", "checkpoint.every=2"]
EVERYTHING = [*CASES["gae"], *LONGER]  # value model, averages, adaptive KL, pretraining mix, two scorers
BASELINE = [*CASES["reinforce"], *LONGER]
UPDATES = 4  # of the policy in an iteration, each with one of the value model

# A function that the fourth iteration calls, and the number of that call. Evaluations ask, and score, too.
PLACES = {
    "rollout": "rlhf_pipeline.rollout:completions:7",
    "score": "points:words:7",
    "evaluate": "rlhf_pipeline.recipes.ppo:evaluate:4",
    "update of the policy": f"rlhf_pipeline.ppo.updates:update:{2 * UPDATES * 3 + 5}",
    "update of the value model": f"rlhf_pipeline.ppo.updates:update:{2 * UPDATES * 3 + 6}",
    "before the state": "rlhf_pipeline.resume:save:2",
    "within the state": "rlhf_pipeline.resume:publish:2",
    "after the state": "rlhf_pipeline.resume:_prune:2",
}
KILLED, TERM = int(signal.SIGKILL), int(signal.SIGTERM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("ppo_resume"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, rlhf: Forks) -> Path:
    return made(rlhf, folder, "undisturbed", EVERYTHING)


QUICK = ("rollout", "score", "update of the value model", "within the state")


@pytest.mark.parametrize("place", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PLACES])
def test_kill_9_at_every_part_of_an_iteration(folder: Path, rlhf: Forks, undisturbed: Path, place: str) -> None:
    name = "killed_" + place.replace(" ", "_")
    run = folder / f"runs/{name}/ppo"
    command = [*EVERYTHING, f"name={name}"]
    rlhf.start(folder, *command, DIE_AT=f"{PLACES[place]}:{KILLED}").wait(-KILLED)
    done = len(iterations(run))
    assert done == (4 if "state" in place else 3)
    assert states(run) == ([2, 4] if place == "after the state" else [2])
    job = rlhf.run(folder, *command)
    assert f"resumed after step {states_before(place)}" in job.output and "warning" not in job.output
    assert_same_end(run, undisturbed)
    shutil.rmtree(run.parent)


def states_before(place: str) -> int:
    return 4 if place == "after the state" else 2


@pytest.mark.parametrize("attempt", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 12))])
@pytest.mark.slow
def test_kill_9_at_a_random_change_of_its_files(folder: Path, rlhf: Forks, undisturbed: Path, attempt: int) -> None:
    listed = rlhf.start(folder, *EVERYTHING, f"name=listed_{attempt}", crash=0).wait()
    changes = re.findall(r"^change \d+: (.*)$", listed.output, re.MULTILINE)
    assert len(changes) > 40
    seed = int(os.environ.get("RLHF_TEST_SEED") or random.SystemRandom().randrange(10**6))
    number = random.Random(f"{attempt} {seed}").randrange(len(changes)) + 1
    print(f"killed before change {number}: {changes[number - 1]} (RLHF_TEST_SEED={seed})")
    command = [*EVERYTHING, f"name=crashed_{attempt}"]
    run = folder / f"runs/crashed_{attempt}/ppo"
    rlhf.start(folder, *command, crash=number).wait(-KILLED)
    rlhf.run(folder, *command)
    assert_same_end(run, undisturbed)
    assert not [name for name in files_below(run) if ".partial" in name or ".old" in name or ".tmp" in name]


@pytest.mark.slow
def test_the_running_mean_of_reinforce_goes_on(folder: Path, rlhf: Forks) -> None:
    """Killed in the third iteration, whose baseline two others have made; and paused, with the averages in place."""
    whole = made(rlhf, folder, "reinforce", BASELINE)
    command = [*BASELINE, "name=reinforce_killed"]
    rlhf.start(folder, *command, DIE_AT=f"rlhf_pipeline.ppo.updates:update:6:{KILLED}").wait(-KILLED)
    rlhf.run(folder, *command)
    assert_same_end(folder / "runs/reinforce_killed/ppo", whole)
    paused = made(rlhf, folder, "reinforce_paused", BASELINE, "train.stop_after=3")
    assert states(paused)[-1] == 3 and len(iterations(paused)) == 3
    rlhf.run(folder, *BASELINE, "name=reinforce_paused")
    assert_same_end(paused, whole)


def test_sigterm_finishes_the_iteration_and_saves(folder: Path, rlhf: Forks, undisturbed: Path) -> None:
    command = [*EVERYTHING, "name=asked"]
    job = rlhf.start(folder, *command, DIE_AT=f"points:words:6:{TERM}").wait(143)
    run = folder / "runs/asked/ppo"
    assert "stopped with the state saved" in job.output and "Traceback" not in job.output
    assert states(run) == [2, 3] and len(iterations(run)) == 3
    rlhf.run(folder, *command)
    assert_same_end(run, undisturbed)


def test_a_run_cut_short_where_it_stands_has_an_artifact(folder: Path, rlhf: Forks) -> None:
    paused = made(rlhf, folder, "short", BASELINE, "train.stop_after=2")
    assert not (paused / "artifact").exists()
    rlhf.run(folder, *BASELINE, "name=short", "train.max_steps=2")
    two = made(rlhf, folder, "two", BASELINE, "train.max_steps=2")
    assert (paused / "artifact/model.safetensors").read_bytes() == (two / "artifact/model.safetensors").read_bytes()


def test_operational_changes_go_on(folder: Path, rlhf: Forks, undisturbed: Path) -> None:
    """Another ZeRO stage, packing and sampling batches: up to rounding the same."""
    paused = made(rlhf, folder, "paused", EVERYTHING, "train.stop_after=3")
    run = copy_run(paused, folder / "runs/operational/ppo")
    changed = ["engine=zero3", "batch.row_length=400", "rollout.batch_tokens=5000", "+rewards.rm.batch_tokens=100",
               "reference.offload=true", "health.max_kl=1000"]  # fmt: skip
    job = rlhf.run(folder, *EVERYTHING, "name=operational", *changed)
    assert "resumed after step 3" in job.output and "zero_stage: 1 -> 3" in job.output
    for found, expected in zip(iterations(run), iterations(undisturbed), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert relative_difference(weights(run / "artifact"), weights(undisturbed / "artifact")) < 1e-6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kl.target=0.3", "kl.target: was 0.1, is now 0.3"),
        ("rewards.rm.weight=0.7", "rewards.rm.weight: was 0.5, is now 0.7"),
    ],
)
def test_another_run_is_refused(folder: Path, rlhf: Forks, undisturbed: Path, override: str, message: str) -> None:
    before = metrics(undisturbed)
    line = [one for one in EVERYTHING if one.partition("=")[0].lstrip("+") != override.partition("=")[0]]
    sign = "+" if override.startswith("rewards") else ""
    job = rlhf.run(folder, *line, "name=undisturbed", sign + override, code=2)
    assert message in job.output and "Traceback" not in job.output
    assert metrics(undisturbed) == before


def test_what_the_run_was_made_of_has_changed(folder: Path, rlhf: Forks) -> None:
    """The prompts, or the reward model behind the same name."""
    paused = made(rlhf, folder, "changed", EVERYTHING, "train.stop_after=2")
    (folder / "reward").rename(folder / "kept")
    try:
        make_reward_model(folder / "reward", folder / "policy", seed=5, kind=Kind.reward_model, shift=0.3, scale=2.0)
        job = rlhf.run(folder, *EVERYTHING, "name=changed", code=2)
    finally:
        shutil.rmtree(folder / "reward")
        (folder / "kept").rename(folder / "reward")
    assert "the contents of rewards.rm=reward have changed since the run began" in job.output
    rows = (folder / "prompts.jsonl").read_text()
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"{i} another?", "bonus": 0} for i in range(24)])
    try:
        job = rlhf.run(folder, *EVERYTHING, "name=changed", code=2)
    finally:
        (folder / "prompts.jsonl").write_text(rows)
    assert "the data have changed" in job.output and "Traceback" not in job.output
    assert states(paused) == [2]
