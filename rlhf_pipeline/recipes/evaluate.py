"""`rlhf evaluate`: models beside each other, by the lab's judge, by known rankings, by a reward model, or by any judge.

Several processes answer prompts together; what follows (verdicts, rewards, tables) is the first one's work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console

from rlhf_pipeline import runtime
from rlhf_pipeline.config.schema import EvaluationKind, TokenizerConfig
from rlhf_pipeline.config.stages import EvaluateConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation import gold, preferences, selection
from rlhf_pipeline.evaluation.raters import Rating, Sort, naming, progress, resolve, sort_of
from rlhf_pipeline.generation.load import open_renderer
from rlhf_pipeline.recipes.answers import answers, answers_or_file, results_folder, save, tell_files
from rlhf_pipeline.recipes.frontier import frontier
from rlhf_pipeline.recipes.winrate import winrate
from rlhf_pipeline.scoring.answers import read_answers
from rlhf_pipeline.scoring.rewards import open_scorer, rewards


def main(config: EvaluateConfig) -> None:
    """Evaluate as `kind` says, print what came of it and save it in the run's folder.

    Raises:
        UserError: for what the user can put right.
        SystemExit: 130 after Ctrl-C; answers that are there stay.
    """
    evaluate: dict[EvaluationKind, Callable[[EvaluateConfig], None]] = {
        EvaluationKind.gold: _gold,
        EvaluationKind.rm: _rm,
        EvaluationKind.select: _select,
        EvaluationKind.winrate: winrate,
        EvaluationKind.rank: winrate,
        EvaluationKind.frontier: frontier,
    }
    runtime.start(config.runtime)  # of several processes each, also those that then have nothing to do
    try:
        evaluate[config.kind](config)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        raise SystemExit(130) from None


def _gold(config: EvaluateConfig) -> None:
    """The lab's judge over the answers of every system."""
    # 1 Answers; those that are there from an interrupted run stay
    lines = {name: answers_or_file(name, system, config, gold.FIELDS) for name, system in config.systems.items()}
    if not runtime.is_main():
        return
    for name, mine in lines.items():
        if any(line["sample"] for line in mine):
            raise UserError(f"systems.{name}: holds several answers to a prompt; the lab's judge compares one each")

    # 2 A verdict on each
    verdicts = gold.judged(lines)

    # 3 For programs, then for people
    folder = results_folder(config)
    save(folder, {"kind": "gold", **gold.results(verdicts)}, "verdicts.jsonl", gold.rows(lines, verdicts))
    console = Console()
    gold.show(console, lines, verdicts, samples=config.samples)
    tell_files(console, folder, "verdicts.jsonl (every criterion of every answer, with why)")


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
    folder = results_folder(config)
    save(folder, {"kind": "rm", **preferences.results(found)}, "rewards.jsonl", preferences.lines(compared, given))
    console = Console()
    preferences.show(console, found)
    tell_files(console, folder, "rewards.jsonl (every row with every system's rewards)")


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
    lines = {name: answers(name, path, config) for name, path in paths.items()}
    if not runtime.is_main():
        return
    rows = {name: selection.to_score(mine) for name, mine in lines.items()}
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
                tick=progress(name, len(lines[name])),
            )

    # 4 For programs, then for people
    found = selection.select(paths, lines, given)
    folder = results_folder(config)
    save(folder, {"kind": "select", **selection.results(found)}, "rewards.jsonl", selection.lines(rows, given))
    console = Console()
    selection.show(console, found)
    tell_files(console, folder, "rewards.jsonl (every answer and its reward)")
