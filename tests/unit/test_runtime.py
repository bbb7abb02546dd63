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


def test_batch_systems_announce_the_end_of_a_job_by_other_signals_too() -> None:
    stop = StopRequest()
    stop(signal.SIGUSR1, None)
    assert stop.exit_code == 143
    previous = signal.getsignal(signal.SIGUSR1)
    with runtime.stopping_on_signals(stop := StopRequest()):
        signal.raise_signal(signal.SIGUSR1)
    assert stop.exit_code == 143 and signal.getsignal(signal.SIGUSR1) == previous
