"""A tracked run in a process of its own, with or without a terminal, for the tests of tracking."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import rlhf_pipeline
from rlhf_pipeline.tracking import Tracker, open_tracker

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


def open_plain(run_dir: Path, *, restored_step: int | None = None, progress: bool = False, **others: Any) -> Tracker:
    settings: dict[str, Any] = {"wandb": "disabled", "tensorboard": False, "is_main": True, **others}
    return open_tracker(
        run_dir=run_dir,
        name="demo",
        stage="sft",
        config={},
        wandb_project="tests",
        wandb_entity=None,
        progress=progress,
        restored_step=restored_step,
        **settings,
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
