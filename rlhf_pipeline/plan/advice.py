"""The cheapest change that makes a run fit: changes are tried in the order of what they cost.

First those that change nothing but the layout in memory, then those that cost time, then those that train something else,
at last more GPUs. Each is kept while it makes the peak smaller, until the run fits; then those that were not needed for it
are taken back, the dearest first. What is left is spelled as on the command line.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.config.machine import size_of
from rlhf_pipeline.config.schema import Dtype, LoraConfig, Offload
from rlhf_pipeline.config.stages import DpoConfig, PpoConfig, StageConfig
from rlhf_pipeline.plan.memory import Memory, longest, longest_example, memory_of

MOST_GPUS = 65_536
LEAST_ROW = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A step of the way."""

    override: str
    values: tuple[tuple[str, Any], ...]  # dotted keys of the config
    costs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to change. No `changes`: nothing helps, and `why` says what is too large."""

    changes: tuple[Change, ...]
    why: str
    config: StageConfig | None  # with the changes
    memory: Memory | None

    @property
    def overrides(self) -> list[str]:
        return [change.override for change in self.changes]


def room(config: StageConfig) -> float:
    """Bytes of a GPU that a run may take."""
    return size_of(config.machine.gpu_memory) * (1 - config.machine.reserve)


def host_needed(config: StageConfig, memory: Memory) -> float:
    """Bytes of one host."""
    return sum(memory.host.values()) * min(config.machine.gpus, config.machine.gpus_per_host)


def fits(config: StageConfig, memory: Memory) -> bool:
    """Whether there is room on every GPU and in every host."""
    return memory.peak.total <= room(config) and host_needed(config, memory) <= size_of(config.machine.host_memory)


def advise(config: StageConfig) -> Advice:
    """The cheapest changes, of those that are known here, under which the run fits.

    Raises:
        UserError: see `memory_of`.
    """
    kept: list[Change] = []
    now, memory = config, memory_of(config)
    while not fits(now, memory):
        step = _next(now, memory)
        if step is None:
            return _without_end(now, memory)
        change, now, memory = step
        kept.append(change)
    needed = _needed(config, kept)
    final = _with(config, needed)
    return Advice(changes=tuple(needed), why="", config=final, memory=memory_of(final))


def _next(config: StageConfig, memory: Memory) -> tuple[Change, StageConfig, Memory] | None:
    """The cheapest change after which GPUs and hosts are less too small, and neither of them is more so."""
    before = _missing(config, memory)
    for change in _changes(config):
        tried = _with(config, [change])
        if not _is_allowed(tried):
            continue
        found = memory_of(tried)
        after = _missing(tried, found)
        if after[0] <= before[0] and after[1] <= before[1] and sum(after) < sum(before) - 1:
            return change, tried, found
    return None


def _missing(config: StageConfig, memory: Memory) -> tuple[float, float]:
    """Bytes by which a GPU and a host are too small."""
    host = host_needed(config, memory) - size_of(config.machine.host_memory)
    return max(memory.peak.total - room(config), 0.0), max(host, 0.0)


def _changes(config: StageConfig) -> Iterator[Change]:
    """What can still be changed, the cheapest first."""
    yield from _taken_back(config)
    yield from _layout(config)
    if not config.model.gradient_checkpointing:
        yield _one("model.gradient_checkpointing", True, "true", "a third more time")
    yield from _stages(config)
    yield from _parked_models(config)
    yield from _offloads(config)
    if config.lora is None and config.model.shape is None:
        yield Change(override="lora=default", values=(("lora", LoraConfig()),), costs="trains adapters alone")
    if config.machine.gpus < MOST_GPUS:
        more = config.machine.gpus * 2
        yield _one("machine.gpus", more, str(more), "more GPUs")


def _layout(config: StageConfig) -> Iterator[Change]:
    rows = config.batch
    if rows.micro_rows > 1:
        yield _one("batch.micro_rows", 1, "1", "smaller matrix products")
    least = max(LEAST_ROW, longest_example(config))
    if rows.row_length > least:
        half = max(rows.row_length // 2, least)
        yield _one("batch.row_length", half, str(half), "smaller matrix products")
    for key, options in (("rollout", getattr(config, "rollout", None)), ("sampled", getattr(config, "sampled", None))):
        if options is not None and options.batch_tokens > longest(config, options):
            half = max(options.batch_tokens // 2, longest(config, options))
            yield _one(f"{key}.batch_tokens", half, str(half), "slower sampling")


def _stages(config: StageConfig) -> Iterator[Change]:
    stage = config.engine.zero_stage
    if stage < 2:
        yield _one("engine.zero_stage", 2, "2", "gradients are sent with every micro-batch")
    if stage < 3 and not (config.lora is not None and config.lora.quantise.value != "none"):
        yield _one("engine.zero_stage", 3, "3", "weights are sent with every micro-batch")


def _parked_models(config: StageConfig) -> Iterator[Change]:
    if not isinstance(config, PpoConfig | DpoConfig):
        return
    if not config.reference.offload:
        yield _one("reference.offload", True, "true", "weights move to the GPU and back")
    for name, one in config.rewards.items():
        if one.model is not None and not one.offload:
            yield _one(f"rewards.{name}.offload", True, "true", "weights move to the GPU and back")


def _offloads(config: StageConfig) -> Iterator[Change]:
    engine = config.engine
    if engine.offload_optimizer is Offload.none and engine.zero_stage >= 2:
        yield _one("engine.offload_optimizer", Offload.cpu, "cpu", "updates are computed by the host")
    if engine.offload_parameters is Offload.none and engine.zero_stage == 3:
        yield _one("engine.offload_parameters", Offload.cpu, "cpu", "weights come from the host for every layer")


def _taken_back(config: StageConfig) -> Iterator[Change]:
    """Offloads, where GPUs have room and hosts have not."""
    if isinstance(config, PpoConfig | DpoConfig) and config.reference.offload:
        yield _one("reference.offload", False, "false", "nothing")
    for name, one in getattr(config, "rewards", {}).items():
        if one.model is not None and one.offload:
            yield _one(f"rewards.{name}.offload", False, "false", "nothing")
    for name in ("offload_parameters", "offload_optimizer"):
        if getattr(config.engine, name) is Offload.cpu:
            yield _one(f"engine.{name}", Offload.none, "none", "nothing")


def _one(key: str, value: Any, text: str, costs: str) -> Change:
    return Change(override=f"{key}={text}", values=((key, value),), costs=costs)


def _with(config: StageConfig, changes: Sequence[Change]) -> StageConfig:
    """A copy with other values."""
    changed = copy.deepcopy(config)
    for change in changes:
        for key, value in change.values:
            *path, name = key.split(".")
            section: Any = changed
            for part in path:
                section = section[part] if isinstance(section, dict) else getattr(section, part)
            setattr(section, name, value)
    return changed


def _needed(config: StageConfig, changes: list[Change]) -> list[Change]:
    """Without those that the run fits without, the dearest first; of one key the mildest value that will do."""
    needed = _last_of_each(changes)
    for change in reversed(list(needed)):
        others = [one for one in needed if one is not change]
        milder = [one for one in changes if one.values[0][0] == change.values[0][0] and one is not change]
        for instead in ([], *([one] for one in milder)):
            tried = _with(config, [*others, *instead])
            if _is_allowed(tried) and fits(tried, memory_of(tried)):
                needed = sorted([*others, *instead], key=changes.index)
                break
    return needed


def _last_of_each(changes: Sequence[Change]) -> list[Change]:
    """The same key may have been changed several times."""
    last = {change.values[0][0]: change for change in changes}
    return [change for change in changes if last[change.values[0][0]] is change]


def _is_allowed(config: StageConfig) -> bool:
    """What `config.check` would refuse about the engine."""
    engine = config.engine
    return not (
        (engine.offload_optimizer is Offload.cpu and engine.zero_stage < 2)
        or (engine.offload_parameters is Offload.cpu and engine.zero_stage != 3)
        or (config.model.dtype is Dtype.bfloat16 and engine.zero_stage == 0)
    )


def _without_end(config: StageConfig, memory: Memory) -> Advice:
    """`config`: with all that has helped."""
    if memory.peak.total > room(config):
        line, size = max(memory.peak.lines.items(), key=lambda item: item[1])
        what = f"{size / 1e9:,.0f} GB of {line} on every GPU in the phase {memory.peak.name}"
    else:
        what = f"{host_needed(config, memory) / 1e9:,.0f} GB of what is offloaded in every host"
    return Advice(
        changes=(), why=f"no change known to rlhf plan makes it fit: there stay {what}", config=None, memory=None
    )
