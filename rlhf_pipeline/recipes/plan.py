"""`rlhf plan <stage> <arguments of that stage>`: what a run will take, before there is one. No torch, and no weights.

Bytes on every GPU, whether they fit, the cheapest change that makes them, and the time from FLOPs. Nothing is written
and nothing is downloaded. The exit code is 0 where it fits and 1 where it does not. docs/scaling.md has the model.
"""

from __future__ import annotations

import json
import sys

from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.plan import show
from rlhf_pipeline.plan.advice import advise, fits
from rlhf_pipeline.plan.memory import memory_of
from rlhf_pipeline.plan.time import time_of


def main(config: StageConfig) -> None:
    """Print the plan of a stage.

    Raises:
        SystemExit: 1 when the run does not fit.
        UserError: when the shape of a model, or the speed of a GPU, is not known.
    """
    memory = memory_of(config)
    plan = show.Plan(
        config=config,
        memory=memory,
        time=time_of(config, memory.models),
        advice=None if fits(config, memory) else advise(config),
    )
    if config.machine.json:
        sys.stdout.write(json.dumps(show.to_json(plan), indent=2) + "\n")
    else:
        _print(plan)
    if not plan.fits:
        raise SystemExit(1)


def _print(plan: show.Plan) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for one in show.tables(plan):
        console.print(one)
    for line in show.lines(plan):
        console.print(line, markup=False, soft_wrap=True)
