"""The short plan: a few faults in `make test`, one of every kind among the long tests. `make faults` is the long plan."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from helpers_runs import forks

from faults import stages
from faults.__main__ import table
from faults.faults import FAULTS
from faults.harness import Bench, Result, Trial, tried
from faults.plan import APPLIES, plan

QUICK = [
    ("sft", 1, "kill -9"),
    ("sft", 1, "damaged artifact"),
    ("ppo, served", 1, "dead server"),
]
LONG = [
    ("sft", 2, "one rank killed"),
    ("generate", 2, "one rank frozen"),
    *((next(iter(stages)), max(next(iter(stages.values()))), fault) for fault, stages in APPLIES.items()),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.of(tmp_path_factory.mktemp("faults") / "world", forks())


@pytest.mark.parametrize(
    ("stage", "ranks", "fault"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in LONG)]
)
def test_survived(bench: Bench, stage: str, ranks: int, fault: str) -> None:
    """RLHF_TEST_SEED=<seed> draws the same moment again."""
    if fault == "small file system" and os.geteuid() != 0:
        pytest.skip("a small file system can only be mounted by root")
    seed = int(os.environ.get("RLHF_TEST_SEED") or random.SystemRandom().randrange(10**6))
    print(f"RLHF_TEST_SEED={seed}")
    result = tried(bench, number=0, stage=stage, ranks=ranks, fault=fault, act=FAULTS[fault], seed=seed)
    assert not result.trouble, result.trouble


def shorter(trial: Trial, rng: random.Random) -> None:
    """A run that ends too early, and says that it is done."""
    trial.end(trial.start("train.max_steps=6"), 0)
    trial.compare()


def unclear(trial: Trial, rng: random.Random) -> None:
    """An error whose cause is not told."""
    (trial.folder / "points.py").rename(trial.folder / "kept.py")
    try:
        (trial.folder / "points.py").write_text("import not_there_at_all")
        trial.end(trial.start("model.path=nowhere/at/all"), 0)
    finally:
        (trial.folder / "kept.py").rename(trial.folder / "points.py")


@pytest.mark.parametrize(
    ("act", "said"), [(shorter, "is not what the undisturbed run wrote"), (unclear, "exit code 2")]
)
def test_what_does_not_survive_is_seen(bench: Bench, act: object, said: str) -> None:
    result = tried(bench, number=1, stage="sft", ranks=1, fault="kill -9", act=act, seed=0)  # type: ignore[arg-type]
    assert said in result.trouble
    assert "0/1" in table([result])


def test_the_plan_has_every_pair_once_before_any_comes_twice() -> None:
    pairs = {(fault, stage) for fault, places in APPLIES.items() for stage in places}
    assert {stage for _, stage in pairs} <= stages.stages().keys() and APPLIES.keys() == FAULTS.keys()
    for number in (len(pairs), len(pairs) + 7):
        found = Counter((one.fault, one.stage) for one in plan(number, 3))
        assert found.keys() == pairs and sum(found.values()) == number and max(found.values()) <= 2
    assert plan(40, 3) == plan(40, 3) != plan(40, 4)
    assert all(one.ranks in APPLIES[one.fault][one.stage] for one in plan(300, 1))
    assert {one.stage for one in plan(9, 1, stage="rm")} == {"rm"}


def test_the_table_counts() -> None:
    def of(stage: str, fault: str, trouble: str) -> Result:
        common = {"ranks": 1, "number": 0, "seed": 0, "seconds": 1.0, "struck": True, "told": ""}
        return Result(stage=stage, fault=fault, trouble=trouble, **common)  # type: ignore[arg-type]

    rows = table([of("sft", "clock", ""), of("sft", "clock", "bad"), of("ppo, served", "dead server", "")]).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    place = {name: i for i, name in enumerate(cells[0])}
    clock = next(row for row in cells if row[0] == "clock")
    assert (clock[place["sft"]], clock[place["ppo"]], clock[-1]) == ("1/2", "", "1/2")
    assert cells[-1][place["ppo"]] == "1/1" and cells[-1][-1] == "2/3"


def test_everything_in_the_world_is_made_once(bench: Bench, tmp_path: Path) -> None:
    """Two worlds are the same to the byte, so that a trial can be made again by its number and seed."""
    again = stages.make_world(tmp_path / "world")
    for name in ("prompts.jsonl", "ranked.jsonl", "answers.jsonl", "plain_artifact/model.safetensors"):
        assert (again / name).read_bytes() == (bench.world / name).read_bytes(), name
