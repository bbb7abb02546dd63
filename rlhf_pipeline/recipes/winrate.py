"""`rlhf evaluate kind=winrate` and `kind=rank`: a judge between the answers of systems."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlhf_pipeline import runtime
from rlhf_pipeline.config.schema import EvaluationKind
from rlhf_pipeline.config.stages import EvaluateConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation import matching, strengths, winrate_plots
from rlhf_pipeline.evaluation import winrate as measured
from rlhf_pipeline.evaluation.diversity import diversity
from rlhf_pipeline.evaluation.intervals import ClusterMean, cluster_means
from rlhf_pipeline.evaluation.matching import Matched
from rlhf_pipeline.evaluation.tables import cell, table
from rlhf_pipeline.files import write_json
from rlhf_pipeline.judging.open import open_judge
from rlhf_pipeline.judging.pairs import Judge, rule
from rlhf_pipeline.judging.reward import optimised_for
from rlhf_pipeline.recipes.answers import Line, answers, answers_or_file, results_folder, tell_files, write_lines
from rlhf_pipeline.scoring import sources as scoring
from rlhf_pipeline.scoring.episodes import Episode


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The lines of `rlhf generate` of every system; of some also at other temperatures."""

    lines: dict[str, list[Line]]
    at: dict[str, dict[float, list[Line]]]


def winrate(config: EvaluateConfig) -> None:
    """Judge every pair in both orders, print win rates (of kind=rank strengths as well), and keep everything.

    Raises:
        UserError: for what the user can put right.
    """
    # 1 What can be refused before any model is loaded
    compared = measured.against(config.systems, config.baseline)
    scoring.check_sources(config.rewards)

    # 2 Answers; those that are there from an interrupted run stay
    drawn = _draw(config)
    if not runtime.is_main():
        return
    matched = matching.match(drawn.lines)

    # 3 A ruling on every pair; what a judge has said stays as well
    device = runtime.start(config.runtime).device
    tell = Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print
    judge = open_judge(config.judge, tokenizer=config.tokenizer, device=device, tell=tell)
    for name in optimised_for(config.judge, config.systems):
        tell(f"warning: {name} was trained to please this judge, which will favour it; another judge says more")
    rulings = {pair: rule(judge, matching.pairs(matched, *pair)) for pair in compared}
    folder = results_folder(config, judge.name)
    scores = _scores(config, matched, device)
    write_lines(folder / "verdicts.jsonl", _lines(matched, rulings, scores))

    # 4 What comes of them
    found = measured.compare(matched, rulings, difficulty=_difficulty(config, matched))
    answered = diversity(matched)
    ranking = strengths.ranking(matched.systems, rulings, matched.same()) if _ranks(config) else None
    rates = _by_temperature(judge, drawn, str(config.baseline)) if drawn.at else {}

    # 5 For programs, then for people
    results = measured.results(
        matched,
        found,
        kind=config.kind.value,
        judge={"name": judge.name, **judge.identity},
        paths=config.systems,
        diversities=answered,
        ranking=ranking,
    )
    results |= {"temperatures": _plain(rates), "scores": _means(scores, matched)}
    write_json(folder / "results.json", results)
    winrate_plots.win_rates(found, folder / "win_rates.png")
    if config.baseline is None and len(matched.systems) > 2:
        winrate_plots.matrix(matched.systems, found, folder / "matrix.png")
    console = Console()
    measured.show(console, matched, found, answered)
    if ranking is not None:
        winrate_plots.strengths(ranking, folder / "strengths.png")
        strengths.show(console, ranking)
    if rates:
        _write_temperatures(folder, rates, str(config.baseline))
        console.print(_temperature_table(rates, str(config.baseline)))
    tell_files(console, folder, "verdicts.jsonl (every answer and every verdict with its reason)")


def _draw(config: EvaluateConfig) -> Drawn:
    lines = {name: answers_or_file(name, path, config, matching.FIELDS) for name, path in config.systems.items()}
    at: dict[str, dict[float, list[Line]]] = {}
    for name, path in config.systems.items() if config.temperatures else ():
        if name != config.baseline:
            at[name] = {
                one: answers(
                    name,
                    path,
                    config,
                    sampling=replace(config.sampling, temperature=one, samples=1),
                    folder=f"{name}-temperature_{one:g}",
                )
                for one in config.temperatures
            }
    return Drawn(lines=lines, at=at)


def _ranks(config: EvaluateConfig) -> bool:
    return config.kind is EvaluationKind.rank


def _difficulty(config: EvaluateConfig, matched: Matched) -> np.ndarray | str | None:
    if config.difficulty in (None, measured.JOINT):
        return config.difficulty
    return measured.given_difficulty(str(config.difficulty), matched)


def _by_temperature(judge: Judge, drawn: Drawn, baseline: str) -> dict[str, dict[float, ClusterMean]]:
    """Win rates against the baseline's answers, which stay the same."""
    found: dict[str, dict[float, ClusterMean]] = {}
    for name, mine in drawn.at.items():
        found[name] = {}
        for temperature, lines in mine.items():
            matched = matching.match({name: lines, baseline: drawn.lines[baseline]})
            rulings = rule(judge, matching.pairs(matched, name, baseline))
            values = np.array([np.nan if one.value is None else one.value for one in rulings])
            known = ~np.isnan(values)
            if not known.any():
                raise UserError(f"{name} at temperature {temperature:g}: none of the judge's verdicts can be read")
            found[name][temperature] = cluster_means(values[known], matched.same()[known])[0]
    return found


def _scores(config: EvaluateConfig, matched: Matched, device: str) -> dict[str, dict[str, np.ndarray]]:
    """By system what each scorer of `rewards` gives its answers, float64 [prompts]."""
    sources = scoring.open_sources(config.rewards, device=device)
    found = {}
    for name in matched.systems:
        episodes = [
            Episode(
                prompt=asked.messages,
                response=asked.answer(name)["response"],
                finished=asked.answer(name)["finish_reason"] != matching.CUT,
                columns=asked.answer(name),  # those of the prompt's row are among them
                origin=f"prompt {asked.index}",
            )
            for asked in matched.prompts
        ]
        found[name] = {source.name: source.score(episodes) for source in sources.values()}
    return found


def _means(scores: Mapping[str, Mapping[str, np.ndarray]], matched: Matched) -> dict[str, dict[str, Any]]:
    return {
        name: {scorer: _interval(cluster_means(values, matched.same())[0]) for scorer, values in mine.items()}
        for name, mine in scores.items()
    }


def _lines(matched: Matched, rulings: measured.Rulings, scores: Mapping[str, Mapping[str, np.ndarray]]) -> list[Line]:
    """With what the scorers give each answer."""
    lines = measured.lines(matched, rulings)
    for i, line in enumerate(lines):
        for name, answer in line["answers"].items():
            answer["scores"] = {scorer: float(values[i]) for scorer, values in scores[name].items()}
    return lines


def _plain(rates: Mapping[str, Mapping[float, ClusterMean]]) -> dict[str, list[dict[str, float]]]:
    return {
        name: [{"temperature": at, **_interval(one)} for at, one in sorted(mine.items())]
        for name, mine in rates.items()
    }


def _interval(one: ClusterMean) -> dict[str, float]:
    return {"mean": one.mean, "low": one.low, "high": one.high}


def _write_temperatures(folder: Path, rates: Mapping[str, Mapping[float, ClusterMean]], baseline: str) -> None:
    with (folder / "temperatures.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("system", "baseline", "temperature", "win_rate", "low", "high", "prompts"))
        for name, mine in rates.items():
            for at, one in sorted(mine.items()):
                rows.writerow((name, baseline, at, one.mean, one.low, one.high, one.prompts))
    winrate_plots.by_temperature(rates, baseline, folder / "temperatures.png")


def _temperature_table(rates: Mapping[str, Mapping[float, ClusterMean]], baseline: str) -> Any:
    temperatures: Sequence[float] = sorted({at for mine in rates.values() for at in mine})
    made = table(f"win rate against {baseline} by sampling temperature", "system", (f"{at:g}" for at in temperatures))
    for name, mine in rates.items():
        made.add_row(name, *(cell(mine[at]) for at in temperatures))
    return made
