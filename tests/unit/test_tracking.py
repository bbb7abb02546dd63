"""Tracking: the files of a run, the mirrors (real wandb and TensorBoard), the display, redaction.

wandb runs in subprocesses: it keeps one service and one set of settings for a whole process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import rlhf_pipeline
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.tracking import Tracker, open_tracker, read_metrics, read_samples, redact, redact_text
from rlhf_pipeline.tracking import records as records_module
from rlhf_pipeline.tracking import tracker as tracker_module
from rlhf_pipeline.tracking.display import Lines, clock, describe, printable
from rlhf_pipeline.tracking.mirrors import WandbMirror
from rlhf_pipeline.tracking.records import cut_back
from rlhf_pipeline.tracking.sinks import Metrics, Sink

REPOSITORY = Path(rlhf_pipeline.__file__).parents[1]
HEX40 = "0123456789abcdef0123456789abcdef01234567"
HF_TOKEN = "hf_" + "aB3" * 11

# A run of 8 steps with an evaluation every second step. Arguments: run directory, restored step or "none", the
# step at which it kills itself as `kill -9` would (0: never), wandb mode.
DRIVER = """
import os, signal, sys
from pathlib import Path
from rlhf_pipeline.tracking import open_tracker

run_dir, restored, killed_at, mode = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
restored_step = None if restored == "none" else int(restored)
with open_tracker(
    run_dir=run_dir, name="demo", stage="sft", config={"lr": 0.1, "hub": {"token": "hf_" + "aB3" * 11}},
    wandb=mode, wandb_project="tests", wandb_entity=None, tensorboard=False, progress=True,
    restored_step=restored_step, is_main=True,
) as tracker:
    for step in range((restored_step or 0) + 1, 9):
        tracker.log(step, {"train/loss": 1 / step, "time/tokens_per_second": 100.0})
        tracker.progress(step, 8)
        if step % 2 == 0:
            tracker.log(step, {"eval/loss": 2 / step})
            tracker.samples(step, [{"prompt": "hello", "response": f"answer {step}"}])
            tracker.sync()
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
    tracker.summary({"eval/loss": 0.25})
"""


def open_plain(run_dir: Path, *, restored_step: int | None = None, progress: bool = False) -> Tracker:
    return open_tracker(
        run_dir=run_dir,
        name="demo",
        stage="sft",
        config={},
        wandb="disabled",
        wandb_project="tests",
        wandb_entity=None,
        tensorboard=False,
        progress=progress,
        restored_step=restored_step,
        is_main=True,
    )


def log_steps(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log(step, {"train/loss": 1.0 / step, "time/seconds": float(os.urandom(1)[0])})
        tracker.samples(step, [{"prompt": "a", "response": str(step)}])


def clean_environment(tmp_path: Path, **extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY), **extra}


def drive(tmp_path: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        env=clean_environment(tmp_path, **extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- the files of a run


def test_metrics_file_holds_one_flat_object_a_line(tmp_path: Path) -> None:
    with open_plain(tmp_path) as tracker:
        tracker.log(1, {"train/loss": 0.5, "train/tokens": 7})
        # visible at once, not only after closing: a killed run keeps what it logged
        first = json.loads((tmp_path / "metrics.jsonl").read_text())
        tracker.log(1, {"eval/loss": 0.25})
    assert first.pop("time/elapsed") >= 0
    assert first == {"step": 1, "train/loss": 0.5, "train/tokens": 7}
    assert read_metrics(tmp_path / "metrics.jsonl", timings=False) == [
        {"step": 1, "train/loss": 0.5, "train/tokens": 7},
        {"step": 1, "eval/loss": 0.25},
    ]


def test_non_finite_values_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with open_plain(tmp_path) as tracker:
        tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1 + 0.2})
        tracker.summary({"a": math.nan})
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(line, parse_constant=refuse)
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse) == {"a": "nan"}
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 0.1 + 0.2)


def test_two_logs_compare_equal_without_timings_even_with_nan(tmp_path: Path) -> None:
    rows = []
    for name, seconds in (("first", 1.0), ("second", 2.0)):
        with open_plain(tmp_path / name) as tracker:
            tracker.log(1, {"train/loss": math.nan, "time/seconds": seconds})
        rows.append(read_metrics(tmp_path / name / "metrics.jsonl", timings=False))
    assert rows[0] == rows[1]
    assert read_metrics(tmp_path / "first" / "metrics.jsonl")[0]["time/seconds"] == 1.0


def test_resumed_run_leaves_the_files_of_an_undisturbed_one(tmp_path: Path) -> None:
    with open_plain(tmp_path / "undisturbed") as tracker:
        log_steps(tracker, range(1, 7))
    broken = tmp_path / "broken"
    with open_plain(broken) as tracker:
        log_steps(tracker, range(1, 5))
        tracker.summary({"done": False})
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')  # killed in the middle of a line
    with open_plain(broken, restored_step=3) as tracker:
        assert [row["step"] for row in read_metrics(broken / "metrics.jsonl")] == [1, 2, 3]
        assert not (broken / "summary.json").exists()
        log_steps(tracker, range(4, 7))
    for run in ("undisturbed", "broken"):
        assert len(read_metrics(tmp_path / run / "metrics.jsonl")) == 6
    assert read_metrics(broken / "metrics.jsonl", timings=False) == read_metrics(
        tmp_path / "undisturbed" / "metrics.jsonl", timings=False
    )
    assert (broken / "samples.jsonl").read_bytes() == (tmp_path / "undisturbed" / "samples.jsonl").read_bytes()


def test_elapsed_counts_earlier_sessions(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/elapsed": 100.5}\n{"step": 2, "time/elapsed": 300}\n')
    with open_plain(tmp_path, restored_step=1) as tracker:
        tracker.log(2, {"train/loss": 1.0})
    assert 100.5 <= read_metrics(tmp_path / "metrics.jsonl")[-1]["time/elapsed"] < 160


def test_new_run_starts_with_empty_files(tmp_path: Path) -> None:
    with open_plain(tmp_path) as tracker:
        log_steps(tracker, range(1, 3))
    with open_plain(tmp_path, restored_step=None):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


def test_cut_back_keeps_bytes_and_drops_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step":1,   "odd":"spacing"}\n{"step": 2}\n'
    path.write_bytes(kept + b'\x00\x00\x00\n{"step": 3}\n[1]\n{"nostep": 1}\n{"step": 2')
    assert cut_back(path, restored_step=2) == 5
    assert path.read_bytes() == kept
    before = path.stat()
    assert cut_back(path, restored_step=2) == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert cut_back(tmp_path / "absent.jsonl", restored_step=2) == 0
    path.write_bytes(kept + b'{"step": 2}')  # whole but for its end: the next line would be glued to it
    assert cut_back(path, restored_step=2) == 1
    assert path.read_bytes() == kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_crash_while_cutting_back_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    old = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(old)
    synced: list[int] = []
    real_fsync = os.fsync

    def record_fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        real_fsync(descriptor)

    def crash(source: Path, target: Path) -> None:
        assert synced == [len(b'{"step": 1}\n')], "the new content must be on disk before the rename"
        raise KeyboardInterrupt

    monkeypatch.setattr(records_module.os, "fsync", record_fsync)
    monkeypatch.setattr(records_module.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        cut_back(path, restored_step=1)
    assert path.read_bytes() == old


def test_reader_skips_a_torn_end_and_names_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "tr')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged: b'nonsense"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"No absent\.jsonl in .* logged a step"):
        read_metrics(tmp_path / "absent.jsonl")


def test_samples_survive_any_text(tmp_path: Path) -> None:
    texts = ["line\nbreak", "\u2028 separator", "\x1b[31mred", "\ud800 lone surrogate", "nan", "\u4f60\u597d"]
    with open_plain(tmp_path) as tracker:
        tracker.samples(3, [{"prompt": text, "response": text} for text in texts])
    assert read_samples(tmp_path / "samples.jsonl") == [{"step": 3, "prompt": text, "response": text} for text in texts]


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    with open_plain(tmp_path) as tracker:
        tracker.log(1, {"a": 1.0})
        monkeypatch.setattr(
            records_module.os, "fsync", lambda fd: synced.add(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        )
        tracker.sync()
    assert synced == {"metrics.jsonl", "samples.jsonl"}


def test_step_is_not_a_metric_and_not_a_column(tmp_path: Path) -> None:
    with open_plain(tmp_path) as tracker:
        with pytest.raises(ValueError, match="'step' is not a metric"):
            tracker.log(1, {"step": 2.0})
        with pytest.raises(ValueError, match="'step' is not a column"):
            tracker.samples(1, [{"step": "2"}])


def test_other_processes_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    tracker = open_tracker(
        run_dir=run_dir,
        name="demo",
        stage="sft",
        config={},
        wandb="online",
        wandb_project="tests",
        wandb_entity=None,
        tensorboard=True,
        progress=True,
        restored_step=None,
        is_main=False,
    )
    with tracker:
        tracker.progress(1, 2)
        tracker.log(1, {"train/loss": 1.0})
        tracker.samples(1, [{"prompt": "a", "response": "b"}])
        tracker.info("hello")
        tracker.warn("hello")
        tracker.summary({})
        tracker.sync()
    assert not run_dir.exists()
    assert capfd.readouterr() == ("", "")


def test_imports_stay_cheap(tmp_path: Path) -> None:
    script = """
import sys
import rlhf_pipeline.tracking
from pathlib import Path
with rlhf_pipeline.tracking.open_tracker(
    run_dir=Path(sys.argv[1]), name="a", stage="b", config={}, wandb="disabled", wandb_project="",
    wandb_entity=None, tensorboard=False, progress=True, restored_step=None, is_main=True,
) as tracker:
    tracker.progress(1, 2)
    tracker.log(1, {"a": 1.0})
print(sorted({"wandb", "tensorboard", "torch", "rich", "numpy"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    out = subprocess.run(command, env=clean_environment(tmp_path), capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"


# --- mirrors that fail, and the display


class Listener(Sink):
    """Keeps what it is told, and raises when asked to."""

    name = "listener"

    def __init__(self, *, broken: bool = False, essential: bool = False) -> None:
        self.is_essential = essential
        self.broken = broken
        self.steps: list[int] = []
        self.messages: list[str] = []
        self.progresses: list[tuple[int, int, float | None]] = []
        self.closed: list[bool] = []

    def log(self, step: int, metrics: Metrics) -> None:
        if self.broken:
            raise ConnectionResetError("lost\nthe server")
        self.steps.append(step)

    def progress(self, step: int, total: int, eta_seconds: float | None) -> None:
        self.progresses.append((step, total, eta_seconds))

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)


def test_broken_mirror_is_dropped_with_one_warning() -> None:
    good, bad = Listener(), Listener(broken=True)
    with Tracker([bad, good]) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"a": 1.0})
    assert good.steps == [1, 2, 3]
    assert good.messages == [
        "warning: listener failed and is off from here: ConnectionResetError: lost the server."
        " Everything is still in metrics.jsonl."
    ]
    assert (good.closed, bad.closed) == ([False], [True])


def test_broken_record_stops_the_run() -> None:
    with pytest.raises(ConnectionResetError), Tracker([Listener(broken=True, essential=True)]) as tracker:
        tracker.log(1, {"a": 1.0})


def test_closing_tells_whether_the_run_failed() -> None:
    listener = Listener()
    with pytest.raises(KeyboardInterrupt), Tracker([listener]) as tracker:
        raise KeyboardInterrupt
    tracker.close()
    assert listener.closed == [True]


def test_eta_follows_the_recent_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tracker_module.time, "monotonic", lambda: now[0])
    listener = Listener()
    tracker = Tracker([listener])
    for step in range(11, 14):  # resumed at step 10: earlier steps must not count as this session's speed
        tracker.progress(step, 20)
        now[0] += 2.0
    assert listener.progresses == [(11, 20, None), (12, 20, 16.0), (13, 20, 14.0)]
    for step in range(14, 120):
        tracker.progress(step, 200)
        now[0] += 10.0
    assert listener.progresses[-1] == (119, 200, pytest.approx(810.0))


def test_messages_hide_credentials() -> None:
    listener = Listener()
    tracker = Tracker([listener])
    tracker.info(f"pulling https://me:pass@host/x with {HF_TOKEN}")
    assert listener.messages == ["pulling https://***@host/x with ***"]


def test_plain_lines_have_no_control_characters(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open_plain(tmp_path, progress=True) as tracker:
        tracker.progress(1, 20)
        tracker.log(1, {"train/loss": 2.3456789, "train/lr": 1e-5, "time/tokens_per_second": 1234.5})
        rows = [{"prompt": f"p{i}", "response": "\x1b[31mred\r\n\u202eend"} for i in range(3)]
        tracker.samples(1, rows)
        tracker.warn("low disk")
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.partition(" ")[2] for line in err.splitlines()] == [
        "sft step 1/20 train/loss=2.346 train/lr=1e-05 1,234 tok/s",
        r"sft step 1 sample 1: prompt: p0 | response: \x1b[31mred\r\n\u202eend",
        r"sft step 1 sample 2: prompt: p1 | response: \x1b[31mred\r\n\u202eend",
        "sft warning: low disk",
    ]
    assert all(character == "\n" or character.isprintable() for character in err)


def test_without_progress_only_messages_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open_plain(tmp_path, progress=False) as tracker:
        tracker.progress(1, 20)
        tracker.log(1, {"train/loss": 2.0})
        tracker.samples(1, [{"prompt": "a", "response": "b"}])
        tracker.info("hello")
    assert capfd.readouterr().err.rstrip("\n").partition(" ")[2] == "sft hello"


def test_a_closed_stderr_does_not_stop_the_run(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w")
    listener = Listener()
    with Tracker([Lines("sft", stream, messages_only=False), listener]) as tracker:
        tracker.log(1, {"a": 1.0})
        tracker.log(2, {"a": 1.0})
    assert listener.steps == [1, 2]
    assert len(listener.messages) == 1
    assert "display failed" in listener.messages[0]
    with contextlib.suppress(BrokenPipeError):  # what is still buffered cannot be written; the file is closed
        stream.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (90000, "25:00:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_describe_cuts_long_lists() -> None:
    metrics = {f"train/m{i}": float(i) for i in range(11)}
    assert describe({**metrics, "time/eta": 61.0, "time/other": 3.0}) == (
        " ".join(f"train/m{i}={i}" for i in range(8)) + " (+3) eta 0:01:01"
    )
    assert printable("a\tb\u200b") == r"a\tb\u200b"


def run_on_terminal(tmp_path: Path, arguments: list[str], **extra: str) -> str:
    """The output of the driver with a terminal as its stdin, stdout and stderr."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        env=clean_environment(tmp_path, TERM="xterm-256color", COLUMNS="100", **extra),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    watchdog = threading.Timer(20, process.kill)  # a question on the terminal would wait for ever
    watchdog.start()
    output = b""
    try:
        while chunk := os.read(leader, 65536):
            output += chunk
    except OSError:  # how Linux reports that the other side has closed
        pass
    assert process.wait() == 0, output.decode()
    watchdog.cancel()
    os.close(leader)
    return output.decode()


def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    shown = run_on_terminal(tmp_path, [str(tmp_path / "run"), "none", "0", "disabled"])
    assert "8/8" in shown
    assert "loss 0.125" in shown
    assert "100 tok/s" in shown
    assert "step 8 eval/loss=0.25" in shown
    assert "\x1b[?25l" in shown and shown.rstrip().endswith("\x1b[?25h"), "the cursor is hidden and shown again"


# --- TensorBoard


def test_tensorboard_purges_what_came_after_the_restored_step(tmp_path: Path) -> None:
    def run(restored_step: int | None, steps: range, scale: float) -> None:
        with open_tracker(
            run_dir=tmp_path,
            name="demo",
            stage="sft",
            config={},
            wandb="disabled",
            wandb_project="tests",
            wandb_entity=None,
            tensorboard=True,
            progress=False,
            restored_step=restored_step,
            is_main=True,
        ) as tracker:
            for step in steps:
                tracker.log(step, {"train/loss": scale * step})

    run(None, range(1, 3), scale=7.0)  # an attempt that died before its first checkpoint
    run(None, range(1, 6), scale=1.0)
    run(3, range(4, 7), scale=10.0)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
        (5, 50.0),
        (6, 60.0),
    ]


# --- wandb


def history_of(path: Path) -> dict[int, dict[str, Any]]:
    """The history rows of an offline run file by step, without timings; of a table its content's hash.

    The file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB holding records with a checksum (4
    bytes), a length (2), and a kind (1 whole, 2 first part, 3 middle, 4 last), of protobuf content.
    """
    from wandb.proto import wandb_internal_pb2

    content, position, parts = path.read_bytes(), 7, b""
    rows: dict[int, dict[str, Any]] = {}
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts = (b"" if kind in (1, 2) else parts) + content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in (1, 4):
            continue
        record = wandb_internal_pb2.Record.FromString(parts)  # type: ignore[attr-defined]
        if record.HasField("history"):
            items = {tuple(item.nested_key) or (item.key,): item.value_json for item in record.history.item}
            rows[int(items[("_step",)])] = {
                key[0]: json.loads(value)
                for key, value in items.items()
                if not key[0].startswith(("_", "time/")) and key[1:] in ((), ("sha256",))
            }
    return rows


def expected_history() -> dict[int, set[str]]:
    return {step: {"train/loss"} | ({"eval/loss", "samples"} if step % 2 == 0 else set()) for step in range(1, 9)}


def test_wandb_offline_run_is_complete_after_kill_and_resume(tmp_path: Path) -> None:
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    assert drive(tmp_path, str(undisturbed), "none", "0", "offline").returncode == 0
    assert drive(tmp_path, str(broken), "none", "5", "offline").returncode == -signal.SIGKILL
    (first_session,) = (broken / "wandb").glob("offline-run-*/*.wandb")
    secret = f"hub.token={HF_TOKEN}"  # an override on the command line
    assert drive(tmp_path, str(broken), "4", "0", "offline", secret).returncode == 0

    (complete,) = (undisturbed / "wandb").glob("offline-run-*/*.wandb")
    (resumed,) = (broken / "wandb").glob("offline-run-*/*.wandb")
    assert resumed.name == first_session.name, "the resumed session continues the same run id"
    wandb_id = json.loads((broken / "wandb.json").read_text())["wandb_id"]
    assert resumed.name == f"run-{wandb_id}.wandb"
    assert complete.name != resumed.name
    assert (broken / "wandb" / "superseded" / first_session.parent.name / first_session.name).exists()

    rows = history_of(resumed)
    assert {step: set(row) for step, row in rows.items()} == expected_history()
    assert rows == history_of(complete)
    assert rows[8]["eval/loss"] == 0.25
    assert read_metrics(broken / "metrics.jsonl", timings=False) == read_metrics(
        undisturbed / "metrics.jsonl", timings=False
    )
    assert not (tmp_path / "home").exists(), "everything stays in the run directory"
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or HF_TOKEN.encode() not in file.read_bytes(), file


class FakeWandb(BaseHTTPRequestHandler):
    """As much of the wandb server as a run needs: it creates and resumes runs and collects their history."""

    histories: dict[str, list[str]]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        request = (
            json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}") if "sdk" not in self.path else {}
        )
        if self.path.startswith("/graphql"):
            self.answer(self.graphql(request["query"], request.get("variables") or {}))
            return
        if self.path.endswith("/file_stream"):
            history = self.histories[self.path.split("/")[4]]
            for name, part in (request.get("files") or {}).items():
                if "history" in name:
                    history[part["offset"] :] = part["content"]
        self.answer({})

    def graphql(self, query: str, variables: dict[str, Any]) -> object:
        entity = {"id": "e", "name": "team"}
        name = variables.get("name")
        if "RunResumeStatus" in query:
            rows = self.histories.get(str(name))
            found: object = rows and {
                "id": "r",
                "name": name,
                "historyLineCount": len(rows),
                "eventsLineCount": 0,
                "logLineCount": 0,
                "historyTail": json.dumps(rows[-1:]),
                "eventsTail": "[]",
                "summaryMetrics": rows[-1],
                "config": "{}",
                "wandbConfig": '{"t": 1}',
                "tags": [],
            }
            return {"data": {"model": {"id": "m", "name": "tests", "entity": entity, "bucket": found or None}}}
        if "UpsertBucket" in query:
            rows = self.histories.setdefault(str(name), [])
            project = {"id": "p", "name": "tests", "entity": entity}
            bucket = {
                "id": "r",
                "name": name,
                "displayName": "d",
                "config": "{}",
                "historyLineCount": len(rows),
            }
            return {"data": {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": not rows}}}
        if "Viewer" in query:
            return {"data": {"viewer": {"id": "v", "entity": "team", "username": "u", "flags": "{}"}}}
        return {"data": None, "errors": [{"message": "not part of the fake"}]}


@pytest.fixture
def wandb_server() -> Iterator[tuple[str, dict[str, list[str]]]]:
    FakeWandb.histories = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeWandb)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", FakeWandb.histories
    server.shutdown()
    server.server_close()


def test_wandb_online_run_is_continued_without_repeating_steps(
    tmp_path: Path, wandb_server: tuple[str, dict[str, list[str]]]
) -> None:
    url, histories = wandb_server
    run_dir = tmp_path / "run"
    account = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40}
    # the first session is without wandb, so the second has its steps to send as well
    assert drive(tmp_path, str(run_dir), "none", "4", "disabled").returncode == -signal.SIGKILL
    second = drive(tmp_path, str(run_dir), "4", "0", "online", **account)
    assert second.returncode == 0
    assert f"wandb: {url}/team/tests/runs/sft-" in second.stderr
    ((wandb_id, history),) = histories.items()
    assert [json.loads(row)["_step"] for row in history] == list(range(1, 9))
    # the server lost the last two steps, and the run goes back to step 4: 5 and 6 are there, 7 and 8 are not
    sent = list(history)
    del history[6:]
    history.append('{"_step": 6, "marker": 1}')  # kept only if step 6 is not sent a second time
    assert drive(tmp_path, str(run_dir), "4", "0", "online", **account).returncode == 0
    assert list(histories) == [wandb_id], "one wandb run"
    assert [json.loads(row)["_step"] for row in history] == [1, 2, 3, 4, 5, 6, 6, 7, 8]
    assert history[:6] == sent[:6]
    kept = [{k: v for k, v in json.loads(row).items() if k in ("train/loss", "eval/loss")} for row in history[7:]]
    assert kept == [{"train/loss": 1 / 7}, {"train/loss": 1 / 8, "eval/loss": 0.25}]


def test_wandb_is_not_sent_what_it_has() -> None:
    sent: list[tuple[int, dict[str, Any]]] = []
    mirror: Any = WandbMirror.__new__(WandbMirror)
    mirror._first_step = 7
    mirror._table = lambda columns, data: (columns, data)
    mirror._run = SimpleNamespace(log=lambda values, step: sent.append((step, values)))
    for step in (6, 7):
        mirror.log(step, {"a": 1.0})
        mirror.samples(step, [{"prompt": "p", "response": "r"}])
    mirror.samples(8, [])
    assert sent == [(7, {"a": 1.0}), (7, {"samples": (["prompt", "response"], [["p", "r"]])})]


def test_wandb_without_a_login_warns_once_and_never_asks(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shown = run_on_terminal(tmp_path, [str(run_dir), "none", "0", "online"])
    assert shown.count("warning: wandb (online) is off for this run: UsageError: No API key configured.") == 1
    assert "Enter your choice" not in shown
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")][-1] == 8


# --- redaction


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hf_token",
        "hub.token",
        "accessToken",
        "API_KEY",
        "apiKey",
        "wandb-api-key",
        "key",
        "secret_access_key",
        "secret",
        "client_secret",
        "password",
        "db_password",
        "authorization",
        "api_keys",
    ],
)
def test_values_of_secret_keys_are_hidden(key: str) -> None:
    assert redact({key: "plain words"}) == {key: "***"}
    assert redact({"a": [{key: {"inner": ["plain words"]}}]}) == {"a": [{key: {"inner": ["***"]}}]}


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "max_tokens",
        "token_budget",
        "keys",
        "num_tokens",
        "pad_token",
        "eos_token",
        "tokens_per_second",
        "loss_per_token",
        "keyboard",
        "monkey",
        "prompt_key",
        "sort_key",
        "key_column",
        "secretary",
        "author",
        "password_file",
    ],
)
def test_values_of_harmless_keys_stay(key: str) -> None:
    config = {key: "plain words", "nested": {key: ["plain words", 3, None]}}
    assert redact(config) == config


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HF_TOKEN, "***"),
        (f"use {HF_TOKEN}, please", "use ***, please"),
        ("sk-proj-abcdefghij0123456789", "***"),
        ("ghp_" + "a1" * 18, "***"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def_1", "***"),
        ("Bearer abcdefghijklmnop1234", "Bearer ***"),
        ("https://user:pa@ss:word@host/path?x=1", "https://***@host/path?x=1"),
        ("https://0123token@host/path", "https://***@host/path"),
        ("postgres://u:p@db:5432/x", "postgres://***@db:5432/x"),
        ("hub.token=abc lr=0.1", "hub.token=*** lr=0.1"),
        ("https://host/?api_key=abc&b=2", "https://host/?api_key=***&b=2"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "***"),
    ],
)
def test_credentials_are_hidden_in_any_text(text: str, shown: str) -> None:
    assert redact_text(text) == shown
    assert redact({"note": [text]}) == {"note": [shown]}
    assert redact({"path": Path("/x") / "y"}) == {"path": Path("/x/y")}


@pytest.mark.parametrize(
    "text",
    [
        "meta-llama/Llama-3.2-1B",
        "ssh://git@host/repo",
        "https://host/a@b",
        "hf_hub",
        "risk-averse-policies-of-2024-and-later",
        "sk-learn-like-names-are-fine-too",
        "max_tokens=5",
        f"/cache/models--a--b/snapshots/{HEX40}/config.json",
        "a" * 64,
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact({"note": text}) == {"note": text}


def test_forty_hex_digits_are_a_wandb_key_unless_a_commit() -> None:
    config = {"note": HEX40, "revision": HEX40, "git_commit": HEX40, "listed": [f" {HEX40} "]}
    assert redact(config) == {"note": "***", "revision": HEX40, "git_commit": HEX40, "listed": ["***"]}


def test_numbers_and_nothing_are_judged_by_the_key() -> None:
    config = {"token": 7, "password": 1234, "secret": None, "use_auth": True, "auth": "", "lr": 0.1}
    assert redact(config) == {**config, "password": "***"}


def test_nested_objects_do_not_carry_a_secret_past_the_mask() -> None:
    @dataclass
    class Hub:
        token: str
        repo: str

    class Pair(NamedTuple):
        left: str
        right: str

    assert redact({"hub": Hub("plain", "a/b"), "pair": Pair("x", HF_TOKEN)}) == {
        "hub": {"token": "***", "repo": "a/b"},
        "pair": ("x", "***"),
    }


def test_redact_does_not_change_its_argument() -> None:
    config = {"a": {"token": "x"}, "b": ["https://u:p@h"], "c": ("y", {"password": "z"})}
    before = repr(config)
    assert redact(config) == {"a": {"token": "***"}, "b": ["https://***@h"], "c": ("y", {"password": "***"})}
    assert repr(config) == before
