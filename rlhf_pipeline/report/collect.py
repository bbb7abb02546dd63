"""Reads a folder of runs into plain data: stages that trained, what evaluated them, and the answers that were judged.

Everything is optional but one usable thing; nothing here draws, and nothing is written. Weights are not opened: of their
files only the headers are read, for the number of parameters.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report.values import mapping
from rlhf_pipeline.tracking.records import read_metrics
from rlhf_pipeline.tracking.redaction import redact

ORDER = ("pretrain", "sft", "rm", "ppo", "dpo")  # as the recipe goes
# What a stage or an evaluation keeps for itself: another epoch's weights, training state, tokens, answers' caches.
SKIPPED = frozenset({"artifact", "artifacts", "state", "cache", "tokenizer", "wandb"})
DEEPEST = 7  # folders below the one that is told of
MOST_STAGES = 64
MOST_EVALUATIONS = 32
MOST_BYTES = 2 << 20  # of a picture that is taken into the page
_HEADER = 100 << 20  # bytes, which no safetensors header exceeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A training run. `label` is its folder as seen from the one that is told of."""

    label: str
    stage: str
    metrics: list[dict[str, float]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)  # secrets masked; empty before the run has ended
    parameters: int | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    rewards_png: str | None = None  # base64
    written: datetime | None = None  # the manifest

    @property
    def hash(self) -> str | None:
        return self.manifest.get("content_hash") or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A results.json. `models` has, of the systems for which it is known, the content hash of the model or its path."""

    label: str
    kind: str
    judge: str | None
    results: dict[str, Any]
    rows: list[dict[str, Any]]  # of verdicts.jsonl, one a prompt
    place: str  # the run of rlhf evaluate: its results are about the same answers
    models: dict[str, str]

    @property
    def title(self) -> str:
        return f"{self.kind}, judge {self.judge}" if self.judge else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    name: str
    stages: list[Stage]
    evaluations: list[Evaluation]
    notes: list[str]  # what was left out

    def of(self, stage: str) -> list[Stage]:
        return [one for one in self.stages if one.stage == stage]

    def judged(self, *kinds: str) -> list[Evaluation]:
        return [one for one in self.evaluations if one.kind in kinds]


def collect(folder: Path) -> Collected:
    """All that a report can tell of `folder`, in the recipe's order.

    Raises:
        UserError: when there is no such folder, nothing usable lies in it, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"folder={folder}: there is no such folder; name one that holds runs, such as runs/demo")
    folder = folder.resolve()
    stages, evaluations = [], []
    for place in _folders(folder):
        if (place / "metrics.jsonl").is_file() and _stage_name(place) in ORDER:
            stages.append(place)
        elif (place / "results.json").is_file() and "kind" in _json(place / "results.json"):
            evaluations.append(place)
    if not stages and not evaluations:
        raise UserError(
            f"folder={folder}: holds no run that has trained a step and no results of rlhf evaluate; "
            "name a folder of runs, such as runs/demo, or run a stage first"
        )
    notes = []
    if (left := len(stages) - MOST_STAGES) > 0:
        notes.append(f"{left} more training runs lie in the folder; a report on a part of it has them")
    if (left := len(evaluations) - MOST_EVALUATIONS) > 0:
        notes.append(f"{left} more evaluations lie in the folder; a report on a part of it has them")
    read = [_stage(place, folder) for place in stages[:MOST_STAGES]]
    return Collected(
        name=folder.name,
        stages=sorted(read, key=lambda one: (ORDER.index(one.stage), _natural(one.label))),
        evaluations=[_evaluation(place, folder) for place in evaluations[:MOST_EVALUATIONS]],
        notes=notes,
    )


def _folders(folder: Path) -> Iterator[Path]:
    for place, below, _ in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        wanted = [one for one in below if one not in SKIPPED and not one.startswith(".") and depth < DEEPEST]
        below[:] = sorted(wanted, key=_natural)
        yield Path(place)


def _natural(name: str) -> list[Any]:
    """A key by which run_2 comes before run_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _stage_name(place: Path) -> str:
    marker = place / "run.json"
    return str(_json(marker).get("stage")) if marker.is_file() else ""


def _stage(place: Path, folder: Path) -> Stage:
    artifact = place / "artifact"
    manifest = artifact / "artifact.json"
    picture = place / "rewards.png"
    shown = picture.is_file() and picture.stat().st_size <= MOST_BYTES
    return Stage(
        label=_label(place, folder),
        stage=_stage_name(place),
        metrics=read_metrics(place / "metrics.jsonl"),
        manifest=redact(_json(manifest)) if manifest.is_file() else {},
        parameters=_parameters(artifact),
        evaluation=_json(place / "evaluation.json") if (place / "evaluation.json").is_file() else {},
        rewards_png=base64.b64encode(picture.read_bytes()).decode() if shown else None,
        written=datetime.fromtimestamp(int(manifest.stat().st_mtime), UTC) if manifest.is_file() else None,
    )


def _evaluation(place: Path, folder: Path) -> Evaluation:
    results = _json(place / "results.json")
    verdicts = place / "verdicts.jsonl"
    kind = str(results["kind"])
    place_of_run = place.parent.parent if kind in ("winrate", "rank") else place.parent
    return Evaluation(
        label=_label(place, folder),
        kind=kind,
        judge=str(mapping(results.get("judge")).get("name") or place.name) if kind in ("winrate", "rank") else None,
        results=results,
        rows=list(_lines(verdicts)) if verdicts.is_file() else [],
        place=str(place_of_run),
        models=_models(mapping(results.get("systems")), place_of_run),
    )


def _models(systems: Mapping[str, Any], run: Path) -> dict[str, str]:
    found = {}
    for name, one in systems.items():
        inputs = run / "answers" / name / "inputs.json"
        model = _json(inputs).get("model") if inputs.is_file() else mapping(one).get("path")
        if isinstance(model, str):
            found[name] = model
    return found


def _label(place: Path, folder: Path) -> str:
    return folder.name if place == folder else place.relative_to(folder).as_posix()


def _parameters(artifact: Path) -> int | None:
    """Counted from the headers of safetensors files: eight bytes of length, then JSON with the shapes."""
    count = 0
    for file in sorted(artifact.glob("*.safetensors")):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > _HEADER:
                return None
            try:
                header = json.loads(opened.read(length))
            except ValueError:
                return None
        count += sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    return count or None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); remove it, or make it again") from None
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                raise UserError(f"{path}, line {number}: is not valid JSON; make the file again") from None
            if isinstance(row, dict):
                yield row
