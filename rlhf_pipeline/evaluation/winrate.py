"""How often each system's answer is judged better than another's (`kind=winrate`, `kind=rank`).

Rulings in, plain results and tables out; judges are in `judging`, strengths of many systems in `strengths`. A win rate is
the mean over the prompts that a verdict could be read for, a tie one half.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.diversity import Diversity
from rlhf_pipeline.evaluation.intervals import ClusterMean, cluster_means
from rlhf_pipeline.evaluation.length_control import Compared, LengthControlled, joint_difficulty, length_controlled
from rlhf_pipeline.evaluation.matching import Matched
from rlhf_pipeline.evaluation.strengths import Strength
from rlhf_pipeline.evaluation.tables import cell, table
from rlhf_pipeline.judging.pairs import Ruling

JOINT = "joint"  # difficulties of prompts are fitted
UNNAMED = "(none)"  # category of prompts without one, where others have one

Rulings = Mapping[tuple[str, str], Sequence[Ruling]]  # of each (system, baseline), for every matched prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One system held against another."""

    system: str
    baseline: str
    win_rate: ClusterMean
    wins: int
    ties: int
    losses: int
    disagreed: int  # of the ties, those whose two orders were judged differently
    malformed: int  # prompts without a verdict that could be read; they are in no figure
    length_controlled: LengthControlled | None
    by_category: dict[str, ClusterMean]  # empty where no prompt has one


def against(systems: Iterable[str], baseline: str | None) -> list[tuple[str, str]]:
    """What is compared, as (system, baseline): all others with the baseline, or without one every two, the later first.

    Raises:
        UserError: where there are not two systems, or the baseline is none of them.
    """
    names = list(systems)
    if len(names) < 2:
        raise UserError(f"systems: there is {names[0] if names else 'none'} only; name two or more to compare")
    if baseline is None:
        return [(b, a) for a, b in combinations(names, 2)]
    if baseline not in names:
        raise UserError(f"baseline={baseline}: is none of the systems, which are {', '.join(names)}")
    return [(name, baseline) for name in names if name != baseline]


def compare(
    matched: Matched, rulings: Rulings, *, difficulty: np.ndarray | str | None = JOINT, seed: int = 0
) -> list[Comparison]:
    """Win rates of all comparisons with 95 % intervals: paired, by a seeded bootstrap over prompts.

    Args:
        difficulty: of the prompts, for the length-controlled rate: given (float [prompts]), `JOINT`, which needs several
            systems with the same baseline and is none otherwise, or None.

    Raises:
        UserError: for a comparison without a verdict that could be read.
    """
    same = matched.same()
    compared = {pair: _compared(matched, *pair, mine) for pair, mine in rulings.items()}
    gammas = _difficulties(compared, difficulty)
    category, names = _categories(matched)
    found = []
    for (system, baseline), mine in rulings.items():
        judged = ~np.isnan(compared[system, baseline].value)
        if not judged.any():
            raise UserError(
                f"{system} against {baseline}: none of the judge's {2 * len(mine)} verdicts can be read, so there is no win "
                f"rate; the first one: {mine[0].verdicts[0].reason[:200]!r}"
            )
        value = compared[system, baseline].value[judged]
        found.append(
            Comparison(
                system=system,
                baseline=baseline,
                win_rate=cluster_means(value, same[judged], seed=seed)[0],
                wins=int((value > 0.5).sum()),
                ties=int((value == 0.5).sum()),
                losses=int((value < 0.5).sum()),
                disagreed=sum(one.value is not None and not one.agreed for one in mine),
                malformed=int((~judged).sum()),
                length_controlled=length_controlled(
                    compared[system, baseline], difficulty=gammas[system, baseline], prompt=same, seed=seed
                ),
                by_category=_by_category(value, same[judged], category[judged], names, seed=seed) if names else {},
            )
        )
    return found


def given_difficulty(file: str, matched: Matched) -> np.ndarray:
    """The difficulties in a JSON file {index of a prompt: number}, float [prompts]; large where the baseline is weak.

    Raises:
        UserError: where the file is not that, or lacks a prompt.
    """
    try:
        given = json.loads(Path(file).read_text(encoding="utf-8"))
        numbers = {int(index): float(one) for index, one in given.items()}
    except OSError as error:
        raise UserError(f"difficulty={file}: cannot be read ({error.strerror})") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"difficulty={file}: is not a JSON object of prompts' indices with numbers") from None
    lacking = [asked.index for asked in matched.prompts if not np.isfinite(numbers.get(asked.index, np.nan))]
    if lacking:
        raise UserError(
            f"difficulty={file}: has no finite number for {len(lacking)} of {len(matched.prompts)} prompts, "
            f"index {lacking[0]} for one"
        )
    return np.array([numbers[asked.index] for asked in matched.prompts])


def results(
    matched: Matched,
    comparisons: Sequence[Comparison],
    *,
    kind: str,
    judge: Mapping[str, Any],
    paths: Mapping[str, str],
    diversities: Mapping[str, Diversity],
    ranking: Mapping[str, Strength] | None = None,
) -> dict[str, Any]:
    """What results.json holds.

    Args:
        judge: its name, kind and identity.
        paths: of the systems' models or files.
    """
    return {
        "kind": kind,
        "judge": dict(judge),
        "prompts": len(matched.prompts),
        "unmatched": matched.unmatched,
        "systems": {name: {"path": paths[name], **asdict(diversities[name])} for name in matched.systems},
        "comparisons": [asdict(one) for one in comparisons],
        "ranking": None if ranking is None else {name: asdict(one) for name, one in ranking.items()},
    }


def lines(matched: Matched, rulings: Rulings) -> list[dict[str, Any]]:
    """What verdicts.jsonl holds: one line a prompt, with every system's answer and every ruling."""
    return [
        {
            "index": asked.index,
            "prompt": [{"role": message.role, "content": message.content} for message in asked.messages],
            "category": asked.category,
            "answers": {
                name: {
                    "response": answer["response"],
                    "finish_reason": answer["finish_reason"],
                    "response_tokens": answer.get("response_tokens"),
                }
                for name in matched.systems
                for answer in [asked.answer(name)]
            },
            "rulings": [
                {"system": system, "baseline": baseline, **asdict(mine[i])}
                for (system, baseline), mine in rulings.items()
            ],
        }
        for i, asked in enumerate(matched.prompts)
    ]


def show(
    console: Console, matched: Matched, comparisons: Sequence[Comparison], diversities: Mapping[str, Diversity]
) -> None:
    """Print a line a comparison, win rates by category, and a line a system."""
    made = table(
        f"win rate and its 95 % interval over {len(matched.prompts)} prompts",
        "system : baseline",
        ("win rate", "length-controlled", "won/tied/lost", "disagreed", "malformed"),
    )
    for one in comparisons:
        controlled = "-" if one.length_controlled is None else cell(one.length_controlled)
        counts = f"{one.wins}/{one.ties}/{one.losses}", str(one.disagreed), str(one.malformed)
        made.add_row(_title(one), cell(one.win_rate), controlled, *counts)
    console.print(made)

    named = list(dict.fromkeys(name for one in comparisons for name in one.by_category))
    if named:
        made = table("win rate by category", "category", map(_title, comparisons))
        for name in named:
            given = [one.by_category.get(name) for one in comparisons]
            made.add_row(escape(name), *("-" if mean is None else cell(mean) for mean in given))
        console.print(made)

    columns = ("tokens", "characters", "finished", "distinct 1/2/3", "identical")
    made = table("answers", "system", columns)
    for name, mine in diversities.items():
        distinct = "/".join(_share(one) for one in (mine.distinct_1, mine.distinct_2, mine.distinct_3))
        tokens = "-" if mine.tokens is None else f"{mine.tokens:.1f}"
        figures = tokens, f"{mine.characters:.0f}", f"{mine.finished:.0%}", distinct, _share(mine.identical)
        made.add_row(escape(name), *figures)
    console.print(made)
    for name, count in matched.unmatched.items():
        if count:
            console.print(f"{name}: {count} prompts that not all systems answered are left out", markup=False)


def _compared(matched: Matched, system: str, baseline: str, rulings: Sequence[Ruling]) -> Compared:
    if len(rulings) != len(matched.prompts):
        raise ValueError(f"{system} against {baseline}: {len(rulings)} rulings on {len(matched.prompts)} prompts")
    characters = [
        (len(asked.answer(system)["response"]), len(asked.answer(baseline)["response"])) for asked in matched.prompts
    ]
    return Compared(
        value=np.array([np.nan if one.value is None else one.value for one in rulings]),
        longer=np.array([mine - theirs for mine, theirs in characters], float),
    )


def _difficulties(
    compared: Mapping[tuple[str, str], Compared], difficulty: np.ndarray | str | None
) -> dict[tuple[str, str], np.ndarray | None]:
    """gamma for each comparison. A prompt that is hard for one baseline is not so for another: they must have the same."""
    if isinstance(difficulty, np.ndarray):
        return dict.fromkeys(compared, difficulty)
    one_baseline = len({baseline for _, baseline in compared}) == 1
    if difficulty is None or not one_baseline:
        return dict.fromkeys(compared)
    if difficulty != JOINT:
        raise ValueError(f"difficulty {difficulty!r} is neither {JOINT!r} nor numbers")
    return dict(zip(compared, joint_difficulty(list(compared.values())), strict=True))


def _categories(matched: Matched) -> tuple[np.ndarray, list[str]]:
    """Of each prompt the number of its category, and their names, none where no prompt has one."""
    given = [asked.category for asked in matched.prompts]
    if not any(given):
        return np.zeros(len(given), np.int64), []
    names = sorted({one or UNNAMED for one in given})
    return np.array([names.index(one or UNNAMED) for one in given], np.int64), names


def _by_category(
    value: np.ndarray, prompt: np.ndarray, category: np.ndarray, names: Sequence[str], *, seed: int
) -> dict[str, ClusterMean]:
    """The win rate of every category that has a verdict."""
    there, group = np.unique(category, return_inverse=True)
    means = cluster_means(value, prompt, group, seed=seed)
    return {names[i]: mean for i, mean in zip(there, means, strict=True)}


def _title(one: Comparison) -> str:
    return escape(f"{one.system} : {one.baseline}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
