"""SIGTERM and SIGINT: the step is finished, the state saved, and the same command goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers_runs import (
    TINY_RUN,
    TINY_SHAPE,
    Forks,
    assert_same_end,
    logged_steps,
    states,
    texts,
    wait_for,
    write_jsonl,
)

# 24 steps, each followed by an evaluation, so that there is time for a signal; no state but the one that it asks for.
TRAIN = [
    "pretrain",
    "data.train=text.jsonl",
    "data.max_length=64",
    "data.heldout_fraction=0.1",
    "batch.tokens=100",
    "train.epochs=3",
    "checkpoint.every=1000",
    "evaluation.every=1",
    *TINY_SHAPE,
    *TINY_RUN,
    "evaluation.sample_tokens=16",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    write_jsonl(folder / "text.jsonl", texts(56))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path, rlhf: Forks) -> Path:
    rlhf.run(folder, *TRAIN, "name=undisturbed")
    return folder / "runs/undisturbed/pretrain"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(
    folder: Path, undisturbed: Path, rlhf: Forks, number: signal.Signals, code: int
) -> None:
    run = folder / f"runs/left_{code}/pretrain"
    job = rlhf.start(folder, *TRAIN, f"name=left_{code}")
    wait_for(lambda: logged_steps(run) >= 3, job)
    job.signal(number)
    job.wait(code)
    assert "stopped with the state saved" in job.output and "Traceback" not in job.output
    assert states(run) == [logged_steps(run)]
    assert 3 <= logged_steps(run) < logged_steps(undisturbed)
    rlhf.run(folder, *TRAIN, f"name=left_{code}")
    assert_same_end(run, undisturbed)


def test_two_signals_at_once_are_one_request(folder: Path, undisturbed: Path, rlhf: Forks) -> None:
    run = folder / "runs/asked_twice/pretrain"
    job = rlhf.start(folder, *TRAIN, "name=asked_twice")
    wait_for(lambda: logged_steps(run) >= 3, job)
    os.kill(job.pids[0], signal.SIGSTOP)  # so that both are there before it looks
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        os.kill(job.pids[0], number)
    job.wait(143, 130)
    assert len(states(run)) == 1
    rlhf.run(folder, *TRAIN, "name=asked_twice")
    assert_same_end(run, undisturbed)
