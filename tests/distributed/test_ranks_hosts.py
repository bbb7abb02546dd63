"""Runs over several machines, as far as one can play them: loopback addresses and network namespaces.

What dies, what is cut off and what never comes is told within a minute, and the same command ends as if nothing had been.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_hosts import calls, fake_slurm, fake_ssh, pull_cable, two_namespaces
from helpers_peers import Ended, together, wait_for_all
from helpers_runs import (
    ENVIRONMENT,
    NO_PLACE,
    REPOSITORY,
    SFT_ON_FILES,
    TINY_RUN,
    Forks,
    Job,
    assert_same_end,
    children,
    is_alive,
    kill_tree,
    logged_steps,
    program,
    states,
    wait_for,
)

from rlhf_pipeline import peers, peers_hub
from rlhf_pipeline.launch import free_port

MINUTE = 60.0
SECRET = "hf_abcdefghijklmnopqrstuvwxyz123456"
# 12 steps, each followed by an evaluation with samples, so that there is time to disturb it.
SFT = [
    *SFT_ON_FILES,
    "batch.examples=6",
    "train.epochs=2",
    "optim.lr=1e-3",
    "checkpoint.every=3",
    "evaluation.every=1",
    *TINY_RUN,
    "evaluation.sample_tokens=16",
]
STEPS = 12


# Without a model: who has gone, over a cable that is pulled


@pytest.fixture
def namespaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Two machines with a cable; each asks after the other more often than in earnest."""
    quick = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 3000}
    monkeypatch.setattr(peers_hub, "PROBES", quick)
    monkeypatch.setattr(peers, "GRACE", 0.5)
    with two_namespaces() as names:
        yield names


def _said(ended: Ended | None) -> str:
    assert ended is not None and ended.code == 1 and "Traceback" not in ended.said, ended
    return ended.said


def test_a_machine_is_cut_off(namespaces: list[str], tmp_path: Path) -> None:
    """No connection is ever closed, as where the power fails: only silence tells it."""

    def computes() -> None:
        peers.meet(20)
        wait_for_all()
        if peers.place().rank == 1:
            (tmp_path / "met").touch()
        time.sleep(MINUTE)

    def cut_off() -> None:
        wait_for(lambda: (tmp_path / "met").exists(), timeout=MINUTE)
        pull_cable(namespaces[1])

    puller = os.fork()
    if not puller:
        try:
            cut_off()
        finally:
            os._exit(0)
    ended = together([computes] * 2, folder=tmp_path, address="10.77.0.1", port=29500, namespaces=namespaces)
    os.waitpid(puller, 0)
    words = "has not answered for 3 s: the machine is off, frozen or cut off"
    assert f"process 1 on machine1 {words}" in _said(ended[0])
    assert f"process 0 on machine0 {words}" in _said(ended[1])
    assert all(one is not None and one.seconds < 30 for one in ended)


def test_the_first_machine_does_not_answer(namespaces: list[str], tmp_path: Path) -> None:
    pull_cable(namespaces[0])
    acts: list[Callable[[], object] | None] = [lambda: peers.meet(5)] * 2
    first, second = together(acts, folder=tmp_path, address="10.77.0.1", port=29500, namespaces=namespaces)
    assert "10.77.0.1:29500: 1 of 2 processes did not come within 5 s" in _said(first)
    for words in ("10.77.0.1:29500", "process 0 does not answer", "process 1 on machine1 has tried for 5 s"):
        assert words in _said(second)


# The product


@pytest.fixture(scope="module")
def undisturbed(folder: Path, base: Path, rlhf: Forks) -> Path:
    """Two processes of one machine."""
    rlhf.run(folder, *SFT, f"model.path={base}", "name=undisturbed", ranks=2)
    assert logged_steps(folder / "runs/undisturbed/sft") == STEPS
    return folder / "runs/undisturbed/sft"


def test_one_of_two_processes_dies(folder: Path, base: Path, undisturbed: Path, rlhf: Forks) -> None:
    """No launcher is there to end the other one, as under a batch system."""
    command = [*SFT, f"model.path={base}", "name=died"]
    run = folder / "runs/died/sft"
    job = rlhf.start(folder, *command, ranks=2)
    wait_for(lambda: logged_steps(run) >= 4, job)
    job.signal(signal.SIGKILL, rank=1)
    since = time.monotonic()
    job.wait(1, -signal.SIGKILL)
    assert time.monotonic() - since < MINUTE
    assert "process 1 on" in job.output and "has gone without a word" in job.output
    assert "the same command goes on from the last saved state" in job.output and "Traceback" not in job.output
    assert states(run) and logged_steps(run) < STEPS
    rlhf.run(folder, *command, ranks=2)
    assert_same_end(run, undisturbed)


def test_a_port_that_is_taken_and_a_process_that_never_comes(folder: Path, base: Path, rlhf: Forks) -> None:
    command = [*SFT, f"model.path={base}", "name=alone", "runtime.rendezvous_seconds=3"]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        job = rlhf.run(folder, *command, code=1, MASTER_PORT=str(port), **place)
        assert f"rlhf sft: 127.0.0.1:{port}: port {port} is taken" in job.output and "Traceback" not in job.output
    job = rlhf.run(folder, *command, code=1, MASTER_PORT=str(free_port()), **place)
    assert "1 of 2 processes did not come within 3 s" in job.output and "Traceback" not in job.output
    assert not (folder / "runs/alone/sft/metrics.jsonl").exists()


@pytest.fixture
def started() -> Iterator[list[Job]]:
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        for pid in _descendants(job.pids[0]):
            if is_alive(pid):
                kill_tree(pid)


def _descendants(pid: int) -> list[int]:
    return [pid, *(one for child in children(pid) for one in _descendants(child))]


def _ranks(job: Job, count: int = 2) -> dict[int, int]:
    """The process ids of the ranks below a launcher, by rank."""

    def found() -> dict[int, int]:
        ids = _ranks_below(job.pids[0])
        return ids if len(ids) == count else {}

    return wait_for(found, job)  # type: ignore[no-any-return]


def _ranks_below(launcher: int) -> dict[int, int]:
    ids = {}
    for pid in _descendants(launcher):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((int(one[5:]) for one in environment if one.startswith(b"RANK=")), None)
        if rank is not None and b"rlhf_pipeline" in line and b"sft" in line:
            ids[rank] = pid
    return ids


@pytest.mark.slow
def test_a_run_of_two_hosts(
    folder: Path, base: Path, undisturbed: Path, started: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop, then a host killed, then left alone: it ends as two processes of one machine do."""
    ssh = fake_ssh(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{ssh}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    command = ["launch", "--hostfile", "hosts", *SFT, f"model.path={base}", "name=on_hosts"]
    run = folder / "runs/on_hosts/sft"

    def start() -> Job:
        started.append(program(folder, *command))
        return started[-1]

    job = start()
    ranks = _ranks(job)
    wait_for(lambda: logged_steps(run) >= 2, job)
    everywhere = [Path(f"/proc/{pid}/cmdline").read_text() for pid in _descendants(job.pids[0])]
    assert SECRET not in "".join(everywhere) + str(calls(ssh))
    assert SECRET in Path(f"/proc/{ranks[1]}/environ").read_text()
    job.signal(signal.SIGTERM)
    job.wait(143)
    assert "stopped with the state saved" in job.output and not any(map(is_alive, ranks.values()))
    saved = max(states(run))

    job = start()
    ranks = _ranks(job)
    wait_for(lambda: logged_steps(run) >= saved + 2, job)
    for pid in (int(Path(f"/proc/{ranks[1]}/stat").read_text().rpartition(")")[2].split()[1]), ranks[1]):
        os.kill(pid, signal.SIGKILL)
    since = time.monotonic()
    job.wait(1)
    assert time.monotonic() - since < MINUTE and not any(map(is_alive, ranks.values()))
    assert "process 1 on 127.0.0.2 has gone without a word" in job.output and "Traceback" not in job.output
    assert "host 127.0.0.2 (process 1): the connection has broken off" in job.output

    start().wait(0)
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_a_host_is_cut_off(
    folder: Path, base: Path, undisturbed: Path, started: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each host in a network of its own, and the cable between them pulled."""
    ssh = fake_ssh(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{ssh}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    command = ["launch", "--hostfile", "two", *SFT, f"model.path={base}", "name=cut_off"]
    (folder / "two").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    run = folder / "runs/cut_off/sft"
    for cut in (True, False):
        with two_namespaces() as names:
            for number, name in enumerate(names, 1):
                (ssh / f"10.77.0.{number}").write_text(name)
            job = program(folder, *command)
            started.append(job)
            if not cut:
                job.wait(0)
                break
            ranks = _ranks(job)
            wait_for(lambda: logged_steps(run) >= 4, job)
            pull_cable(names[1])
            since = time.monotonic()
            job.wait(1)
            assert time.monotonic() - since < MINUTE and not any(map(is_alive, ranks.values()))
            for rank in (0, 1):
                assert f"process {rank} on 10.77.0.{rank + 1} has not answered for 30 s" in job.output
            assert "Traceback" not in job.output and logged_steps(run) < STEPS
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_a_job_whose_time_is_up(folder: Path, base: Path, undisturbed: Path, tmp_path: Path) -> None:
    """scripts/slurm/train.sbatch as Slurm would run it, twice: saved and put back into the queue, then finished."""
    slurm = fake_slurm(tmp_path / "bin", hosts=("127.0.0.1", "127.0.0.2"))
    (tmp_path / "rlhf").write_text(f'#!/bin/bash\nexec {sys.executable} -m rlhf_pipeline "$@"\n')
    (tmp_path / "rlhf").chmod(0o755)
    job = {"JOB_ID": str(free_port() % 10_000), "JOB_NODELIST": "node[1-2]", "NTASKS": "2", "NTASKS_PER_NODE": "1"}
    environment = {name: value for name, value in os.environ.items() if name not in NO_PLACE} | ENVIRONMENT
    environment |= {f"SLURM_{name}": value for name, value in job.items()} | {"RLHF": str(tmp_path / "rlhf")}
    environment["PATH"] = f"{slurm}{os.pathsep}{environment['PATH']}"
    line = ["bash", str(REPOSITORY / "scripts/slurm/train.sbatch"), *SFT, f"model.path={base}", "name=slurm"]
    run = folder / "runs/slurm/sft"
    for time_is_up in (True, False):
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(line, cwd=folder, env=environment, stdout=log, stderr=log)
        if time_is_up:
            wait_for(lambda: logged_steps(run) >= 3)
            for pid in _ranks_below(process.pid).values():
                os.kill(pid, signal.SIGTERM)
        assert process.wait(300) == (143 if time_is_up else 0), (tmp_path / "log").read_text()
    assert (slurm / "requeued").read_text() == f"{job['JOB_ID']}\n"
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_two_torchruns(folder: Path, base: Path, undisturbed: Path) -> None:
    """A launcher a machine, each told its number by hand, at addresses of their own."""
    port, logs = free_port(), [folder / f"torchrun_{number}" for number in (0, 1)]
    environment = {name: value for name, value in os.environ.items() if name not in NO_PLACE} | ENVIRONMENT
    processes = []
    for number, log in enumerate(logs):
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)]
        line += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
        line += ["--local-addr", f"127.0.0.{number + 1}", "-m", "rlhf_pipeline"]
        line += [*SFT, f"model.path={base}", "name=torchrun"]
        with log.open("wb") as sink:
            processes.append(subprocess.Popen(line, cwd=folder, env=environment, stdout=sink, stderr=sink))
    try:
        assert [process.wait(300) for process in processes] == [0, 0], [log.read_text() for log in logs]
    finally:
        for process in processes:
            process.terminate()
    assert_same_end(folder / "runs/torchrun/sft", undisturbed)
    assert json.loads((folder / "runs/torchrun/sft/run.json").read_text())["stage"] == "sft"
