"""How often reward models, and whatever else rates answers, prefer the answer that people preferred (`kind=rm`).

Rewards in, plain results and tables out; `raters` computes the rewards. Accuracy is over comparisons, as RewardBench
has it (Lambert et al. 2024), and a ranking of K answers is all its pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.intervals import ClusterMean, cluster_means
from rlhf_pipeline.evaluation.ranking_metrics import Judged, correct, pairs
from rlhf_pipeline.evaluation.tables import Interval, blocks, cell, is_clear, room, signed, table
from rlhf_pipeline.scoring.answers import Answered

SUBSET = ("subset", "category")  # columns that say which part of the benchmark a row is of; the first that is there
EXAMPLE = "0.123 [0.123, 0.123]"  # what a figure takes with its interval
UNNAMED = "(none)"  # rows without one, where others have one

Rewards = Sequence[np.ndarray]  # float64 [K] of every row


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Of one system. `subsets_mean` is the unweighted mean over subsets; None where there are not several."""

    overall: ClusterMean
    subsets_mean: float | None
    by_subset: dict[str, ClusterMean]


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Accuracies of all systems on the same comparisons, and how far apart each two of them are."""

    rows: int
    comparisons: int
    ties: int  # comparisons that the labels leave open
    systems: dict[str, Accuracy]
    differences: dict[str, ClusterMean]  # "b - a"


def ranked(rows: Sequence[Answered]) -> list[Answered]:
    """The rows that say which of their answers is better.

    Raises:
        UserError: when none does.
    """
    found = [row for row in rows if row.ranks is not None]
    if not found:
        raise UserError(
            "data.path: no row says which of its answers is better, so there is nothing to compare rewards with; "
            "use rows with chosen and rejected, or with responses and ranks or scores (docs/data-formats.md)"
        )
    if not any(len(set(row.ranks or ())) > 1 for row in found):
        raise UserError("data.path: in every row all answers are tied, so there is nothing to compare rewards with")
    return found


def measure(rows: Sequence[Answered], rewards: Mapping[str, Rewards], *, seed: int = 0) -> Results:
    """Accuracies with 95 % intervals by a seeded bootstrap over prompts, and paired differences.

    Args:
        rows: ranked ones. Rows with the same prompt are drawn together.
        rewards: of every system, for every row.
    """
    judged = {name: _judged(rows, mine) for name, mine in rewards.items()}
    found = pairs(next(iter(judged.values())))
    prompt, subset, names = _prompts(rows)[found.prompt], *_subsets(rows, found.prompt)
    right = {name: correct(mine, found) for name, mine in judged.items()}
    return Results(
        rows=len(rows),
        comparisons=len(found.winner),
        ties=found.tied,
        systems={name: _accuracy(mine, prompt, subset, names, seed=seed) for name, mine in right.items()},
        differences={
            f"{b} - {a}": cluster_means(right[b] - right[a], prompt, seed=seed)[0] for a, b in combinations(right, 2)
        },
    )


def results(measured: Results) -> dict[str, Any]:
    """What results.json holds."""
    return asdict(measured)


def lines(rows: Sequence[Answered], rewards: Mapping[str, Rewards]) -> list[dict[str, Any]]:
    """What rewards.jsonl holds: every row with the rewards that each system gave its answers."""
    return [
        {
            "index": row.index,
            "origin": row.origin,
            "subset": _subset(row),
            "prompt": [{"role": message.role, "content": message.content} for message in row.prompt],
            "responses": list(row.responses),
            "ranks": list(row.ranks or ()),
            "rewards": {name: mine[i].tolist() for name, mine in rewards.items()},
        }
        for i, row in enumerate(rows)
    ]


def show(console: Console, found: Results) -> None:
    """Print a line a system, and accuracies by subset. Differences are to the first system; results.json has all."""
    first, one = next(iter(found.systems.items()))
    made = table(f"{one.overall.count:,} comparisons", "system", ["accuracy", f"to {first}", "clear"])
    for name, mine in found.systems.items():
        gap = found.differences.get(f"{name} - {first}")
        told = ("", "") if gap is None else (signed(gap), "yes" if is_clear(gap) else "no")
        made.add_row(escape(name), cell(mine.overall), *told)
    console.print(made)
    have_room = len(found.systems) <= room(console.width, EXAMPLE)
    shown, widest = (cell, EXAMPLE) if have_room else (_mean, max(found.systems, key=len))
    for some in blocks(found.systems, console.width, widest=widest) if one.by_subset else ():
        made = table("accuracy by subset", "subset (comparisons)", map(escape, some))
        if one.subsets_mean is not None:
            made.add_row("mean over subsets", *(f"{mine.subsets_mean:.3f}" for mine in some.values()), style="bold")
        for name, size in one.by_subset.items():
            made.add_row(escape(f"{name} ({size.count})"), *(shown(mine.by_subset[name]) for mine in some.values()))
        console.print(made)
    if found.ties:
        console.print(f"{found.ties} comparisons are ties in the labels and are left out")


def _mean(one: Interval) -> str:
    return f"{one.mean:.3f}"


def _judged(rows: Sequence[Answered], rewards: Rewards) -> Judged:
    """Rewards and ranks of all answers, flat; each row is a prompt of its own here, for no other has its answers."""
    sizes = [len(row.responses) for row in rows]
    for row, mine in zip(rows, rewards, strict=True):
        if not np.isfinite(mine).all():
            raise UserError(
                f"{row.origin}: the reward of an answer is not a finite number; the model's weights are damaged"
            )
    return Judged(
        reward=np.concatenate(rewards),
        prompt=np.repeat(np.arange(len(rows)), sizes),
        rank=np.concatenate([np.asarray(row.ranks, np.int32) for row in rows]),
        score=np.full(sum(sizes), np.nan, np.float32),
        length=np.zeros(sum(sizes), np.int64),
    )


def _accuracy(
    right: np.ndarray, prompt: np.ndarray, subset: np.ndarray, names: Sequence[str], *, seed: int
) -> Accuracy:
    by_subset = dict(zip(names, cluster_means(right, prompt, subset, seed=seed), strict=True)) if names else {}
    return Accuracy(
        overall=cluster_means(right, prompt, seed=seed)[0],
        subsets_mean=float(np.mean([one.mean for one in by_subset.values()])) if len(by_subset) > 1 else None,
        by_subset=by_subset,
    )


def _prompts(rows: Sequence[Answered]) -> np.ndarray:
    """A number for each row, int64 [rows]; equal for equal prompts."""
    known: dict[tuple[tuple[str, str], ...], int] = {}
    asked = [tuple((message.role, message.content) for message in row.prompt) for row in rows]
    return np.array([known.setdefault(one, len(known)) for one in asked], np.int64)


def _subsets(rows: Sequence[Answered], row: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Of each comparison, by its row, the number of its subset; and their names, most comparisons first."""
    given = [_subset(rows[i]) for i in row]
    if not any(given):
        return np.zeros(len(given), np.int64), []
    named = [name or UNNAMED for name in given]
    order = [name for name, _ in Counter(named).most_common()]
    places = {name: place for place, name in enumerate(order)}
    return np.array([places[name] for name in named], np.int64), order


def _subset(row: Answered) -> str | None:
    return next((str(row.row[column]) for column in SUBSET if row.row.get(column) not in (None, "")), None)
