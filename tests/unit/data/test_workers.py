"""Mapping in several processes: the same results in the same order, errors as if in one, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_pipeline.data.workers import default_workers, map_in_order
from rlhf_pipeline.errors import UserError

ROOT = Path(__file__).parents[3]


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = children()  # of other tests in this process
    yield
    assert children() <= before


def slow_first(item: int) -> tuple[int, int]:
    time.sleep(0.05 if item % 3 == 0 else 0)  # later items are ready before earlier ones
    return item * item, os.getpid()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order(workers: int) -> None:
    found = list(map_in_order(slow_first, range(20), workers=workers))
    assert [value for value, _ in found] == [i * i for i in range(20)]
    pids = {pid for _, pid in found}
    assert pids == {os.getpid()} if workers == 1 else len(pids) == workers and os.getpid() not in pids


def test_few_items_need_no_process() -> None:
    assert {pid for _, pid in map_in_order(slow_first, range(3), workers=2)} == {os.getpid()}
    assert list(map_in_order(slow_first, [], workers=2)) == []


def test_items_are_taken_only_as_they_are_needed() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield i

    mapped = map_in_order(abs, items(), workers=2)
    for _ in range(10):
        next(mapped)
    assert taken <= 10 + 4
    mapped.close()


def fails_at_seven(item: int) -> int:
    if item == 7:
        raise UserError("file:7: wrong")
    if item == 9:
        raise ZeroDivisionError("nine")
    return item


def test_an_error_comes_in_its_turn_and_as_it_is() -> None:
    for workers in (1, 2):
        done = []
        with pytest.raises(UserError, match=r"^file:7: wrong$"):
            for item in map_in_order(fails_at_seven, range(20), workers=workers):
                done.append(item)
        assert done == list(range(7))
    with pytest.raises(ZeroDivisionError) as error:
        list(map_in_order(fails_at_seven, [1, 2, 3, 4, 9], workers=2))
    assert "in fails_at_seven" in str(error.value.__cause__)  # where it was raised


def killed_at_seven(item: int) -> int:
    if item == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_process_that_is_killed_is_reported() -> None:
    with pytest.raises(UserError, match=r"exit code -9.*data\.workers=1"):
        list(map_in_order(killed_at_seven, range(40), workers=2))


SCRIPT = """
import os, sys, time
from rlhf_pipeline.data.workers import map_in_order
def work(item):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece, also when two do it
    time.sleep(60)
try:
    list(map_in_order(work, range(9), workers=2))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_no_process_outlives_ctrl_c() -> None:
    """It goes to all of them, and the first one ends the others."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    process.wait(20)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_idle_process_ends_with_the_first_one() -> None:
    script = SCRIPT.replace("time.sleep(60)", "time.sleep(0.1)").replace("range(9)", "slow()")
    script = script.replace("try:", "def slow():\n    yield from range(5)\n    time.sleep(60)\ntry:")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    pids = {int(process.stdout.readline()) for _ in range(5)}
    process.kill()
    process.wait(20)
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and _state(pid) != "Z" for pid in pids):
        assert time.monotonic() < until, "a process has outlived its parent"
        time.sleep(0.01)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_default_is_what_the_process_may_use() -> None:
    assert default_workers() == len(os.sched_getaffinity(0))
