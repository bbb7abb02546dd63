"""Scores of several processes: each scores its share, all have all of them, and none goes on where one has failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import ENVIRONMENT, NO_PLACE

from rlhf_pipeline.launch import free_port

RANKS = 2
PROGRAMS = """
import os

seen = []

def length(episodes):
    seen.append([one.response for one in episodes])
    return [len(one.response) for one in episodes]

def half(episodes):
    return [len(one.response) / 2 for one in episodes]

def fails_on_the_second(episodes):
    if os.environ["RANK"] == "1":
        raise ValueError("no answer for me")
    return [0.0] * len(episodes)

def fails_everywhere(episodes):
    raise ValueError("rank " + os.environ["RANK"])
"""
PROCESS = """
import json, sys
from collections import Counter
import programs_here
from rlhf_pipeline import runtime
from rlhf_pipeline.config.ppo import ScorerConfig
from rlhf_pipeline.config.schema import Device, RuntimeConfig
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.scoring.sources import open_sources, score

runtime.join_process_group(runtime.start(RuntimeConfig(device=Device.cpu, threads=1)), timeout_minutes=1)
told = {}
for name, programs, count in json.loads(sys.argv[1]):
    sources = open_sources({p: ScorerConfig(program=f"programs_here:{p}") for p in programs}, device="cpu")
    episodes = [Episode(prompt=(Message("user", "a"),), response="x" * i, finished=True, columns={}, origin="p")
                for i in range(count)]
    programs_here.seen.clear()
    try:
        told[name] = {p: values.tolist() for p, values in score(sources, episodes).items()}
    except UserError as error:
        told[name] = str(error)
    told[name + " seen"] = [len(one) for call in programs_here.seen for one in call]
    if name == "counts":
        source = sources["length"]
        run = lambda given, counts: (counts.update(retries=len(given)), source.run(given, counts))[1]
        import dataclasses
        counts = Counter()
        score({"c": dataclasses.replace(source, run=run)}, episodes, counts=counts)
        told["counts"] = dict(counts)
print(json.dumps(told))
"""
CASES = [
    ("several", ["length", "half"], 7),
    ("fewer than processes", ["length"], 1),
    ("one fails", ["length", "fails_on_the_second"], 4),
    ("after it", ["half"], 3),
    ("both fail", ["fails_everywhere"], 4),
    ("counts", ["length"], 5),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has to tell of the cases, one after the other in one process group."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    (folder / "programs_here.py").write_text(PROGRAMS)
    group = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {k: v for k, v in os.environ.items() if k not in NO_PLACE} | ENVIRONMENT | group
    environment["PYTHONPATH"] += f"{os.pathsep}{folder}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, json.dumps(CASES)],
            cwd=folder,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_every_process_has_all_scores_in_order(told: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        assert told[rank]["several"] == {"length": list(range(7)), "half": [i / 2 for i in range(7)]}
        assert told[rank]["fewer than processes"] == {"length": [0.0]}
    assert [one["several seen"] for one in told] == [[0, 2, 4, 6], [1, 3, 5]]
    assert [one["fewer than processes seen"] for one in told] == [[0], []]


def test_where_one_process_fails_all_do(told: list[dict[str, Any]]) -> None:
    first, second = (one["one fails"] for one in told)
    assert first == second and "ValueError: no answer for me" in first
    assert first.startswith("rewards.fails_on_the_second: program=programs_here:fails_on_the_second: ")
    assert all(one["after it"] == {"half": [0.0, 0.5, 1.0]} for one in told), "and none is left behind"
    first, second = (one["both fail"] for one in told)
    assert first == second and "ValueError: rank 0" in first


def test_counts_are_those_of_all_processes(told: list[dict[str, Any]]) -> None:
    assert [one["counts"] for one in told] == [{"c/retries": 5}] * RANKS
