"""What checkpoints gain in reward for what they move away from their reference (`kind=frontier`): points, rows, a table.

A point is a checkpoint of a run, or the best of N answers of the reference. Its reward is the mean over held-out prompts of
what each scorer gives its answers; how far it is from the reference comes in from `divergence`. Plain results out.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind, Manifest
from rlhf_pipeline.config.frontier import FrontierConfig
from rlhf_pipeline.data.lab.summary import Mean, mean
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.divergence import Divergence
from rlhf_pipeline.evaluation.diversity import Diversity
from rlhf_pipeline.evaluation.implicit import reference_of
from rlhf_pipeline.evaluation.raters import naming
from rlhf_pipeline.evaluation.selection import Answer, kept
from rlhf_pipeline.evaluation.tables import cell, table
from rlhf_pipeline.scoring.best_of import kl_upper_bound

BEST_OF = "best_of_n"  # what such points are called, as a system and as a method
AXES = ("gold", "proxy")
METHOD = {
    "kl": "mean over prompts, in nats an answer, of the sum over the tokens of an answer that the policy drew of "
    "KL(policy || reference) of both next-token distributions over the whole vocabulary, both at sampling.temperature",
    "kl_best_of_n": "log N - (N-1)/N, an upper bound of KL(best of N || reference) (Beirami et al. 2024)",
    "entropy": "of the policy's next-token distribution, in nats a token, mean over all tokens of the same answers",
    "intervals": "95 %, percentiles of 2,000 samples of the prompts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A policy that becomes a point."""

    system: str
    label: str  # epoch_2, step_100 or artifact; empty for a model that is a system of its own
    path: str
    method: str  # ppo, the name of a direct objective, or another stage; model where nothing tells
    step: int | None
    reference: str  # what its KL is against

    @property
    def name(self) -> str:
        """Of it alone, and of the folder of its answers."""
        return f"{self.system}-{self.label}" if self.label else self.system


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of the picture."""

    system: str
    label: str
    method: str
    step: int | None
    kl: Mean
    kl_is_bound: bool
    scores: dict[str, Mean]  # by scorer
    entropy: float | None  # None where nothing measured it
    diversity: Diversity


def checkpoints(systems: Mapping[str, str], reference: str | None) -> list[Checkpoint]:
    """Every checkpoint of the systems, by step; a run of several models becomes all of them, each once.

    Args:
        systems: by name a run's folder, or a model.
        reference: of all of them; None takes each one's parent.

    Raises:
        UserError: naming the system, for files, what is no policy, what has no reference, and names that come up twice.
    """
    found: list[Checkpoint] = []
    for system, path in systems.items():
        if path.endswith(".jsonl"):
            raise UserError(f"systems.{system}={path}: answers have no KL divergence; name a run's folder, or a model")
        with naming(f"systems.{system}", path):
            found += _of_system(system, path, reference)
    names = [BEST_OF, *(one.name for one in found)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"systems: {name} is there twice; give a system another name")
    return found


def _of_system(system: str, path: str, given: str | None) -> list[Checkpoint]:
    inside = Path(path) / "artifact"
    models = kept(path, "epoch", "step") + ([("artifact", str(inside))] if artifact.is_artifact(inside) else [])
    if not models:
        manifest = artifact.load(path, kind=Kind.policy) if artifact.is_artifact(path) else None
        return [_checkpoint(system, "", path, manifest, reference_of(path, given))]
    reference = reference_of(models[0][1], given)  # a run's artifacts have one parent
    known: dict[str, Checkpoint] = {}  # by content: the end of an epoch may have a step's name as well
    for label, one in models:
        manifest = artifact.load(one, kind=Kind.policy)
        if manifest.content_hash not in known:
            known[manifest.content_hash] = _checkpoint(system, label, one, manifest, reference)
    return sorted(known.values(), key=lambda one: one.step or 0)


def _checkpoint(system: str, label: str, path: str, manifest: Manifest | None, reference: str) -> Checkpoint:
    return Checkpoint(
        system=system,
        label=label,
        path=path,
        method="model" if manifest is None else _method(manifest),
        step=None if manifest is None else manifest.step,
        reference=reference,
    )


def _method(manifest: Manifest) -> str:
    objective = manifest.config.get("objective") if manifest.stage == "dpo" else None
    return str(objective["name"]) if objective else manifest.stage


def axes(config: FrontierConfig, scorers: Sequence[str]) -> dict[str, str | None]:
    """Which scorer is gold and which is the proxy, as far as there are such scorers."""
    named = {"gold": config.gold, "proxy": config.proxy}
    return {axis: name if name in scorers else None for axis, name in named.items()}


# Points


def of_checkpoint(
    one: Checkpoint,
    divergences: Sequence[Divergence],
    scores: Mapping[str, np.ndarray],
    diversity: Diversity,
    *,
    seed: int = 0,
) -> Point:
    """
    Args:
        divergences: of each prompt.
        scores: by scorer, float64 [prompts, samples].
    """
    entropy, tokens = (np.concatenate([getattr(mine, name) for mine in divergences]) for name in ("entropy", "tokens"))
    return Point(
        system=one.system,
        label=one.label,
        method=one.method,
        step=one.step,
        kl=mean(np.array([mine.kl.mean() for mine in divergences]), seed=seed),
        kl_is_bound=False,
        scores=_means(scores, seed),
        entropy=float(entropy.sum() / tokens.sum()),
        diversity=diversity,
    )


def of_best(n: int, scores: Mapping[str, np.ndarray], diversity: Diversity, *, seed: int = 0) -> Point:
    """
    Args:
        scores: by scorer, of the chosen answers, float64 [prompts, 1].
    """
    bound = kl_upper_bound(n)
    return Point(
        system=BEST_OF,
        label=str(n),
        method=BEST_OF,
        step=None,
        kl=Mean(mean=bound, low=bound, high=bound, count=len(next(iter(scores.values())))),
        kl_is_bound=True,
        scores=_means(scores, seed),
        entropy=None,
        diversity=diversity,
    )


def chosen(scores: np.ndarray, n: int) -> np.ndarray:
    """Which of the first n of each prompt's answers has the highest score, the first of those that share it.

    Scores [prompts, samples] -> int64 [prompts].
    """
    return np.argmax(scores[:, :n], axis=1)


def _means(scores: Mapping[str, np.ndarray], seed: int) -> dict[str, Mean]:
    return {name: mean(values.mean(axis=1), seed=seed) for name, values in scores.items()}


# For programs, then for people


def row(point: Point, which: Mapping[str, str | None]) -> dict[str, Any]:
    """A point of results.json. `which`: of `axes`."""
    found: dict[str, Any] = {
        "system": point.system,
        "label": point.label,
        "method": point.method,
        "step": point.step,
        **_spread("kl", point.kl),
        "kl_is_bound": point.kl_is_bound,
        "scores": {name: _interval(one) for name, one in point.scores.items()},
    }
    for axis in AXES:
        name = which[axis]
        found |= _spread(axis, None if name is None else point.scores[name])
    said = asdict(point.diversity)
    more = ("distinct_1", "distinct_2", "distinct_3", "identical", "tokens", "finished")
    return found | {"entropy": point.entropy} | {name: said[name] for name in more}


def results(points: Sequence[Point], which: Mapping[str, str | None], method: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json holds. `method`: what else is to be said of how the figures came about."""
    return {"kind": "frontier", "method": {**METHOD, **which, **method}, "points": [row(one, which) for one in points]}


def write_csv(path: Path, points: Sequence[Point], which: Mapping[str, str | None]) -> None:
    """A row a point: the columns of results.json, and three for every scorer."""
    rows = []
    for one in points:
        flat = row(one, which)
        del flat["scores"]
        for name, score in one.scores.items():
            flat |= _spread(f"score_{name}", score)
        rows.append(flat)
    with path.open("w", encoding="utf-8", newline="") as file:
        sheet = csv.DictWriter(file, fieldnames=list(rows[0]))
        sheet.writeheader()
        sheet.writerows(rows)


def lines(
    answers: Mapping[str, Sequence[Answer]],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    divergences: Mapping[str, Sequence[Divergence]],
) -> list[dict[str, Any]]:
    """What scores.jsonl holds: a line a prompt with every point's answers, their scores and, of checkpoints, their KL."""
    found: dict[int, dict[str, Any]] = {}
    for name, mine in answers.items():
        places: dict[int, int] = {}
        for line in mine:
            place = places.setdefault(line["index"], len(places))
            asked = found.setdefault(line["index"], {"index": line["index"], "prompt": line["prompt"], "answers": {}})
            given = asked["answers"].setdefault(name, {"responses": [], "finished": []})
            given["responses"].append(line["response"])
            given["finished"].append(line["finish_reason"] == "stop")
            given["scores"] = {scorer: values[place].tolist() for scorer, values in scores[name].items()}
            if name in divergences:
                given["kl"] = divergences[name][place].kl.tolist()
    return list(found.values())


def show(console: Console, points: Sequence[Point], which: Mapping[str, str | None], prompts: int) -> None:
    """Print a line a point."""
    shown = [name for name in (which["gold"], which["proxy"]) if name is not None]
    columns = ("KL", *shown, "entropy", "tokens", "finished")
    made = table(f"means and 95 % intervals over {prompts} prompts; KL in nats an answer", "checkpoint", columns)
    made.columns[0].no_wrap = True
    for one in points:
        spread = one.diversity
        made.add_row(
            f"{one.system} {one.label}".strip(),
            f"at most {one.kl.mean:.3f}" if one.kl_is_bound else cell(one.kl),
            *(cell(one.scores[name]) for name in shown),
            "" if one.entropy is None else f"{one.entropy:.3f}",
            "" if spread.tokens is None else f"{spread.tokens:.1f}",
            f"{spread.finished:.0%}",
        )
    console.print(made)


def _interval(one: Mean) -> dict[str, float]:
    return {"mean": one.mean, "low": one.low, "high": one.high}


def _spread(name: str, one: Mean | None) -> dict[str, float | None]:
    """A mean and its interval as three fields."""
    if one is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: one.mean, f"{name}_low": one.low, f"{name}_high": one.high}
