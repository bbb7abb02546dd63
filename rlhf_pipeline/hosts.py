"""`rlhf launch --hostfile`: the machines of a host file, over ssh.

On each machine runs `python -m rlhf_pipeline.hosts`, which starts its ranks. What it shall do comes on its standard
input, one JSON object a line: first the command with its environment, then signals to pass on. So nothing has to survive
a remote shell's quoting, no secret stands on a command line, and a machine whose connection breaks off knows it: its
ranks then save and leave.

The machines need the same folder and the same Python at the same path, as on a shared file system. Left out: batch systems
(scripts/slurm), which start processes by themselves.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf_pipeline.errors import UserError

CONNECT = 15  # seconds
# A machine that is off or cut off is given up after three unanswered questions.
SSH = ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT}", "-o", "ServerAliveInterval=10"]
SSH += ["-o", "ServerAliveCountMax=3"]
SSH_FAILED = 255  # ssh's own exit code
# What belongs to a machine or a login and is not taken along. All else is, as srun does it.
OF_A_MACHINE = re.compile(
    r"(SSH_|XDG_|DBUS_|TMUX|STY$|DISPLAY$|WAYLAND_|HOME$|USER$|LOGNAME$|MAIL$|SHELL$|HOSTNAME$|HOST$|TMPDIR$|"
    r"PWD$|OLDPWD$|SHLVL$|_$|"
    r"(CUDA|ROCR|HIP)_VISIBLE_DEVICES$|(LOCAL_)?(RANK|WORLD_SIZE|SIZE)$|MASTER_)"
)
FREE_PORT = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine and how many processes it gets."""

    name: str  # as ssh takes it: perhaps user@, perhaps an alias of its config
    slots: int

    @property
    def address(self) -> str:
        return self.name.rpartition("@")[2]


def read_hostfile(path: str) -> list[Host]:
    """Lines `<host> slots=<processes>`, as DeepSpeed and MPI have them; `#` begins a comment.

    Raises:
        UserError: with every mistake.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"--hostfile {path}: there is no such file; each line reads: <host> slots=<GPUs>") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read as text: {error}") from None
    hosts: dict[str, Host] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        found = re.fullmatch(r"([^\s=-][^\s=]*)\s+slots\s*=\s*(\d+)", words, re.ASCII)
        where = f"{path}:{number}"
        if not words:
            continue
        if found is None:
            problems.append(f"{where}: {words!r} does not read <host> slots=<processes>")
        elif not int(found[2]):
            problems.append(f"{where}: {found[1]} slots=0: a host without processes; leave it out")
        elif found[1] in hosts:
            problems.append(f"{where}: {found[1]} stands there a second time; give it all its slots in one line")
        else:
            hosts[found[1]] = Host(name=found[1], slots=int(found[2]))
    if not hosts and not problems:
        problems = [f"{path}: names no host; each line reads: <host> slots=<GPUs>"]
    if problems:
        raise UserError("\n".join(["--hostfile:", *problems]) if len(problems) > 1 else f"--hostfile {problems[0]}")
    return list(hosts.values())


def check_hosts(hosts: list[Host]) -> int:
    """Try every machine, all at once; a port that is free on the first one.

    Raises:
        UserError: with every machine that cannot be used, and why.
    """
    line = f"cd {shlex.quote(os.getcwd())} && exec {shlex.quote(sys.executable)} -c {shlex.quote(FREE_PORT)}"
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        asked = [subprocess.Popen([*SSH, host.name, line], text=True, **pipes) for host in hosts]  # type: ignore[call-overload]
    except FileNotFoundError:
        raise UserError("--hostfile needs ssh, and there is none on the PATH") from None
    problems, answers = [], []
    here = f"{os.getcwd()} and {sys.executable}"
    for host, process in zip(hosts, asked, strict=True):
        try:
            answer, said = process.communicate(timeout=2 * CONNECT)
        except subprocess.TimeoutExpired:
            process.kill()
            answer, said = "", f"no answer for {2 * CONNECT} s"
            process.wait()
        answers.append(answer)
        reason = " ".join(said.split()) or f"exit code {process.returncode}"
        if process.returncode == SSH_FAILED or process.returncode < 0:
            problems.append(f"{host.name}: cannot be reached by ssh without a password: {reason}")
        elif process.returncode:
            problems.append(f"{host.name}: every host needs {here}, at the same paths: {reason}")
    if problems:
        raise UserError("\n".join([f"--hostfile: {len(problems)} of {len(hosts)} hosts cannot be used", *problems]))
    words = answers[0].split()  # a login may greet
    if not words or not words[-1].isdigit():
        raise UserError(f"--hostfile: {hosts[0].name}: answers with {answers[0]!r} where a port's number should be")
    return int(words[-1])


def orders(
    hosts: list[Host], command: list[str], *, address: str | None, port: int
) -> list[tuple[str, list[str], str]]:
    """For each host: what to call it, the local command line, and the first line for its standard input."""
    environment = {name: value for name, value in os.environ.items() if not OF_A_MACHINE.match(name)}
    path = f"PYTHONPATH={shlex.quote(environment['PYTHONPATH'])} " if "PYTHONPATH" in environment else ""
    line = f"cd {shlex.quote(os.getcwd())} && {path}exec {shlex.quote(sys.executable)} -m rlhf_pipeline.hosts"
    size = sum(host.slots for host in hosts)
    found: list[tuple[str, list[str], str]] = []
    first = 0
    for host in hosts:
        order = {
            "command": command,
            "count": host.slots,
            "first": first,
            "environment": {
                **environment,
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": address or hosts[0].address,
                "MASTER_PORT": str(port),
                "RLHF_HOST": host.address,
            },
        }
        last = first + host.slots - 1
        name = f"host {host.name} (process {first}{f' to {last}' if last > first else ''})"
        found.append((name, [*SSH, host.name, line], json.dumps(order) + "\n"))
        first += host.slots
    return found


def main() -> int:
    """On a machine of the file: start its ranks, and do what else is told; the ranks' exit code."""
    from rlhf_pipeline import launch

    told = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a rank that reads its input must not find orders there
    order = json.loads(told.readline())
    environment = {**os.environ, **order["environment"]}
    parts = launch.ranks(order["command"], environment, count=order["count"], first=order["first"])

    def listen(forward: Callable[[int], None]) -> None:
        def until_end() -> None:
            for line in told:
                forward(int(line))
            forward(signal.SIGTERM)  # the connection has gone: save and leave

        threading.Thread(target=until_end, daemon=True).start()

    return launch.run(parts, listen=listen)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the listening thread holds the lock of what it reads, which the interpreter would wait for
