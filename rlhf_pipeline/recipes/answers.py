"""What every `rlhf evaluate` needs around its own work: the answers of a system, and a place for what comes of them.

Answers lie in <run_dir>/answers/<system>/responses.jsonl, whatever asked for them, so that the same ones can be judged
again by somebody else. Results lie in a folder of their own for every kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_pipeline import runtime
from rlhf_pipeline.config.schema import ReadyModelConfig, SamplingConfig
from rlhf_pipeline.config.stages import EvaluateConfig, GenerateConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.raters import naming
from rlhf_pipeline.files import write_json, write_text
from rlhf_pipeline.generation.responses import read_lines
from rlhf_pipeline.recipes import generate

Line = dict[str, Any]  # of `rlhf generate`


def answers(
    name: str, model: str, config: EvaluateConfig, *, sampling: SamplingConfig | None = None, folder: str | None = None
) -> list[Line]:
    """The lines of `rlhf generate` for this model, drawn where they are not there yet; on the first process.

    Args:
        sampling: another one than the config's.
        folder: under `answers`; else the system's name.
    """
    place = Path(config.run_dir, "answers", folder or name)
    asked = GenerateConfig(
        name=config.name,
        runs=config.runs,
        run_dir=str(place),
        seed=config.seed,
        model=ReadyModelConfig(path=model),
        tokenizer=config.tokenizer,
        prompts=config.prompts,
        sampling=sampling or config.sampling,
        token_ids=True,  # kind=frontier reads them
        runtime=config.runtime,
    )
    with naming(f"systems.{name}", model):
        generate.main(asked)
    return list(read_lines(place / "responses.jsonl")) if runtime.is_main() else []


def answers_or_file(name: str, system: str, config: EvaluateConfig, fields: Iterable[str]) -> list[Line]:
    """The answers of a model, or those that a file holds.

    Raises:
        UserError: where there is no such file, it is empty, or a line lacks one of `fields`.
    """
    file = Path(system)
    if file.suffix != ".jsonl":
        return answers(name, system, config)
    if not file.is_file():
        raise UserError(f"systems.{name}={system}: there is no such file; name a model, or a file of rlhf generate")
    if not runtime.is_main():
        return []
    rows = list(read_lines(file))
    if not rows:
        raise UserError(f"systems.{name}={system}: holds no answers")
    lacking = next((field for row in rows for field in fields if field not in row), None)
    if lacking:
        raise UserError(f"systems.{name}={system}: a line has no {lacking!r}; name a model, or a file of rlhf generate")
    return rows


def results_folder(config: EvaluateConfig, *more: str) -> Path:
    """Where this kind of evaluation leaves its results."""
    return Path(config.run_dir).joinpath(config.kind.value, *more)


def save(folder: Path, results: Mapping[str, Any], name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write results.json and, a line each, the rows that it was made of."""
    write_lines(folder / name, rows)
    write_json(folder / "results.json", results)


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a line a row; the folder is made where it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def tell_files(console: Console, folder: Path, rows: str) -> None:
    """Print where the results are."""
    console.print(f"\nresults.json and {rows} are in {folder}", soft_wrap=True)
