"""The loop that the offline stages share: a function over a stream of global batches, not a class to inherit from.

A step: 1 update (update.py), 2 log, 3 evaluate, 4 save. It can be left after any step, by a signal or by kill -9, and
goes on from the last state with the same numbers.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline import artifact, resume, runtime
from rlhf_pipeline.config.schema import CheckpointConfig, EvaluationConfig, OptimConfig, TrackingConfig
from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.functional.schedules import learning_rate
from rlhf_pipeline.machine import peak_memory_bytes
from rlhf_pipeline.run import Run
from rlhf_pipeline.runtime import StopRequest
from rlhf_pipeline.tracking import Tracker
from rlhf_pipeline.tracking.records import METRICS_FILE, read_metrics
from rlhf_pipeline.update import Counts, Loss, update

ENGINE = "model"  # what resume states call the one engine of a stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """This rank's part of a global batch."""

    micro_batches: Sequence[PackedTrees]
    epoch: int
    ends_epoch: bool
    origins: Callable[[], list[str]]  # file:line of the global batch's examples, for error messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long, how fast, and what happens when."""

    seed: int
    num_steps: int
    stop_after: int | None
    optim: OptimConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    tracking: TrackingConfig

    @classmethod
    def of(cls, config: StageConfig, num_steps: int) -> Schedule:
        """The schedule of a stage's config."""
        return cls(
            seed=config.seed,
            num_steps=num_steps,
            stop_after=config.train.stop_after,
            optim=config.optim,
            checkpoint=config.checkpoint,
            evaluation=config.evaluation,
            tracking=config.tracking,
        )

    def learning_rate(self, step: int) -> float:
        optim = self.optim
        return learning_rate(
            step,
            num_steps=self.num_steps,
            peak=optim.lr,
            decay=optim.decay.value,
            final_fraction=optim.final_lr_fraction,
            warmup_steps=optim.warmup_steps + round(optim.warmup_fraction * self.num_steps),
            warmup_start_fraction=optim.warmup_start_fraction,
        )

    def evaluates_after(self, done: int) -> bool:
        every = self.evaluation.every
        return done == self.num_steps or (every > 0 and done % every == 0)

    def artifacts_after(self, run: Run, done: int, *, epoch: int, ends_epoch: bool) -> list[Path]:
        """Where the model goes after so many steps; nowhere after most of them. `epoch` counts from 1."""
        every = self.checkpoint.artifact_every
        found = [run.step_artifact(done)] if every is not None and done % every == 0 else []
        last = done == self.num_steps
        if last or (ends_epoch and self.checkpoint.artifact_every_epoch):
            found.append(run.epoch_artifact(epoch))
        return [*found, run.artifact] if last else found  # a parent of later stages is a run that has come to its end


class Stopped(Exception):
    """Training left early on request, with its state saved."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def fit(  # noqa: PLR0913 - each is a noun of the loop, and named
    *,
    engine: Engine,
    run: Run,
    schedule: Schedule,
    batches: Callable[[int], Step],
    loss: Loss,
    counts: Counts,
    evaluate: Callable[[int], dict[str, float]],
    save_artifact: Callable[[list[Path], int, dict[str, float]], None],
    tracker: Tracker,
    stop: StopRequest,
    state_meta: dict[str, Any],
    flops_per_token: float,
    peak_flops: Callable[[], float],
) -> None:
    """Train from the run's state to the end.

    Args:
        batches: the global batch of a step, this rank's part.
        loss: terms of one micro-batch from the module's output.
        counts: the same terms' counts, from the integers alone, so that they can be added up before the first backward.
        evaluate: held-out metrics after a number of steps; logs its own samples.
        save_artifact: called with (folders, step, metrics of the last evaluation) where there are such folders.
        state_meta: written into every resume state.
        peak_flops: of one process, measured once after the first step.

    Raises:
        Stopped: after a signal, with the state saved.
        UserError: for a loss or gradient that is not finite, and for a full disk.
    """
    gc.freeze()
    gc.enable()
    done = run.step
    meter = _Meter(flops_per_token, peak_flops)
    metrics = last_evaluation(run)
    if done == 0 and schedule.evaluation.before:
        tracker.log(0, evaluate(0))
    if done >= schedule.num_steps and not is_handed_over(run):
        epoch = batches(schedule.num_steps - 1).epoch + 1
        save_artifact([run.epoch_artifact(epoch), run.artifact], done, metrics)  # paused there, and now cut short
    while done < schedule.num_steps:
        step = batches(done)
        # Drawn from the step and not from a running stream, dropout is the same in a resumed run.
        torch.manual_seed((schedule.seed * 1_000_003 + done) * runtime.world_size() + runtime.rank())
        rate = schedule.learning_rate(done)
        failed = partial(_not_finite, step, done + 1)
        made = update(engine, step.micro_batches, loss, counts, learning_rate=rate, failed=failed)
        leaving = int(runtime.max_over_ranks({"stop": float(stop.exit_code)})["stop"])
        done += 1
        if done % schedule.tracking.every == 0 or done == schedule.num_steps:
            values = {f"train/{name}": value for name, value in made.means.items()}
            values |= {"train/grad_norm": made.norm, "train/lr": rate, "train/epoch": float(step.epoch + 1)}
            tracker.log(done, values | meter.rates(made.tokens))
        else:
            meter.rates(made.tokens)
        tracker.progress(done, schedule.num_steps)
        if schedule.evaluates_after(done):
            metrics = evaluate(done)
            tracker.log(done, metrics)
            meter.restart()
        last = done == schedule.num_steps
        folders = schedule.artifacts_after(run, done, epoch=step.epoch + 1, ends_epoch=step.ends_epoch)
        if folders:
            save_artifact(folders, done, metrics)
            meter.restart()
        paused = leaving or done == schedule.stop_after
        if last or paused or done % schedule.checkpoint.every == 0:
            tracker.sync()
            resume.save(run.folder, {ENGINE: engine}, step=done, meta=state_meta, keep=schedule.checkpoint.keep)
            meter.restart()
        if paused and not last:
            raise Stopped(leaving)


def is_handed_over(run: Run) -> bool:
    """Whether the run's artifact is there and whole. Called by every rank; the first one looks."""
    with runtime.at_own_pace():  # it reads all of it
        there = runtime.is_main() and artifact.is_whole(run.artifact)
    return bool(runtime.max_over_ranks({"there": float(there)})["there"])


def last_evaluation(run: Run) -> dict[str, float]:
    """What was measured last before the step that a run goes on from; empty where nothing was since its start."""
    file = run.folder / METRICS_FILE
    lines = read_metrics(file, timings=False) if run.state is not None and file.is_file() else []
    for line in reversed(lines):
        if 0 < line["step"] <= run.step and any(name.startswith("eval/") for name in line):
            return {name: value for name, value in line.items() if name != "step"}
    return {}


def _not_finite(step: Step, number: int, what: str, values: list[float]) -> UserError:
    origins = step.origins()
    shown = ", ".join(origins[:16]) + (f" and {len(origins) - 16} more" if len(origins) > 16 else "")
    return UserError(
        f"step {number}: the {what} is not finite ({', '.join(map(str, values))}). The weights were not saved; the "
        f"last state on disk is from before it. Examples of this batch: {shown}. "
        "A lower optim.lr, a smaller optim.max_grad_norm or model.dtype=float32 often helps."
    )


class _Meter:
    """Throughput between two calls; time spent on evaluating and saving does not count."""

    def __init__(self, flops_per_token: float, peak_flops: Callable[[], float]) -> None:
        self.flops_per_token = flops_per_token
        self.peak_flops = cache(peak_flops)
        self.restart()

    def restart(self) -> None:
        self.since = time.perf_counter()

    def rates(self, tokens: float) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        per_second = tokens / seconds
        share = per_second * self.flops_per_token / (self.peak_flops() * runtime.world_size())
        self.restart()
        return {
            "time/step_seconds": seconds,
            "time/tokens_per_second": per_second,
            "time/share_of_peak": share,
            "time/peak_memory_gb": peak_memory_bytes() / 1e9,
        }
