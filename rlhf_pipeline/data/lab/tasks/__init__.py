"""The ten categories of tasks, one file each; here they are drawn and read back."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from rlhf_pipeline.data.lab.task import TURN, Task, TaskType
from rlhf_pipeline.data.lab.tasks import (
    brainstorming,
    chat,
    classification,
    closed_qa,
    extraction,
    generation,
    open_qa,
    refusal,
    rewriting,
    summarising,
)
from rlhf_pipeline.data.records import Message

# The use cases of InstructGPT (Ouyang et al. 2022, table 1), and requests that are to be refused.
CATEGORIES: dict[str, tuple[TaskType, ...]] = {
    module.TYPES[0].category: module.TYPES
    for module in (
        *(brainstorming, open_qa, closed_qa, classification, extraction),
        *(rewriting, summarising, generation, chat, refusal),
    )
}
TYPES: dict[tuple[str, str], TaskType] = {(t.category, t.name): t for types in CATEGORIES.values() for t in types}


def make(rng: random.Random, *, held_out: bool = False, category: str | None = None) -> Task:
    """A task of any category (each as likely as the others), of the training or the held-out side."""
    types = CATEGORIES[category or rng.choice(tuple(CATEGORIES))]
    kind = rng.choice(types)
    while True:
        task = kind.make(rng)
        if task.held_out() == held_out:
            return task


def parse(messages: Sequence[Message]) -> Task | None:
    """The task that a prompt poses, read back from its text; None for a prompt that is not the lab's."""
    return _parse(tuple((message.role, message.content) for message in messages))


@functools.lru_cache(maxsize=20_000)
def _parse(turns: tuple[tuple[str, str], ...]) -> Task | None:
    if [role for role, _ in turns] != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        return None
    text = TURN.join(content for _, content in turns)
    for kind in TYPES.values():
        task = kind.read(text)
        if task is not None:
            return task
    return None
