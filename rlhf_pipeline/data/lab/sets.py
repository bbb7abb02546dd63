"""The lab's files: rows in public formats, the same on every machine and whatever the size of the set."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.data.lab.candidates import candidates
from rlhf_pipeline.data.lab.corpus import document
from rlhf_pipeline.data.lab.judge import judge
from rlhf_pipeline.data.lab.labelers import LABELERS, ranks_of
from rlhf_pipeline.data.lab.task import Task
from rlhf_pipeline.data.lab.tasks import make
from rlhf_pipeline.errors import UserError

Row = dict[str, Any]
FEWEST, MOST = 4, 9  # answers to a ranked prompt, as in InstructGPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Set:
    """`row` makes one row; `kind` is what the readers make of it (text, demonstration, ranking, prompt).

    `seeded_as` names the set whose rows, in the same order, have the same prompts and answers.
    """

    row: Callable[[random.Random], Row]
    kind: str
    seeded_as: str | None = None


def _prompt(task: Task) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in task.messages]


def _demonstration(rng: random.Random, *, held_out: bool) -> Row:
    """The last answer is the one to learn: earlier ones are part of the prompt, and of weight 0."""
    task = make(rng, held_out=held_out)
    prompt = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in _prompt(task)]
    answer = {"role": "assistant", "content": rng.choice(task.references)}
    return {"messages": [*prompt, answer], "category": task.category, "task": task.type}


def _ranking(rng: random.Random, *, held_out: bool) -> Row:
    task = make(rng, held_out=held_out)
    responses = candidates(task, rng, rng.randint(FEWEST, MOST))
    labeler = rng.choice(LABELERS)
    scores = labeler.scores(task.messages, responses)
    return {
        "prompt": _prompt(task),
        "responses": responses,
        "scores": scores,
        "ranks": ranks_of(scores),
        "labeler": labeler.name,
        "category": task.category,
    }


def _gold_ranking(rng: random.Random, *, held_out: bool) -> Row:
    """The row of `_ranking`, rated by the judge instead of a labeler."""
    row = _ranking(rng, held_out=held_out)
    scores = [judge(row["prompt"], response).score for response in row["responses"]]
    return {**row, "scores": scores, "ranks": ranks_of(scores), "labeler": "gold"}


def _only_prompt(rng: random.Random, *, held_out: bool) -> Row:
    task = make(rng, held_out=held_out)
    return {"prompt": _prompt(task), "category": task.category, "task": task.type}


SETS: dict[str, Set] = {
    "documents": Set(row=document, kind="text"),
    "demonstrations": Set(row=lambda rng: _demonstration(rng, held_out=False), kind="demonstration"),
    "rankings": Set(row=lambda rng: _ranking(rng, held_out=False), kind="ranking"),
    "prompts": Set(row=lambda rng: _only_prompt(rng, held_out=False), kind="prompt"),
    "heldout_prompts": Set(row=lambda rng: _only_prompt(rng, held_out=True), kind="prompt"),
    "heldout_demonstrations": Set(row=lambda rng: _demonstration(rng, held_out=True), kind="demonstration"),
    "heldout_rankings": Set(row=lambda rng: _ranking(rng, held_out=True), kind="ranking"),
    "heldout_gold_rankings": Set(
        row=lambda rng: _gold_ranking(rng, held_out=True), kind="ranking", seeded_as="heldout_rankings"
    ),
}


def rows(set_name: str, *, count: int, seed: int = 0) -> Iterator[Row]:
    """The first `count` rows of a set. Row i depends on the set (see `Set.seeded_as`), `seed` and i alone.

    Raises:
        UserError: for a set that does not exist.
    """
    if set_name not in SETS:
        raise UserError(f"the demo lab has no set {set_name!r}; there are {', '.join(SETS)}")
    chosen = SETS[set_name]
    stream = chosen.seeded_as or set_name
    for i in range(count):
        yield chosen.row(random.Random(f"{stream} {seed} {i}"))
