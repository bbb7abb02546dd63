"""Win rates, counted by hand; their intervals, checked by simulation."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.diversity import diversity
from rlhf_pipeline.evaluation.matching import Matched, match
from rlhf_pipeline.evaluation.strengths import ranking
from rlhf_pipeline.evaluation.winrate import against, compare, given_difficulty, lines, results, show
from rlhf_pipeline.judging.pairs import Outcome, Ruling, Verdict

A, B, TIE, MALFORMED = Outcome.a, Outcome.b, Outcome.tie, Outcome.malformed
WON, LOST, TIED = (A, B), (B, A), (TIE, TIE)


def ruling(first: Outcome, second: Outcome) -> Ruling:
    """Written out, not by `judging`: value, and whether both orders said the same."""
    value, agreed = {
        WON: (1.0, True),
        LOST: (0.0, True),
        TIED: (0.5, True),
        (A, A): (0.5, False),
        (A, TIE): (0.5, False),
        (MALFORMED, A): (None, False),
    }[first, second]
    verdicts = Verdict(outcome=first, reason="one"), Verdict(outcome=second, reason="other")
    return Ruling(value=value, agreed=agreed, verdicts=verdicts)


def matched(
    prompts: int, *, systems: Sequence[str] = ("base", "sft"), same: int = 0, categories: str | None = None
) -> Matched:
    """Systems whose answers have 4 characters more than the system's place; the last `same` prompts ask the same."""

    def line(i: int, place: int) -> dict[str, Any]:
        question = "again" if i >= prompts - same else f"question {i}"
        return {
            "index": 10 + i,
            "prompt": [{"role": "user", "content": question}],
            "response": "a b " + "x" * place,
            "finish_reason": "length" if i == 0 else "stop",
            "response_tokens": 2 + place,
            **({} if categories is None or categories[i] == "-" else {"category": categories[i]}),
        }

    return match({name: [line(i, place) for i in range(prompts)] for place, name in enumerate(systems)})


SIX = [ruling(*one) for one in (WON, WON, TIED, (A, A), LOST, (MALFORMED, A))]


def test_what_is_compared() -> None:
    assert against(["base", "sft", "ppo"], "sft") == [("base", "sft"), ("ppo", "sft")]
    assert against(["base", "sft", "ppo"], None) == [("sft", "base"), ("ppo", "base"), ("ppo", "sft")]
    with pytest.raises(UserError, match="baseline=dpo: is none of the systems, which are base, sft"):
        against(["base", "sft"], "dpo")
    with pytest.raises(UserError, match="base only"):
        against(["base"], None)


def test_a_win_rate_by_hand() -> None:
    (found,) = compare(matched(6), {("sft", "base"): SIX})
    assert (found.system, found.baseline) == ("sft", "base")
    assert found.win_rate.mean == pytest.approx((1 + 1 + 0.5 + 0.5 + 0) / 5)
    assert (found.win_rate.count, found.win_rate.prompts) == (5, 5)
    assert (found.wins, found.ties, found.losses) == (2, 2, 1)
    assert (found.disagreed, found.malformed) == (1, 1)
    assert found.length_controlled is None and found.by_category == {}
    assert 0 <= found.win_rate.low < found.win_rate.mean < found.win_rate.high <= 1


def test_win_rates_by_category() -> None:
    (found,) = compare(matched(6, categories="qqcc-q"), {("sft", "base"): SIX})
    assert {name: (one.mean, one.count) for name, one in found.by_category.items()} == {
        "q": (1.0, 2),  # its malformed one is left out
        "c": (0.5, 2),
        "(none)": (0.0, 1),
    }
    (found,) = compare(matched(6, categories="qqqqqz"), {("sft", "base"): SIX})
    assert list(found.by_category) == ["q"]  # of z nothing could be read


def test_prompts_that_ask_the_same_are_drawn_together() -> None:
    some = [ruling(*one) for one in [WON, LOST] * 20 + [WON] * 10]
    (apart,) = compare(matched(50), {("sft", "base"): some})
    (together,) = compare(matched(50, same=10), {("sft", "base"): some})
    assert together.win_rate.mean == apart.win_rate.mean == 0.6
    assert (together.win_rate.count, together.win_rate.prompts) == (50, 41)
    assert together.win_rate.high - together.win_rate.low > 1.1 * (apart.win_rate.high - apart.win_rate.low)


def test_nothing_that_could_be_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"sft against base: none of the judge's 4 verdicts can be read.*'one'"):
        compare(matched(2), {("sft", "base"): [ruling(MALFORMED, A)] * 2})


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """A judge that ties now and then: of 300 sets of 100 prompts the 95 % intervals hold the true rate in about 95 %."""
    rng = np.random.default_rng(0)
    prompts = matched(100)
    chances = np.array([0.5, 0.2, 0.3])  # of a win, a tie and a loss: the rate is 0.6
    kinds = [ruling(*WON), ruling(*TIED), ruling(*LOST)]
    held = 0
    for seed in range(300):
        drawn = [kinds[i] for i in rng.choice(3, 100, p=chances)]
        (found,) = compare(prompts, {("sft", "base"): drawn}, seed=seed)
        held += found.win_rate.low <= 0.6 <= found.win_rate.high
    assert 0.92 <= held / 300 <= 0.98


def several(
    size: int, lengths: Sequence[float], *, same: int = 1
) -> tuple[Matched, dict[tuple[str, str], list[Ruling]]]:
    """Systems against base under a judge that likes length, on prompts of which every other one is easy for all systems.

    `same` prompts each ask the same.
    """
    rng = np.random.default_rng(1)
    spread = rng.integers(0, 300, (len(lengths) + 1, size))
    spread[1:] += np.array(lengths, int)[:, None]
    names = ["base", *(f"s{i}" for i in range(len(lengths)))]

    def line(i: int, length: int) -> dict[str, Any]:
        prompt = [{"role": "user", "content": f"question {i // same}"}]
        return {"index": i, "prompt": prompt, "response": "x" * int(length), "finish_reason": "stop"}

    answers = {name: [line(i, mine[i]) for i in range(size)] for name, mine in zip(names, spread, strict=True)}
    easy = np.where(np.arange(size) % 2, 2.0, -2.0)
    chance = 1 / (1 + np.exp(-(spread[1:] - spread[0]) / 100 - easy))
    won = rng.random(chance.shape) < chance
    rulings = {(names[1 + s], "base"): [ruling(*(WON if one else LOST)) for one in mine] for s, mine in enumerate(won)}
    return match(answers), rulings


def test_length_control_uses_characters_and_difficulties() -> None:
    prompts, rulings = several(400, [0.0, 100.0, 100.0])
    joint = compare(prompts, rulings)
    for one in joint[1:]:
        assert one.win_rate.mean > 0.6
        assert one.length_controlled is not None and one.length_controlled.low < 0.5 < one.length_controlled.high
    # Difficulties change little, and none are fitted where baselines differ.
    plain = compare(prompts, rulings, difficulty=None)
    assert joint[1] != plain[1] and joint[1].win_rate == plain[1].win_rate
    single = {("s1", "base"): rulings["s1", "base"]}
    assert compare(prompts, single) == compare(prompts, single, difficulty=None) == [plain[1]]
    mixed = rulings | {("s2", "s1"): rulings["s2", "base"]}
    assert compare(prompts, mixed)[:3] == plain
    given = compare(prompts, single, difficulty=np.where(np.arange(400) % 2, 1.0, -1.0))
    assert given != [plain[1]] and given[0].length_controlled is not None
    assert given[0].length_controlled.mean == pytest.approx(0.5, abs=0.06)


def test_length_control_draws_prompts_that_ask_the_same_together() -> None:
    (apart,), (together,) = (compare(*several(100, [50.0], same=same)) for same in (1, 4))
    assert apart.length_controlled is not None and together.length_controlled is not None
    assert together.length_controlled.mean == apart.length_controlled.mean
    assert together.length_controlled.low != apart.length_controlled.low


def test_difficulties_from_a_file(tmp_path: Path) -> None:
    prompts, file = matched(2), tmp_path / "difficulty.json"
    file.write_text(json.dumps({"10": 0.5, "11": -2, "99": 7}))
    assert given_difficulty(str(file), prompts).tolist() == [0.5, -2.0]
    for content, said in (
        ('{"10": 1}', "no finite number for 1 of 2 prompts, index 11"),
        ('{"10": 1, "11": NaN}', "index 11"),
        ("[1, 2]", "is not a JSON object"),
        ("{", "is not a JSON object"),
        ('{"10": "hard", "11": 1}', "is not a JSON object"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=said):
            given_difficulty(str(file), prompts)
    with pytest.raises(UserError, match=r"nowhere.json: cannot be read \(No such file"):
        given_difficulty(str(tmp_path / "nowhere.json"), prompts)


def test_results_are_as_documented() -> None:
    prompts = matched(6, systems=("base", "sft", "ppo"), categories="qqcc-q")
    rulings = dict.fromkeys(against(prompts.systems, None), SIX)
    ranked = ranking(prompts.systems, rulings, prompts.same())
    paths = {name: f"runs/{name}" for name in prompts.systems}
    found = results(
        prompts,
        compare(prompts, rulings),
        kind="rank",
        judge={"name": "gold", "kind": "gold", "tie": 0.0},
        paths=paths,
        diversities=diversity(prompts),
        ranking=ranked,
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"kind", "judge", "prompts", "unmatched", "systems", "comparisons", "ranking"}
    assert (found["kind"], found["judge"]["tie"], found["prompts"]) == ("rank", 0.0, 6)
    assert found["unmatched"] == {"base": 0, "sft": 0, "ppo": 0}
    sft = found["systems"]["sft"]
    assert (sft["path"], sft["answers"], sft["tokens"], sft["characters"]) == ("runs/sft", 6, 3.0, 5.0)
    assert (sft["finished"], sft["distinct_1"], sft["identical"]) == (5 / 6, 3 / 18, None)
    assert {"distinct_2", "distinct_3"} <= set(sft)
    first = found["comparisons"][0]
    assert (first["system"], first["baseline"], first["wins"]) == ("sft", "base", 2)
    assert set(first["win_rate"]) == {"mean", "low", "high", "count", "prompts"} == set(first["by_category"]["q"])
    assert first["length_controlled"] is None
    assert list(found["ranking"]) == ["ppo", "sft", "base"]
    assert {"strength", "low", "high", "elo", "win_rate"} <= set(found["ranking"]["ppo"])
    assert found["ranking"]["ppo"]["win_rate"] == pytest.approx(0.6)


def test_lines_hold_every_ruling() -> None:
    first, *_, last = lines(matched(6, categories="qqcc-q"), {("sft", "base"): SIX})
    assert (first["index"], first["category"]) == (10, "q")
    assert first["prompt"] == [{"role": "user", "content": "question 0"}]
    assert first["answers"]["sft"] == {"response": "a b x", "finish_reason": "length", "response_tokens": 3}
    assert json.loads(json.dumps(last["rulings"])) == [
        {
            "system": "sft",
            "baseline": "base",
            "value": None,
            "agreed": False,
            "verdicts": [{"outcome": "malformed", "reason": "one"}, {"outcome": "a", "reason": "other"}],
        }
    ]


def test_the_tables() -> None:
    prompts = matched(6, systems=("base", "sft[1]"), categories="qqcc-q")
    out = io.StringIO()
    show(
        Console(file=out, width=160),
        prompts,
        compare(prompts, {("sft[1]", "base"): SIX}),
        diversity(prompts),
    )
    told = out.getvalue()
    for piece in ("sft[1] : base", "0.600 [", "2/2/1", "(none)", "0.500 [", "0.17/0.17/0.17", "83%"):
        assert piece in told
    assert "left out" not in told


def test_prompts_that_were_left_out_are_told() -> None:
    line = {"prompt": [{"role": "user", "content": "p"}], "response": "x", "finish_reason": "stop"}
    other = line | {"prompt": [{"role": "user", "content": "q"}]}
    prompts = match({"a": [line], "b": [line, other]})
    out = io.StringIO()
    show(Console(file=out, width=120), prompts, compare(prompts, {("b", "a"): [ruling(*WON)]}), diversity(prompts))
    assert "b: 1 prompts that not all systems answered are left out" in out.getvalue()
    assert "a: " not in out.getvalue()
