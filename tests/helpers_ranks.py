"""Runs a function of a test in several processes that are joined in one group, as the ranks of a run are."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_pipeline.launch import free_port

TIMEOUT = 120.0  # seconds


def in_ranks(function: Callable[..., None], *arguments: Any, ranks: int, folder: Path) -> None:
    """`function(*arguments)` in each process. It is found by its name, so it must be one of a module.

    Raises:
        AssertionError: when one does not end well in time; what it wrote is in `folder`/rank-<rank>.log.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(function, arguments, rank, ranks, port, folder)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(TIMEOUT)
        codes = [process.exitcode for process in processes]
        logs = "".join(file.read_text()[-3000:] for file in sorted(folder.glob("rank-*.log")))
        assert codes == [0] * ranks, f"{codes}\n{logs}"
    finally:
        for process in processes:
            process.kill()


def _rank(function: Callable[..., None], arguments: Any, rank: int, ranks: int, port: int, folder: Path) -> None:
    log = os.open(folder / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    from rlhf_pipeline import runtime
    from rlhf_pipeline.config.schema import Device, RuntimeConfig

    process = runtime.start(RuntimeConfig(device=Device.cpu, threads=1))
    runtime.join_process_group(process, timeout_minutes=1)
    function(*arguments)
