"""What the runs cost: a table of times and throughput, and where the seconds of a PPO iteration go."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_pipeline.report import charts
from rlhf_pipeline.report.collect import Stage
from rlhf_pipeline.report.models import last, median, timings
from rlhf_pipeline.report.parts import Block, Figure, Key

PARTS = {
    "time/rollout_seconds": "sampling",
    "time/score_seconds": "scoring",
    "time/evaluate_seconds": "log-probs and values",
    "time/update_seconds": "updates",
}
MOST_RUNS = 24


def costs(stages: Sequence[Stage]) -> list[Block | None]:
    return [timings(stages), _minutes(stages), _iterations(stages)]


def _minutes(stages: Sequence[Stage]) -> Figure | None:
    rows = [(stage.label, [found.mean / 60]) for stage in stages if (found := last(stage, "time/elapsed")) is not None]
    if len(rows) < 2:
        return None
    return Figure(
        title="Minutes of each run",
        caption="From start to end, with evaluations and saving; of a resumed run all sessions together.",
        picture=charts.stacked(rows[:MOST_RUNS], "minutes", x="minutes"),
    )


def _iterations(stages: Sequence[Stage]) -> Figure | None:
    rows = []
    for stage in stages:
        parts = [median(stage, name) for name in PARTS]
        if any(part is not None for part in parts):
            rows.append((stage.label, [part or 0.0 for part in parts]))
    if not rows:
        return None
    return Figure(
        title="Where a PPO iteration's time goes",
        caption="Medians over iterations. Sampling and updates should have most of it; a large share of scoring asks for "
        "larger batches of the reward model.",
        picture=charts.stacked(rows[:MOST_RUNS], "iterations", x="seconds"),
        legend=tuple(Key(label=label, colour=i, style="bar") for i, label in enumerate(PARTS.values())),
    )
