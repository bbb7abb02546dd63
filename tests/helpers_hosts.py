"""Machines for the tests of several: an `ssh` and a Slurm that start what they are told to here, and network namespaces."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

# As ssh does it: a clean environment, a home folder, a shell; 255 where a machine is unknown or its program is killed.
# A host that is the address of a network namespace runs in it. Every call is written down.
SSH = """#!/bin/bash
here=$(dirname "$0")
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
host=${1#*@}; shift
printf '%s\\t%s\\n' "$host" "$*" >> "$here/calls"
[[ $host == gone* ]] && { echo "ssh: Could not resolve hostname $host: Name or service not known" >&2; exit 255; }
within=()
[[ -e $here/$host ]] && within=(ip netns exec "$(< "$here/$host")")
cd / && "${within[@]}" env -i PATH="$PATH" HOME="$HOME" bash -c "$*"
code=$?
(( code > 128 && code != 130 && code != 143 )) && code=255
exit $code
"""


def fake_ssh(folder: Path) -> Path:
    """A folder for the PATH; its file `calls` has one line a call: host, tab, command."""
    folder.mkdir()
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    return folder


def calls(folder: Path) -> list[tuple[str, str]]:
    """(host, command) of every call so far."""
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return [(line.partition("\t")[0], line.partition("\t")[2]) for line in lines]


# Starts the job's tasks with Slurm's variables and gives the highest exit code, as srun does. SIGTERM to srun itself would
# kill the tasks; the batch system signals them, here by the process ids that they leave.
SRUN = """#!/bin/bash
here=$(dirname "$0"); options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
echo "${options[*]}" > "$here/srun_options"
per_node=$SLURM_NTASKS_PER_NODE; pids=()
for (( i = 0; i < SLURM_NTASKS; i++ )); do
    SLURM_PROCID=$i SLURM_LOCALID=$(( i % per_node )) SLURM_NODEID=$(( i / per_node )) "$@" &
    pids+=($!)
done
highest=0
for pid in "${pids[@]}"; do
    wait "$pid"; code=$?
    (( code > highest )) && highest=$code
done
exit $highest
"""
SCONTROL = """#!/bin/bash
here=$(dirname "$0")
case "$1 $2" in
    "show hostnames") [[ $3 == "node[1-2]" ]] && cat "$here/hosts";;
    "requeue "*) echo "$2" >> "$here/requeued"; [[ ! -e $here/refuses ]];;
    *) exit 9;;
esac
"""
SBATCH = """#!/bin/bash
here=$(dirname "$0")
number=$(( 100 + $(cat "$here/submitted" 2> /dev/null | wc -l) ))
printf '%s\\n' "$number $(printf '%q ' "$@")" >> "$here/submitted"
echo "$number;cluster"
"""


def fake_slurm(folder: Path, *, hosts: Sequence[str]) -> Path:
    """A folder for the PATH with srun, scontrol and sbatch; node[1-2] are those hosts."""
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "hosts").write_text("".join(f"{host}\n" for host in hosts))
    return folder


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_namespaces() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2 at eth0. Skips where none can be made."""
    names = [f"rlhf_{os.getpid()}_{which}" for which in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            _ip("netns", "del", name)


def pull_cable(name: str) -> None:
    """From here on a namespace neither hears nor says anything."""
    _ip("-n", name, "link", "set", "eth0", "down")
