"""Adapters on two processes: the numbers of one, killed and started again bit for bit, gone on with by other layouts."""

from __future__ import annotations

import random
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
    logged_steps,
    relative_difference,
    series,
    wait_for,
    weights,
    write_jsonl,
)

pytest.importorskip("peft", reason="needs the lora extra")

SLOW = pytest.mark.slow
# 10 steps in 2 epochs, the last of each with one example: one rank has nothing to do there.
SFT = [
    *SFT_ON_FILES,
    "batch.examples=5",
    "batch.row_length=100",
    "train.epochs=2",
    "optim.lr=1e-2",
    "checkpoint.every=3",
    "evaluation.every=5",
    "lora=default",
    "lora.rank=3",  # so that two ranks cut through rows
    "lora.merge=false",
    *TINY_RUN,
]
STEPS, PAUSE = 10, 4
Layout = tuple[int, int]  # processes, ZeRO stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora_ranks")
    write_jsonl(folder / "train.jsonl", dialogues(21, seed=2))
    write_jsonl(folder / "heldout.jsonl", dialogues(5, seed=3))
    return folder


def command(base: Path, name: str, layout: Layout) -> list[str]:
    return [*SFT, f"model.path={base}", f"name={name}", f"engine=zero{layout[1]}"]


def made(rlhf: Forks, folder: Path, base: Path, layout: Layout, *overrides: str, label: str = "undisturbed") -> Path:
    name = f"{label}_{layout[0]}_{layout[1]}"
    run = folder / f"runs/{name}/sft"
    if not run.exists():
        rlhf.run(folder, *command(base, name, layout), *overrides, ranks=layout[0])
    return run


def compare(run: Path, other: Path) -> None:
    assert series(run, "train/loss") == pytest.approx(series(other, "train/loss"), rel=1e-6)
    assert series(run, "train/grad_norm") == pytest.approx(series(other, "train/grad_norm"), rel=1e-5)
    assert relative_difference(weights(run / "artifact"), weights(other / "artifact")) < 1e-6


@pytest.mark.parametrize(
    "layout", [(2, 3), *(pytest.param(one, marks=SLOW) for one in [(2, 0), (2, 1), (2, 2), (3, 3)])]
)
@pytest.mark.slow
def test_the_numbers_of_one_process(folder: Path, base: Path, rlhf: Forks, layout: Layout) -> None:
    """Adapters begin alike on all ranks, and every one of them has a part in the sums."""
    one, run = made(rlhf, folder, base, (1, 1)), made(rlhf, folder, base, layout)
    assert logged_steps(run) == STEPS
    assert series(run, "eval/loss")[-1] < series(run, "eval/loss")[0] - 0.2
    compare(run, one)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 2), (2, 3)])
def test_kill_9_is_not_seen_in_the_end(folder: Path, base: Path, rlhf: Forks, layout: Layout) -> None:
    undisturbed, name = made(rlhf, folder, base, layout), f"killed_{layout[0]}_{layout[1]}"
    run, after = folder / f"runs/{name}/sft", random.SystemRandom().randint(1, STEPS - 3)
    for _ in range(10):  # on a busy machine it may be done before we look
        shutil.rmtree(run, ignore_errors=True)
        job = rlhf.start(folder, *command(base, name, layout), ranks=layout[0])
        wait_for(lambda: logged_steps(run) >= after, job)
        job.signal(signal.SIGKILL)
        job.wait(-signal.SIGKILL, 0)
        if 0 not in job.codes:
            break
    print(f"killed after step {logged_steps(run)}")
    rlhf.run(folder, *command(base, name, layout), ranks=layout[0])
    assert_same_end(run, undisturbed)
    name = "artifact/adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *(
            pytest.param(a, b, marks=SLOW)
            for a, b in [((2, 3), (1, 1)), ((2, 2), (2, 3)), ((1, 1), (2, 3)), ((3, 3), (2, 1))]
        ),
    ],
)
def test_another_layout_goes_on(folder: Path, base: Path, rlhf: Forks, before: Layout, after: Layout) -> None:
    """The frozen weights are found to be the same ones in other partitions."""
    paused = made(rlhf, folder, base, before, f"train.stop_after={PAUSE}", label="paused")
    name = f"moved_{before[0]}_{before[1]}_{after[0]}_{after[1]}"
    run = copy_run(paused, folder / f"runs/{name}/sft")
    job = rlhf.run(folder, *command(base, name, after), ranks=after[0])
    assert f"resumed after step {PAUSE}" in job.output
    compare(run, made(rlhf, folder, base, (1, 1)))


@pytest.mark.parametrize("layout", [(2, 3)])
def test_the_next_stage_begins_where_this_one_ended(folder: Path, base: Path, rlhf: Forks, layout: Layout) -> None:
    run = made(rlhf, folder, base, layout)
    plain = [one for one in SFT if not one.startswith("lora")]
    start = [f"model.path={run / 'artifact'}", "name=after", "train.max_steps=1", "engine=zero3"]
    rlhf.run(folder, *plain, *start, ranks=2)
    first = series(folder / "runs/after/sft", "eval/loss")[0]
    assert first == pytest.approx(series(run, "eval/loss")[-1], abs=1e-5)
