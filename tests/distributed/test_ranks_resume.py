"""Two processes: killed and started again, bit for bit; gone on with by other numbers of processes and ZeRO stages."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers_runs import (
    SFT_ON_FILES,
    TINY_RUN,
    Forks,
    assert_same_end,
    copy_run,
    dialogues,
    files_below,
    logged_steps,
    metrics,
    relative_difference,
    series,
    states,
    wait_for,
    weights,
    write_jsonl,
)

SLOW = pytest.mark.slow
# 15 steps in 3 epochs, the last of each with one example: one rank has nothing to do there.
SFT = [
    *SFT_ON_FILES,
    "batch.examples=5",
    "batch.row_length=100",
    "batch.micro_rows=2",
    "train.epochs=3",
    "optim.lr=1e-3",
    "optim.weight_decay=0.1",
    "checkpoint.every=4",
    "evaluation.every=3",
    *TINY_RUN,
]
STEPS, PAUSE = 15, 6
Layout = tuple[int, int]  # processes, ZeRO stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_jsonl(folder / "train.jsonl", dialogues(21, seed=2, turns=3))
    write_jsonl(folder / "heldout.jsonl", dialogues(5, seed=3))
    return folder


class Runs:
    """Undisturbed and paused runs by layout, made when a test asks for them."""

    def __init__(self, rlhf: Forks, folder: Path, base: Path) -> None:
        self.rlhf, self.folder, self.base = rlhf, folder, base

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name / "sft"

    def command(self, name: str, layout: Layout, *overrides: str) -> list[str]:
        return [*SFT, f"name={name}", f"model.path={self.base}", f"engine=zero{layout[1]}", *overrides]

    def made(self, name: str, layout: Layout, *overrides: str) -> Path:
        if not self.path(name).exists():
            self.rlhf.run(self.folder, *self.command(name, layout, *overrides), ranks=layout[0])
        return self.path(name)

    def undisturbed(self, layout: Layout, *overrides: str, label: str = "") -> Path:
        run = self.made(f"undisturbed{label}_{layout[0]}_{layout[1]}", layout, *overrides)
        assert logged_steps(run) == STEPS
        return run

    def paused(self, layout: Layout, *overrides: str, label: str = "") -> Path:
        name = f"paused{label}_{layout[0]}_{layout[1]}"
        return self.made(name, layout, *overrides, f"train.stop_after={PAUSE}")


@pytest.fixture(scope="module")
def runs(rlhf: Forks, folder: Path, base: Path) -> Runs:
    return Runs(rlhf, folder, base)


def kill(runs: Runs, name: str, layout: Layout, *, after: int, first: int) -> None:
    """SIGKILL to one rank after a step, then to the others. Waiting for it, they would not end by themselves."""
    for _ in range(10):  # on a busy machine it may be done before we look
        shutil.rmtree(runs.path(name), ignore_errors=True)
        job = runs.rlhf.start(runs.folder, *runs.command(name, layout), ranks=layout[0])
        wait_for(lambda: logged_steps(runs.path(name)) >= after, job)
        job.signal(signal.SIGKILL, rank=first)
        job.signal(signal.SIGKILL)
        job.wait(-signal.SIGKILL, 0)
        if 0 not in job.codes:
            return
    raise AssertionError("it was always done before it could be killed")


@pytest.mark.parametrize(
    "layout",
    [
        (2, 1),
        *(pytest.param(layout, marks=SLOW) for layout in [(2, 3), (2, 0), (2, 2), (1, 0), (1, 2), (1, 3), (3, 3)]),
    ],
)
def test_kill_9_at_a_random_step(runs: Runs, layout: Layout) -> None:
    seed = int(os.environ.get("RLHF_TEST_SEED") or random.SystemRandom().randrange(10**6))
    rng = random.Random(seed)
    after, first = rng.randint(1, STEPS - 3), rng.randrange(layout[0])
    print(f"rank {first} is killed first, after step {after} (RLHF_TEST_SEED={seed})")
    undisturbed = runs.undisturbed(layout)
    name = f"killed_{layout[0]}_{layout[1]}"
    kill(runs, name, layout, after=after, first=first)
    print(f"killed after step {logged_steps(runs.path(name))}, states {states(runs.path(name))}")
    runs.rlhf.run(runs.folder, *runs.command(name, layout), ranks=layout[0])
    assert_same_end(runs.path(name), undisturbed)


@pytest.mark.parametrize("layout", [(2, 1), pytest.param((2, 3), marks=SLOW)])
def test_a_damaged_part_of_the_newest_state(runs: Runs, layout: Layout) -> None:
    """The part of the second rank: then the whole state is no good."""
    undisturbed, paused = runs.undisturbed(layout), runs.paused(layout)
    assert states(paused) == [4, 6]
    name = f"damaged_{layout[0]}_{layout[1]}"
    run = copy_run(paused, runs.path(name))
    part = run / "state/step_00000006/rank_00001.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    job = runs.rlhf.run(runs.folder, *runs.command(name, layout), ranks=layout[0])
    assert job.output.count("step_00000006: damaged (rank_00001.safetensors)") == 1, "said once, by the first rank"
    assert job.output.count("resumed after step 4") == 1
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_kill_9_at_every_change_of_its_files(runs: Runs) -> None:
    """The first rank is killed before each change that it makes; the second one then finds itself alone."""
    layout = (2, 1)
    undisturbed = runs.undisturbed(layout)
    job = runs.rlhf.start(runs.folder, *runs.command("listed", layout), ranks=2, crash=0).wait()
    changes = re.findall(r"^change \d+: (.*)$", job.output, re.MULTILINE)
    assert len(changes) > 40
    for number in range(1, len(changes) + 1):
        print(f"killed before change {number}: {changes[number - 1]}")
        name = f"crashed_{number}"
        job = runs.rlhf.start(runs.folder, *runs.command(name, layout), ranks=2, crash=number)
        wait_for(lambda job=job, said=f"change {number}:": said in job.output, job)
        job.signal(signal.SIGKILL)
        job.wait(-signal.SIGKILL)
        runs.rlhf.run(runs.folder, *runs.command(name, layout), ranks=2)
        assert_same_end(runs.path(name), undisturbed)
        shutil.rmtree(runs.path(name))


FAST_MOVES = [((1, 1), (2, 2)), ((2, 3), (1, 1))]
LAYOUTS = [(1, 0), (2, 0), (1, 1), (2, 2), (1, 3), (2, 3), (3, 3), (3, 1)]
SLOW_MOVES = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b and (a, b) not in FAST_MOVES]


@pytest.mark.parametrize(
    ("before", "after"), [*FAST_MOVES, *(pytest.param(before, after, marks=SLOW) for before, after in SLOW_MOVES)]
)
def test_another_number_of_processes_or_zero_stage(runs: Runs, before: Layout, after: Layout) -> None:
    undisturbed, paused = runs.undisturbed(before), runs.paused(before)
    name = f"moved_{before[0]}_{before[1]}_{after[0]}_{after[1]}"
    run = copy_run(paused, runs.path(name))
    job = runs.rlhf.run(runs.folder, *runs.command(name, after), ranks=after[0])
    assert f"resumed after step {PAUSE}" in job.output and "may differ in the last bits" in job.output
    losses, expected = series(run, "train/loss"), series(undisturbed, "train/loss")
    worst = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    distance = relative_difference(weights(run / "artifact"), weights(undisturbed / "artifact"))
    print(f"{before} -> {after}: losses {worst:.1e}, weights {distance:.1e}")
    assert losses[:PAUSE] == expected[:PAUSE]
    assert worst < 1e-6
    assert distance < 1e-5
    assert series(run, "eval/loss") == pytest.approx(series(undisturbed, "eval/loss"), rel=1e-6)
    # What it saves now is in the new layout, and whole.
    newest = run / f"state/step_{STEPS:08d}"
    assert files_below(newest) == {"state.json", *(f"rank_{rank:05d}.safetensors" for rank in range(after[0]))}


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 2), (1, 3)), ((1, 1), (2, 3)), ((2, 3), (2, 1)), ((1, 3), (1, 1))],
)
@pytest.mark.slow
def test_bf16_moves_as_well(runs: Runs, before: Layout, after: Layout) -> None:
    """The fp32 masters and moments move; the losses then agree to bf16's few digits."""
    dtype = "model.dtype=bfloat16"
    undisturbed, paused = (f(before, dtype, label="_bf16") for f in (runs.undisturbed, runs.paused))
    name = f"bf16_{before[0]}_{before[1]}_{after[0]}_{after[1]}"
    run = copy_run(paused, runs.path(name))
    runs.rlhf.run(runs.folder, *runs.command(name, after, dtype), ranks=after[0])
    losses, expected = series(run, "train/loss"), series(undisturbed, "train/loss")
    assert losses == pytest.approx(expected, rel=5e-3)
    as_float = [{k: t.float() for k, t in weights(r / "artifact").items()} for r in (run, undisturbed)]
    assert relative_difference(*as_float) < 3e-3


@pytest.mark.parametrize("layout", [pytest.param(one, marks=SLOW) for one in [(2, 2), (1, 1), (1, 3), (2, 3)]])
def test_bf16_pause_is_not_seen_in_the_end(runs: Runs, layout: Layout) -> None:
    dtype = "model.dtype=bfloat16"
    undisturbed, paused = (f(layout, dtype, label="_bf16") for f in (runs.undisturbed, runs.paused))
    name = f"bf16_gone_on_{layout[0]}_{layout[1]}"
    run = copy_run(paused, runs.path(name))
    runs.rlhf.run(runs.folder, *runs.command(name, layout, dtype), ranks=layout[0])
    assert_same_end(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "ranks"), [("zero3_offload", 2), ("zero2_offload", 2), ("zero2_offload", 1), ("zero3_offload", 1)]
)
def test_offload_pause_is_not_seen_in_the_end(runs: Runs, engine: str, ranks: int) -> None:
    offload = f"engine={engine}"
    layout = (ranks, int(engine[4]))
    undisturbed = runs.undisturbed(layout, offload, label="_offload")
    paused = runs.paused(layout, offload, label="_offload")
    run = copy_run(paused, runs.path(f"offload_{engine}_{ranks}"))
    runs.rlhf.run(runs.folder, *runs.command(f"offload_{engine}_{ranks}", layout, offload), ranks=ranks)
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_full_disk_ends_every_rank(runs: Runs) -> None:
    """The first rank finds no room for the state; the others hear of it and end the same way, without a traceback."""
    layout = (2, 1)
    undisturbed, paused = runs.undisturbed(layout), runs.paused(layout)
    for what, name in (
        (r"open .*state.json.partial", "full_state"),
        (r"open .*epoch_2.partial/config", "full_artifact"),
    ):
        run = copy_run(paused, runs.path(name))
        listed = copy_run(paused, runs.path(f"{name}_listed"))
        job = runs.rlhf.start(runs.folder, *runs.command(f"{name}_listed", layout), ranks=2, crash=0).wait()
        changes = re.findall(r"^change \d+: (.*)$", job.output, re.MULTILINE)
        number = next(i for i, change in enumerate(changes, 1) if re.search(what, change))
        shutil.rmtree(listed)
        job = runs.rlhf.start(runs.folder, *runs.command(name, layout), ranks=2, full=number).wait(2)
        assert job.output.count("the disk is full") == 1 and "Traceback" not in job.output
        runs.rlhf.run(runs.folder, *runs.command(name, layout), ranks=2)
        assert_same_end(run, undisturbed)


def test_refusals_are_said_once_and_end_every_rank(runs: Runs) -> None:
    paused = runs.paused((2, 1))
    before = metrics(paused)
    job = runs.rlhf.run(runs.folder, *runs.command(paused.parent.name, (2, 1), "seed=9"), ranks=2, code=2)
    assert job.output.count("seed: was 0, is now 9") == 1 and "Traceback" not in job.output
    assert metrics(paused) == before
