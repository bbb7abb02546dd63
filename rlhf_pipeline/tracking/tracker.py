"""The one object that a training loop reports to.

Only the main process writes; the others hold a tracker without sinks, so the loop has no `if rank == 0`. The
run's own files come first and must not fail; wandb, TensorBoard and the display are mirrors, dropped with one
warning when they fail. Which values are logged, and when, is the loop's affair.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rlhf_pipeline.tracking.display import open_display
from rlhf_pipeline.tracking.records import METRICS_FILE, Records, read_metrics
from rlhf_pipeline.tracking.redaction import redact, redact_text
from rlhf_pipeline.tracking.sinks import ELAPSED, ETA, Sink

_ETA_WINDOW = 50  # progress reports; long enough to be calm, short enough to follow a change of speed


class Tracker:
    """Passes what the loop reports to every sink. Use it as a context manager; `open_tracker` makes one."""

    def __init__(self, sinks: Sequence[Sink], *, elapsed_before: float = 0.0) -> None:
        """`elapsed_before`: seconds of training in earlier sessions, added to `time/elapsed`."""
        self._sinks = list(sinks)
        self._started = time.monotonic() - elapsed_before
        self._recent: deque[tuple[float, int]] = deque(maxlen=_ETA_WINDOW)
        self._eta: float | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of one optimiser step. Names are flat, `group/name`; timings belong under `time/`.

        Adds `time/elapsed` (seconds of training, earlier sessions included) and, once known, `time/eta`
        (seconds).
        """
        if not self._sinks:
            return
        if "step" in metrics:
            raise ValueError("'step' is not a metric name: it is the key of the line")
        values = {name: value if type(value) is int else float(value) for name, value in metrics.items()}
        values[ELAPSED] = round(time.monotonic() - self._started, 3)
        if self._eta is not None:
            values[ETA] = round(self._eta, 3)
        self._each(lambda sink: sink.log(int(step), values))

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Record texts sampled at an evaluation, one mapping of column to text for each."""
        if any("step" in row for row in rows):
            raise ValueError("'step' is not a column of samples: it is the key of the line")
        self._each(lambda sink: sink.samples(int(step), rows))

    def images(self, step: int, images: Mapping[str, Path]) -> None:
        """Copy PNG files, which the run has written, to the mirrors; names are flat, like those of metrics.

        The files are the record: they are read at once, and may be written anew for the next step.
        """
        self._each(lambda sink: sink.images(int(step), images))

    def progress(self, step: int, total: int) -> None:
        """Report the position after each optimiser step: `step` of `total` are done."""
        if not self._sinks:
            return
        self._recent.append((time.monotonic(), step))
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        if last_step > first_step:
            self._eta = (total - step) * (last_time - first_time) / (last_step - first_step)
        self._each(lambda sink: sink.progress(step, total, self._eta))

    def info(self, text: str) -> None:
        """Show one line; credentials in it are hidden."""
        self._each(lambda sink: sink.message(redact_text(text)))

    def warn(self, text: str) -> None:
        """Show one line, marked as a warning; credentials in it are hidden."""
        self.info(f"warning: {text}")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the run's final values, as JSON in `summary.json`; credentials in them are hidden."""
        shown = redact(values)
        self._each(lambda sink: sink.summary(shown))

    def sync(self) -> None:
        """Make what is recorded survive a crash. Call it before the training state of a step is saved."""
        self._each(lambda sink: sink.sync())

    def close(self, *, failed: bool = False) -> None:
        """Close every sink; `failed` marks the wandb run as crashed. A second call does nothing."""
        self._each(lambda sink: sink.close(failed=failed))
        self._sinks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _open(self, name: str, make: Callable[[], Sink]) -> Sink | None:
        """Open one mirror; a failure is a warning."""
        try:
            sink = make()
        except Exception as error:  # no network, no login, no package: training goes on
            self._warn_off(f"{name} is off for this run", error)
            return None
        self._sinks.append(sink)
        return sink

    def _warn_off(self, what: str, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        self.warn(f"{what}: {reason}. Everything is still in {METRICS_FILE}.")

    def _each(self, call: Callable[[Sink], None]) -> None:
        failures: list[tuple[Sink, Exception]] = []
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:  # whatever a mirror's library raises, training goes on
                if sink.is_essential:
                    raise
                failures.append((sink, error))
        for sink, failure in failures:
            self._sinks.remove(sink)
            with contextlib.suppress(Exception):
                sink.close(failed=True)
            self._warn_off(f"{sink.name} failed and is off from here", failure)


def open_tracker(  # noqa: PLR0913
    *,
    run_dir: Path,
    name: str,
    stage: str,
    config: Mapping[str, Any],
    wandb: Literal["online", "offline", "disabled"],
    wandb_project: str,
    wandb_entity: str | None,
    tensorboard: bool,
    progress: bool,
    restored_step: int | None,
    is_main: bool,
) -> Tracker:
    """Open the tracker of a run; a process that is not the main one gets one that does nothing.

    `restored_step` is the step whose training state was restored: everything recorded after it is removed.
    None starts new files; the caller has made sure that no other run lives in `run_dir`.
    """
    if not is_main:
        return Tracker([])
    records = Records(run_dir, restored_step=restored_step)
    earlier = [] if restored_step is None else read_metrics(run_dir / METRICS_FILE)
    tracker = Tracker([records], elapsed_before=earlier[-1].get(ELAPSED, 0.0) if earlier else 0.0)
    tracker._open("display", lambda: open_display(stage, progress=progress))
    if wandb != "disabled":
        from rlhf_pipeline.tracking.mirrors import WandbMirror

        mirror = tracker._open(
            f"wandb ({wandb})",
            lambda: WandbMirror(
                run_dir,
                mode=wandb,
                project=wandb_project,
                entity=wandb_entity,
                name=name,
                stage=stage,
                config=redact(config),
                restored_step=restored_step,
            ),
        )
        if isinstance(mirror, WandbMirror) and mirror.url is not None:
            tracker.info(f"wandb: {mirror.url}")
    if tensorboard:
        from rlhf_pipeline.tracking.mirrors import TensorboardMirror

        tracker._open("tensorboard", lambda: TensorboardMirror(run_dir, restored_step=restored_step))
    return tracker
