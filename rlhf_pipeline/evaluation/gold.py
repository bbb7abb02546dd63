"""The lab's judge over the answers of several systems to the same prompts: plain results, and tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_pipeline.data.lab.judge import Verdict, judge
from rlhf_pipeline.data.lab.summary import Summary, difference, summary
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.tables import blocks, cell, clear, signed, table

Answer = Mapping[str, Any]  # a line of `rlhf generate`
FIELDS = ("prompt", "response", "finish_reason")  # what is read of it; the prompt as messages
FINISHED = "stop"
NARROW = "[0.123,"  # what a figure with its interval takes over three lines


def judged(answers: Mapping[str, Sequence[Answer]]) -> dict[str, list[Verdict]]:
    """The verdict on every answer, by system.

    Raises:
        UserError: when the systems did not answer the same prompts, or a prompt is not the lab's.
    """
    (first, prompts), *others = ((name, [row["prompt"] for row in rows]) for name, rows in answers.items())
    for name, theirs in others:
        if theirs != prompts:
            raise UserError(
                f"systems: {first} and {name} answered other prompts ({len(prompts)} and {len(theirs)}); "
                "only answers to the same prompts, in the same order, can be compared"
            )
    return {
        name: [judge(row["prompt"], row["response"], finished=row["finish_reason"] == FINISHED) for row in rows]
        for name, rows in answers.items()
    }


def results(verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, Any]:
    """Mean scores by system, category and criterion, and each pair's difference, all with 95 % intervals."""
    return {
        "systems": {name: asdict(summary(mine)) for name, mine in verdicts.items()},
        "differences": {
            f"{b} - {a}": asdict(difference(verdicts[b], verdicts[a])) for a, b in combinations(verdicts, 2)
        },
    }


def rows(answers: Mapping[str, Sequence[Answer]], verdicts: Mapping[str, Sequence[Verdict]]) -> list[dict[str, Any]]:
    """One row a prompt with every system's answer and its verdict."""
    first = next(iter(answers))
    return [
        {
            "prompt": prompt["prompt"],
            "category": verdicts[first][i].category,
            "answers": {
                name: {
                    "response": mine[i]["response"],
                    "finish_reason": mine[i]["finish_reason"],
                    **asdict(verdicts[name][i]),
                }
                for name, mine in answers.items()
            },
        }
        for i, prompt in enumerate(answers[first])
    ]


def show(
    console: Console,
    answers: Mapping[str, Sequence[Answer]],
    verdicts: Mapping[str, Sequence[Verdict]],
    *,
    samples: int,
) -> None:
    """Print the tables, the differences, what is left to gain, and some answers side by side."""
    found = {name: summary(mine) for name, mine in verdicts.items()}
    for draw in (_scores, _criteria):
        for some in blocks(found, console.width, widest=max([NARROW, *found], key=len)):
            made = draw(some)
            made.columns[0].no_wrap = True  # or it is what is cut
            console.print(made)
    for a, b in combinations(verdicts, 2):
        gap = difference(verdicts[b], verdicts[a])
        console.print(f"{b} - {a}: {signed(gap)} on the same prompts, {clear(gap)}")
    for name, one in found.items():
        console.print(f"headroom above {name}: {1 - one.score.mean:.3f} of 1")
    for i in _spread([verdict.category for verdict in next(iter(verdicts.values()))], samples):
        console.print(_side_by_side(i, answers, verdicts))


def _scores(found: Mapping[str, Summary]) -> Table:
    sizes = next(iter(found.values()))
    made = table("gold score: mean and 95 % interval over prompts", "category", found)
    made.add_row(f"all ({sizes.score.count})", *(cell(one.score) for one in found.values()), style="bold")
    for category in sorted(sizes.by_category):
        count = sizes.by_category[category].count
        made.add_row(f"{category} ({count})", *(cell(one.by_category[category]) for one in found.values()))
    return made


def _criteria(found: Mapping[str, Summary]) -> Table:
    made = table("by criterion: share of its points", "criterion", found)
    for name in next(iter(found.values())).by_criterion:
        made.add_row(name, *(cell(one.by_criterion[name]) for one in found.values()))
    return made


def _spread(categories: Sequence[str], count: int) -> list[int]:
    """The first prompt of each category, then the second of each, and so on: `count` places."""
    nth: dict[str, int] = {}
    order = []
    for i, category in enumerate(categories):
        nth[category] = nth.get(category, 0) + 1
        order.append((nth[category], category, i))
    return [i for *_, i in sorted(order)[:count]]


def _side_by_side(i: int, answers: Mapping[str, Sequence[Answer]], verdicts: Mapping[str, Sequence[Verdict]]) -> Text:
    messages = next(iter(answers.values()))[i]["prompt"]
    text = Text("\n" + "\n".join(f"{message['role']}: {message['content']}" for message in messages), style="dim")
    for name, mine in answers.items():
        verdict = verdicts[name][i]
        lost = max(verdict.criteria, key=lambda criterion: criterion.out_of - criterion.points)
        why = "" if lost.points == lost.out_of else f"   ({lost.name}: {lost.why})"
        text.append(f"\n  {name} {verdict.score:.2f}: ", style="not dim bold")
        text.append(mine[i]["response"].strip().replace("\n", " / "), style="not dim")
        text.append(why, style="not dim italic")
    return text
