"""A user's mistakes in the sections of `rlhf ppo`, and which of their fields make a run that run."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from rlhf_pipeline import config
from rlhf_pipeline.config.compose import examine
from rlhf_pipeline.config.identity import differences, identity
from rlhf_pipeline.config.ppo import ScorerConfig

GIVEN = ["data.train=some.jsonl", "model.path=some_model"]
SCORED = [*GIVEN, "+rewards.rm.model.path=some_reward"]


def problems(*overrides: str) -> list[str]:
    return examine("ppo", [*SCORED, *overrides])[1]


def test_what_is_given_is_enough() -> None:
    assert problems() == []


# What changes the complaints about other keys, or takes the place of them.
INTERACTING = (
    *("rollout.samples", "batch.examples", "advantage.estimator", "advantage.missing_end", "kl.place"),
    *("ptx.coefficient", "ptx.train", "rollout.tempature"),
)
ONE: list[tuple[list[str], str]] = [
    # a policy
    (
        ["model=lab", "model.path=null", "tokenizer.path=t", "data.max_length=512", "data.max_prompt_length=256"],
        "model.shape: a policy is not made from scratch; name the fine-tuned model with model.path",
    ),
    # rollouts
    (["rollout.top_k=50"], "rollout.top_k=50: must stay 0 in training: "),
    (["rollout.top_p=0.9"], "rollout.top_p=0.9: must stay 1.0 in training: "),
    (["rollout.min_new_tokens=2"], "rollout.min_new_tokens=2: must stay 0 in training: "),
    (["rollout.temperature=0"], "rollout.temperature=0.0: must be more than 0; a greedy policy explores nothing"),
    (["rollout.max_new_tokens=0"], "rollout.max_new_tokens=0: must be more than 0"),
    (["rollout.batch_tokens=0"], "rollout.batch_tokens=0: must be more than 0"),
    (["rollout.samples=0"], "rollout.samples=0: must be more than 0"),
    (["rollout.samples=3", "batch.examples=3"], "rollout.episodes=512: must be a multiple of rollout.samples=3"),
    (["rollout.samples=4", "batch.examples=6"], "batch.examples=6: must be a multiple of rollout.samples=4"),
    (["batch.examples=1024"], "batch.examples=1024: more than the rollout.episodes=512 of an iteration"),
    (
        ["batch.tokens=512", "batch.examples=null"],
        "batch.tokens: an update is a number of episodes; set batch.examples",
    ),
    # the KL
    (["kl.beta=-0.1"], "kl.beta=-0.1: must not be negative"),
    (["kl.controller=adaptive", "kl.target=0"], "kl.target=0.0: must be more than 0"),
    (["kl.controller=adaptive", "kl.beta=0"], "kl.beta=0.0: must be more than 0"),
    (["kl.controller=adaptive", "kl.horizon=100"], "kl.horizon=100: must be more than a fifth of rollout.episodes=512"),
    (["kl.controller=adaptive", "kl.place=loss"], "kl.controller=adaptive: controls the penalty of rewards; set "),
    # advantages
    (["advantage.gamma=1.1"], "advantage.gamma=1.1: must be between 0 and 1"),
    (["advantage.lam=-1"], "advantage.lam=-1.0: must be between 0 and 1"),
    (["advantage.baseline_decay=1"], "advantage.baseline_decay=1.0: must be at least 0 and less than 1"),
    (["advantage.score_clip=0"], "advantage.score_clip=0.0: must be more than 0"),
    (
        ["advantage.missing_end=subtract", "advantage.missing_end_score=-1"],
        "advantage.missing_end_score=-1.0: is subtracted, and must be more than 0",
    ),
    (
        ["advantage.missing_end=substitute"],
        "advantage.missing_end_score=1.0: would be the score of responses that are cut off",
    ),
    (["advantage.estimator=rloo"], "advantage.estimator=rloo: compares the samples of a prompt, and rollout.samples=1"),
    (["advantage.estimator=grpo"], "advantage.estimator=grpo: compares the samples of a prompt, and rollout.samples=1"),
    (
        ["advantage.skip_no_spread=true"],
        "advantage.skip_no_spread=true: is for rloo and grpo; with advantage.estimator=gae",
    ),
    # policy and value model
    (["policy.clip=1.5"], "policy.clip=1.5: must be between 0 and 1"),
    (["policy.epochs=0"], "policy.epochs=0: must be more than 0"),
    (["policy.entropy=-1"], "policy.entropy=-1.0: must not be negative"),
    (["model.dropout=0.1"], "model.dropout=0.1: must stay 0: "),
    (["lora=default", "lora.dropout=0.1"], "lora.dropout=0.1: must stay 0: "),
    (["value.clip=0"], "value.clip=0.0: must be more than 0"),
    (["value.optim.lr=0"], "value.optim.lr=0.0: must be more than 0"),
    (["value.optim.betas=[0.9]"], "value.optim.betas=[0.9]: Adam has two"),
    (["ema.decay=1"], "ema.decay=1.0: must be at least 0 and less than 1"),
    # the pretraining mix
    (["ptx.coefficient=1"], "ptx.train: has no value; add ptx.train=..."),
    (["ptx.train=text"], "ptx.coefficient=0.0: leaves ptx.train out"),
    (["ptx.coefficient=-1"], "ptx.coefficient=-1.0: must not be negative"),
    (["ptx.coefficient=1", "ptx.train=t", "ptx.examples_per_episode=0"], "ptx.examples_per_episode=0.0: must be more"),
    (["ptx.coefficient=1", "ptx.train=t", "ptx.max_length=1"], "ptx.max_length=1: must be at least 2"),
    (["ptx.coefficient=1", "ptx.train=t", "rollout.temperature=0.7"], "rollout.temperature=0.7: must stay 1 with the"),
    # health
    (["health.max_kl=0"], "health.max_kl=0.0: must be more than 0"),
    (["health.max_ratio=-1"], "health.max_ratio=-1.0: must be more than 0"),
    (["health.min_ended=2"], "health.min_ended=2.0: must be between 0 and 1"),
    # misspelt
    (["rollout.tempature=1"], "rollout.tempature=1: there is no key 'rollout.tempature' (did you mean rollout.temp"),
    (["kl.place=rewards"], "kl.place=rewards: Invalid value 'rewards', expected one of [reward, loss]"),
    (["advantage.estimator=ppo"], "advantage.estimator=ppo: Invalid value 'ppo', expected one of [gae, reinforce, "),
]


ALONE = [one for one in ONE if len(one[0]) > 1 or one[0][0].partition("=")[0] in INTERACTING]
TOGETHER = [one for one in ONE if one not in ALONE]


@pytest.mark.parametrize(("overrides", "beginning"), ALONE, ids=lambda value: str(value)[:40])
def test_one_problem(overrides: list[str], beginning: str) -> None:
    (problem,) = problems(*overrides)
    assert problem.startswith(beginning)


def test_every_problem_of_many_is_named_and_no_other() -> None:
    """Composing takes a second where the machine is busy."""
    found = problems(*(override for overrides, _ in TOGETHER for override in overrides))
    missing = [beginning for _, beginning in TOGETHER if sum(line.startswith(beginning) for line in found) != 1]
    assert missing == [] and len(found) == len(TOGETHER) > 15


def test_numbers_are_finite() -> None:
    keys = ["kl.beta", "rollout.temperature", "value.optim.lr", "advantage.lam", "ema.decay"]
    found = problems(*(f"{key}=nan" for key in keys))
    assert all(f"{key}=nan: must be a finite number" in found for key in keys)


SCORERS: list[tuple[list[str], str]] = [
    ([], "rewards: names no scorer; add +rewards.<name>.model.path=<an artifact of rlhf rm>, or .program, or .url"),
    (["rewards=3"], "rewards=3: must map names of yours to scorers"),
    (["rewards=[a,b]"], "rewards=[a,b]: Cannot merge DictConfig with ListConfig"),
    (["+rewards.rm=model"], "rewards.rm=model: must be a mapping: model, program or url"),
    (["+rewards.rm.modle.path=m"], "rewards.rm.modle: Key 'modle' not in 'ScorerConfig'"),
    (["+rewards.rm.model.pth=m"], "rewards.rm.model.pth: Key 'pth' not in 'ReadyModelConfig'"),
    (["+rewards.rm.program=a:b", "+rewards.rm.weight=much"], "rewards.rm.weight: Value 'much' of type 'str' could not"),
    (["+rewards.rm.weight=2"], "rewards.rm: set exactly one of model, program and url; it has none"),
    (
        ["+rewards.rm.program=a:b", "+rewards.rm.url=http://h"],
        "rewards.rm: set exactly one of model, program and url; it has program and url",
    ),
    (["+rewards.rm.model.dtype=float32"], "rewards.rm.model.path: has no value; name a reward model"),
    (["+rewards.rm.program=a.b"], "rewards.rm.program=a.b: must be module:function"),
    (["+rewards.rm.program=':b'"], "rewards.rm.program=:b: must be module:function"),
    (["+rewards.rm.url=ftp://h"], "rewards.rm.url: must begin with http:// or https://"),
    (["+rewards.std.program=a:b"], "rewards.std: rollout/score_std is another metric; choose another name"),
    (["+rewards={a-b:{program:'a:b'}}"], "rewards.a-b: a scorer's name stands in the names of metrics"),
    (["+rewards.rm.program=a:b", "+rewards.rm.weight=0"], "rewards: every weight is 0, which is for scorers that are"),
    (["+rewards.rm.program=a:b", "+rewards.rm.weight=inf"], "rewards.rm.weight=inf: must be a finite number"),
    (
        ["+rewards.rm.model.path=m", "+rewards.rm.max_length=1"],
        "rewards.rm.max_length=1: a prompt token and a response",
    ),
    (["+rewards.rm.model.path=m", "+rewards.rm.batch_tokens=0"], "rewards.rm.batch_tokens=0: must be more than 0"),
    (["+rewards.rm.url=http://h", "+rewards.rm.batch=0"], "rewards.rm.batch=0: must be more than 0"),
    (["+rewards.rm.url=http://h", "+rewards.rm.timeout=0"], "rewards.rm.timeout=0.0: must be more than 0"),
    (["+rewards.rm.url=http://h", "+rewards.rm.retries=-1"], "rewards.rm.retries=-1: must not be negative"),
]


@pytest.mark.parametrize(("overrides", "beginning"), SCORERS, ids=lambda value: str(value)[:50])
def test_scorers(overrides: list[str], beginning: str) -> None:
    (problem,) = examine("ppo", [*GIVEN, "value.init=policy", *overrides])[1]
    assert problem.startswith(beginning)


def test_a_value_model_needs_a_reward_model_to_begin_as() -> None:
    (problem,) = examine("ppo", [*GIVEN, "+rewards.words.program=a:b"])[1]
    assert problem == "value.init=reward_model: no scorer is a reward model; use value.init=policy"
    assert examine("ppo", [*GIVEN, "+rewards.words.program=a:b", "advantage.estimator=reinforce"])[1] == []


def test_every_wrong_scorer_is_named() -> None:
    found = examine("ppo", [*GIVEN, "+rewards.a=1", "+rewards.b.weight=x", "+rewards.c.program=a:b"])[1]
    assert [line.partition("=")[0].partition(":")[0] for line in found] == ["rewards.a", "rewards.b.weight"]


def test_scorers_have_their_types_and_defaults() -> None:
    one = config.load("ppo", [*SCORED, "+rewards.rm.weight=2", "+rewards.x={program: 'a:b', batch: 3}"]).rewards
    assert list(one) == ["rm", "x"] and all(isinstance(s, ScorerConfig) for s in one.values())
    assert one["rm"].model.path == "some_reward" and type(one["rm"].weight) is float and one["rm"].normalised
    assert (one["x"].program, one["x"].batch, one["x"].weight) == ("a:b", 3, 1.0)


# Which fields make a run that run


@functools.cache
def ppo(*overrides: str) -> Any:
    return config.load("ppo", [*SCORED, *overrides])


@pytest.mark.parametrize(
    "override",
    ["+rewards.rm.batch_tokens=100", "+rewards.rm.batch=3", "+rewards.rm.timeout=1", "+rewards.rm.retries=1",
     "+rewards.rm.offload=true", "reference.offload=true", "rollout.batch_tokens=100", "health.max_kl=3",
     "train.max_steps=3", "engine=zero3"],
)  # fmt: skip
def test_operational(override: str) -> None:
    assert ppo(override) != ppo()
    assert identity(ppo(override)) == identity(ppo())


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("+rewards.rm.weight=2", "rewards.rm.weight: was 1.0, is now 2.0"),
        ("+rewards.rm.normalised=false", "rewards.rm.normalised: was True, is now False"),
        ("+rewards.rm.max_length=99", "rewards.rm.max_length: was 2048, is now 99"),
        ("reference.path=other", "reference.path: was None, is now 'other'"),
        ("kl.beta=0.5", "kl.beta: was 0.02, is now 0.5"),
        ("rollout.episodes=256", "rollout.episodes: was 512, is now 256"),
        ("advantage.estimator=reinforce", "advantage.estimator: was 'gae', is now 'reinforce'"),
        ("value.optim.lr=1", "value.optim.lr: was 9e-06, is now 1.0"),
        ("value.init=policy", "value.init: was 'reward_model', is now 'policy'"),
        ("ema.decay=0.5", "ema.decay: was 0.992, is now 0.5"),
    ],
)
def test_identity(override: str, difference: str) -> None:
    assert differences(identity(ppo()), identity(ppo(override))) == [difference]


def test_another_scorer_is_another_run() -> None:
    found = differences(identity(ppo()), identity(ppo("+rewards.words.program=a:b")))
    assert "rewards.words.program: was None, is now 'a:b'" in found
    assert all(line.startswith("rewards.words.") for line in found)
    now = config.load("ppo", [*GIVEN, "+rewards.rm.model.path=another"])
    assert differences(identity(ppo()), identity(now)) == ["rewards.rm.model.path: was 'some_reward', is now 'another'"]
