"""`rlhf evaluate kind=frontier`: what checkpoints gain in reward for what they move away from their reference.

1 answers of every checkpoint, and N of the reference, to the same held-out prompts; 2 their scores; 3 the KL along them;
4 points. Several processes draw answers together; the rest is the first one's work. Two models are in memory at most,
but for reward models, which are all there while answers are scored.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from rlhf_pipeline import runtime
from rlhf_pipeline.config.schema import ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.config.stages import EvaluateConfig
from rlhf_pipeline.data.records import BadRow, Message
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation import divergence, frontier_plots
from rlhf_pipeline.evaluation import frontier as points
from rlhf_pipeline.evaluation.divergence import Divergence
from rlhf_pipeline.evaluation.diversity import Diversity, diversity
from rlhf_pipeline.evaluation.frontier import BEST_OF, Checkpoint, Point
from rlhf_pipeline.evaluation.matching import match
from rlhf_pipeline.evaluation.raters import Sort, naming, progress, sort_of
from rlhf_pipeline.evaluation.selection import check_same_prompts, to_score
from rlhf_pipeline.generation.load import open_renderer
from rlhf_pipeline.generation.prompts import Asked, read_prompts
from rlhf_pipeline.models.ready import check_same_words, context_of, open_policy
from rlhf_pipeline.recipes.answers import Line, answers, results_folder, save, tell_files
from rlhf_pipeline.scoring import sources as scoring
from rlhf_pipeline.scoring.episodes import Episode

Tell = Callable[[str], None]
Scores = dict[str, np.ndarray]  # by scorer, float64 [prompts, samples]


def frontier(config: EvaluateConfig) -> None:
    """Evaluate, print a line a point, and save points, pictures and every answer's scores.

    Raises:
        UserError: for what the user can put right.
    """
    tell: Tell = Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print

    # 1 What can be refused before anything is loaded
    scoring.check_sources(config.rewards)
    found = points.checkpoints(config.systems, config.reference)
    base = _base(config, found)
    _check_readers(config, found[0])

    # 2 Answers; those that are there from an interrupted run stay
    lines = {one.name: answers(one.system, one.path, config, folder=one.name) for one in found}
    if base is not None:
        many = dataclasses.replace(config.sampling, samples=max(config.frontier.best_of))
        lines[BEST_OF] = answers(BEST_OF, base, config, sampling=many)
    if not runtime.is_main():
        return
    _check_alike(lines)
    device = runtime.start(config.runtime).device

    # 3 What every scorer gives them
    scores = _scores(config, found[0], lines, device, tell)

    # 4 KL and entropy along those of checkpoints
    _tell_references(found, tell)
    divergences = _divergences(config, found, lines, device)

    # 5 For programs, then for people
    made = _of_checkpoints(config, found, lines, scores, divergences)
    chosen_by = None
    if base is not None:
        chosen_by = config.frontier.chosen_by or config.frontier.proxy or config.frontier.gold
        made += _of_best(config, str(chosen_by), lines[BEST_OF], scores[BEST_OF])
    folder, which = results_folder(config), points.axes(config.frontier, list(config.rewards))
    method = {
        "temperature": config.sampling.temperature,
        "samples": config.sampling.samples,
        "max_new_tokens": config.sampling.max_new_tokens,
        "prompts": made[0].kl.count,
        "seed": config.seed,
        "references": {one.system: one.reference for one in found},
        "best_of_from": base,
        "chosen_by": chosen_by,
    }
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _draw(made, which, folder)
    points.write_csv(folder / "frontier.csv", made, which)
    rows = points.lines(lines, scores, divergences)
    save(folder, points.results(made, which, method), "scores.jsonl", rows)
    console = Console()
    points.show(console, made, which, made[0].kl.count)
    tell_files(console, folder, f"frontier.csv, {', '.join(pictures)} and scores.jsonl (every answer with its scores)")


# Before anything is loaded


def _base(config: EvaluateConfig, found: Sequence[Checkpoint]) -> str | None:
    """What the best of N is chosen among the answers of; None where there is no N."""
    if not config.frontier.best_of:
        return None
    several = sorted({one.reference for one in found})
    if several[1:]:
        raise UserError(
            f"frontier.best_of={config.frontier.best_of}: is drawn from the reference, and the systems have several "
            f"({', '.join(several)}); name one for all with reference=..., or leave out best_of"
        )
    return several[0]


def _check_readers(config: EvaluateConfig, first: Checkpoint) -> None:
    """Refuse scorers that are no reward model, and prompts that one cannot read, before hours have gone by."""
    asked = _asked(config, first.path)
    for name, one in config.rewards.items():
        if one.model is None:
            continue
        with naming(f"rewards.{name}", str(one.model.path)):
            renderer = open_renderer(one.model, TokenizerConfig())
            if sort_of(str(one.model.path)) is not Sort.reward_model:
                raise UserError("is no reward model; rlhf rm trains one")
            from rlhf_pipeline.scoring.written import check_prompt

            for prompt in asked.values():
                try:
                    check_prompt(renderer, prompt.messages)
                except BadRow as error:
                    raise UserError(f"cannot read the prompt {prompt.origin}: {error}") from error


def _asked(config: EvaluateConfig, path: str) -> dict[int, Asked]:
    """The prompts as this model reads them, by number."""
    renderer = open_renderer(ReadyModelConfig(path=path), config.tokenizer)
    return {one.index: one for one in read_prompts(config.prompts, renderer, context=context_of(path)).asked}


def _check_alike(lines: Mapping[str, Sequence[Line]]) -> None:
    """Refuse points that answered other prompts than others, and answers without the tokens that the KL is along."""
    check_same_prompts({name: to_score([one for one in mine if not one["sample"]]) for name, mine in lines.items()})
    for name, mine in lines.items():
        if any("response_ids" not in line for line in mine):
            raise UserError(
                f"the answers of {name} were drawn by an earlier version, which did not keep their tokens; remove their "
                "folder in the run's folder answers, or choose another name=..."
            )


# Scores


def _scores(
    config: EvaluateConfig, first: Checkpoint, lines: Mapping[str, Sequence[Line]], device: str, tell: Tell
) -> dict[str, Scores]:
    """Of all answers, by point and scorer. What the scorers need of memory is given back."""
    asked = _asked(config, first.path)
    sources = scoring.open_sources(config.rewards, device=device)
    for line in scoring.describe(sources):
        tell(line)
    counts: Counter[str] = Counter()
    found: dict[str, Scores] = {}
    for name, mine in lines.items():
        episodes = [_episode(asked[line["index"]], line) for line in mine]
        samples = 1 + max(line["sample"] for line in mine)
        found[name] = {}
        for scorer, source in sources.items():
            own: Counter[str] = Counter()
            found[name][scorer] = source.score(episodes, own).reshape(-1, samples)
            counts.update({f"{scorer}: {what}": count for what, count in own.items()})
    for what, count in counts.items():
        if count:
            tell(f"rewards.{what} {count}")
    return found


def _episode(asked: Asked, line: Line) -> Episode:
    """An answer as scorers take it: as in `rlhf ppo`, the text that is written."""
    return Episode(
        prompt=tuple(Message(turn["role"], turn["content"]) for turn in line["prompt"]),
        response=line["response"],
        finished=line["finish_reason"] == "stop",
        columns=asked.columns,
        origin=line["origin"],
    )


# KL


def _tell_references(found: Sequence[Checkpoint], tell: Tell) -> None:
    of = {one.reference: one.system for one in found}
    if len(of) > 1:
        said = ", ".join(f"{system}: {reference}" for reference, system in of.items())
        tell(f"the KL of these systems is against different models ({said}) and does not compare; see reference=...")


def _divergences(
    config: EvaluateConfig, found: Sequence[Checkpoint], lines: Mapping[str, Sequence[Line]], device: str
) -> dict[str, list[Divergence]]:
    """Along the answers of every checkpoint, by its name and for each prompt; a reference is opened once."""
    place = torch.device(device)
    known: dict[str, list[Divergence]] = {}
    for reference in dict.fromkeys(one.reference for one in found):
        mine = [one for one in found if one.reference == reference]
        renderer = open_renderer(ReadyModelConfig(path=mine[0].path), config.tokenizer)
        with naming("reference", reference):
            frozen = open_policy(ReadyModelConfig(path=reference), renderer.tokenizer, place)
        for one in mine:
            trees = _trees(_asked(config, one.path), lines[one.name])
            with naming(f"systems.{one.system}", one.path):
                renderer = open_renderer(ReadyModelConfig(path=one.path), config.tokenizer)
                if config.tokenizer.path is None:  # one that is named is meant for both
                    check_same_words(renderer.tokenizer, reference, config.tokenizer)
                policy = open_policy(ReadyModelConfig(path=one.path), renderer.tokenizer, place)
                known[one.name] = divergence.along(
                    policy,
                    frozen,
                    trees,
                    batch_tokens=config.batch_tokens,
                    temperature=config.sampling.temperature,
                    tick=progress(f"{one.name}, KL", len(lines[one.name])),
                )
    return known


def _trees(asked: Mapping[int, Asked], lines: Sequence[Line]) -> list[Tree]:
    """Each prompt with the answers to it, token for token as they were drawn, in the lines' order."""
    drawn: dict[int, list[np.ndarray]] = defaultdict(list)
    for line in lines:
        drawn[line["index"]].append(np.asarray(line["response_ids"], np.int32))
    return [
        Tree(
            prompt=asked[index].tokens,
            responses=tuple(mine),
            scored=tuple(np.ones(len(ids), bool) for ids in mine),
            index=index,
        )
        for index, mine in drawn.items()
    ]


# Points


def _of_checkpoints(
    config: EvaluateConfig,
    found: Sequence[Checkpoint],
    lines: Mapping[str, Sequence[Line]],
    scores: Mapping[str, Scores],
    divergences: Mapping[str, Sequence[Divergence]],
) -> list[Point]:
    spread = diversity(match({one.name: lines[one.name] for one in found}))
    return [
        points.of_checkpoint(one, divergences[one.name], scores[one.name], spread[one.name], seed=config.seed)
        for one in found
    ]


def _of_best(config: EvaluateConfig, chosen_by: str, lines: Sequence[Line], scores: Scores) -> list[Point]:
    """For every N the best of the first N answers to each prompt; lines are in the order of prompt and sample."""
    samples = next(iter(scores.values())).shape[1]
    made = []
    for n in sorted(config.frontier.best_of):
        best = points.chosen(scores[chosen_by], n)
        places = np.arange(len(best))
        mine = [{**lines[place * samples + k], "sample": 0} for place, k in zip(places, best.tolist(), strict=True)]
        spread: Diversity = diversity(match({BEST_OF: mine}))[BEST_OF]
        picked = {name: values[places, best][:, None] for name, values in scores.items()}
        made.append(points.of_best(n, picked, spread, seed=config.seed))
    return made


def _draw(made: Sequence[Point], which: Mapping[str, str | None], folder: Path) -> list[str]:
    """Draw what there is to draw; the files' names."""
    gold, proxy = which["gold"], which["proxy"]
    frontier_plots.reward_against_kl(made, str(gold or proxy), folder / "frontier.png")
    if gold is None or proxy is None:
        return ["frontier.png"]
    frontier_plots.gold_against_proxy(made, gold, proxy, folder / "proxy_gold.png")
    return ["frontier.png", "proxy_gold.png"]
