"""`rlhf launch` with ranks that are small scripts: what they are given, how they end, and what of it comes back."""

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

from rlhf_pipeline import hydra_bridge, launch

PATIENCE = 60.0  # seconds: a busy machine may take long over what takes none

# A rank writes what it was given, then does what the test asks of its number.
RANK = """
import json, os, signal, sys, time
from pathlib import Path

rank = int(os.environ["RANK"])
here = Path(sys.argv[1])
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
signals = []


def save_and_leave(number, frame):
    signals.append(number)
    (here / f"signals_{rank}").write_text(json.dumps(signals))


def wait_for_a_signal(then):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, save_and_leave)
    ready()
    while not signals:
        time.sleep(0.01)
    time.sleep(0.5)  # a second one would come now
    (here / f"left_{rank}").touch()
    sys.exit(then if then is not None else 128 + signals[0])


def ready():
    given = {name: os.environ[name] for name in names}
    part = here / f"part_{rank}"
    part.write_text(json.dumps({"pid": os.getpid(), "arguments": sys.argv[2:], **given}))
    part.rename(here / f"rank_{rank}")
"""


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """ranks(code) makes `launch` start processes that run `code` instead of rlhf; gives the folder they write to."""

    def prepare(code: str) -> Path:
        script = tmp_path / "rank.py"
        script.write_text(RANK + textwrap.dedent(code))
        monkeypatch.setattr(launch, "PROGRAM", [sys.executable, str(script), str(tmp_path)])
        monkeypatch.setattr(hydra_bridge, "preflight", lambda stage, args: None)
        return tmp_path

    return prepare


def start(num_processes: int, *command: str) -> int:
    return launch.launch(list(command) or ["sft"], num_processes=num_processes, hostfile=None, master_port=None)


def given(folder: Path, rank: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"rank_{rank}").read_text())
    return content


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_every_rank_knows_its_place(ranks: Any) -> None:
    folder = ranks("ready()")
    before = dict(os.environ)
    assert start(3, "sft", "name=big", "-m") == 0
    assert dict(os.environ) == before
    for rank in range(3):
        found = given(folder, rank)
        assert (found["RANK"], found["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"], found["MASTER_ADDR"]) == ("3", "3", "127.0.0.1")
        assert found["arguments"] == ["sft", "name=big", "-m"]
    assert len({given(folder, rank)["MASTER_PORT"] for rank in range(3)}) == 1
    assert 1024 <= int(given(folder, 0)["MASTER_PORT"]) <= 65535


def test_port_of_the_users_choice(ranks: Any) -> None:
    folder = ranks("ready()")
    assert launch.launch(["sft"], num_processes=1, hostfile=None, master_port=23456) == 0
    assert given(folder, 0)["MASTER_PORT"] == "23456"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(3 if rank == 1 else 0)", 3),
        ("sys.exit(143)", 143),
        ("sys.exit(5 if rank == 1 else 143)", 5),  # saving failed on one rank: that counts
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None", 137),
    ],
)
def test_exit_code(ranks: Any, code: str, expected: int) -> None:
    ranks(code)
    assert start(2) == expected


def test_death_of_one_rank_ends_the_others(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an out-of-memory kill: the others would wait in a collective until it times out."""
    assert launch.PEER_DEATH_GRACE < 50, "all are to be gone within a minute"
    monkeypatch.setattr(launch, "PEER_DEATH_GRACE", 0.3)
    folder = ranks("""
        ready()
        if rank == 1:
            while not (here / "rank_0").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    """)
    begun = time.monotonic()
    assert start(2) == 137
    assert time.monotonic() - begun < PATIENCE
    assert is_gone(given(folder, 0)["pid"])


def test_rank_that_saves_is_not_hurried(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 leaves with 143 long before rank 1 has saved; that is no failure."""
    monkeypatch.setattr(launch, "PEER_DEATH_GRACE", 0.1)
    folder = ranks("""
        time.sleep(1.0 * rank)
        (here / f"left_{rank}").touch()
        sys.exit(143)
    """)
    assert start(2) == 143
    assert (folder / "left_1").exists()


# Signals need a launcher that is a process of its own.


@pytest.fixture
def launcher(ranks: Any, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """launcher(code) runs `launch` over two ranks in a session of its own, and waits until both are ready."""
    started: list[subprocess.Popen[bytes]] = []

    def run(code: str, **options: Any) -> subprocess.Popen[bytes]:
        ranks(code)
        driver = f"""
            import sys
            from rlhf_pipeline import hydra_bridge, launch
            launch.PROGRAM = {launch.PROGRAM!r}
            hydra_bridge.preflight = lambda stage, args: None
            sys.exit(launch.launch(["sft"], num_processes=2, hostfile=None, master_port=None))
        """
        line = [sys.executable, "-c", textwrap.dedent(driver)]
        started.append(subprocess.Popen(line, start_new_session=True, **options))
        until(lambda: (tmp_path / "rank_0").exists() and (tmp_path / "rank_1").exists())
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
    for rank in range(2):
        if (tmp_path / f"rank_{rank}").exists() and not is_gone(pid := given(tmp_path, rank)["pid"]):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_signal_is_passed_on_and_all_are_waited_for(launcher: Any, tmp_path: Path, number: int, code: int) -> None:
    process = launcher("wait_for_a_signal(then=None)")
    process.send_signal(number)
    assert process.wait(PATIENCE) == code
    for rank in range(2):
        assert (tmp_path / f"left_{rank}").exists()
        assert json.loads((tmp_path / f"signals_{rank}").read_text()) == [number]


def test_ctrl_c_reaches_a_rank_once(launcher: Any, tmp_path: Path) -> None:
    """A terminal signals every process of the foreground; a rank that is asked twice leaves without saving."""
    process = launcher("wait_for_a_signal(then=None)")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    assert [json.loads((tmp_path / f"signals_{rank}").read_text()) for rank in range(2)] == [[2], [2]]


def test_closed_terminal_leaves_no_rank_behind(launcher: Any, tmp_path: Path) -> None:
    process = launcher("ready(); time.sleep(1000)")
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE) == 128 + signal.SIGHUP
    assert all(is_gone(given(tmp_path, rank)["pid"]) for rank in range(2))


def test_nohup(launcher: Any, tmp_path: Path) -> None:
    process = launcher("wait_for_a_signal(then=0)", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert [json.loads((tmp_path / f"signals_{rank}").read_text()) for rank in range(2)] == [[15], [15]]


# What cannot be started


def test_mistake_is_told_once_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "run", lambda parts: pytest.fail("started"))
    assert start(2, "sft", "optim.lrr=1") == 2
    assert capsys.readouterr().err.count("did you mean optim.lr?") == 1
    assert start(2, "stf") == 2
    assert "there is no such stage (did you mean sft?)" in capsys.readouterr().err


def test_command_line_reaches_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags behind the stage are the stage's, and the exit code is the ranks'."""
    from typer.testing import CliRunner

    from rlhf_pipeline.cli import app

    calls: list[tuple[Any, ...]] = []

    def remember(command: list[str], **options: Any) -> int:
        calls.append((command, options))
        return 7

    monkeypatch.setattr(launch, "launch", remember)
    run = CliRunner().invoke(app, ["launch", "--num-processes", "2", "sft", "-m", "seed=1,2", "--cfg", "job"])
    assert run.exit_code == 7
    options = {"num_processes": 2, "hostfile": None, "master_port": None, "master_addr": None}
    assert calls == [(["sft", "-m", "seed=1,2", "--cfg", "job"], options)]


def test_free_port_is_free() -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", launch.free_port()))
