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
Command = tuple[list[str], dict[str, str]]  # a process: its command line and its environment
PROGRAM = [sys.executable, "-m", "rlhf_pipeline"]
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Running, done, or saved and left on a signal: ranks do the last one each at its own pace.
NO_FAILURE = (None, 0, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(command: list[str], *, num_processes: int, hostfile: str | None, master_port: int | None) -> int:
    """Run `rlhf <command>` in `num_processes` processes, or as many as the host file says.

    Returns the exit code of the first rank that failed, or 0. The ranks get SIGTERM, SIGINT and SIGHUP passed on.
    """
    from rlhf_pipeline.hydra_bridge import preflight

    try:
        if hostfile is None:
            commands = _on_this_machine(command, num_processes, master_port or free_port())
        else:
            commands = [_on_hosts(command, num_processes=num_processes, hostfile=hostfile, master_port=master_port)]
        preflight(command[0], command[1:])  # one message instead of one a rank
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return _run(commands)


def _on_this_machine(command: list[str], num_processes: int, port: int) -> list[Command]:
    shared = {
        **os.environ,
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    line = [*PROGRAM, *command]
    return [(line, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(num_processes)]


def _on_hosts(command: list[str], *, num_processes: int, hostfile: str, master_port: int | None) -> Command:
    """DeepSpeed's launcher, which starts the ranks over ssh."""
    if not os.path.isfile(hostfile):
        raise UserError(f"--hostfile {hostfile}: there is no such file; each line reads: <host> slots=<GPUs>")
    if num_processes > 1:
        raise UserError("--num-processes: the slots of --hostfile say how many; leave one of them out")
    launcher = shutil.which("deepspeed", path=os.path.dirname(sys.executable)) or shutil.which("deepspeed")
    if launcher is None:
        raise UserError("--hostfile needs DeepSpeed's launcher, and there is no `deepspeed` on the PATH")
    port = ["--master_port", str(master_port)] if master_port else []
    return [launcher, "--hostfile", hostfile, *port, "--module", "rlhf_pipeline", *command], dict(os.environ)


def _run(commands: list[Command]) -> int:
    """Start the processes, pass signals on to them, wait for all."""
    ranks: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in ranks:
            process.send_signal(number)  # does nothing to one that has ended

    heeded = [n for n in FORWARDED if signal.getsignal(n) is not signal.SIG_IGN]  # under nohup a hang-up is not
    previous = {number: signal.signal(number, forward) for number in heeded}
    try:
        for line, environment in commands:
            # A session of its own: a Ctrl-C reaches the ranks once, from here, and not from the terminal as well;
            # a rank that is asked twice leaves without saving.
            ranks.append(subprocess.Popen(line, env=environment, start_new_session=True))
            for number in received:
                ranks[-1].send_signal(number)
        return _watch(ranks)
    finally:
        for process in ranks:
            process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one fails, give the others a moment to notice, then end them."""
    failed_at: float | None = None
    code = 0
    while None in (codes := [process.poll() for process in ranks]):
        if failed_at is None and (failed := [c for c in codes if c not in NO_FAILURE]):
            failed_at, code = time.monotonic(), failed[0]
        if failed_at is not None and time.monotonic() - failed_at > PEER_DEATH_GRACE:
            for process in ranks:
                process.kill()
        time.sleep(POLL)
    code = code or next((c for c in codes if c not in NO_FAILURE), 0) or next((c for c in codes if c), 0)
    return 128 - code if code < 0 else code  # a rank killed by signal n reads as 128 + n, as in a shell
