"""A plan as tables for people, and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from rlhf_pipeline.config.machine import size_of
from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.evaluation.tables import table
from rlhf_pipeline.plan.advice import Advice, fits, host_needed, room
from rlhf_pipeline.plan.memory import LINES, Memory
from rlhf_pipeline.plan.models import Models
from rlhf_pipeline.plan.time import Time

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is known of a run before it."""

    config: StageConfig
    memory: Memory
    time: Time
    advice: Advice | None  # None where it fits

    @property
    def fits(self) -> bool:
        return fits(self.config, self.memory)


def tables(plan: Plan) -> list[Table]:
    """Memory by phase, and time."""
    return [_memory(plan.memory), _time(plan.time)]


def lines(plan: Plan) -> list[str]:
    """What is said in words; the last line says whether it fits."""
    config, memory = plan.config, plan.memory
    found = [f"{_of(memory.models)}; ZeRO stage {config.engine.zero_stage}, {config.model.dtype.value}"]
    if memory.host:
        found.append(
            f"in each host's memory: {_gb(host_needed(config, memory))} of {config.machine.host_memory} "
            f"({', '.join(memory.host)})"
        )
    found += _duration(plan.time)
    if plan.advice is not None:
        found += _advice(plan.advice)
    needs = f"{_gb(memory.peak.total)} of {config.machine.gpu_memory}"
    kept_free = f"{config.machine.reserve:.0%} kept free"
    gpus = "on the GPU" if config.machine.gpus == 1 else f"on each of {config.machine.gpus:,} GPUs"
    where = f"{gpus}, in the phase: {memory.peak.name}"
    found.append(f"{'fits' if plan.fits else 'does not fit'}: {needs} ({kept_free}) {where}")
    return found


def to_json(plan: Plan) -> dict[str, Any]:
    """Bytes, seconds and FLOPs as they are."""
    config, memory, time, advice = plan.config, plan.memory, plan.time, plan.advice
    return {
        "fits": plan.fits,
        "gpus": config.machine.gpus,
        "gpu_memory": size_of(config.machine.gpu_memory),
        "room": room(config),
        "peak": memory.peak.total,
        "peak_phase": memory.peak.name,
        "phases": {phase.name: phase.lines for phase in memory.phases},
        "host_memory": size_of(config.machine.host_memory),
        "host_needed": host_needed(config, memory),
        "host": memory.host,
        "parameters": {one.name: one.parameters.elements for one in memory.models.trained},
        "time": {
            "unit": time.unit,
            "seconds": time.seconds,
            "steps": time.steps,
            "gpu_hours": time.gpu_hours,
            "sent": sum(part.sent for part in time.parts),
            "parts": [asdict(part) for part in time.parts],
            "assumed": time.assumed,
        },
        "advice": None if advice is None else {"overrides": advice.overrides, "why": advice.why},
    }


def _memory(memory: Memory) -> Table:
    made = table("GB on a GPU", "", [phase.name for phase in memory.phases])
    others = dict.fromkeys(name for phase in memory.phases for name in phase.lines if name not in LINES)
    for line in (*LINES, *others):
        sizes = [phase.lines.get(line, 0.0) for phase in memory.phases]
        if any(sizes):
            made.add_row(line, *(f"{size / GB:,.2f}" if size else "" for size in sizes))
    made.add_section()
    made.add_row("all", *(f"{phase.total / GB:,.2f}" for phase in memory.phases))
    return made


def _time(time: Time) -> Table:
    made = table(f"one {time.unit}", "", ["seconds", "PFLOP on a GPU", "GB sent by a GPU", "GB to and from its host"])
    for part in time.parts:
        made.add_row(
            part.name, f"{part.seconds:,.2f}", f"{part.flops / 1e15:,.3f}", _figure(part.sent), _figure(part.moved)
        )
    if len(time.parts) > 1:
        made.add_section()
        sums = [sum(getattr(part, name) for part in time.parts) for name in ("flops", "sent", "moved")]
        made.add_row("all", f"{time.seconds:,.2f}", f"{sums[0] / 1e15:,.3f}", _figure(sums[1]), _figure(sums[2]))
    return made


def _figure(size: float) -> str:
    return f"{size / GB:,.2f}" if size else ""


def _gb(size: float) -> str:
    return f"{size / GB:,.1f} GB"


def _of(models: Models) -> str:
    found = [f"{one.name} {one.parameters.elements:,} parameters" for one in models.trained]
    found += [f"({one.parameters.trained:,} trained)" for one in models.trained if one.parameters.frozen_bytes]
    others = [*models.rewards, *([models.reference] if models.reference else [])]
    return ", ".join([*found, *(f"{one.name} {one.elements:,}" for one in others)])


def _duration(time: Time) -> list[str]:
    assumed = ", ".join(f"{value:,.4g} {name}" for name, value in time.assumed.items())
    if time.steps is None:
        return [f"assumed: {assumed}; add machine.examples=<examples in the data> for the time of the whole run"]
    hours = time.seconds * time.steps / 3600
    return [
        f"assumed: {assumed}",
        f"{time.steps:,} {time.unit}s: {hours:,.1f} hours, {time.gpu_hours:,.0f} GPU hours",
    ]


def _advice(advice: Advice) -> list[str]:
    if advice.why or advice.memory is None or advice.config is None:
        return [advice.why]
    costs = ", ".join(dict.fromkeys(change.costs for change in advice.changes))
    peak = _gb(advice.memory.peak.total)
    return [f"the cheapest change that makes it fit ({peak}): {' '.join(advice.overrides)} ({costs})"]
