"""Tables of models: what each is worth, what it cost, and how its artifact came to be."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.report.collect import Collected, Evaluation, Stage
from rlhf_pipeline.report.lineage import anchor
from rlhf_pipeline.report.parts import Cell, Table, table, words
from rlhf_pipeline.report.values import (
    Interval,
    beside,
    bounds,
    entries,
    interval,
    mapping,
    percent,
    plain,
    short,
    whole,
)

STAGE_NAMES = {
    "pretrain": "pretraining",
    "sft": "fine-tuning",
    "rm": "reward model",
    "ppo": "PPO",
    "dpo": "direct objective",
}
_TOKENS = ("time/tokens_per_second", "time/rollout_tokens_per_second")
_STEP = ("time/step_seconds", "time/iteration_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What a reader can open below a stage's name."""

    anchor: str
    label: str
    command: str
    facts: tuple[tuple[str, str], ...]
    parents: Table | None
    data: Table | None
    metrics: Table | None
    config: str


def last(stage: Stage, name: str) -> Interval | None:
    """The metric's last value with its interval."""
    return next((found for row in reversed(stage.metrics) if (found := beside(row, name)) is not None), None)


def median(stage: Stage, *names: str) -> float | None:
    """Over the steps, of the first of the metrics that the run has: one slow step says nothing of the others."""
    for name in names:
        if values := [one.mean for row in stage.metrics if (one := interval(row.get(name))) is not None]:
            return statistics.median(values)
    return None


def system_of(evaluation: Evaluation, stage: Stage) -> str | None:
    """The name under which an evaluation has a stage's model: by content hash, or by its folder."""
    for name, model in evaluation.models.items():
        if stage.hash is not None and model == stage.hash:
            return name
    folders = {name: Path(model).parts for name, model in evaluation.models.items()}
    ending = (*Path(stage.label).parts, "artifact")
    return next((name for name, parts in folders.items() if parts[-len(ending) :] == ending), None)


def overview(collected: Collected) -> Table | None:
    """A row a model, with whatever was measured of it, and below them what was evaluated without being a model here."""
    stages, others = collected.stages, _others(collected)

    def of_stages(make: Callable[[Stage], Cell | None]) -> list[Cell | None]:
        return [*(make(stage) for stage in stages), *(None for _ in others)]

    def of_systems(one: Evaluation, cells: Mapping[Any, Cell | None]) -> list[Cell | None]:
        return [cells.get(name) for name in (*(system_of(one, stage) for stage in stages), *others)]

    columns = {
        "stage": of_stages(lambda stage: words(STAGE_NAMES[stage.stage])),
        "objective": of_stages(_objective),
        "parameters": of_stages(lambda stage: _cell(stage.parameters, short)),
    }
    gold = collected.judged("gold")
    for one in gold:
        systems = mapping(one.results.get("systems"))
        scores = {name: _interval(interval(mapping(mine).get("score"))) for name, mine in systems.items()}
        columns["gold score" if len(gold) == 1 else f"gold score ({one.label})"] = of_systems(one, scores)
    for one in collected.judged("winrate", "rank")[:4]:
        baseline = _baseline(one, collected)
        rates = {} if baseline is None else _rates(one, baseline)
        cells = {name: _interval(rate, as_percent=True) for name, rate in rates.items()}
        columns[f"beats {baseline}, says {one.judge}"] = of_systems(one, cells)
    columns |= {
        "held-out accuracy": of_stages(lambda stage: _interval(last(stage, "eval/accuracy"), as_percent=True)),
        "held-out loss": of_stages(lambda stage: _interval(last(stage, "eval/loss"))),
        "KL": of_stages(lambda stage: _interval(last(stage, "eval/kl") or last(stage, "rollout/kl"))),
        "minutes": of_stages(_minutes),
        "tokens/s": of_stages(lambda stage: _cell(median(stage, *_TOKENS), whole)),
    }
    caption = (
        "Everything measured, with 95 % intervals in brackets. Gold scores are the lab's judge's, 1 is the best. KL is in "
        "nats an answer, from the model that training started from. Losses of different stages are not comparable."
    )
    names = [*(words(stage.label, href=f"#{anchor(stage)}") for stage in stages), *(words(name) for name in others)]
    return table("Models", caption, names, columns, first="model")


def _objective(stage: Stage) -> Cell | None:
    """Of stages that have a choice its name: of direct objectives, ranking losses, or advantages."""
    config = mapping(stage.manifest.get("config"))
    for section, key in (("objective", "name"), ("objective", "loss"), ("advantage", "estimator")):
        if name := mapping(config.get(section)).get(key):
            return words(str(name))
    return None


def _others(collected: Collected) -> list[str]:
    """Systems of evaluations that are none of the folder's models: files of answers, the best of n, people."""
    found: dict[str, None] = {}
    for one in collected.judged("gold", "winrate", "rank"):
        known = {system_of(one, stage) for stage in collected.stages}
        found |= dict.fromkeys(str(name) for name in mapping(one.results.get("systems")) if name not in known)
    return list(found)


def _baseline(one: Evaluation, collected: Collected) -> str | None:
    """Whom the others are held against: the supervised model where it took part, else the only baseline there is."""
    pairs = entries(one.results.get("comparisons"))
    there = {str(c.get(key)) for c in pairs for key in ("system", "baseline")}
    supervised = [name for name in (*(system_of(one, stage) for stage in collected.of("sft")), "sft") if name in there]
    baselines = {str(c.get("baseline")) for c in pairs}
    return supervised[0] if supervised else baselines.pop() if len(baselines) == 1 else None


def _rates(one: Evaluation, baseline: str) -> dict[str, Interval]:
    """Win rates against it, whichever way round they were measured."""
    found = {}
    for c in entries(one.results.get("comparisons")):
        if (rate := interval(c.get("win_rate"))) is not None:
            if c.get("baseline") == baseline:
                found[str(c.get("system"))] = rate
            elif c.get("system") == baseline:
                found[str(c.get("baseline"))] = rate.turned()
    return found


def timings(stages: Sequence[Stage]) -> Table | None:
    """What every stage took."""
    columns: dict[str, Sequence[Cell | None]] = {
        "steps": [_cell(stage.metrics[-1]["step"], whole) if stage.metrics else None for stage in stages],
        "minutes": [_minutes(stage) for stage in stages],
        "seconds a step": [_cell(median(stage, *_STEP), plain) for stage in stages],
        "tokens/s": [_cell(median(stage, *_TOKENS), whole) for stage in stages],
        "answers/s": [_cell(median(stage, "time/episodes_per_second"), plain) for stage in stages],
        "share of peak": [_cell(median(stage, "time/share_of_peak"), percent) for stage in stages],
        "memory, GB": [_cell(_most(stage, "time/peak_memory_gb"), plain) for stage in stages],
    }
    caption = (
        "Medians over steps; memory is the most at any time. Tokens of PPO are those that were sampled. Share of peak is "
        "of what the machine's processor can do at its best."
    )
    names = [words(stage.label, href=f"#{anchor(stage)}") for stage in stages]
    return table("Time and throughput", caption, names, columns, first="run")


def details(stage: Stage) -> Details:
    """Config, parents, data and last metrics of a run, as its manifest has them."""
    manifest = stage.manifest
    facts = {
        "command": f"rlhf {stage.stage}",
        "step": manifest.get("step"),
        "kind": manifest.get("kind"),
        "parameters": short(stage.parameters) if stage.parameters else None,
        "content hash": manifest.get("content_hash"),
        "template": manifest.get("template_hash"),
        "tokenizer": manifest.get("tokenizer_hash"),
        "vocabulary": manifest.get("vocab_size"),
        "reward shift": manifest.get("reward_shift"),
        "reward scale": manifest.get("reward_scale"),
        "revision": manifest.get("git_revision"),
        "versions": ", ".join(f"{name} {one}" for name, one in sorted(mapping(manifest.get("versions")).items())),
    }
    return Details(
        anchor=anchor(stage),
        label=stage.label,
        command=f"rlhf {stage.stage}",
        facts=tuple((name, str(value)) for name, value in facts.items() if value not in (None, "")),
        parents=_parents(mapping(manifest.get("parents"))),
        data=_data(mapping(manifest.get("data"))),
        metrics=_metrics(mapping(manifest.get("metrics"))),
        config=json.dumps(manifest.get("config"), indent=2, sort_keys=True, ensure_ascii=False),
    )


def _parents(parents: Mapping[str, Any]) -> Table | None:
    names = sorted(parents)
    columns = {
        "from": [words(str(mapping(parents[name]).get("path", ""))) for name in names],
        "content hash": [words(str(mapping(parents[name]).get("content_hash") or "no artifact")) for name in names],
    }
    return table("Made from", "", [words(name) for name in names], columns, first="role")


def _data(data: Mapping[str, Any]) -> Table | None:
    names = sorted(data)
    columns = {
        "fingerprint": [words(str(mapping(data[name]).get("fingerprint", ""))) for name in names],
        "counts other than 0": [words(_counts(mapping(data[name]).get("counts"))) for name in names],
    }
    return table("Data", "", [words(name) for name in names], columns, first="set")


def _counts(counts: Any) -> str:
    return ", ".join(f"{key} {whole(value)}" for key, value in mapping(counts).items() if value and _is_number(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _metrics(metrics: Mapping[str, Any]) -> Table | None:
    names = sorted(name for name in metrics if not name.endswith(("_low", "_high")))
    columns = {"value": [_interval(beside(metrics, name)) for name in names]}
    return table("Last evaluation", "", [words(name) for name in names], columns, first="metric")


def _cell(value: float | None, shown: Callable[[float], str]) -> Cell | None:
    return None if value is None else Cell(text=shown(value))


def _interval(one: Interval | None, *, as_percent: bool = False) -> Cell | None:
    if one is None:
        return None
    return Cell(text=percent(one.mean) if as_percent else plain(one.mean), note=bounds(one, as_percent=as_percent))


def _minutes(stage: Stage) -> Cell | None:
    found = last(stage, "time/elapsed")
    return None if found is None else Cell(text=f"{found.mean / 60:.1f}")


def _most(stage: Stage, name: str) -> float | None:
    return max((one.mean for row in stage.metrics if (one := interval(row.get(name))) is not None), default=None)
