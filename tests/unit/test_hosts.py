"""`rlhf launch --hostfile`: the host file, the machines that are tried, what each is told, and how all end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_hosts import calls, fake_ssh
from helpers_runs import NO_PLACE, REPOSITORY, is_alive, kill_tree, wait_for

from rlhf_pipeline import hosts, hydra_bridge, launch
from rlhf_pipeline.errors import UserError

SECRET = "hf_abcdefghijklmnopqrstuvwxyz123456"


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = fake_ssh(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1 slots=8\nnode2 slots=4\n", [("node1", 8), ("node2", 4)]),
        ("# mine\n\n me@node1   slots = 2  # the old one\n", [("me@node1", 2)]),
        ("127.0.0.1 slots=1\nfe80::1 slots=1", [("127.0.0.1", 1), ("fe80::1", 1)]),
    ],
)
def test_hostfile(tmp_path: Path, text: str, expected: list[tuple[str, int]]) -> None:
    (tmp_path / "hosts").write_text(text)
    assert [(host.name, host.slots) for host in hosts.read_hostfile(str(tmp_path / "hosts"))] == expected
    assert hosts.Host(name="me@node1", slots=2).address == "node1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no such file; each line reads"),
        (b"\xff\xfe", "cannot be read as text"),
        (b"# nobody\n", "names no host"),
        (b"node1 slots=8\nnode2\n", "hosts:2: 'node2' does not read <host> slots=<processes>"),
        (b"node1 slots=-1\n", "hosts:1: 'node1 slots=-1' does not read"),
        (b"node1 slots=eight\n", "hosts:1: 'node1 slots=eight' does not read"),
        (b"-oProxyCommand=x slots=1\n", "hosts:1: '-oProxyCommand=x slots=1' does not read"),
        (b"node1 slots=0\n", "hosts:1: node1 slots=0: a host without processes"),
        (b"node1 slots=1\nnode1 slots=2\n", "hosts:2: node1 stands there a second time"),
    ],
)
def test_hostfile_that_cannot_be_followed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: bytes | None,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "run", lambda parts: pytest.fail("started"))
    if text is not None:
        (tmp_path / "hosts").write_bytes(text)
    assert launch.launch(["sft"], num_processes=1, hostfile="hosts", master_port=None) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("--hostfile") and said.count("\n") == 1


def test_all_mistakes_of_a_hostfile_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=0\nb\na slots=1\na slots=1\n")
    with pytest.raises(UserError) as error:
        hosts.read_hostfile(str(tmp_path / "hosts"))
    assert [line.rpartition("hosts:")[2][0] for line in str(error.value).splitlines()[1:]] == ["1", "2", "4"]


def start(text: str, *command: str, **options: Any) -> int:
    Path("hosts").write_text(text)
    given = {"num_processes": 1, "hostfile": "hosts", "master_port": None, **options}
    return launch.launch(list(command) or ["sft"], **given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_processes": 2}, "--num-processes: the slots of --hostfile say how many"),
        ({"hostfile": None, "master_addr": "node1"}, "--master-addr: is for --hostfile"),
    ],
)
def test_options_that_do_not_go_together(
    ssh: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], words: str
) -> None:
    assert start("node1 slots=1\n", **options) == 2
    assert capsys.readouterr().err.startswith(words)
    assert not calls(ssh)


@pytest.fixture
def no_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydra_bridge, "preflight", lambda stage, args: None)


def test_hosts_that_cannot_be_used_are_told_at_once(
    ssh: Path, no_preflight: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "run", lambda parts: pytest.fail("started"))
    assert start("gone1 slots=1\n127.0.0.1 slots=1\ngone2 slots=1\n") == 2
    said = capsys.readouterr().err
    assert said.startswith("--hostfile: 2 of 3 hosts cannot be used\n")
    for name in ("gone1", "gone2"):
        reason = f"ssh: Could not resolve hostname {name}: Name or service not known"
        assert f"{name}: cannot be reached by ssh without a password: {reason}\n" in said


def test_host_without_the_program(
    ssh: Path, no_preflight: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/no such/python")
    assert start("127.0.0.1 slots=1\n") == 2
    said = capsys.readouterr().err
    assert "127.0.0.1: every host needs " in said and "/opt/no such/python: No such file" in said


def test_host_that_never_answers(
    ssh: Path, no_preflight: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (ssh / "ssh").write_text("#!/bin/bash\nexec sleep 60\n")
    monkeypatch.setattr(hosts, "CONNECT", 0.2)
    assert start("127.0.0.1 slots=1\n") == 2
    assert "127.0.0.1: cannot be reached by ssh without a password: no answer for 0.4 s" in capsys.readouterr().err


def test_no_ssh(tmp_path: Path, no_preflight: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert start("127.0.0.1 slots=1\n") == 2
    assert capsys.readouterr().err == "--hostfile needs ssh, and there is none on the PATH\n"


def test_a_mistake_is_told_before_any_machine_is_asked(ssh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("127.0.0.1 slots=1\n", "sft", "optim.lrr=1") == 2
    assert capsys.readouterr().err.count("did you mean optim.lr?") == 1
    assert not calls(ssh)


def test_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for name in ("SSH_AUTH_SOCK", "CUDA_VISIBLE_DEVICES", "RANK", "MASTER_ADDR", "TMPDIR", "HOSTNAME", "HOME"):
        monkeypatch.setenv(name, "of this machine")
    two = [hosts.Host(name="me@node1", slots=2), hosts.Host(name="node2", slots=1)]
    command = ["sft", "name=a b", "x='$HOME;*'"]
    (first, line, order), (second, _, other) = hosts.orders(two, command, address=None, port=29500)
    assert (first, second) == ("host me@node1 (process 0 to 1)", "host node2 (process 2)")
    assert line[:2] == ["ssh", "-T"] and line[-2] == "me@node1" and line[-1].endswith("-m rlhf_pipeline.hosts")
    assert SECRET not in " ".join(line)
    told = json.loads(order)
    assert (told["command"], told["count"], told["first"]) == (command, 2, 0)
    assert (json.loads(other)["count"], json.loads(other)["first"]) == (1, 2)
    assert told["environment"]["HF_TOKEN"] == SECRET
    assert "of this machine" not in told["environment"].values()
    where = {name: told["environment"][name] for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RLHF_HOST")}
    assert where == {"WORLD_SIZE": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "RLHF_HOST": "node1"}
    [(_, _, order), _] = hosts.orders(two, command, address="10.0.0.1", port=1)
    assert json.loads(order)["environment"]["MASTER_ADDR"] == "10.0.0.1"


# Ranks that are small scripts, over the whole way: the launcher, ssh, the machine's own launcher, the rank

RANK = """
import json, os, signal, sys, time
from pathlib import Path

rank, here = int(os.environ["RANK"]), Path(os.environ["HERE"])
names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RLHF_HOST", "HF_TOKEN")


def ready():
    told = {"pid": os.getpid(), "parent": os.getppid(), "arguments": sys.argv[1:], "folder": os.getcwd(),
            "input": os.readlink("/proc/self/fd/0")}
    (here / f"part_{rank}").write_text(json.dumps({**told, **{name: os.environ[name] for name in names}}))
    (here / f"part_{rank}").rename(here / f"rank_{rank}")


def wait_for_a_signal():
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))
    ready()
    while not signals:
        time.sleep(0.01)
    time.sleep(0.3)
    (here / f"left_{rank}").write_text(json.dumps(signals))
    sys.exit(143)


"""
# Loaded by Python at its start, before anything of ours runs.
INSTEAD = """
import sys
if "rlhf_pipeline.hosts" in sys.orig_argv:
    from rlhf_pipeline import launch
    launch.PROGRAM = [sys.executable, {rank!r}]
"""


@pytest.fixture
def launcher(ssh: Path, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """launcher(code) runs ranks of that code on two hosts, two on the first and one on the second."""
    started: list[subprocess.Popen[bytes]] = []
    (tmp_path / "hosts").write_text("127.0.0.1 slots=2\nuser@127.0.0.2 slots=1\n")

    def run(code: str) -> subprocess.Popen[bytes]:
        (tmp_path / "rank.py").write_text(RANK + textwrap.dedent(code))
        (tmp_path / "site").mkdir()
        (tmp_path / "site/sitecustomize.py").write_text(INSTEAD.format(rank=str(tmp_path / "rank.py")))
        driver = """
            import sys
            from rlhf_pipeline import hydra_bridge, launch
            hydra_bridge.preflight = lambda stage, args: None
            launch.PEER_DEATH_GRACE, launch.LAST_ORDER = 1.0, 1.0
            command = ["sft", "name=a  b", 'x="$HOME;*"']
            sys.exit(launch.launch(command, num_processes=1, hostfile="hosts", master_port=None))
        """
        environment = {name: value for name, value in os.environ.items() if name not in NO_PLACE}
        environment |= {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{REPOSITORY}", "HERE": str(tmp_path)}
        environment |= {"HF_TOKEN": SECRET}
        with (tmp_path / "said").open("wb") as said:
            line = [sys.executable, "-c", textwrap.dedent(driver)]
            started.append(subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=said, start_new_session=True))
        return started[-1]

    yield run
    for process in started:
        kill_tree(process.pid)
        process.wait()
    for file in tmp_path.glob("rank_*"):
        for name in ("parent", "pid"):
            if is_alive(pid := json.loads(file.read_text())[name]):
                os.kill(pid, signal.SIGKILL)


def given(folder: Path) -> list[dict[str, Any]]:
    """What each rank was given, once all are there."""
    wait_for(lambda: all((folder / f"rank_{rank}").exists() for rank in range(3)), timeout=60)
    return [json.loads((folder / f"rank_{rank}").read_text()) for rank in range(3)]


def test_ranks_of_two_hosts_and_a_signal(launcher: Any, ssh: Path, tmp_path: Path) -> None:
    process = launcher("wait_for_a_signal()")
    ranks = given(tmp_path)
    assert [(r["LOCAL_RANK"], r["LOCAL_WORLD_SIZE"], r["WORLD_SIZE"], r["RLHF_HOST"]) for r in ranks] == [
        ("0", "2", "3", "127.0.0.1"),
        ("1", "2", "3", "127.0.0.1"),
        ("0", "1", "3", "127.0.0.2"),
    ]
    same = {(r["MASTER_ADDR"], r["folder"], r["HF_TOKEN"], r["input"]) for r in ranks}
    assert same == {("127.0.0.1", str(tmp_path), SECRET, "/dev/null")}
    assert len({r["MASTER_PORT"] for r in ranks}) == 1 and ranks[0]["MASTER_PORT"].isdigit()
    assert all(r["arguments"] == ["sft", "name=a  b", 'x="$HOME;*"'] for r in ranks)
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in (process.pid, *(r["parent"] for r in ranks))]
    assert SECRET not in str(calls(ssh)) + "".join(lines)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(90) == 143
    assert [json.loads((tmp_path / f"left_{rank}").read_text()) for rank in range(3)] == [[signal.SIGUSR1]] * 3


def test_the_launching_machine_dies(launcher: Any, tmp_path: Path) -> None:
    """The other machines' ranks save and leave, though nobody can tell them to."""
    process = launcher("wait_for_a_signal()")
    ranks = given(tmp_path)
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_alive(rank[name]) for rank in ranks for name in ("pid", "parent")), timeout=30)
    assert [json.loads((tmp_path / f"left_{rank}").read_text()) for rank in range(3)] == [[signal.SIGTERM]] * 3


def test_a_host_dies(launcher: Any, tmp_path: Path) -> None:
    process = launcher("ready(); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)")
    ranks = given(tmp_path)
    for name in ("parent", "pid"):
        os.kill(ranks[2][name], signal.SIGKILL)
    since = time.monotonic()
    assert process.wait(90) == 1
    assert time.monotonic() - since < 60
    assert not any(is_alive(rank[name]) for rank in ranks for name in ("pid", "parent"))
    assert (
        "rlhf launch: host user@127.0.0.2 (process 2): the connection has broken off" in (tmp_path / "said").read_text()
    )


def test_a_rank_fails_on_another_host(launcher: Any, tmp_path: Path) -> None:
    process = launcher("ready(); time.sleep(1); sys.exit(2 if rank == 2 else time.sleep(1000))")
    ranks = given(tmp_path)
    assert process.wait(90) == 2
    assert not any(is_alive(rank[name]) for rank in ranks for name in ("pid", "parent"))
