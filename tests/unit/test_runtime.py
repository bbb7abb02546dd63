"""What a process does when it is asked to stop."""

from __future__ import annotations

import signal

import pytest

from rlhf_pipeline import runtime
from rlhf_pipeline.runtime import StopRequest


def test_the_first_signal_is_noted_and_the_second_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now)
    stop = StopRequest()
    stop(signal.SIGTERM, None)
    assert stop.exit_code == 143
    now = 100.9  # a launcher and a scheduler both sent it
    stop(signal.SIGTERM, None)
    assert stop.exit_code == 143
    now = 101.1
    with pytest.raises(SystemExit) as left:
        stop(signal.SIGINT, None)
    assert left.value.code == 143
