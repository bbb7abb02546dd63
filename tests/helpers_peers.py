"""Processes that meet as the ranks of a run do, each a fork of the test's own process that runs one function."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 90.0  # seconds
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended."""

    code: int  # negative: by a signal
    said: str
    seconds: float  # from the start of all


def together(
    acts: Sequence[Callable[[], object] | None],
    *,
    folder: Path,
    address: str = "127.0.0.1",
    port: int,
    namespaces: Sequence[str] = (),
    places: Sequence[dict[str, str]] = (),
) -> list[Ended | None]:
    """Run each function as the rank of its place in the list; None is a rank that is never started.

    Args:
        namespaces: a network namespace for each, which is then a machine of its own.
        places: more of each one's environment.
    """
    import torch.distributed  # noqa: F401 - once, before the forks

    begun = time.monotonic()
    pids: dict[int, int] = {}
    for rank, act in enumerate(acts):
        if act is None:
            continue
        host = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(len(acts))}
        if namespaces:
            host = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RLHF_HOST": f"machine{rank}"}
        group = {"RANK": str(rank), "WORLD_SIZE": str(len(acts)), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        environment = {**group, **host, **(places[rank] if places else {})}
        pids[rank] = os.fork()
        if not pids[rank]:
            _be(act, environment, folder / f"said_{rank}", namespaces[rank] if namespaces else None)
    ended: list[Ended | None] = [None] * len(acts)
    while left := [rank for rank in pids if ended[rank] is None]:
        for rank in left:
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            if pid:
                said = (folder / f"said_{rank}").read_text()
                code = os.waitstatus_to_exitcode(status)
                ended[rank] = Ended(code=code, said=said, seconds=time.monotonic() - begun)
            elif time.monotonic() - begun > TIMEOUT:
                os.kill(pids[rank], signal.SIGKILL)
        time.sleep(0.01)
    return ended


def wait_for_all() -> None:
    """In a process of a run that has met: wait until every other one has come to this line.

    The first process keeps the store, so it is the last to go on: the others have seen that all are here by then.
    """
    from rlhf_pipeline import peers

    store = peers.meet(TIMEOUT)
    size = peers.place().size
    store.add("here", 1)
    while store.add("here", 0) < size or (peers.place().rank == 0 and store.add("seen", 0) < size - 1):
        time.sleep(0.01)
    store.add("seen", 1)


def _be(act: Callable[[], object], environment: dict[str, str], log: Path, namespace: str | None) -> None:
    """In the fork: what `hydra_bridge.run_stage` does around a recipe."""
    code = 99
    try:
        atexit._clear()  # the test process's own
        os.environ.update(environment)
        sink = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(sink, stream)
        if namespace is not None:
            with open(f"/var/run/netns/{namespace}") as file:
                assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) == 0
        import sys

        from rlhf_pipeline import failures, peers

        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # pytest's are the parent's
        try:
            act()
            code = 0
        except Exception as error:
            code = failures.leave(error, "sft", first=peers.is_first())
        atexit._run_exitfuncs()
    finally:
        os._exit(code)
