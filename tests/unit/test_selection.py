"""The choice among candidates by reward, by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.selection import Selection, candidates, check_same_prompts, lines, select, show, to_score


def answer(index: int, sample: int = 0, *, finish: str = "stop", tokens: int = 4, **others: Any) -> dict[str, Any]:
    return {
        "index": index,
        "sample": sample,
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"question {index}"}],
        "response": f"answer {index} {sample}",
        "finish_reason": finish,
        "response_tokens": tokens,
        "origin": f"file:{index + 1}",
        **others,
    }


def chosen(**rewards: list[list[float]]) -> Selection:
    given = {name: [np.array(one) for one in mine] for name, mine in rewards.items()}
    answers = {
        name: [answer(i, s) for i, one in enumerate(mine) for s in range(len(one))] for name, mine in given.items()
    }
    return select({name: f"runs/{name}" for name in given}, answers, given)


def test_the_highest_mean_reward_wins() -> None:
    found = chosen(one=[[0.0], [1.0]], two=[[1.0], [3.0]], three=[[1.0], [2.0]])
    assert (found.winner, found.winner_name, found.runner_up) == ("runs/two", "two", "three")
    assert {name: one.reward.mean for name, one in found.candidates.items()} == {"one": 0.5, "two": 2.0, "three": 1.5}
    assert found.candidates["two"].behind is None
    behind = found.candidates["one"].behind
    assert behind is not None and (behind.mean, behind.low, behind.high) == (1.5, 1.0, 2.0)


def test_a_prompt_weighs_the_same_whatever_the_number_of_its_answers() -> None:
    found = chosen(one=[[4.0, 0.0, 2.0], [1.0, 1.0, 4.0]])
    assert found.candidates["one"].reward.mean == pytest.approx((2.0 + 2.0) / 2)
    assert found.candidates["one"].reward.count == found.prompts == 2


def test_of_equal_ones_the_first_wins_and_is_not_clear() -> None:
    found = chosen(early=[[1.0], [2.0]], late=[[2.0], [1.0]])
    assert found.winner_name == "early" and found.is_clear is False


def test_a_winner_is_clear_where_the_paired_difference_is() -> None:
    """Prompts differ by far more than candidates do: only the paired difference can tell them apart."""
    level = [100.0 * i for i in range(30)]
    found = chosen(a=[[one] for one in level], b=[[one + 1.0] for one in level])
    assert found.winner_name == "b" and found.is_clear is True
    a, b = found.candidates["a"].reward, found.candidates["b"].reward
    assert a.low < b.low < a.high


def test_length_and_finish() -> None:
    answers = {"a": [answer(0, tokens=3), answer(1, tokens=9, finish="length")]}
    found = select({"a": "x"}, answers, {"a": [np.array([0.0]), np.array([1.0])]}).candidates["a"]
    assert (found.tokens, found.finished) == (6.0, 0.5)


def test_a_single_candidate_wins_alone() -> None:
    found = chosen(only=[[1.0], [2.0]])
    assert (found.winner_name, found.runner_up, found.is_clear) == ("only", None, None)
    assert "only is the only candidate" in shown(found) and "best: runs/only" in shown(found)


def test_what_is_printed() -> None:
    text = shown(chosen(a=[[0.0], [0.0]], b=[[1.0], [1.0]]))
    assert "b - a: +1.000 [+1.000, +1.000] on the same prompts, clear of chance" in text
    assert "1.000 [1.000, 1.000]" in text and "best" in text and "over 2 prompts" in text
    assert "not clear of chance" in shown(chosen(a=[[0.0], [2.0]], b=[[1.0], [1.5]]))


def test_a_run_becomes_its_epochs_in_the_order_of_numbers(tmp_path: Path) -> None:
    for name in ("epoch_1", "epoch_2", "epoch_10", "epoch_3.partial", "epoch_11"):
        (tmp_path / "sft/artifacts" / name).mkdir(parents=True)
        if name != "epoch_11":  # not finished
            (tmp_path / "sft/artifacts" / name / "artifact.json").write_text("{}")
    run = str(tmp_path / "sft")
    found = candidates({"sft": run, "base": "some/model"})
    assert found == {
        **{f"sft-epoch_{n}": f"{run}/artifacts/epoch_{n}" for n in (1, 2, 10)},
        "base": "some/model",
    }
    assert list(found) == ["sft-epoch_1", "sft-epoch_2", "sft-epoch_10", "base"]
    with pytest.raises(UserError, match="sft-epoch_1 is there twice"):
        candidates({"sft": run, "sft-epoch_1": "some/model"})


def test_files_of_answers_are_refused() -> None:
    with pytest.raises(UserError, match=r"systems\.mine=mine\.jsonl: answers are no model to choose"):
        candidates({"mine": "mine.jsonl"})


def test_answers_to_a_prompt_are_scored_together() -> None:
    rows = to_score([answer(0), answer(0, 1, finish="length"), answer(2)])
    assert to_score([answer(0, finish="length", response=" ")])[0].finished == (True,), "there is only its end to score"
    assert [(row.index, row.responses, row.finished) for row in rows] == [
        (0, ("answer 0 0", "answer 0 1"), (True, False)),
        (2, ("answer 2 0",), (True,)),
    ]
    assert rows[1].prompt == (Message("system", "Be brief."), Message("user", "question 2"))
    written = lines({"a": rows}, {"a": [np.array([1.0, 2.0]), np.array([3.0])]})
    assert written[0]["answers"]["a"] == {
        "responses": ["answer 0 0", "answer 0 1"],
        "finished": [True, False],
        "rewards": [1.0, 2.0],
    }
    assert [one["index"] for one in written] == [0, 2]


@pytest.mark.parametrize("theirs", [[answer(0)], [answer(0), answer(2)], [answer(0), answer(1), answer(1, 1)]])
def test_other_prompts_are_not_compared(theirs: list[dict[str, Any]]) -> None:
    ours = to_score([answer(0), answer(1)])
    check_same_prompts({"a": ours, "b": ours})
    with pytest.raises(UserError, match="a and b answered other prompts"):
        check_same_prompts({"a": ours, "b": to_score(theirs)})


def shown(found: Selection) -> str:
    sink = io.StringIO()
    show(Console(file=sink, width=200), found)
    return sink.getvalue()
