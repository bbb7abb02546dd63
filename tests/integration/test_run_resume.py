"""A run that is killed anywhere and started again ends as if nothing had happened; another run is refused."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers_runs import (
    TINY_RUN,
    TINY_SHAPE,
    Forks,
    Job,
    assert_same_end,
    copy_run,
    files_below,
    logged_steps,
    metrics,
    program,
    relative_difference,
    series,
    states,
    texts,
    wait_for,
    weights,
    write_jsonl,
)

# 18 steps in 3 epochs; a state every 5, an evaluation with samples every 4.
TRAIN = [
    "pretrain",
    "data.train=text.jsonl",
    "data.max_length=64",
    "data.heldout_fraction=0.1",
    "batch.tokens=130",
    "batch.row_length=48",
    "batch.micro_rows=2",
    "train.epochs=3",
    "checkpoint.every=5",
    "evaluation.every=4",
    *TINY_SHAPE,
    *TINY_RUN,
]
STEPS = 18
PAUSE = 13  # `paused` holds the states of steps 10 and 13


def run_of(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "pretrain"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_jsonl(folder / "text.jsonl", texts(56))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """In a fresh interpreter, as users run it; all others are forks, so that the two are compared as well."""
    program(folder, *TRAIN, "name=undisturbed").wait()
    run = run_of(folder, "undisturbed")
    assert logged_steps(run) == STEPS
    return run


@pytest.fixture(scope="module")
def paused(folder: Path, rlhf: Forks) -> Path:
    rlhf.run(folder, *TRAIN, "name=paused", f"train.stop_after={PAUSE}")
    run = run_of(folder, "paused")
    assert states(run) == [10, 13]
    assert logged_steps(run) == PAUSE
    return run


def go_on(rlhf: Forks, folder: Path, paused: Path, name: str, *overrides: str, code: int = 0) -> tuple[Path, Job]:
    """Continue a copy of the paused run (the copy may have been made already)."""
    run = run_of(folder, name)
    if not run.exists():
        copy_run(paused, run)
    return run, rlhf.run(folder, *TRAIN, f"name={name}", *overrides, code=code)


def draw(label: str, size: int) -> int:
    """A random number below `size` that a failing test prints; RLHF_TEST_SEED=<seed> draws it again."""
    seed = int(os.environ.get("RLHF_TEST_SEED") or random.SystemRandom().randrange(10**6))
    number = random.Random(f"{label} {seed}").randrange(size)
    print(f"{label}: {number} of {size} (RLHF_TEST_SEED={seed})")
    return number


# Killed


@pytest.mark.parametrize("attempt", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 6))])
def test_kill_9_at_a_random_step(folder: Path, undisturbed: Path, rlhf: Forks, attempt: int) -> None:
    step = draw(f"kill {attempt} after step", STEPS - 3) + 1
    run = run_of(folder, f"killed_{attempt}")
    for _ in range(10):  # on a busy machine it may be done before we look
        shutil.rmtree(run, ignore_errors=True)
        job = rlhf.start(folder, *TRAIN, f"name={run.parent.name}")
        wait_for(lambda: logged_steps(run) >= step, job)
        job.signal(signal.SIGKILL)
        if job.wait(-signal.SIGKILL, 0).codes != [0]:
            break
    assert job.codes == [-signal.SIGKILL]
    print(f"killed after step {logged_steps(run)}, states {states(run)}")
    rlhf.run(folder, *TRAIN, f"name={run.parent.name}")
    assert_same_end(run, undisturbed)


@pytest.fixture(scope="module")
def changes(folder: Path, rlhf: Forks) -> list[str]:
    """Every change that an undisturbed run makes to its files, in order: where it can be killed."""
    job = rlhf.start(folder, *TRAIN, "name=listed", crash=0).wait()
    found = re.findall(r"^change \d+: (.*)$", job.output, re.MULTILINE)
    assert len(found) > 60
    return found


def crash(rlhf: Forks, folder: Path, undisturbed: Path, changes: list[str], number: int) -> None:
    print(f"killed before change {number}: {changes[number - 1]}")
    run = run_of(folder, f"crashed_{number}")
    rlhf.start(folder, *TRAIN, f"name={run.parent.name}", crash=number).wait(-signal.SIGKILL)
    rlhf.run(folder, *TRAIN, f"name={run.parent.name}")
    assert_same_end(run, undisturbed)
    left_over = [name for name in files_below(run) if ".partial" in name or ".old" in name or ".tmp" in name]
    assert not left_over
    shutil.rmtree(run)


@pytest.mark.parametrize("attempt", range(3))
def test_kill_9_at_a_random_change_of_its_files(
    folder: Path, undisturbed: Path, rlhf: Forks, changes: list[str], attempt: int
) -> None:
    crash(rlhf, folder, undisturbed, changes, draw(f"change {attempt}", len(changes)) + 1)


@pytest.mark.slow
def test_kill_9_at_every_change_of_its_files(folder: Path, undisturbed: Path, rlhf: Forks, changes: list[str]) -> None:
    """In the middle of a state, of an artifact, between two renames, in the first second of the run, ..."""
    for number in range(1, len(changes) + 1):
        crash(rlhf, folder, undisturbed, changes, number)


# What a crash or a bad disk leaves behind


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "no state.json", "state.json torn", "no rank file"])
def test_damaged_newest_state(folder: Path, undisturbed: Path, paused: Path, rlhf: Forks, damage: str) -> None:
    run = copy_run(paused, run_of(folder, "damaged_" + re.sub(r"\W", "_", damage)))
    newest = run / "state/step_00000013"
    match damage:
        case "truncated":
            half(newest / "rank_00000.safetensors")
        case "flipped bit":
            flip(newest / "rank_00000.safetensors")
        case "no state.json":
            (newest / "state.json").unlink()
        case "state.json torn":
            half(newest / "state.json")
        case "no rank file":
            (newest / "rank_00000.safetensors").unlink()
    run, job = go_on(rlhf, folder, paused, run.parent.name)
    assert "warning: " in job.output and "step_00000013: damaged" in job.output
    assert "resumed after step 10" in job.output
    assert_same_end(run, undisturbed)


def test_no_state_is_whole(folder: Path, undisturbed: Path, paused: Path, rlhf: Forks) -> None:
    run = copy_run(paused, run_of(folder, "none_whole"))
    for state in (run / "state").iterdir():
        half(state / "rank_00000.safetensors")
    run, job = go_on(rlhf, folder, paused, run.parent.name)
    assert job.output.count(": damaged (") == 2
    assert "resumed" not in job.output
    assert_same_end(run, undisturbed)


def test_left_overs_of_a_save(folder: Path, undisturbed: Path, paused: Path, rlhf: Forks) -> None:
    run = copy_run(paused, run_of(folder, "left_overs"))
    for name in ("state/step_00000014.partial", "state/step_00000015.partial", "artifact.partial", "artifact.old"):
        shutil.copytree(run / "state/step_00000013", run / name)
        half(run / name / "rank_00000.safetensors")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "train/loss": 9.0}\n{"step": 15, "tra')
    run, job = go_on(rlhf, folder, paused, run.parent.name)
    assert "resumed after step 13" in job.output and "warning" not in job.output
    assert_same_end(run, undisturbed)
    assert not [path for path in run.rglob("*") if path.name.endswith((".partial", ".old"))]


# The same run, or another one


def test_a_pause_is_not_seen_in_the_end(folder: Path, undisturbed: Path, paused: Path, rlhf: Forks) -> None:
    run, _ = go_on(rlhf, folder, paused, "gone_on")
    assert_same_end(run, undisturbed)


def test_operational_changes_go_on(folder: Path, undisturbed: Path, paused: Path, rlhf: Forks) -> None:
    run, job = go_on(
        rlhf,
        folder,
        paused,
        "operational",
        "engine=zero2",
        "batch.row_length=256",
        "batch.micro_rows=3",
        "model.attention=dense",
        "model.gradient_checkpointing=true",
        "checkpoint.every=4",
        "evaluation.samples=1",
        "tracking.every=2",
    )
    assert "resumed after step 13" in job.output
    assert "results may differ in the last bits" in job.output and "zero_stage: 1 -> 2" in job.output
    losses, expected = (
        {m["step"]: m["train/loss"] for m in metrics(r) if "train/loss" in m} for r in (run, undisturbed)
    )
    assert sorted(losses) == [*range(1, 14), 14, 16, 18]
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=1e-6)
    assert relative_difference(weights(run / "artifact"), weights(undisturbed / "artifact")) < 1e-5


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=1", "seed: was 0, is now 1"),
        ("optim.lr=0.5", "optim.lr: was 0.002, is now 0.5"),
        ("model.shape.hidden=64", "model.shape.hidden: was 32, is now 64"),
        ("data.max_length=63", "data.max_length: was 64, is now 63"),
    ],
)
def test_another_run_is_refused(folder: Path, paused: Path, rlhf: Forks, override: str, difference: str) -> None:
    before = {name: (paused / name).read_bytes() for name in files_below(paused)}
    job = rlhf.run(folder, *TRAIN, "name=paused", override, code=2)
    assert difference in job.output and "name=" in job.output and "Traceback" not in job.output
    assert job.output.count(": was ") == 1
    assert {name: (paused / name).read_bytes() for name in files_below(paused)} == before


def test_changed_data_are_refused(folder: Path, paused: Path, rlhf: Forks) -> None:
    rows = texts(56)
    rows[7]["text"] += " again"
    write_jsonl(folder / "text.jsonl", rows)
    try:
        before = metrics(paused)
        job = rlhf.run(folder, *TRAIN, "name=paused", code=2)
    finally:
        write_jsonl(folder / "text.jsonl", texts(56))
    assert "the data have changed" in job.output and "Traceback" not in job.output
    assert metrics(paused) == before and states(paused) == [10, 13]


def test_a_finished_run_started_again(folder: Path, undisturbed: Path, rlhf: Forks) -> None:
    ignored = ("config.yaml", "run.json")  # written anew with the same content
    before = {n: (undisturbed / n).stat().st_mtime_ns for n in files_below(undisturbed) if n not in ignored}
    recorded = metrics(undisturbed)
    job = rlhf.run(folder, *TRAIN, "name=undisturbed")
    assert "done" in job.output and "artifact" in job.output
    after = {n: (undisturbed / n).stat().st_mtime_ns for n in files_below(undisturbed) if n not in ignored}
    assert after == before
    assert metrics(undisturbed) == recorded


CONSTANT = ["optim.decay=constant", "optim.warmup_fraction=0"]


def test_a_longer_run_goes_on_from_a_finished_one(folder: Path, rlhf: Forks) -> None:
    """With a rate that does not depend on the number of steps it is the run that was longer from the start."""
    for name, *epochs in (("grown", 2, 3), ("long", 3)):
        for number in epochs:
            job = rlhf.run(folder, *TRAIN, *CONSTANT, f"name={name}", f"train.epochs={number}")
    grown, long = run_of(folder, "grown"), run_of(folder, "long")
    assert (grown / "artifact/model.safetensors").read_bytes() == (long / "artifact/model.safetensors").read_bytes()
    assert series(grown, "train/loss") == series(long, "train/loss")
    assert files_below(grown / "artifacts") == files_below(long / "artifacts")
    assert "done" in job.output


def test_a_run_cut_short_where_it_stands_has_an_artifact(folder: Path, paused: Path, rlhf: Forks) -> None:
    """max_steps at or below the steps made: there is nothing to train, and "done" must not be said of nothing."""
    run = copy_run(paused, run_of(folder, "cut_short"))
    assert not (run / "artifact").exists(), "no parent of later stages before the run has come to its end"
    shutil.rmtree(run / "artifacts")
    job = rlhf.run(folder, *TRAIN, "name=cut_short", f"train.max_steps={PAUSE}")
    assert (run / "artifact/artifact.json").is_file(), job.output


def test_two_processes_do_not_work_on_one_run(folder: Path, paused: Path, rlhf: Forks) -> None:
    copy_run(paused, run_of(folder, "contested"))
    first = rlhf.start(folder, *TRAIN, "name=contested", "evaluation.every=1")
    wait_for(lambda: "held out" in first.output, first)
    first.signal(signal.SIGSTOP)  # it cannot end before the second one comes
    second = rlhf.run(folder, *TRAIN, "name=contested", "evaluation.every=1", code=2)
    first.signal(signal.SIGCONT)
    assert "another process is at work" in second.output and "Traceback" not in second.output
    first.wait()


def test_kill_9_while_the_tokenizer_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of its files: what is there then is not taken for a tokenizer."""
    from transformers import PreTrainedTokenizerFast

    from rlhf_pipeline import config
    from rlhf_pipeline.data import stage

    class Killed(Exception):
        pass

    def half_of_it(self: PreTrainedTokenizerFast, place: Path) -> None:
        place.mkdir()
        (place / "tokenizer_config.json").write_text("{}")
        raise Killed

    monkeypatch.chdir(folder)
    setup = config.load("pretrain", [*TRAIN[1:], "name=tokenizer"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", half_of_it)
        stage.open_renderer(setup)
    made = stage.open_renderer(setup).tokenizer
    assert len(made) > 300 and made.chat_template
    assert stage.open_renderer(setup).tokenizer.get_vocab() == made.get_vocab()


def test_a_sweep_is_as_many_runs(folder: Path, undisturbed: Path, rlhf: Forks) -> None:
    """Two jobs in one process: each in a folder of its own, the numbers those of a run by itself."""
    rlhf.run(folder, *TRAIN, "name=sweep", "train.max_steps=6", "seed=0,1", "-m")
    one, other = (folder / f"runs/sweep/{job}/pretrain" for job in (0, 1))
    rlhf.run(folder, *TRAIN, "name=alone", "train.max_steps=6", "seed=1")
    assert_same_end(other, run_of(folder, "alone"))
    assert series(one, "train/loss")[0] == series(undisturbed, "train/loss")[0] != series(other, "train/loss")[0]
