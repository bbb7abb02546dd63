"""Ranks at their own pace: slow work of one is no time-out of the others, a rank that gives no sign of life is."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
from helpers_ranks import in_ranks


def slow_first(said: Path) -> None:
    """The first rank is four times as long at work as anybody has patience for."""
    from rlhf_pipeline import runtime

    runtime._patience, since = 1.5, time.monotonic()
    with runtime.main_first():
        if runtime.is_main():
            time.sleep(6)
            said.write_text("written")
    assert said.read_text() == "written" and time.monotonic() - since >= 5.9
    with runtime.at_own_pace():
        time.sleep(2.5 * runtime.rank())
    assert runtime.sum_over_ranks({"here": 1.0}) == {"here": 2.0}
    assert time.monotonic() - since >= 8.4


def absent(said: Path) -> None:
    """The second rank is frozen: none of its threads does anything for a while."""
    from rlhf_pipeline import runtime

    runtime._patience = 2.0
    if runtime.rank() == 1:
        other = os.fork()
        if other == 0:
            os.kill(os.getppid(), signal.SIGSTOP)
            time.sleep(7)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.waitpid(other, 0)
        return
    since = time.monotonic()
    with pytest.raises(ConnectionError, match="process 1 has given no sign of life for 2 s"), runtime.at_own_pace():
        pass
    assert 2 < time.monotonic() - since < 6


def failing(said: Path) -> None:
    """What the first rank cannot do, all cannot; and then they go on together."""
    from rlhf_pipeline import runtime
    from rlhf_pipeline.errors import UserError

    for _ in range(3):
        with pytest.raises(UserError, match="no room"), runtime.main_first():
            if runtime.is_main():
                raise UserError("no room")
    assert runtime.sum_over_ranks({"here": 1.0}) == {"here": 2.0}


def limits(said: Path) -> None:
    """Every group that computes has the run's time limit, whoever made it."""
    import torch
    from torch.distributed import distributed_c10d as c10d

    from rlhf_pipeline.config.schema import Dtype, EngineConfig, OptimConfig
    from rlhf_pipeline.engine import Engine

    for stage in range(4):
        module = torch.nn.Linear(4, 4)
        engine = Engine(
            module,
            engine=EngineConfig(zero_stage=stage),
            optim=OptimConfig(lr=1e-3),
            dtype=Dtype.float32,
            device=torch.device("cpu"),
        )
        engine.backward(engine(torch.ones(1, 4)).sum(), last=True)
        engine.step(1e-3)
    groups = list(c10d._world.pg_map)
    found = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    assert len(groups) >= 2 and found == {timedelta(minutes=1)}, found


def everything(said: Path) -> None:
    """In this order: who is given up does not come to the next one."""
    for case in (limits, failing, slow_first, absent):
        case(said)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    in_ranks(everything, tmp_path / "said", ranks=2, folder=tmp_path)
