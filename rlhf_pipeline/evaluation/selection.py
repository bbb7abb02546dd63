"""Which of several candidates a reward model likes best on the same prompts (`kind=select`).

InstructGPT chose its supervised model, among the epochs of a fine-tuning, by reward on validation prompts, which went on
to rise when the validation loss no longer fell (Ouyang et al. 2022, section 3.5). Answers and rewards in, plain results
and a table out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlhf_pipeline import artifact
from rlhf_pipeline.data.lab.summary import Mean, mean
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.tables import cell, clear, is_clear, signed, table
from rlhf_pipeline.scoring.answers import CUT, Answered

Answer = Mapping[str, Any]  # a line of `rlhf generate`


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Its figures over all prompts, and what the winner is ahead of it on the same prompts."""

    path: str
    reward: Mean  # of each prompt's mean over its answers
    tokens: float  # of an answer, on average
    finished: float  # share of the answers that came to their end
    behind: Mean | None  # None for the winner


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The outcome. `runner_up` and whether the winner is clearly ahead of it: None where there was nothing to choose."""

    winner: str  # the path
    winner_name: str
    runner_up: str | None
    is_clear: bool | None
    prompts: int
    candidates: dict[str, Candidate]


def candidates(systems: Mapping[str, str]) -> dict[str, str]:
    """The paths to choose from: a run of several epochs becomes name-epoch_1, name-epoch_2, ...; a model stays itself.

    Raises:
        UserError: for files, runs without a finished epoch, and names that come up twice.
    """
    found: dict[str, str] = {}
    for name, path in systems.items():
        if path.endswith(".jsonl"):
            raise UserError(
                f"systems.{name}={path}: answers are no model to choose; kind=gold compares files of answers"
            )
        for label, one in kept(path, "epoch") or [("", path)]:
            full = f"{name}-{label}" if label else name
            if full in found:
                raise UserError(f"systems: {full} is there twice; give {name} another name")
            found[full] = one
    return found


def kept(path: str, *units: str) -> list[tuple[str, str]]:
    """(<unit>_<n>, artifact) of what a run's folder keeps of its epochs ("epoch") or steps ("step"), in their order."""
    found = []
    for unit in units:
        folders = Path(path).glob(f"artifacts/{unit}_*")
        numbered = {int(match[1]): one for one in folders if (match := re.fullmatch(rf"{unit}_(\d+)", one.name))}
        found += [(f"{unit}_{n}", str(numbered[n])) for n in sorted(numbered) if artifact.is_artifact(numbered[n])]
    return found


def to_score(answers: Sequence[Answer]) -> list[Answered]:
    """The lines of `rlhf generate`, which has them in order, as one row for each prompt with all its answers.

    Of an answer without a word that was cut off as well there is nothing to score; it is scored as one that says nothing.
    """
    of_prompt: dict[int, list[Answer]] = {}
    for line in answers:
        of_prompt.setdefault(line["index"], []).append(line)
    return [
        Answered(
            index=index,
            origin=lines[0]["origin"],
            prompt=tuple(Message(turn["role"], turn["content"]) for turn in lines[0]["prompt"]),
            responses=tuple(line["response"] for line in lines),
            finished=tuple(line["finish_reason"] != CUT or not line["response"].strip() for line in lines),
            many=True,
            row={},
        )
        for index, lines in of_prompt.items()
    ]


def check_same_prompts(rows: Mapping[str, Sequence[Answered]]) -> None:
    """
    Raises:
        UserError: when two candidates did not answer the same prompts as often, as they do not where a prompt is too long
            for one of them.
    """
    (first, wanted), *others = (
        (name, [(row.prompt, len(row.responses)) for row in mine]) for name, mine in rows.items()
    )
    for name, theirs in others:
        if theirs != wanted:
            raise UserError(
                f"systems: {first} and {name} answered other prompts ({len(wanted)} and {len(theirs)}), and only answers "
                "to the same ones can be compared; lower prompts.max_prompt_length to what all of them can read"
            )


def select(
    paths: Mapping[str, str],
    answers: Mapping[str, Sequence[Answer]],
    rewards: Mapping[str, Sequence[np.ndarray]],
    *,
    seed: int = 0,
) -> Selection:
    """The candidate with the highest mean reward (of equal ones the first), with 95 % intervals by a seeded bootstrap.

    Args:
        paths, answers: of every candidate.
        rewards: of every candidate, for every prompt float64 [answers].
    """
    of_prompt = {name: np.array([one.mean() for one in mine]) for name, mine in rewards.items()}
    order = sorted(of_prompt, key=lambda name: -of_prompt[name].mean())
    best = order[0]
    behind = {name: mean(of_prompt[best] - of_prompt[name], seed=seed) for name in order[1:]}
    return Selection(
        winner=paths[best],
        winner_name=best,
        runner_up=order[1] if behind else None,
        is_clear=is_clear(behind[order[1]]) if behind else None,
        prompts=len(of_prompt[best]),
        candidates={
            name: Candidate(
                path=paths[name],
                reward=mean(mine, seed=seed),
                tokens=float(np.mean([line["response_tokens"] for line in answers[name]])),
                finished=float(np.mean([line["finish_reason"] != CUT for line in answers[name]])),
                behind=behind.get(name),
            )
            for name, mine in of_prompt.items()
        },
    )


def results(selection: Selection) -> dict[str, Any]:
    """What results.json holds."""
    return asdict(selection)


def lines(rows: Mapping[str, Sequence[Answered]], rewards: Mapping[str, Sequence[np.ndarray]]) -> list[dict[str, Any]]:
    """What rewards.jsonl holds: one line a prompt with the answers of every candidate and their rewards."""
    first = next(iter(rows.values()))
    return [
        {
            "index": row.index,
            "prompt": [{"role": message.role, "content": message.content} for message in row.prompt],
            "answers": {
                name: {
                    "responses": list(mine[i].responses),
                    "finished": list(mine[i].finished),
                    "rewards": rewards[name][i].tolist(),
                }
                for name, mine in rows.items()
            },
        }
        for i, row in enumerate(first)
    ]


def show(console: Console, found: Selection) -> None:
    """Print the candidates, the best one marked, and how sure the choice is."""
    columns = ("reward", "behind the best", "tokens", "finished")
    made = table(f"mean reward and its 95 % interval over {found.prompts} prompts", "candidate", columns)
    for name, one in found.candidates.items():
        is_best = name == found.winner_name
        gap = "best" if one.behind is None else cell(one.behind)
        figures = (cell(one.reward), gap, f"{one.tokens:.1f}", f"{one.finished:.0%}")
        made.add_row(name, *figures, style="bold" if is_best else None)
    console.print(made)
    if found.runner_up is None:
        console.print(f"{found.winner_name} is the only candidate", highlight=False, soft_wrap=True)
    else:
        behind = found.candidates[found.runner_up].behind
        assert behind is not None
        console.print(
            f"{found.winner_name} - {found.runner_up}: {signed(behind)} on the same prompts, {clear(behind)}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"best: {found.winner}", highlight=False, soft_wrap=True)
