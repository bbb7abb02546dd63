"""What the person at the terminal sees: a progress bar on a terminal, plain lines everywhere else.

Plain lines hold no control characters, one line per logged step, so CI logs and files stay readable.
Everything goes to stderr; stdout belongs to the command's own output. Texts that a model wrote are escaped
before they are shown, since they can hold terminal escape sequences.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, TextIO

from rlhf_pipeline.tracking.sinks import ETA, TIME_PREFIX, TOKENS_PER_SECOND, Metrics, Rows, Sink

if TYPE_CHECKING:
    from rich.progress import TaskID

_SHOWN_METRICS = 8
_SHOWN_SAMPLES = 2
_SHOWN_CHARACTERS = 300
_REFRESH_INTERVAL_S = 0.1


def open_display(stage: str, *, progress: bool) -> Sink:
    """The display that suits stderr; with `progress` off only messages are shown."""
    if not progress:
        return Lines(stage, sys.stderr, messages_only=True)
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return Bar(stage)
    return Lines(stage, sys.stderr, messages_only=False)


class Lines(Sink):
    """One plain line for each logged step, sample and message."""

    name = "display"

    def __init__(self, stage: str, stream: TextIO, *, messages_only: bool) -> None:
        self._stage = stage
        self._stream = stream
        self._messages_only = messages_only
        self._total: int | None = None

    def progress(self, step: int, total: int, eta_seconds: float | None) -> None:
        self._total = total

    def log(self, step: int, metrics: Metrics) -> None:
        if not self._messages_only:
            position = f"{step}" if self._total is None else f"{step}/{self._total}"
            self.message(f"step {position} {describe(metrics)}")

    def samples(self, step: int, rows: Rows) -> None:
        if not self._messages_only:
            for line in sample_lines(step, rows):
                self.message(line)

    def message(self, text: str) -> None:
        self._stream.write(f"{time.strftime('%H:%M:%S')} {self._stage} {printable(text)}\n")
        self._stream.flush()


class Bar(Sink):
    """A rich progress bar, drawn from the first step on; whatever else is shown scrolls above it."""

    name = "display"

    def __init__(self, stage: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = Console(stderr=True)
        # Drawn by hand: a refreshing thread would take time from training and draw nothing new.
        self._bar = Progress(
            TextColumn(stage),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TextColumn("eta {task.fields[eta]}"),
            console=self._console,
            auto_refresh=False,
        )
        self._task: TaskID | None = None
        self._drawn_at = 0.0

    def progress(self, step: int, total: int, eta_seconds: float | None) -> None:
        if self._task is None:
            self._task = self._bar.add_task("", total=total, metrics="", eta="-")
            self._bar.start()
        eta = "-" if eta_seconds is None else clock(eta_seconds)
        self._bar.update(self._task, completed=step, total=total, eta=eta)
        self._draw()

    def log(self, step: int, metrics: Metrics) -> None:
        if any(name.startswith("eval/") for name in metrics):
            self.message(f"step {step} {describe(metrics)}")
        elif self._task is not None:
            self._bar.update(self._task, metrics=_headline(metrics))
            self._draw()

    def samples(self, step: int, rows: Rows) -> None:
        for line in sample_lines(step, rows):
            self.message(line)

    def message(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False, emoji=False)

    def close(self, *, failed: bool) -> None:
        if self._task is not None:
            self._bar.refresh()
            self._bar.stop()

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self._drawn_at >= _REFRESH_INTERVAL_S:
            self._drawn_at = now
            self._bar.refresh()


def describe(metrics: Metrics) -> str:
    """The first metrics, the speed and the time left: `train/loss=2.31 812 tok/s eta 0:00:05`."""
    values = {name: value for name, value in metrics.items() if not name.startswith(TIME_PREFIX)}
    parts = [f"{name}={value:.4g}" for name, value in list(values.items())[:_SHOWN_METRICS]]
    if len(values) > _SHOWN_METRICS:
        parts.append(f"(+{len(values) - _SHOWN_METRICS})")
    if TOKENS_PER_SECOND in metrics:
        parts.append(f"{metrics[TOKENS_PER_SECOND]:,.0f} tok/s")
    if ETA in metrics:
        parts.append(f"eta {clock(metrics[ETA])}")
    return " ".join(parts)


def sample_lines(step: int, rows: Rows) -> list[str]:
    """One line for each of the first samples, long texts cut."""
    lines = []
    for number, row in enumerate(rows[:_SHOWN_SAMPLES], start=1):
        texts = " | ".join(f"{name}: {_cut(text)}" for name, text in row.items())
        lines.append(f"step {step} sample {number}: {texts}")
    return lines


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def printable(text: str) -> str:
    """`text` on one line, with every control and invisible character escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _headline(metrics: Metrics) -> str:
    """The loss (or whatever metric comes first) and the speed."""
    values = [name for name in metrics if not name.startswith(TIME_PREFIX)]
    name = "train/loss" if "train/loss" in metrics else next(iter(values), None)
    parts = [] if name is None else [f"{name.rpartition('/')[2]} {metrics[name]:.4g}"]
    if TOKENS_PER_SECOND in metrics:
        parts.append(f"{metrics[TOKENS_PER_SECOND]:,.0f} tok/s")
    return " ".join(parts)
