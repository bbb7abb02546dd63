"""Accuracies of rewards on known rankings, by hand."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.preferences import Results, lines, measure, ranked, show
from rlhf_pipeline.scoring.answers import Answered


def row(index: int, ranks: tuple[int, ...] | None, *, prompt: str | None = None, **columns: Any) -> Answered:
    count = 2 if ranks is None else len(ranks)
    return Answered(
        index=index,
        origin=f"file:{index + 1}",
        prompt=(Message("user", prompt or f"question {index}"),),
        responses=tuple(f"answer {k}" for k in range(count)),
        finished=(True,) * count,
        many=True,
        ranks=ranks,
        row=columns,
    )


def rewards(*values: list[float]) -> list[np.ndarray]:
    return [np.array(one) for one in values]


# Four pairs and a ranking of three: 4 + 3 comparisons. Right are pairs 0 and 1; pair 2 has equal rewards, pair 3 is wrong;
# of the ranking (best first) 0 > 1 and 0 > 2 are right, 1 > 2 is wrong.
ROWS = [
    row(0, (0, 1), subset="chat"),
    row(1, (1, 0), subset="chat"),
    row(2, (0, 1), subset="safety"),
    row(3, (0, 1), subset="safety"),
    row(4, (0, 1, 2), subset="chat"),
]
GIVEN = rewards([2.0, 1.0], [-5.0, -4.0], [0.5, 0.5], [0.0, 1.0], [3.0, 1.0, 2.0])


def test_accuracy_is_over_comparisons_and_equal_rewards_count_half() -> None:
    found = measure(ROWS, {"mine": GIVEN})
    assert (found.rows, found.comparisons, found.ties) == (5, 7, 0)
    overall = found.systems["mine"].overall
    assert overall.mean == pytest.approx((1 + 1 + 0.5 + 0 + 2) / 7)
    assert (overall.count, overall.prompts) == (7, 5)
    assert overall.low < overall.mean < overall.high


def test_subsets_come_largest_first_and_weigh_the_same_in_their_mean() -> None:
    found = measure(ROWS, {"mine": GIVEN}).systems["mine"]
    assert list(found.by_subset) == ["chat", "safety"]
    assert found.by_subset["chat"].mean == pytest.approx(4 / 5) and found.by_subset["chat"].count == 5
    assert found.by_subset["safety"].mean == pytest.approx(0.25) and found.by_subset["safety"].count == 2
    assert found.subsets_mean == pytest.approx((4 / 5 + 0.25) / 2)


def test_the_column_category_will_do_and_rows_without_one_are_a_subset_of_their_own() -> None:
    rows = [row(0, (0, 1), category="poems"), row(1, (0, 1)), row(2, (0, 1), category="poems", subset="odes")]
    found = measure(rows, {"mine": rewards([1, 0], [1, 0], [0, 1])}).systems["mine"]
    assert {name: one.mean for name, one in found.by_subset.items()} == {"poems": 1.0, "(none)": 1.0, "odes": 0.0}


def test_without_several_subsets_there_is_no_mean_over_them() -> None:
    found = measure([row(0, (0, 1))], {"mine": rewards([1, 0])}).systems["mine"]
    assert found.subsets_mean is None and found.by_subset == {}
    alone = measure([row(0, (0, 1), subset="chat")], {"mine": rewards([1, 0])}).systems["mine"]
    assert alone.subsets_mean is None and list(alone.by_subset) == ["chat"]


def test_ties_of_the_labels_are_left_out_and_counted() -> None:
    rows = [row(0, (0, 0, 1)), row(1, (0, 0))]
    found = measure(rows, {"mine": rewards([1, 5, 0], [1, 2])})
    assert (found.comparisons, found.ties) == (2, 2)
    assert found.systems["mine"].overall.mean == 1.0


def test_differences_are_paired() -> None:
    """Two systems that are right as often, on other comparisons, differ by 0; two that are equal, by 0 without width."""
    rows = [row(i, (0, 1)) for i in range(4)]
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    found = measure(
        rows,
        {
            "a": rewards(right, right, wrong, wrong),
            "b": rewards(wrong, right, wrong, right),
            "c": rewards(right, right, right, right),
            "also_c": rewards(right, right, right, right),
        },
    )
    assert list(found.differences) == ["b - a", "c - a", "also_c - a", "c - b", "also_c - b", "also_c - c"]
    assert found.differences["b - a"].mean == 0 and found.differences["b - a"].low < 0 < found.differences["b - a"].high
    assert found.differences["c - a"].mean == pytest.approx(0.5)
    same = found.differences["also_c - c"]
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_intervals_are_those_of_the_bootstrap_and_the_same_every_time() -> None:
    """Of N independent pairs the interval is near the normal one: p +- 1.96 sqrt(p (1 - p) / N)."""
    rng = np.random.default_rng(1)
    rows = [row(i, (0, 1)) for i in range(400)]
    given = [np.array([float(rng.random() < 0.8), 0.5]) for _ in rows]
    one, again = (measure(rows, {"mine": given}).systems["mine"].overall for _ in range(2))
    assert one == again
    half = 1.96 * (one.mean * (1 - one.mean) / 400) ** 0.5
    assert one.high - one.mean == pytest.approx(half, rel=0.15)
    assert one.mean - one.low == pytest.approx(half, rel=0.15)
    assert measure(rows, {"mine": given}, seed=1).systems["mine"].overall != one


def test_rows_with_the_same_prompt_are_drawn_together() -> None:
    """Ten times the same two prompts say no more about other prompts than twice."""
    rows = [row(i, (0, 1), prompt=f"question {i % 2}") for i in range(20)]
    overall = measure(rows, {"mine": rewards(*[[1.0, 0.0], [0.0, 1.0]] * 10)}).systems["mine"].overall
    assert (overall.mean, overall.low, overall.high, overall.prompts) == (0.5, 0.0, 1.0, 2)


def test_a_ranking_of_many_answers_is_all_its_pairs() -> None:
    """K = 9, rewards in the order of the ranks but for two neighbours: 35 of 36."""
    given = np.arange(9.0)[::-1].copy()
    given[[3, 4]] = given[[4, 3]]
    found = measure([row(0, tuple(range(9)))], {"mine": [given]})
    assert found.comparisons == 36 and found.systems["mine"].overall.mean == pytest.approx(35 / 36)


def test_rows_without_ranks_are_left_out() -> None:
    assert ranked([row(0, None), row(1, (0, 1))]) == [row(1, (0, 1))]
    with pytest.raises(UserError, match="no row says which of its answers is better"):
        ranked([row(0, None)])
    with pytest.raises(UserError, match="in every row all answers are tied"):
        ranked([row(0, (0, 0)), row(1, None)])


def test_a_reward_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UserError, match="file:1: the reward of an answer is not a finite number"):
        measure([row(0, (0, 1))], {"mine": rewards([float("nan"), 0.0])})


def test_lines_hold_every_reward() -> None:
    found = lines(ROWS, {"mine": GIVEN, "theirs": GIVEN})
    assert found[4] == {
        "index": 4,
        "origin": "file:5",
        "subset": "chat",
        "prompt": [{"role": "user", "content": "question 4"}],
        "responses": ["answer 0", "answer 1", "answer 2"],
        "ranks": [0, 1, 2],
        "rewards": {"mine": [3.0, 1.0, 2.0], "theirs": [3.0, 1.0, 2.0]},
    }


def test_what_is_printed() -> None:
    rows = [row(i, (0, 1), subset="[b]" if i else "chat") for i in range(40)] + [row(40, (0, 0), subset="chat")]
    good = rewards(*[[1.0, 0.0]] * 41)
    bad = rewards(*[[0.0, 1.0]] * 20, *[[1.0, 0.0]] * 21)
    text = _shown(measure(rows, {"bad": bad, "good": good}))
    assert "40 comparisons" in text and "mean over subsets" in text and "chat (1)" in text
    assert "[b] (39)" in text, "a subset's name is not markup"
    assert "1 comparisons are ties" in text
    assert "to bad" in text and re.search(r"good .* \+0.500 \[.*\] .* yes", text)
    same = _shown(measure(rows, {"b": good, "a": good}))
    assert re.search(r"a .* \+0.000 \[\+0.000, \+0.000\] .* no", same)


def test_what_is_printed_has_room() -> None:
    rows = [row(i, (0, 1), subset="chat") for i in range(4)]
    found = measure(rows, dict.fromkeys("abcdefgh", rewards(*[[1.0, 0.0]] * 4)))
    wide, narrow = (_shown(found, width=width).split("by subset", 1)[1] for width in (250, 40))
    assert "[1.000, 1.000]" in wide and "by subset" not in wide
    assert "[1.000" not in narrow and narrow.count("by subset") == 2, "only means, three systems at a time"


def _shown(found: Results, width: int = 200) -> str:
    sink = io.StringIO()
    show(Console(file=sink, width=width), found)
    return sink.getvalue()
