"""`rlhf launch`: the real launcher and real ranks; signals, a rank that is killed, everything that is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_runs import (
    SFT_ON_FILES,
    TINY_RUN,
    Forks,
    Job,
    assert_same_end,
    children,
    is_alive,
    kill_tree,
    launched,
    logged_steps,
    states,
    wait_for,
)

# 30 steps, each followed by an evaluation with samples, so that there is time for a signal.
SFT = [
    *SFT_ON_FILES,
    "batch.examples=6",
    "train.epochs=5",
    "optim.lr=1e-3",
    "checkpoint.every=1000",
    "evaluation.every=1",
    *TINY_RUN,
    "evaluation.sample_tokens=16",
]
STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(folder: Path, base: Path, rlhf: Forks) -> Path:
    """By two forks that no launcher started: the launched ones must come to the same."""
    rlhf.run(folder, *SFT, f"model.path={base}", "name=undisturbed", ranks=2)
    run = folder / "runs/undisturbed/sft"
    assert logged_steps(run) == STEPS
    return run


@pytest.fixture
def started() -> Iterator[list[Job]]:
    """Jobs to be cleaned up, by their process ids, whatever happened."""
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        kill_tree(job.pids[0])


def ranks_of(job: Job) -> list[int]:
    """Its two ranks, once they have been started."""
    wait_for(lambda: len(children(job.pids[0])) == 2, job)
    return children(job.pids[0])


def end(job: Job, code: int, ranks: list[int]) -> None:
    """The launcher ends with `code`, and takes its ranks with it."""
    job.wait(code)
    assert not any(is_alive(rank) for rank in ranks)


@pytest.mark.slow
def test_signals_and_killed_ranks(folder: Path, base: Path, undisturbed: Path, started: list[Job]) -> None:
    """One run, disturbed four times: SIGTERM, SIGINT, SIGKILL to a rank, SIGKILL to all; it ends as the undisturbed."""
    command = [*SFT, f"model.path={base}", "name=disturbed"]
    run = folder / "runs/disturbed/sft"

    def start() -> tuple[Job, list[int]]:
        job = launched(folder, 2, *command)
        started.append(job)
        return job, ranks_of(job)

    for number, code, until in ((signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 7)):
        job, ranks = start()
        wait_for(lambda until=until: logged_steps(run) >= until, job)
        os.kill(job.pids[0], number)
        end(job, code, ranks)
        assert "stopped with the state saved" in job.output and "Traceback" not in job.output
        assert max(states(run)) == logged_steps(run) < STEPS
    saved = max(states(run))

    job, ranks = start()
    wait_for(lambda: logged_steps(run) >= saved + 2, job)
    os.kill(ranks[1], signal.SIGKILL)
    since = time.monotonic()
    job.wait(*range(1, 256))
    assert time.monotonic() - since < 60
    assert not any(is_alive(rank) for rank in ranks)
    assert max(states(run)) == saved

    job, ranks = start()
    wait_for(lambda: logged_steps(run) >= saved + 1, job)
    for pid in (job.pids[0], *ranks):
        os.kill(pid, signal.SIGKILL)
    job.wait(-signal.SIGKILL)
    wait_for(lambda: not any(is_alive(rank) for rank in ranks))

    job, ranks = start()
    end(job, 0, ranks)
    assert f"resumed after step {saved}" in job.output
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_a_mistake_is_said_once(folder: Path, base: Path, undisturbed: Path) -> None:
    """A run of another identity: found by the ranks, not by the launcher's own check."""
    job = launched(folder, 2, *SFT, f"model.path={base}", "name=undisturbed", "optim.lr=2e-3").wait(2)
    assert job.output.count("optim.lr: was 0.001, is now 0.002") == 1 and "Traceback" not in job.output
