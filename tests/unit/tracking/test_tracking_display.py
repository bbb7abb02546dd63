"""Tracking: mirrors that fail, and the display."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from helpers_tracking import HF_TOKEN, open_plain, run_on_terminal

from rlhf_pipeline.tracking import Tracker
from rlhf_pipeline.tracking import tracker as tracker_module
from rlhf_pipeline.tracking.display import Lines, clock, describe, printable
from rlhf_pipeline.tracking.sinks import Metrics, Sink


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


def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    shown = run_on_terminal(tmp_path, [str(tmp_path / "run"), "none", "0", "disabled"])
    assert "8/8" in shown
    assert "loss 0.125" in shown
    assert "100 tok/s" in shown
    assert "step 8 eval/loss=0.25" in shown
    assert "\x1b[?25l" in shown and shown.rstrip().endswith("\x1b[?25h"), "the cursor is hidden and shown again"
