"""How far a reward model (or a policy as one) is to be believed: calibration, accuracy by group, rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pipeline.report import charts
from rlhf_pipeline.report.collect import Evaluation, Stage
from rlhf_pipeline.report.lineage import anchor
from rlhf_pipeline.report.parts import Block, Cell, Figure, Key, Table, table, words
from rlhf_pipeline.report.values import Interval, bounds, entries, interval, mapping, number, percent, whole

MOST_DRAWN = 4  # runs with pictures of their own


def beliefs(stages: Sequence[Stage]) -> list[Block | None]:
    """Pictures of each run's evaluation.json, and one table of correlations."""
    judged = [(stage, _comparisons(stage)) for stage in stages if _comparisons(stage)]
    blocks: list[Block | None] = []
    for stage, found in judged[:MOST_DRAWN]:
        name = "" if len(judged) == 1 else f": {stage.label}"
        slug = anchor(stage)
        blocks += [
            _calibration(found, f"Calibration{name}", f"{slug}-calibration"),
            _groups(found, f"Accuracy by group{name}", f"{slug}-groups"),
            _histogram(stage, f"Rewards of held-out answers{name}"),
        ]
    return [*blocks, _correlations(judged)]


def known_rankings(evaluations: Sequence[Evaluation]) -> list[Table | None]:
    """Reward models and labelers on rankings whose order is known, as `kind=rm` compares them."""
    tables = []
    for one in evaluations:
        systems = mapping(one.results.get("systems"))
        subsets = sorted({str(key) for system in systems.values() for key in mapping(mapping(system).get("by_subset"))})
        columns: dict[str, list[Cell | None]] = {
            "all": [_share(mapping(system).get("overall")) for system in systems.values()]
        }
        for subset in subsets:
            columns[subset] = [
                _share(mapping(mapping(system).get("by_subset")).get(subset), is_short=True)
                for system in systems.values()
            ]
        caption = "Share of known comparisons in which the better answer has the higher reward, with 95 % intervals."
        title = f"Accuracy on known rankings ({one.label})"
        tables.append(table(title, caption, [words(str(name)) for name in systems], columns, first="who rates"))
    return tables


def _comparisons(stage: Stage) -> Mapping[str, Any]:
    """A reward model's evaluation, or that of a policy's implicit reward."""
    return stage.evaluation if "calibration" in stage.evaluation else mapping(stage.evaluation.get("comparisons"))


def _calibration(found: Mapping[str, Any], title: str, slug: str) -> Figure | None:
    read = [
        (number(one.get("expected")), interval(one.get("observed")), number(one.get("count")))
        for one in entries(found.get("calibration"))
    ]
    bins = [(sure, right, count) for sure, right, count in read if sure is not None and right and count]
    if not bins:
        return None
    whole = sum(count for *_, count in bins)
    accuracy, ece = interval(found.get("accuracy")), number(found.get("ece"))
    said = f" Accuracy {percent(accuracy.mean)} {bounds(accuracy, as_percent=True)}." if accuracy else ""
    said += f" Expected calibration error {ece:.3f}." if ece is not None else ""
    caption = (
        "How often the model was right (points, 95 % intervals) by how sure it was, and the share of comparisons in which "
        "it was so sure (bars). Points on the diagonal are calibrated; below it the model is surer than it should be, "
        f"above it less sure.{said}"
    )
    legend = (Key(label="right", colour=0, style="dots"), Key(label="share of comparisons", colour=1, style="bar"))
    picture = charts.reliability([(sure, right, count / whole) for sure, right, count in bins], slug)
    return Figure(title=title, caption=caption, picture=picture, legend=legend)


def _groups(found: Mapping[str, Any], title: str, slug: str) -> Figure | None:
    rows: list[tuple[str, Interval, int]] = []
    groups = {
        "accuracy_by_responses": ("K = {}", 0),
        "accuracy_by_distance": ("{} ranks apart", 1),
    }
    for key, (name, colour) in groups.items():
        for which, one in mapping(found.get(key)).items():
            if (known := interval(one)) is not None:
                rows.append((name.format(which).replace("1 ranks", "1 rank"), known, colour))
    for one in entries(found.get("accuracy_by_margin")):
        known = interval(one.get("value"))
        low, high = number(one.get("low")), number(one.get("high"))
        if known is not None and low is not None and high is not None:
            rows.append((f"score gap {low:.2f} to {high:.2f}", known, 2))
    if not rows:
        return None
    caption = (
        "Accuracy with 95 % intervals by the number of answers to a prompt, by how many ranks two answers are apart, and "
        "by how far apart their scores are where scores are known. Neighbours are hard, even for people; what is far "
        "apart should be near 1. The dashed half is chance."
    )
    picture = charts.whiskers(rows, slug, x="share of comparisons that was right", level=0.5)
    return Figure(title=title, caption=caption, picture=picture)


def _histogram(stage: Stage, title: str) -> Figure | None:
    if stage.rewards_png is None:
        return None
    caption = (
        "Rewards of the best answers and of the others. The two should part; that they overlap is normal, for answers to "
        "different prompts lie in one picture."
    )
    return Figure(title=title, caption=caption, picture=stage.rewards_png, kind="png")


def _correlations(judged: Sequence[tuple[Stage, Mapping[str, Any]]]) -> Table | None:
    columns: dict[str, list[Cell | None]] = {}
    for key, what in {"length": "length", "score": "known score"}.items():
        for name, where in {"spearman": "", "spearman_within": ", within prompts"}.items():
            values = [number(mapping(found.get(key)).get(name)) for _, found in judged]
            columns[f"{what}{where}"] = [None if value is None else Cell(text=f"{value:+.3f}") for value in values]
    columns["comparisons"] = [_count(found.get("pairs")) for _, found in judged]
    columns["of them ties"] = [_count(found.get("tied_pairs")) for _, found in judged]
    caption = (
        "Spearman's rank correlation of the reward with the answer's length, and with its known score. The first should "
        "be near that of people's own choices: a reward model that likes length teaches length."
    )
    return table(
        "What rewards go along with", caption, [words(stage.label) for stage, _ in judged], columns, first="run"
    )


def _count(value: Any) -> Cell | None:
    known = number(value)
    return None if known is None else Cell(text=whole(known))


def _share(value: Any, *, is_short: bool = False) -> Cell | None:
    one = interval(value)
    if one is None:
        return None
    return Cell(text=percent(one.mean), note="" if is_short else bounds(one, as_percent=True), shade=2 * one.mean - 1)
