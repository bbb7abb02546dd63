"""Where tracked values go: the interface of every sink. A sink overrides what it has a use for.

The sinks are the run's own files (`records`), the mirrors wandb and TensorBoard (`mirrors`), and the terminal
(`display`). Nothing is buffered or decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIME_PREFIX = "time/"
"""Metrics under this prefix differ from run to run; every other one is a function of the config."""
TOKENS_PER_SECOND = "time/tokens_per_second"
ELAPSED = "time/elapsed"
ETA = "time/eta"

Metrics = Mapping[str, float]
Rows = Sequence[Mapping[str, str]]
Images = Mapping[str, Path]


class Sink:
    """One destination. The methods are those of `Tracker`, called in the same order with checked values."""

    name = "sink"
    # The run's own files are the record of the run: when they cannot be written, the run must stop.
    is_essential = False

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of one step; a step may come in several parts."""

    def samples(self, step: int, rows: Rows) -> None:
        """Take the texts sampled at one evaluation."""

    def images(self, step: int, images: Images) -> None:
        """Take pictures, by name, that the run has written as PNG files."""

    def progress(self, step: int, total: int, eta_seconds: float | None) -> None:
        """Take the position in the run."""

    def message(self, text: str) -> None:
        """Show one line to the person who watches the run."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Take the run's final values."""

    def sync(self) -> None:
        """Make everything taken so far survive a crash of the machine."""

    def close(self, *, failed: bool) -> None:
        """Finish; no call follows."""
