"""A full disk ends a run with a message and exit code 2, keeps what was saved, and harms nothing once there is room."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_runs import (
    TINY_RUN,
    TINY_SHAPE,
    Forks,
    assert_same_end,
    copy_run,
    metrics,
    states,
    texts,
    write_jsonl,
)

TRAIN = [
    "pretrain",
    "data.train=text.jsonl",
    "data.cache_dir=cache",
    "data.max_length=64",
    "data.heldout_fraction=0.1",
    "batch.tokens=130",
    "train.epochs=2",
    "checkpoint.every=4",
    "evaluation.every=4",
    *TINY_SHAPE,
    *TINY_RUN,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    write_jsonl(folder / "text.jsonl", texts(56))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path, rlhf: Forks) -> Path:
    rlhf.run(folder, *TRAIN, "name=undisturbed")
    return folder / "runs/undisturbed/pretrain"


@pytest.fixture(scope="module")
def paused(folder: Path, rlhf: Forks) -> Path:
    """After step 5, one before the epoch's artifact; states 4 and 5."""
    rlhf.run(folder, *TRAIN, "name=paused", "train.stop_after=5")
    return folder / "runs/paused/pretrain"


@pytest.fixture(scope="module")
def changes(folder: Path, paused: Path, rlhf: Forks) -> list[str]:
    """The changes that the rest of the run makes to its files."""
    copy_run(paused, folder / "runs/listed/pretrain")
    job = rlhf.start(folder, *TRAIN, "name=listed", crash=0).wait()
    return re.findall(r"^change \d+: (.*)$", job.output, re.MULTILINE)


def fill_up(rlhf: Forks, folder: Path, undisturbed: Path, paused: Path, changes: list[str], number: int) -> None:
    print(f"full from change {number} on: {changes[number - 1]}")
    run = copy_run(paused, folder / f"runs/full_{number}/pretrain")
    job = rlhf.start(folder, *TRAIN, f"name=full_{number}", full=number).wait(2, 0)
    if job.codes == [0]:  # it had nothing more to make
        assert number > len(changes) - 3
        return
    assert "the disk is full" in job.output and "Traceback" not in job.output, job.output
    assert states(run)
    rlhf.run(folder, *TRAIN, f"name=full_{number}")
    assert_same_end(run, undisturbed)
    shutil.rmtree(run)


@pytest.mark.parametrize("what", [r"open .*step_00000008\.partial/state\.json", "epoch_1.partial/config", "os.link"])
def test_no_room_for(folder: Path, undisturbed: Path, paused: Path, rlhf: Forks, changes: list[str], what: str) -> None:
    number = next(i for i, change in enumerate(changes, 1) if re.search(what, change))
    fill_up(rlhf, folder, undisturbed, paused, changes, number)


@pytest.mark.slow
def test_no_room_from_any_change_on(
    folder: Path, undisturbed: Path, paused: Path, rlhf: Forks, changes: list[str]
) -> None:
    for number in range(1, len(changes) + 1):
        fill_up(rlhf, folder, undisturbed, paused, changes, number)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a small file system can only be mounted by root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# A state takes 340 kB, an artifact 150 kB.
@pytest.mark.parametrize("kilobytes", [0, 40, 400])
def test_a_real_full_disk(
    folder: Path, undisturbed: Path, paused: Path, rlhf: Forks, small_disk: Path, kilobytes: int
) -> None:
    """With no room at all the first line of metrics.jsonl fails, with some the artifact, with more the next state."""
    run = copy_run(paused, small_disk / "runs/full/pretrain")
    before = states(run)
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(b"x" * (free - kilobytes * 1024))
    command = [*TRAIN, "name=full", f"runs={small_disk}/runs"]
    job = rlhf.run(folder, *command, code=2)
    assert "the disk is full" in job.output and "Traceback" not in job.output
    assert set(before) <= set(states(run))
    ballast.unlink()
    again = rlhf.run(folder, *command)
    assert "damaged" not in again.output and "resumed after step" in again.output
    assert_same_end(run, undisturbed)
    assert metrics(run) == metrics(undisturbed)
