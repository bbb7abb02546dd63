"""A user's mistakes with `rlhf evaluate kind=frontier`."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.compose import examine

GIVEN = [
    "kind=frontier",
    "systems={a:some_run}",
    "+rewards.gold.program=some:thing",
    "+rewards.rm.model.path=some_reward",
]


def problems(*overrides: str) -> list[str]:
    return examine("evaluate", [*GIVEN, *overrides])[1]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["frontier.proxy=rm", "frontier.best_of=[1,4]", "frontier.chosen_by=gold", "sampling.temperature=0.7"],
        ["frontier.gold=null", "frontier.proxy=rm", "reference=some_model", "sampling.samples=4"],
    ],
)
def test_what_is_given_is_enough(more: list[str]) -> None:
    assert problems(*more) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sampling.top_k=50"],
            "sampling.top_k=50: must stay 0: the KL would be along answers of another distribution",
        ),
        (["sampling.top_p=0.9"], "sampling.top_p=0.9: must stay 1.0: "),
        (["sampling.min_p=0.1"], "sampling.min_p=0.1: must stay 0.0: "),
        (["sampling.repetition_penalty=1.2"], "sampling.repetition_penalty=1.2: must stay 1.0: "),
        (["sampling.min_new_tokens=2"], "sampling.min_new_tokens=2: must stay 0: "),
        (["sampling.temperature=0"], "sampling.temperature=0.0: must be more than 0: a greedy policy has no finite KL"),
        (["+rewards.rm.weight=2"], "rewards.rm.weight=2.0: kind=frontier adds no scores up"),
        (["frontier.gold=truth"], "frontier.gold=truth: is none of the rewards, which are gold, rm"),
        (["frontier.proxy=pm"], "frontier.proxy=pm: is none of the rewards, which are gold, rm"),
        (["frontier.gold=null"], "frontier.proxy: has no value, and none of the rewards is gold; name one of gold, rm"),
        (["frontier.proxy=gold"], "frontier.proxy=gold: is the gold one already"),
        (["frontier.best_of=[4,0]"], "frontier.best_of=0: must be more than 0"),
        (["frontier.best_of=[4,4]"], "frontier.best_of=[4, 4]: one is there twice"),
        (["frontier.best_of=[4]", "frontier.chosen_by=me"], "frontier.chosen_by=me: is none of the rewards"),
        (
            ["frontier.chosen_by=rm"],
            "frontier.chosen_by=rm: chooses among the answers of frontier.best_of, which has no N",
        ),
        (
            ["kind=gold", "~rewards.gold", "~rewards.rm", "frontier.proxy=rm"],
            "frontier: is for kind=frontier; kind=gold",
        ),
    ],
)
def test_one_mistake(overrides: list[str], message: str) -> None:
    found = problems(*overrides)
    assert len(found) >= 1 and found[0].startswith(message), found


def test_no_scorer() -> None:
    found = examine("evaluate", GIVEN[:2])[1]
    assert found == [
        "rewards: names no scorer; add +rewards.<name>.model.path=<an artifact of rlhf rm>, or .program, or .url"
    ]


@pytest.mark.parametrize("stage", ["sft", "ppo", "dpo", "rm"])
def test_artifacts_on_the_way(stage: str) -> None:
    found = examine(stage, ["data.train=some.jsonl", "model.path=some_model", "checkpoint.artifact_every=0"])[1]
    assert "checkpoint.artifact_every=0: must be more than 0" in found
