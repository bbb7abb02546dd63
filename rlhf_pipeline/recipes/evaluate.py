"""`rlhf evaluate`: models beside each other, by the lab's judge, by known rankings, or by a reward model.

Several processes answer prompts together; what follows (verdicts, rewards, tables) is the first one's work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_pipeline import runtime
from rlhf_pipeline.config.schema import EvaluationKind, ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.config.stages import EvaluateConfig, GenerateConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation import gold, preferences, selection
from rlhf_pipeline.evaluation.raters import Rating, Sort, naming, progress, resolve, sort_of
from rlhf_pipeline.files import write_json
from rlhf_pipeline.generation.load import open_renderer
from rlhf_pipeline.generation.responses import read_lines
from rlhf_pipeline.recipes import generate
from rlhf_pipeline.scoring.answers import read_answers
from rlhf_pipeline.scoring.rewards import open_scorer, rewards


def main(config: EvaluateConfig) -> None:
    """Evaluate as `kind` says, print what came of it and save it in the run's folder.

    Raises:
        UserError: for what the user can put right.
        SystemExit: 130 after Ctrl-C; answers that are there stay.
    """
    evaluate = {EvaluationKind.gold: _gold, EvaluationKind.rm: _rm, EvaluationKind.select: _select}[config.kind]
    try:
        evaluate(config)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        raise SystemExit(130) from None


def _gold(config: EvaluateConfig) -> None:
    """The lab's judge over the answers of every system."""
    # 1 Answers; those that are there from an interrupted run stay
    answers = {name: _gold_answers(name, system, config) for name, system in config.systems.items()}
    if not runtime.is_main():
        return

    # 2 A verdict on each
    verdicts = gold.judged(answers)

    # 3 For programs, then for people
    _save(config, gold.results(verdicts), "verdicts.jsonl", gold.rows(answers, verdicts))
    console = Console()
    gold.show(console, answers, verdicts, samples=config.samples)
    _tell_files(console, config, "verdicts.jsonl (every criterion of every answer, with why)")


def _rm(config: EvaluateConfig) -> None:
    """Reward models, policies and labelers on answers whose order is known."""
    if not runtime.is_main():
        return
    process = runtime.start(config.runtime)
    tell = Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print

    # 1 What can be refused before any model is loaded, and the rankings
    systems = resolve(config)
    read = read_answers(config.data)
    rows = preferences.ranked(read.rows)
    for note in read.notes:
        tell(note)
    if len(rows) < len(read.rows):
        tell(f"{len(read.rows) - len(rows)} of {len(read.rows)} rows have no ranks and are left out")

    # 2 Rewards by every system, of the rows that all of them can rate
    rating = Rating(config, rows, device=process.device, tell=tell)
    rated = {system.name: rating.by(system) for system in systems}
    compared = preferences.ranked(rating.rows)
    given = {name: [mine[row.index] for row in compared] for name, mine in rated.items()}

    # 3 For programs, then for people
    found = preferences.measure(compared, given)
    _save(config, preferences.results(found), "rewards.jsonl", preferences.lines(compared, given))
    console = Console()
    preferences.show(console, found)
    _tell_files(console, config, "rewards.jsonl (every row with every system's rewards)")


def _select(config: EvaluateConfig) -> None:
    """The candidate whose answers a reward model likes best."""
    # 1 What can be refused before anything is loaded
    paths = selection.candidates(config.systems)
    reward = str(config.reward.path)
    with naming("reward.path", reward):
        open_renderer(config.reward, TokenizerConfig())
        if sort_of(reward) is not Sort.reward_model:
            raise UserError("is no reward model; rlhf rm trains one")

    # 2 Answers; those that are there from an interrupted run stay
    answers = {name: _answers(name, path, config) for name, path in paths.items()}
    if not runtime.is_main():
        return
    rows = {name: selection.to_score(mine) for name, mine in answers.items()}
    selection.check_same_prompts(rows)

    # 3 Rewards, by the reward model's own tokenizer and template
    with naming("reward.path", reward):
        scorer = open_scorer(config.reward, TokenizerConfig(), runtime.start(config.runtime).device)
    given = {}
    for name, mine in rows.items():
        with naming(f"systems.{name}", paths[name]):
            given[name] = rewards(
                scorer,
                mine,
                max_length=config.data.max_length,
                batch_tokens=config.batch_tokens,
                tick=progress(name, len(answers[name])),
            )

    # 4 For programs, then for people
    found = selection.select(paths, answers, given)
    _save(config, selection.results(found), "rewards.jsonl", selection.lines(rows, given))
    console = Console()
    selection.show(console, found)
    _tell_files(console, config, "rewards.jsonl (every answer and its reward)")


def _gold_answers(name: str, system: str, config: EvaluateConfig) -> list[dict[str, Any]]:
    """The answers of a model, or those that a file holds; one to each prompt."""
    file = Path(system)
    if file.suffix != ".jsonl":
        rows = _answers(name, system, config)
    elif not file.is_file():
        raise UserError(f"systems.{name}={system}: there is no such file; name a model, or a file of rlhf generate")
    else:
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


def _answers(name: str, model: str, config: EvaluateConfig) -> list[dict[str, Any]]:
    """The lines of `rlhf generate` in the folder of that name; on the first process."""
    folder = Path(config.run_dir) / name
    asked = GenerateConfig(
        name=config.name,
        runs=config.runs,
        run_dir=str(folder),
        seed=config.seed,
        model=ReadyModelConfig(path=model),
        tokenizer=config.tokenizer,
        prompts=config.prompts,
        sampling=config.sampling,
        runtime=config.runtime,
    )
    with naming(f"systems.{name}", model):
        generate.main(asked)
    return list(read_lines(folder / "responses.jsonl")) if runtime.is_main() else []


def _save(config: EvaluateConfig, results: Any, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / name).write_text("".join(lines), encoding="utf-8")


def _tell_files(console: Console, config: EvaluateConfig, rows: str) -> None:
    console.print(f"\nresults.json and {rows} are in {config.run_dir}", soft_wrap=True)
