"""Tables and curves of evaluations and stages, figure by figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers_report import interval, write, write_stage

from rlhf_pipeline.report import verdicts
from rlhf_pipeline.report.collect import Evaluation, Stage, collect
from rlhf_pipeline.report.costs import costs
from rlhf_pipeline.report.learning import learning
from rlhf_pipeline.report.parts import Figure, Table
from rlhf_pipeline.report.reward_models import beliefs
from rlhf_pipeline.report.values import Interval, bounds, number, plain, short
from rlhf_pipeline.report.values import interval as read_interval


def evaluation(kind: str, **results: Any) -> Evaluation:
    return Evaluation(
        label=f"evaluate/{kind}", kind=kind, judge="j", results={"kind": kind, **results}, rows=[], place="x", models={}
    )


def texts(table: Table) -> list[list[str | None]]:
    return [[cell and cell.text for cell in row] for row in table.rows]


def tables(blocks: Any) -> dict[str, Table]:
    return {block.title: block for block in blocks if isinstance(block, Table)}


def figures(blocks: Any) -> dict[str, Figure]:
    return {block.title: block for block in blocks if isinstance(block, Figure)}


def pair(system: str, baseline: str, rate: float) -> dict[str, Any]:
    return {"system": system, "baseline": baseline, "win_rate": interval(rate), "wins": 3, "ties": 1, "losses": 0}


def test_everyone_against_everyone_is_turned_round() -> None:
    made = tables(verdicts.win_rates(evaluation("rank", comparisons=[pair("b", "a", 0.7), pair("c", "b", 0.6)])))
    square = made["Win rates"]
    assert square.head == ("system", "against b", "against a", "against c")
    assert texts(square) == [
        ["b", None, "70.0 %", "40.0 %"],
        ["a", "30.0 %", None, None],
        ["c", "60.0 %", None, None],
    ]
    assert square.rows[1][1] is not None
    assert square.rows[1][1].note == "[25.0, 35.0]"


def test_one_baseline_makes_a_picture_and_no_square() -> None:
    blocks = verdicts.win_rates(evaluation("winrate", comparisons=[pair("b", "a", 0.7), pair("c", "a", 0.6)]))
    assert list(figures(blocks)) == ["Win rate against a"]
    assert list(tables(blocks)) == ["Every comparison"]
    assert texts(tables(blocks)["Every comparison"])[0] == ["b against a", "70.0 %", "3", "1", "0"]


def test_a_ranking_has_the_strongest_first() -> None:
    found = {"a": {"strength": -0.5, "low": -0.7, "high": -0.3, "elo": 913.4}, "b": {"strength": 0.5, "elo": 1086.9}}
    made = tables(verdicts.ranking(evaluation("rank", ranking=found)))
    assert texts(made["Ranking"]) == [["b", "0.500", "1,087"], ["a", "-0.500", "913"]]


def test_differences_say_whether_they_are_clear() -> None:
    found = {"b - a": interval(0.1), "c - a": interval(0.01)}
    blocks = verdicts.gold(evaluation("gold", systems={"a": {"score": interval(0.5)}}, differences=found))
    assert texts(tables(blocks)["Differences"]) == [
        ["b - a", "+0.100", "clear of chance"],
        ["c - a", "+0.010", "not clear of chance"],
    ]


def test_a_frontier_goes_by_system_and_step_and_marks_bounds() -> None:
    points = [
        {"system": "ppo", "label": "step_2", "method": "ppo", "step": 2, "kl": 4.0, "gold": 0.7, "proxy": 2.0},
        {"system": "best_of_n", "label": "n=4", "kl": 0.6, "gold": 0.6, "kl_is_bound": True},
        {"system": "ppo", "label": "step_1", "method": "ppo", "step": 1, "kl": 1.0, "gold": 0.6, "gold_low": 0.5},
        {"system": "lost", "gold": 0.6},
    ]
    blocks = verdicts.frontier(evaluation("frontier", points=points))
    assert [row[:3] for row in texts(tables(blocks)["Checkpoints"])] == [
        ["best_of_n n=4", None, "at most 0.600"],
        ["ppo step_1", "1", "1.000"],
        ["ppo step_2", "2", "4.000"],
    ]
    gold = figures(blocks)["Frontier: true score over KL"]
    assert [(key.label, key.style) for key in gold.legend] == [("best_of_n, KL is a bound", "hollow"), ("ppo", "dots")]
    proxy = figures(blocks)["Frontier: the trained-for reward over KL"]
    assert [key.label for key in proxy.legend] == ["ppo"]
    assert [key.label for key in figures(blocks)["What the reward is worth"].legend] == ["ppo"]


def test_win_rates_by_temperature() -> None:
    at = [{"temperature": t, "mean": 0.6 - t / 10, "low": 0.5, "high": 0.7} for t in (1.0, 0.0)]
    blocks = verdicts.win_rates(evaluation("winrate", comparisons=[], temperatures={"ppo": at}, scores={}))
    assert list(figures(blocks)) == ["Win rate by temperature"]


def test_lengths_come_from_the_first_that_has_them() -> None:
    systems = {"a": {"answers": 500, "tokens": 10.138, "finished": 0.998, "identical": None}}
    made = verdicts.lengths([evaluation("winrate", systems=systems), evaluation("rank", systems={"a": {"tokens": 3}})])
    assert made is not None
    assert made.head == ("system", "answers", "tokens", "finished")
    assert texts(made) == [["a", "500", "10.14", "99.8 %"]]


def stage(label: str, metrics: list[dict[str, float]], *, name: str = "ppo", **more: Any) -> Stage:
    return Stage(label=label, stage=name, metrics=metrics, **more)


ROWS = [
    {"step": i, "rollout/score": 1.0, "policy/grad_norm": 2.0, "value/grad_norm": 3.0, "eval/score": 1.0}
    for i in (1, 2)
]


def test_one_run_has_a_colour_for_each_metric() -> None:
    made = {one.title: one for one in learning([stage("ppo", ROWS)])}
    assert [key.label for key in made["Score"].legend] == ["rollouts", "held-out prompts"]
    assert len({key.colour for key in made["Gradient norms"].legend}) == 2


def test_several_runs_have_a_colour_each_and_metrics_a_style() -> None:
    made = {one.title: one for one in learning([stage("a", ROWS), stage("b", ROWS)])}
    assert [(key.label, key.colour) for key in made["Score"].legend] == [("a", 0), ("b", 1)]
    assert [(key.label, key.style) for key in made["Gradient norms"].legend] == [
        ("a", "line"),
        ("b", "line"),
        ("policy", "line"),
        ("value model", "dashed"),
    ]


def test_of_many_runs_the_first_picture_names_them() -> None:
    made = learning([stage(f"run {i}", ROWS) for i in range(20)])
    assert [len(one.legend) for one in made] == [16, 2]  # as many as fit; of the gradients' picture the styles


def test_a_curve_of_one_point_is_none() -> None:
    assert learning([stage("ppo", ROWS[:1])])[0].legend[0].style == "dots"


def test_calibration_and_groups(tmp_path: Path) -> None:
    write_stage(tmp_path / "rm", "rm")
    observed = [{"count": 3, "expected": 0.6, "observed": interval(0.7)}, {"count": 0}]
    found = {
        "calibration": observed,
        "accuracy": interval(0.7),
        "ece": 0.1234,
        "length": {"spearman": -0.25},
        "pairs": 7240,
    }
    write(
        tmp_path / "rm" / "evaluation.json",
        {**found, "accuracy_by_distance": {"1": interval(0.6), "4+": interval(0.9)}},
    )
    (tmp_path / "rm" / "rewards.png").write_bytes(b"picture")
    blocks = beliefs(collect(tmp_path).stages)
    made = figures(blocks)
    assert "Accuracy 70.0 % [65.0, 75.0]. Expected calibration error 0.123." in made["Calibration"].caption
    assert ">1 rank apart<" in made["Accuracy by group"].picture
    assert ">4+ ranks apart<" in made["Accuracy by group"].picture
    assert made["Rewards of held-out answers"].picture == "cGljdHVyZQ=="
    assert texts(tables(blocks)["What rewards go along with"]) == [["rm", "-0.250", "7,240"]]


def test_a_policys_implicit_reward_is_calibrated_too() -> None:
    inside = {"calibration": [{"count": 3, "expected": 0.6, "observed": interval(0.7)}]}
    assert "Calibration" in figures(beliefs([stage("dpo", ROWS, name="dpo", evaluation={"comparisons": inside})]))


def test_times_are_medians() -> None:
    rows = [
        {"step": i, "time/step_seconds": s, "time/tokens_per_second": 1000.0 * s, "time/elapsed": 60.0 * i}
        for i, s in ((1, 9.0), (2, 0.5), (3, 0.25))
    ]
    made = tables(costs([stage("sft", rows, name="sft")]))["Time and throughput"]
    assert made.head == ("run", "steps", "minutes", "seconds a step", "tokens/s")
    assert texts(made) == [["sft", "3", "3.0", "0.500", "500"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.6366, "0.637"), (14.4, "14.40"), (197.75, "197.8"), (1509.4, "1,509"), (6.1e-5, "6.1e-05"), (0.0, "0.000")],
)
def test_measurements(value: float, text: str) -> None:
    assert plain(value) == text


@pytest.mark.parametrize(("count", "text"), [(847, "847"), (770_816, "771 k"), (7e9, "7 B"), (1_240_000, "1.24 M")])
def test_sizes(count: int, text: str) -> None:
    assert short(count) == text


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), [], {}])
def test_what_is_no_number(value: Any) -> None:
    assert number(value) is None
    assert read_interval({"mean": value}) is None


def test_an_interval_without_bounds_has_none_to_show() -> None:
    assert read_interval(0.5) == Interval(mean=0.5, low=0.5, high=0.5)
    assert bounds(Interval(mean=0.5, low=0.5, high=0.5)) == ""
    assert bounds(Interval(mean=0.5, low=0.4, high=0.6), as_percent=True) == "[40.0, 60.0]"
