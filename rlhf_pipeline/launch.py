"""Starts one process a rank on this machine, or hands the command to DeepSpeed's launcher for several machines.

The processes of one machine are started here and not by torchrun, which kills after 30 seconds what has not ended on
SIGTERM; a rank that is saving its state may need longer. `torchrun -m rlhf_pipeline ...` works as well.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from rlhf_pipeline.errors import UserError

PEER_DEATH_GRACE = 20.0  # seconds between a rank's failure and the end of the others
POLL = 0.1


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(command: list[str], *, num_processes: int, hostfile: str | None, master_port: int | None) -> int:
    """Run `rlhf <command>` in `num_processes` processes; returns the exit code of the first rank that failed, or 0."""
    try:
        if hostfile is not None:
            return _launch_hosts(command, hostfile=hostfile, master_port=master_port)
        return _launch_here(command, num_processes, master_port or free_port())
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _launch_here(command: list[str], num_processes: int, port: int) -> int:
    from rlhf_pipeline.hydra_bridge import preflight

    if command and not command[0].startswith("-") and command[0] != "launch":
        preflight(command[0], command[1:])  # one message instead of one a rank
    shared = {
        **os.environ,
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    line = [sys.executable, "-m", "rlhf_pipeline", *command]
    ranks = [
        subprocess.Popen(line, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_processes)
    ]

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _watch(ranks)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one fails, give the others a moment to notice, then end them."""
    failed_at: float | None = None
    code = 0
    while any(process.poll() is None for process in ranks):
        bad = [process.returncode for process in ranks if process.poll() not in (None, 0)]
        if bad and failed_at is None:
            failed_at, code = time.monotonic(), bad[0]
        # Ranks that save and leave on a signal all end with 128 + its number, at their own pace.
        if failed_at is not None and code not in (130, 143) and time.monotonic() - failed_at > PEER_DEATH_GRACE:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
        time.sleep(POLL)
    code = code or next((p.returncode for p in ranks if p.returncode), 0)
    return 128 - code if code < 0 else code  # a rank killed by signal n reads as 128 + n, as in a shell


def _launch_hosts(command: list[str], *, hostfile: str, master_port: int | None) -> int:
    if not os.path.isfile(hostfile):
        raise UserError(f"--hostfile {hostfile}: there is no such file; each line reads: <host> slots=<GPUs>")
    launcher = shutil.which("deepspeed", path=os.path.dirname(sys.executable)) or shutil.which("deepspeed")
    if launcher is None:
        raise UserError("--hostfile needs DeepSpeed's launcher, and `deepspeed` is not on the PATH; pip install deepspeed")
    port = ["--master_port", str(master_port)] if master_port else []
    return subprocess.call([launcher, "--hostfile", hostfile, *port, "--module", "rlhf_pipeline", *command])
