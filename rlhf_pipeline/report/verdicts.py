"""What judges said of models: gold scores, win rates, one order of all, the frontier, the length and variety of answers.

A file of results may lack any figure; what is not there is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf_pipeline.report import charts
from rlhf_pipeline.report.charts import Series
from rlhf_pipeline.report.collect import Evaluation
from rlhf_pipeline.report.parts import Block, Cell, Figure, Key, Table, table, words
from rlhf_pipeline.report.values import (
    Interval,
    beside,
    bounds,
    entries,
    interval,
    mapping,
    number,
    percent,
    plain,
    whole,
)

MOST_SYSTEMS = 12  # in a square of everyone against everyone


def gold(one: Evaluation) -> list[Block | None]:
    """The lab's judge: scores by system, category and criterion, and what is clear of chance."""
    systems = mapping(one.results.get("systems"))
    scores = [
        (str(name), found, 0) for name, mine in systems.items() if (found := interval(mapping(mine).get("score")))
    ]
    if not scores:
        return []
    picture = charts.whiskers(scores, f"gold-{_slug(one)}", x="gold score, 1 is the best")
    drawn = Figure(
        title="Gold score",
        caption="The mean score of each system's answers with its 95 % interval over prompts. Overlapping intervals do not "
        "mean that a difference is chance: the paired differences below say that.",
        picture=picture,
    )
    return [
        drawn,
        _groups(systems, "by_category", "By use case", "use case", "Mean gold score by category of the prompts."),
        _groups(systems, "by_criterion", "By criterion", "criterion", "The share of each criterion's points."),
        _differences(mapping(one.results.get("differences"))),
    ]


def win_rates(one: Evaluation) -> list[Block | None]:
    """Everyone against everyone as far as it was judged, every comparison in full, and by category."""
    comparisons = entries(one.results.get("comparisons"))
    names = [words(f"{c.get('system')} against {c.get('baseline')}") for c in comparisons]
    columns: dict[str, Sequence[Cell | None]] = {
        "win rate": [_percent(c.get("win_rate")) for c in comparisons],
        "length-controlled": [_percent(c.get("length_controlled")) for c in comparisons],
    }
    for key in ("wins", "ties", "losses", "disagreed", "malformed"):
        columns[key] = [_number(c.get(key)) for c in comparisons]
    every = table(
        "Every comparison",
        "A pair of answers is judged in both orders. It is won when both verdicts say so; where they disagree it is a tie, "
        "and counted as disagreed. Malformed verdicts are left out, and many of them, or of disagreements, speak against "
        "the judge. Length control asks what the win rate would be between answers of equal length (Dubois et al. 2024).",
        names,
        columns,
        first="comparison",
    )
    categories = sorted({str(key) for c in comparisons for key in mapping(c.get("by_category"))})
    by_category = table(
        "By use case",
        "Win rates by category of the prompts; of few prompts they are rough.",
        [words(name) for name in categories],
        {
            f"{c.get('system')} against {c.get('baseline')}": [
                _percent(mapping(c.get("by_category")).get(name)) for name in categories
            ]
            for c in comparisons
        }
        if len(comparisons) <= MOST_SYSTEMS
        else {},
        first="use case",
    )
    drawn, square = _against_chance(one, comparisons), _matrix(comparisons)
    return [drawn, square, every, by_category, _other_scores(one), _temperatures(one)]


def ranking(one: Evaluation) -> list[Block | None]:
    """The order that all verdicts together make."""
    found = mapping(one.results.get("ranking"))
    order = sorted(found, key=lambda name: -(number(mapping(found[name]).get("strength")) or 0.0))
    strengths = {name: _strength(mapping(found[name])) for name in order}
    rows = [(str(name), known, 0) for name, known in strengths.items() if known is not None]
    if not rows:
        return []
    drawn = Figure(
        title="Strength",
        caption="Strengths with 95 % intervals: the difference of two is the log-odds that one's answer is preferred to the "
        "other's, ties counted half. What overlaps is not told apart by these prompts.",
        picture=charts.whiskers(rows, f"ranking-{_slug(one)}", x="strength, log-odds"),
    )
    columns: dict[str, Sequence[Cell | None]] = {
        "strength": [_plain(strengths[name]) for name in order],
        "Elo": [_whole(mapping(found[name]).get("elo")) for name in order],
        "win rate against all": [_percent(mapping(found[name]).get("win_rate")) for name in order],
    }
    listed = table("Ranking", "Best first.", [words(str(name)) for name in order], columns, first="system")
    return [drawn, listed]


def frontier(one: Evaluation) -> list[Block | None]:
    """Reward over KL for every checkpoint: by the gold judge, and by the reward that was trained for."""
    points = [point for point in entries(one.results.get("points")) if number(point.get("kl")) is not None]
    points.sort(key=lambda point: (str(point.get("system")), number(point.get("step")) or 0.0, point["kl"]))
    methods = {str(point.get("system")): str(point.get("method") or "") for point in points}
    captions = {
        "gold": "True score against the KL from the reference. Good is up and to the left. Where a curve turns down while "
        "the reward it was trained for still rises, the reward model is being exploited (Gao et al. 2023).",
        "proxy": "The reward that was trained for, on the same axis. It rises almost whatever happens; compare its shape "
        "with the true score's.",
    }
    titles = {"gold": "Frontier: true score over KL", "proxy": "Frontier: the trained-for reward over KL"}
    blocks: list[Block | None] = []
    for key in ("gold", "proxy"):
        lines, legend = [], []
        for i, (system, method) in enumerate(sorted(methods.items())):
            mine = [point for point in points if str(point.get("system")) == system]
            for is_bound in (False, True):
                series = _points([p for p in mine if bool(p.get("kl_is_bound")) is is_bound], key, i, is_bound)
                if series is not None:
                    lines.append(series)
                    name = system if method in ("", system) else f"{system} ({method})"
                    name += ", KL is a bound" if is_bound else ""
                    legend.append(Key(label=name, colour=i % charts.COLOURS, style="hollow" if is_bound else "dots"))
        if lines:
            scorer = mapping(one.results.get("method")).get(key)
            y = f"{key} score ({scorer})" if scorer not in (None, key) else f"{key} score"
            picture = charts.frontier(lines, f"frontier-{key}-{_slug(one)}", y=y)
            blocks.append(Figure(title=titles[key], caption=captions[key], picture=picture, legend=tuple(legend)))
    return [*blocks, _gold_over_proxy(points, _slug(one)), _checkpoints(points)]


def lengths(evaluations: Sequence[Evaluation]) -> Table | None:
    """Length and variety of every system's answers, from the win rates or from the frontier."""
    systems: dict[str, Mapping[str, Any]] = {}
    for one in evaluations:
        for name, mine in mapping(one.results.get("systems")).items():
            if "tokens" in mapping(mine):
                systems.setdefault(str(name), mine)
    shown = {
        "answers": (_number, "answers"),
        "tokens": (_number, "tokens"),
        "characters": (_number, "characters"),
        "finished": (_percent, "finished"),
        **{f"distinct {n}-grams": (_percent, f"distinct_{n}") for n in (1, 2, 3)},
        "identical": (_percent, "identical"),
    }
    columns = {head: [make(mine.get(key)) for mine in systems.values()] for head, (make, key) in shown.items()}
    caption = (
        "Means over answers. Distinct n-grams are the share of all words, word pairs and triples that differ, over as many "
        "answers of each system (Li et al. 2016); identical is the share of the pairs of answers to one prompt that are the "
        "same text. A policy that has collapsed says the same to everybody; compare where lengths are alike."
    )
    return table("Length and diversity", caption, [words(name) for name in systems], columns, first="system")


def selection(one: Evaluation) -> Table | None:
    """The epochs of a fine-tuning by reward."""
    candidates = mapping(one.results.get("candidates"))
    columns = {
        "reward": [_plain(interval(mapping(mine).get("reward"))) for mine in candidates.values()],
        "behind the best": [_plain(interval(mapping(mine).get("behind"))) for mine in candidates.values()],
        "tokens": [_number(mapping(mine).get("tokens")) for mine in candidates.values()],
        "finished": [_percent(mapping(mine).get("finished")) for mine in candidates.values()],
    }
    caption = f"Mean reward of the answers to the same prompts; the best is {one.results.get('winner_name')}."
    names = [words(str(name)) for name in candidates]
    return table(f"Candidates by reward ({one.label})", caption, names, columns, first="candidate")


def _other_scores(one: Evaluation) -> Table | None:
    """What scorers beside the judge give the same answers."""
    systems = mapping(one.results.get("scores"))
    scorers = list(dict.fromkeys(str(name) for mine in systems.values() for name in mapping(mine)))
    columns = {name: [_plain(interval(mapping(mine).get(name))) for mine in systems.values()] for name in scorers}
    caption = "The mean of what each scorer gives the same answers, with 95 % intervals."
    return table("Scores beside the judge", caption, [words(str(name)) for name in systems], columns, first="system")


def _temperatures(one: Evaluation) -> Figure | None:
    """Win rates of each system when it samples more or less boldly."""
    lines, legend = [], []
    for i, (name, mine) in enumerate(mapping(one.results.get("temperatures")).items()):
        found = [(number(at.get("temperature")), known) for at in entries(mine) if (known := interval(at)) is not None]
        rows = [(at, known.mean, known.low, known.high) for at, known in found if at is not None]
        if rows:
            x, y, low, high = np.array(sorted(rows), dtype=float).T
            lines += [
                Series(x=x, y=y, low=low, high=high, colour=i, is_exact=True),
                Series(x=x, y=y, colour=i, style="dots"),
            ]
            legend.append(Key(label=str(name), colour=i % charts.COLOURS, style="line"))
    if not lines:
        return None
    caption = (
        "Win rate against the baseline's answers, which stay the same, when the system samples at other temperatures. A "
        "model that is only better where it is cautious has a curve that falls steeply (Rafailov et al. 2023, figure 2)."
    )
    picture = charts.curves(lines, f"temperatures-{_slug(one)}", x="sampling temperature", y="share won", level=0.5)
    return Figure(title="Win rate by temperature", caption=caption, picture=picture, legend=tuple(legend))


def _groups(systems: Mapping[str, Any], key: str, title: str, first: str, caption: str) -> Table | None:
    groups = list(dict.fromkeys(str(name) for mine in systems.values() for name in mapping(mapping(mine).get(key))))
    columns = {
        str(name): [_shaded(mapping(mapping(mine).get(key)).get(group)) for group in groups]
        for name, mine in systems.items()
    }
    return table(title, f"{caption} With 95 % intervals.", [words(group) for group in groups], columns, first=first)


def _differences(found: Mapping[str, Any]) -> Table | None:
    known = {str(name): one for name, mine in found.items() if (one := interval(mine)) is not None}
    columns: dict[str, Sequence[Cell | None]] = {
        "difference": [
            Cell(text=f"{one.mean:+.3f}", note=f"[{one.low:+.3f}, {one.high:+.3f}]") for one in known.values()
        ],
        "": [
            words("clear of chance" if one.low > 0 or one.high < 0 else "not clear of chance") for one in known.values()
        ],
    }
    caption = "Paired on the same prompts, with 95 % intervals. An interval that holds 0 is not clear of chance."
    return table("Differences", caption, [words(name) for name in known], columns, first="systems")


def _against_chance(one: Evaluation, comparisons: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The win rates against a baseline that all share."""
    baselines = {str(c.get("baseline")) for c in comparisons}
    rows = [(str(c.get("system")), rate, 0) for c in comparisons if (rate := interval(c.get("win_rate"))) is not None]
    if len(baselines) != 1 or not rows:
        return None
    (baseline,) = baselines
    return Figure(
        title=f"Win rate against {baseline}",
        caption=f"How often each system's answer is preferred to that of {baseline}, with 95 % intervals over prompts; ties "
        "count half. To the right of the dashed half it is better, and clear of chance where the interval does not "
        "reach it.",
        picture=charts.whiskers(rows, f"rates-{_slug(one)}", x="share won", level=0.5),
    )


def _matrix(comparisons: Sequence[Mapping[str, Any]]) -> Table | None:
    """A row a system, a column an opponent; what was judged one way round is turned for the other.

    Where all were held against one baseline, most of it would be empty, and there is none.
    """
    names = list(dict.fromkeys(str(c.get(key)) for c in comparisons for key in ("system", "baseline")))
    if len({str(c.get("baseline")) for c in comparisons}) < 2:
        return None
    won: dict[tuple[str, str], Interval] = {}
    for c in comparisons:
        if (one := interval(c.get("win_rate"))) is not None:
            a, b = str(c.get("system")), str(c.get("baseline"))
            won[a, b] = one
            won.setdefault((b, a), one.turned())
    if not won or len(names) > MOST_SYSTEMS:
        return None
    columns = {
        f"against {b}": [_percent_of(won[a, b], shade=True) if (a, b) in won else None for a in names] for b in names
    }
    caption = (
        "How often the system of the row is preferred to that of the column, with 95 % intervals; ties count half."
    )
    return table("Win rates", caption, [words(name) for name in names], columns, first="system")


def _points(points: Sequence[Mapping[str, Any]], key: str, colour: int, is_bound: bool) -> Series | None:
    found = [(point, one) for point in points if (one := beside(point, key)) is not None]
    if not found:
        return None
    x, y, low, high = np.array([(point["kl"], one.mean, one.low, one.high) for point, one in found], dtype=float).T
    return Series(x=x, y=y, low=low, high=high, colour=colour, style="dots", is_hollow=is_bound)


def _gold_over_proxy(points: Sequence[Mapping[str, Any]], slug: str) -> Figure | None:
    """What the trained-for reward was worth: each system's points in the order of its steps."""
    lines: list[Series] = []
    legend = []
    for i, system in enumerate(dict.fromkeys(str(point.get("system")) for point in points)):
        mine = [point for point in points if str(point.get("system")) == system]
        found = [(beside(point, "proxy"), beside(point, "gold")) for point in mine]
        rows = [(proxy.mean, gold.mean, gold.low, gold.high) for proxy, gold in found if proxy and gold]
        if rows:
            x, y, low, high = np.array(rows).T
            lines += [
                Series(x=x, y=y, colour=i, is_exact=True),
                Series(x=x, y=y, low=low, high=high, colour=i, style="dots"),
            ]
            legend.append(Key(label=system, colour=i % charts.COLOURS, style="dots"))
    if not lines:
        return None
    caption = (
        "True score against the reward that was trained for, along each run. As long as the line climbs the reward is "
        "worth having; where it goes right without going up, more of it buys nothing, and where it falls it does harm."
    )
    picture = charts.curves(lines, f"goodhart-{slug}", x="proxy score", y="gold score")
    return Figure(title="What the reward is worth", caption=caption, picture=picture, legend=tuple(legend))


def _checkpoints(points: Sequence[Mapping[str, Any]]) -> Table | None:
    columns: dict[str, Sequence[Cell | None]] = {
        "step": [_number(point.get("step")) for point in points],
        "KL": [_kl(point) for point in points],
        "gold": [_plain(beside(point, "gold")) for point in points],
        "proxy": [_plain(beside(point, "proxy")) for point in points],
        "entropy": [_number(point.get("entropy")) for point in points],
        "tokens": [_number(point.get("tokens")) for point in points],
        "finished": [_percent(point.get("finished")) for point in points],
        **{f"distinct {n}-grams": [_percent(point.get(f"distinct_{n}")) for point in points] for n in (1, 2, 3)},
        "identical": [_percent(point.get("identical")) for point in points],
    }
    names = [words(" ".join(str(point[key]) for key in ("system", "label") if point.get(key))) for point in points]
    caption = "Every point of the frontier, with 95 % intervals, and how long and varied its answers are."
    return table("Checkpoints", caption, names, columns, first="checkpoint")


def _kl(point: Mapping[str, Any]) -> Cell | None:
    cell = _plain(beside(point, "kl"))
    return replace(cell, text=f"at most {cell.text}") if cell and point.get("kl_is_bound") else cell


def _strength(one: Mapping[str, Any]) -> Interval | None:
    return interval({"mean": one.get("strength"), "low": one.get("low"), "high": one.get("high")})


def _slug(one: Evaluation) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in one.label)


def _plain(one: Interval | None) -> Cell | None:
    return None if one is None else Cell(text=plain(one.mean), note=bounds(one))


def _shaded(value: Any) -> Cell | None:
    one = interval(value)
    return None if one is None else Cell(text=plain(one.mean), note=bounds(one), shade=one.mean)


def _number(value: Any) -> Cell | None:
    known = number(value)
    if known is None:
        return None
    return Cell(text=whole(known) if isinstance(value, int) else plain(known))


def _whole(value: Any) -> Cell | None:
    known = number(value)
    return None if known is None else Cell(text=whole(known))


def _percent(value: Any) -> Cell | None:
    one = interval(value)
    return None if one is None else _percent_of(one, shade=False)


def _percent_of(one: Interval, *, shade: bool) -> Cell:
    return Cell(text=percent(one.mean), note=bounds(one, as_percent=True), shade=one.mean if shade else None)
