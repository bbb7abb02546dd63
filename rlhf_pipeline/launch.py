"""Starts one process a rank, on this machine or on those of a host file, and sees to it that they end together.

The processes are started here and not by torchrun, which kills after 30 seconds what has not ended on SIGTERM; a rank
that is saving its state may need longer. Nor by DeepSpeed's launcher, which needs pdsh, ends a run that gets a signal
with code 1 and perhaps unsaved, and leaves quoting to a remote shell. `torchrun -m rlhf_pipeline ...` works as well.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from rlhf_pipeline import failures
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hosts import SSH_FAILED, check_hosts, orders, read_hostfile

PEER_DEATH_GRACE = 20.0  # seconds between a rank's failure and the end of the others
LAST_ORDER = 5.0  # seconds for a host to end its ranks
POLL = 0.1
PROGRAM = [sys.executable, "-m", "rlhf_pipeline"]
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Running, done, or saved and left on a signal: ranks do the last one each at its own pace.
NO_FAILURE = (None, 0, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process(Protocol):
    """What `watch` looks after."""

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class Part:
    """A process to start: a rank, or the connection to a host that starts some."""

    name: str
    line: list[str]
    environment: dict[str, str] | None = None
    order: str = ""  # for a host's standard input, which stays open: signals go the same way
    process: subprocess.Popen[bytes] | None = None
    ending_since: float | None = None

    def start(self) -> None:
        # A session of its own: a Ctrl-C reaches the ranks once, from here, and not from the terminal as well; a rank
        # that is asked twice leaves without saving.
        pipe = subprocess.PIPE if self.order else None
        self.process = subprocess.Popen(self.line, env=self.environment, stdin=pipe, start_new_session=True)
        self._write(self.order)

    def poll(self) -> int | None:
        """Its exit code, None while it runs, negative for a signal."""
        return None if self.process is None else self.process.poll()

    def send(self, number: int) -> None:
        if self.order:
            self._write(f"{number}\n")
        elif self.process is not None:
            self.process.send_signal(number)  # does nothing to one that has ended

    def kill(self) -> None:
        """SIGKILL, for a host to its ranks; asked again and in vain, to the connection."""
        if self.ending_since is None:
            self.ending_since = time.monotonic()
            self.send(signal.SIGKILL)
        elif self.process is not None and time.monotonic() - self.ending_since > LAST_ORDER:
            self.process.kill()

    def _write(self, text: str) -> None:
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError):  # the connection has ended, which its exit code says
                self.process.stdin.write(text.encode())
                self.process.stdin.flush()


def launch(
    command: list[str],
    *,
    num_processes: int,
    hostfile: str | None,
    master_port: int | None,
    master_addr: str | None = None,
) -> int:
    """Run `rlhf <command>` in `num_processes` processes, or as many as the host file says.

    Returns the exit code of the first part that failed, or 0. The ranks get SIGTERM, SIGUSR1, SIGINT and SIGHUP passed on.
    """
    from rlhf_pipeline.hydra_bridge import preflight

    try:
        if hostfile is not None and num_processes > 1:
            raise UserError("--num-processes: the slots of --hostfile say how many; leave one of them out")
        if hostfile is None and master_addr is not None:
            raise UserError("--master-addr: is for --hostfile; the processes of one machine find each other without")
        hosts = [] if hostfile is None else read_hostfile(hostfile)
        preflight(command[0], command[1:])  # one message instead of one a rank
        if hosts:
            free = check_hosts(hosts)
            parts = [
                Part(name=name, line=line, order=order)
                for name, line, order in orders(hosts, command, address=master_addr, port=master_port or free)
            ]
        else:
            group = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1"}
            group["MASTER_PORT"] = str(master_port or free_port())
            parts = ranks(command, {**os.environ, **group}, count=num_processes)
    except Exception as error:
        return failures.leave(error, f"launch {command[0]}")
    return run(parts)


def ranks(command: list[str], environment: Mapping[str, str], *, count: int, first: int = 0) -> list[Part]:
    """The ranks of this machine, `first` and those after it. The environment has the size and the address of the run."""
    parts = []
    for local in range(count):
        place = {"RANK": str(first + local), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(count)}
        line = [*PROGRAM, *command]
        parts.append(Part(name=f"process {first + local}", line=line, environment={**environment, **place}))
    return parts


def run(parts: list[Part], *, listen: Callable[[Callable[[int], None]], None] | None = None) -> int:
    """Start the processes, pass signals on to them, wait for all; the exit code.

    Args:
        listen: is given what passes a signal on, for those that come by another way.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None = None) -> None:
        received.append(number)
        for part in parts:
            part.send(number)

    heeded = [n for n in FORWARDED if signal.getsignal(n) is not signal.SIG_IGN]  # under nohup a hang-up is not
    previous = {number: signal.signal(number, forward) for number in heeded}
    try:
        if listen is not None:
            listen(forward)
        for part in parts:
            known = len(received)
            part.start()
            for number in received[:known]:
                part.send(number)
        code = watch(parts)
        _tell(parts)
        return 1 if code == SSH_FAILED else code
    finally:
        for part in parts:
            if part.poll() is None:
                part.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def watch(processes: Sequence[Process]) -> int:
    """Wait for all; when one fails, give the others a moment to notice, then end them. Returns the first failure's code."""
    failed_at: float | None = None
    code = 0
    while None in (codes := [process.poll() for process in processes]):
        if failed_at is None and (failed := [c for c in codes if c not in NO_FAILURE]):
            failed_at, code = time.monotonic(), failed[0] or 0
        if failed_at is not None and time.monotonic() - failed_at > PEER_DEATH_GRACE:
            for process in processes:
                process.kill()
        time.sleep(POLL)
    code = code or next((c for c in codes if c not in NO_FAILURE), 0) or next((c for c in codes if c), 0) or 0
    return 128 - code if code < 0 else code  # a rank killed by signal n reads as 128 + n, as in a shell


def _tell(parts: list[Part]) -> None:
    """Say of every part what it could not say itself."""
    for part in parts:
        code = part.poll() or 0
        if code < 0 and part.ending_since is None:
            sys.stderr.write(f"rlhf launch: {part.name} was killed by {signal.Signals(-code).name}\n")
        elif part.order and code == SSH_FAILED:
            sys.stderr.write(f"rlhf launch: {part.name}: the connection has broken off\n")
