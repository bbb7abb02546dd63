"""`rlhf evaluate`: models beside each other. `kind=gold` has the lab's judge score their answers to held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_pipeline import runtime
from rlhf_pipeline.config.schema import ReadyModelConfig
from rlhf_pipeline.config.stages import EvaluateConfig, GenerateConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation import gold
from rlhf_pipeline.files import write_json
from rlhf_pipeline.generation.responses import read_lines
from rlhf_pipeline.recipes import generate


def main(config: EvaluateConfig) -> None:
    """Answer the prompts with every system, judge the answers, print and save what came of it.

    Raises:
        UserError: for what the user can put right.
        SystemExit: 130 after Ctrl-C; the answers so far are kept.
    """
    folder = Path(config.run_dir)

    # 1 The answers of every system; those that are there from an interrupted run stay
    answers = {name: _answers(name, system, config) for name, system in config.systems.items()}
    if not runtime.is_main():
        return

    # 2 A verdict on each
    verdicts = gold.judged(answers)

    # 3 For programs, then for people
    write_json(folder / "results.json", gold.results(verdicts))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in gold.rows(answers, verdicts)]
    (folder / "verdicts.jsonl").write_text("".join(lines), encoding="utf-8")
    console = Console()
    gold.show(console, answers, verdicts, samples=config.samples)
    console.print(f"\nresults.json and verdicts.jsonl (every criterion of every answer, with why) are in {folder}")


def _answers(name: str, system: str, config: EvaluateConfig) -> list[dict[str, Any]]:
    """The answers of a model, or those that a file holds."""
    file = Path(system)
    if file.suffix != ".jsonl":
        file = Path(config.run_dir) / name / "responses.jsonl"
        asked = GenerateConfig(
            name=config.name,
            runs=config.runs,
            run_dir=str(file.parent),
            seed=config.seed,
            model=ReadyModelConfig(path=system),
            tokenizer=config.tokenizer,
            prompts=config.prompts,
            sampling=config.sampling,
            runtime=config.runtime,
        )
        try:
            generate.main(asked)
        except UserError as error:
            raise UserError(f"systems.{name}={system}: {error}") from error
    elif not file.is_file():
        raise UserError(f"systems.{name}={system}: there is no such file; name a model, or a file of rlhf generate")
    rows = list(read_lines(file)) if runtime.is_main() else []
    lacking = next((field for row in rows for field in gold.FIELDS if field not in row), None)
    if lacking:
        raise UserError(f"systems.{name}={system}: a line has no {lacking!r}; name a model, or a file of rlhf generate")
    if runtime.is_main() and not rows:
        raise UserError(f"systems.{name}={system}: holds no answers")
    if any(row["sample"] for row in rows):
        raise UserError(
            f"systems.{name}={system}: holds several answers to a prompt; the lab's judge compares one each"
        )
    return rows
