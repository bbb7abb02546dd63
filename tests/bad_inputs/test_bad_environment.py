"""Where a command runs: places it cannot write to, ranks that do not fit, GPUs that are not there, closed streams.

The user of the tests may be root, whom permissions do not bind: cases use what binds root too (a file where a folder
should be, links in circles, /proc), and those with permissions are skipped for root.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_runs import REPOSITORY, dialogues, write_jsonl

from rlhf_pipeline import failures, runtime
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import check_folder, read_object
from rlhf_pipeline.generation.responses import check_writable

Command = Callable[..., str]
Refused = Callable[..., str]
TRAIN = ["sft", "data.train=train.jsonl", "model.path=base", "tracking.progress=false"]
SCORE = ["score", "model.path=base", "data.path=train.jsonl"]


def _file(folder: Path) -> None:
    (folder / "taken").write_text("a file")


def _dangling(folder: Path) -> None:
    (folder / "taken").symlink_to("nowhere")


def _circle(folder: Path) -> None:
    (folder / "taken").symlink_to("taken")


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "taken")


# What stands where a run's folder should be made, in the check that every command makes before it loads anything.
PLACES: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "file": (_file, "taken", ("taken: cannot be made: ", "taken is not a folder", "move it away")),
    "below a file": (_file, "taken/x/y", ("taken/x/y: cannot be made: ", "taken is not a folder")),
    "link to nowhere": (_dangling, "taken/x", ("taken is a link that leads nowhere",)),
    "link in a circle": (_circle, "taken/x", ("taken",)),
    "pipe": (_pipe, "taken", ("taken is not a folder",)),
    "device": (_file, "/dev/null/runs", ("/dev/null/runs: cannot be made: /dev/null is not a folder",)),
    "name too long": (_file, "x" * 300, ("xxx", "File name too long")),
}


@pytest.mark.parametrize("case", PLACES)
def test_place_where_no_folder_can_be(case: str, refused: Refused, tmp_path: Path) -> None:
    make, name, words = PLACES[case]
    make(tmp_path)
    refused(lambda: check_folder(tmp_path / name), *words)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_folder_that_may_not_be_written(refused: Refused, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        refused(lambda: check_folder(tmp_path / "runs"), "runs: cannot be written: no permission in ")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("", ("is a folder; name a file",)),
        ("taken/x.jsonl", ("cannot be written: ",)),
        ("/proc/x.jsonl", ("/proc/x.jsonl: cannot be written: ",)),
        ("taken", ("exists, and this run has not written it",)),
    ],
)
def test_output_that_cannot_be_written(output: str, words: tuple[str, ...], refused: Refused, tmp_path: Path) -> None:
    _file(tmp_path)
    refused(lambda: check_writable(tmp_path / output, new=True), "output=", *words)


# Small files of a run that are not as we wrote them

CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "damaged, not JSON"),
    "cut": (b'{"stage": "sf', "damaged, not JSON"),
    "a list": (b"[]", "damaged, a list where an object should be"),
    "a number": (b"7", "damaged, a int where an object should be"),
    "zeros": (b"\0" * 4096, "damaged, not JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "damaged, not JSON"),
    "deep": (b"[" * 100_000, "damaged, not JSON"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_small_file_that_is_damaged(case: str, refused: Refused, tmp_path: Path) -> None:
    content, reason = CONTENTS[case]
    (tmp_path / "run.json").write_bytes(content)
    refused(lambda: read_object(tmp_path / "run.json", "begin again"), "run.json: ", reason, "begin again")


@pytest.mark.parametrize("make", [_pipe, _circle, _dangling, lambda folder: (folder / "taken").mkdir()])
def test_small_file_that_is_none(make: Callable[[Path], None], refused: Refused, tmp_path: Path) -> None:
    make(tmp_path)
    refused(lambda: read_object(tmp_path / "taken", "begin again"), "taken: cannot be read: ")


# Ranks

RANKS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "rank no number": ({"RANK": "first"}, ("RANK=first: not a number", "rlhf launch")),
    "rank negative": ({"RANK": "-1"}, ("RANK=-1: not a number",)),
    "rank empty": ({"RANK": ""}, ("RANK=: not a number",)),
    "rank in other digits": ({"RANK": "\u0663"}, ("RANK=\u0663: not a number",)),
    "size zero": ({"WORLD_SIZE": "0"}, ("WORLD_SIZE=0: there is at least one process",)),
    "size fraction": ({"WORLD_SIZE": "1.5"}, ("WORLD_SIZE=1.5: not a number",)),
    "rank beyond the size": (
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
        ("RANK=2: must be less than WORLD_SIZE=2",),
    ),
    "local rank beyond the size": (
        {"RANK": "0", "LOCAL_RANK": "9", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
        ("LOCAL_RANK=9: must be less than WORLD_SIZE=2",),
    ),
    "size alone": ({"WORLD_SIZE": "2"}, ("WORLD_SIZE=2: several processes need RANK and MASTER_ADDR and MASTER_PORT",)),
    "no address": ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, ("need MASTER_ADDR too",)),
    "port no number": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "http"},
        ("MASTER_PORT=http: not a port",),
    ),
    "port too large": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "65536"},
        ("MASTER_PORT=65536: not a port",),
    ),
}


@pytest.mark.parametrize("case", RANKS)
def test_ranks_that_do_not_fit(case: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    given, words = RANKS[case]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    refused(runtime.check_place, *words)


@pytest.mark.parametrize(
    ("count", "local_rank", "environment", "words"),
    [
        (0, 0, {}, ("runtime.device=cuda: torch ", "use runtime.device=cpu")),
        (0, 0, {"CUDA_VISIBLE_DEVICES": ""}, ("(CUDA_VISIBLE_DEVICES=)",)),
        (1, 1, {}, ("2 processes on this machine and 1 GPUs that torch sees", "at most 1")),
        (2, 0, {"LOCAL_WORLD_SIZE": "8"}, ("8 processes on this machine and 2 GPUs",)),
    ],
)
def test_gpus_that_are_not_there(
    count: int,
    local_rank: int,
    environment: dict[str, str],
    words: tuple[str, ...],
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(lambda: runtime._check_gpu(local_rank), *words)


# How a failure is told. Each error as a command may meet it: exit code, and the words of the message in their order.

NO_MEMORY = type("OutOfMemoryError", (RuntimeError,), {})  # as torch's is called, which is not imported for this
FAILURES: list[tuple[Exception, int, tuple[str, ...]]] = [
    (UserError("x.jsonl: no such file"), 2, ("x.jsonl: no such file",)),
    (PermissionError(13, "Permission denied", "/a/b"), 1, ("rlhf sft: /a/b: Permission denied. Check the path",)),
    (FileNotFoundError(2, "No such file", b"/a/\xff"), 1, ("rlhf sft: /a/", "No such file or directory")),
    (OSError("something"), 1, ("should not have: OSError: something (",)),
    (BrokenPipeError(32, "Broken pipe"), 1, ("rlhf sft: whatever read the output has gone away",)),
    (MemoryError(), 1, ("rlhf sft: out of memory: no more memory can be had", "batch.row_length")),
    (NO_MEMORY("CUDA out of memory. Tried 2 GiB"), 1, ("out of memory: CUDA out of memory. Tried 2 GiB",)),
    (KeyError("x"), 1, ("something went wrong that should not have: KeyError: 'x' (", "RLHF_TRACEBACK=1", "report it")),
    (AssertionError(), 1, ("should not have: AssertionError (",)),
    (RuntimeError("long " * 10_000), 1, ("RuntimeError: long long", " ... (", "report it")),
    (ValueError("\x1b[2Jred \u202e turned \x00"), 1, (r"ValueError: \x1b[2Jred \u202e turned \x00 (",)),
    (ValueError("half a character \ud800"), 1, ("half a character",)),
    (RuntimeError("https://me:secret@host failed"), 1, ("https://***@host failed",)),
    (UserError("\x1b]0;title\x07 in data"), 2, (r"\x1b]0;title\x07 in data",)),
]


@pytest.mark.parametrize(("error", "code", "words"), FAILURES, ids=lambda value: type(value).__name__)
def test_failure(error: Exception, code: int, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append))
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    assert failures.leave(error, "sft") == code
    (told,) = written
    assert told.endswith("\n") and "Traceback" not in told and len(told) < 3000
    assert failures._UNSEEN.search(told) is None
    at = -1
    for word in words:
        assert (at := told.find(word, at + 1)) >= 0, told


def test_only_failures_are_told_by_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert failures.leave(UserError("the same for all"), "sft", first=False) == 2
    assert capsys.readouterr().err == ""
    assert failures.leave(KeyError("of one"), "sft", first=False) == 1
    assert "KeyError" in capsys.readouterr().err


# Whole commands

COMMANDS: dict[str, tuple[int, list[str], dict[str, str], tuple[str, ...]]] = {
    "runs is a file": (2, [*TRAIN, "runs=taken"], {}, ("taken/default/sft: cannot be made: ", "taken is not a folder")),
    "runs cannot be made": (1, [*TRAIN, "runs=/proc/runs"], {}, ("rlhf sft: /proc/runs", "Check the path")),
    "cache is a file": (1, [*TRAIN, "data.cache_dir=taken"], {}, ("rlhf sft: taken: File exists",)),
    "no GPU": (2, [*TRAIN, "runtime.device=cuda"], {"CUDA_VISIBLE_DEVICES": ""}, ("runtime.device=cuda: torch ",)),
    "rank no number": (2, TRAIN, {"RANK": "x"}, ("RANK=x: not a number",)),
    "size alone": (2, TRAIN, {"WORLD_SIZE": "2"}, ("WORLD_SIZE=2: several processes need RANK",)),
    "no data": (2, [*TRAIN, "data.train=gone.jsonl"], {}, ("gone.jsonl: no such file",)),
    "no model": (2, [*TRAIN, "model.path=./gone"], {}, ("gone",)),
    "data cannot be read": (2, [*SCORE, "data.path=/proc/self/mem"], {}, ("/proc/self/mem: not a kind of file",)),
}


@pytest.fixture
def place(tmp_path: Path, base: Path) -> Path:
    write_jsonl(tmp_path / "train.jsonl", dialogues(8))
    (tmp_path / "base").symlink_to(base)
    _file(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", COMMANDS)
def test_command(case: str, command: Command, place: Path) -> None:
    code, arguments, environment, words = COMMANDS[case]
    command(code, words, *arguments, **environment)


def test_run_folder_that_is_damaged(command: Command, place: Path) -> None:
    run = place / "runs/default/sft"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "run.json").write_text("[1]")
    command(2, ("run.json: damaged, a list where an object should be; choose another name=",), *TRAIN)


def test_port_that_is_taken(command: Command, place: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        words = (f"127.0.0.1:{port}: ", "is taken by another program", "MASTER_PORT")
        place_of_first = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command(1, words, *TRAIN, **place_of_first)


def _shell(folder: Path, line: str, **environment: str) -> Any:
    """A line of a shell, in which "$RLHF" is the command."""
    known = {**os.environ, "RLHF": f"{sys.executable} -m rlhf_pipeline", "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=known, capture_output=True, text=True, timeout=120)


STREAMS: dict[str, tuple[str, int, str]] = {
    "disk full": ("$RLHF sft --cfg job > /dev/full", 1, "No space left on device"),
    "nobody reads": ("$RLHF sft --cfg job | true; exit ${PIPESTATUS[0]}", 1, "whatever read the output has gone away"),
    "no working folder": (
        "mkdir gone; cd gone; rmdir ../gone; $RLHF sft --cfg job -p seed",
        2,
        "started in is gone; go to one",
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_stream(case: str, tmp_path: Path) -> None:
    line, code, words = STREAMS[case]
    ended = _shell(tmp_path, line)
    assert ended.returncode == code and words in ended.stderr and "Traceback" not in ended.stderr, ended
    assert "Exception ignored" not in ended.stderr


def test_closed_streams(tmp_path: Path) -> None:
    ended = _shell(tmp_path, "$RLHF sft optim.lrr=1 >&- 2>&-")
    assert ended.returncode == 2 and ended.stderr == ""
    ended = _shell(tmp_path, "$RLHF sft --cfg job -p seed >&-")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_message_in_a_terminal_without_its_letters(tmp_path: Path) -> None:
    ended = _shell(tmp_path, "$RLHF sft 'näme=1'", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and "is not key=value" in ended.stderr


def test_traceback_where_it_is_asked_for(tmp_path: Path) -> None:
    ended = _shell(tmp_path, "$RLHF sft optim.lrr=1", RLHF_TRACEBACK="1")
    assert ended.returncode == 2 and ended.stderr.startswith("Traceback (most recent call last)")
    assert "did you mean optim.lr?" in ended.stderr
