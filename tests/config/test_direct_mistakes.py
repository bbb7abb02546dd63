"""A user's mistakes in the sections of `rlhf dpo`, and which of their fields make a run that run."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from rlhf_pipeline import config
from rlhf_pipeline.config.compose import examine
from rlhf_pipeline.config.identity import differences, identity

GIVEN = ["data.train=some.jsonl", "model.path=some_model"]


def problems(*overrides: str) -> list[str]:
    return examine("dpo", [*GIVEN, *overrides])[1]


def test_what_is_given_is_enough() -> None:
    assert problems() == []


# What a single override of objective=dpo does wrong; none of them changes what is said of another.
TOGETHER: list[tuple[str, str]] = [
    # parameters
    ("objective.beta=0", "objective.beta=0.0: must be more than 0"),
    ("objective.gamma=1", "objective.gamma=1.0: objective=dpo has no such parameter; it takes objective.beta"),
    ("objective.tau=0.1", "objective.tau=0.1: objective=dpo has no such parameter; it takes objective.beta"),
    ("objective.delta=1", "objective.delta=1.0: objective=dpo has no such parameter; it takes objective.beta"),
    ("objective.form=token", "objective.form=token: objective=dpo has no such parameter; it takes objective.beta"),
    ("objective.desirable_weight=1", "objective.desirable_weight=1.0: objective=dpo has no such parameter"),
    ("objective.likelihood=-1", "objective.likelihood=-1.0: must not be negative"),
    # misspelt
    ("objective.beat=0.1", "objective.beat=0.1: there is no key 'objective.beat' (did you mean objective.beta?)"),
    ("objectve.beta=0.1", "objectve.beta=0.1: there is no key 'objectve' (did you mean objective?)"),
    ("objective.ties=keep", "objective.ties=keep: Invalid value 'keep', expected one of [drop, half]"),
    ("objective.pairs=best", "objective.pairs=best: Invalid value 'best', expected one of [all, best_worst, adjacent]"),
    ("objective.reduction=max", "objective.reduction=max: Invalid value 'max', expected one of [sum, mean]"),
    ("objective.label_smoothing=some", "objective.label_smoothing=some: Value 'some' of type 'str' could not be"),
    ("optim.algorithm=adam", "optim.algorithm=adam: Invalid value 'adam', expected one of [adamw, rmsprop]"),
    # the other sections
    ("model.dropout=0.1", "model.dropout=0.1: must stay 0: the policy with dropout would not begin as its reference"),
    ("sampled.max_new_tokens=0", "sampled.max_new_tokens=0: must be more than 0"),
    ("sampled.temperature=0", "sampled.temperature=0.0: must be more than 0"),
    ("sampled.batch_tokens=0", "sampled.batch_tokens=0: must be more than 0"),
    ("sampled.prompts=-1", "sampled.prompts=-1: must not be negative"),
    ("+rewards.rm.weight=2", "rewards.rm: set exactly one of model, program and url; it has none"),
    ("+rewards.words=3", "rewards.words=3: must be a mapping"),
]

ALONE: list[tuple[list[str], str]] = [
    (
        ["objective=dop"],
        "objective=dop: there is no such choice (did you mean dpo?); objective is one of cdpo, cpo, dpo",
    ),
    (["objective.beta=null"], "objective.beta: has no value, and objective=dpo needs one"),
    (["objective.name=simpo"], "objective.gamma: has no value, and objective=simpo needs one"),
    (["objective=simpo", "objective.gamma=-1"], "objective.gamma=-1.0: must not be negative"),
    (["objective=simpo", "objective.beta=-1"], "objective.beta=-1.0: must be more than 0"),
    (["objective=ipo", "objective.tau=0"], "objective.tau=0.0: must be more than 0"),
    (["objective=ipo", "objective.beta=0.1"], "objective.beta=0.1: objective=ipo has no such parameter; it takes obje"),
    (["objective=rdpo", "objective.alpha=-0.1"], "objective.alpha=-0.1: must not be negative"),
    (["objective=slic", "objective.delta=0"], "objective.delta=0.0: must be more than 0"),
    (["objective=slic", "objective.beta=1"], "objective.beta=1.0: objective=slic has no such parameter; it takes obje"),
    (["objective=rrhf", "objective.beta=1"], "objective.beta=1.0: objective=rrhf has no such parameter; it takes none"),
    (["objective=kto", "objective.undesirable_weight=0"], "objective.undesirable_weight=0.0: must be more than 0"),
    (
        ["objective=kto", "objective.desirable_weight=null"],
        "objective.desirable_weight: has no value, and objective=kt",
    ),
    (["objective=unlikelihood", "objective.form=null"], "objective.form: has no value, and objective=unlikelihood"),
    (
        ["objective=unlikelihood", "objective.form=sequence", "objective.alpha=1.5"],
        "objective.alpha=1.5: must be at most 1 with form=sequence",
    ),
    (["objective=cdpo", "objective.label_smoothing=0.5"], "objective.label_smoothing=0.5: must be at least 0 and less"),
    (["objective=cdpo", "objective.label_smoothing=-0.1"], "objective.label_smoothing=-0.1: must be at least 0 and le"),
    # pairs and ties
    (["objective=rrhf", "objective.pairs=adjacent"], "objective.pairs=adjacent: objective=rrhf makes no pairs; leave"),
    (["objective=plackett_luce", "objective.pairs=best_worst"], "objective.pairs=best_worst: objective=plackett_luce "),
    (
        ["objective=kto", "objective.pairs=best_worst"],
        "objective.pairs=best_worst: objective=kto makes no pairs; leave",
    ),
    (
        ["objective=ipo", "objective.ties=half"],
        "objective.ties=half: objective=ipo takes no labels of 1/2; use drop, or one of dpo, cdpo",
    ),
    (["objective=simpo", "objective.ties=half"], "objective.ties=half: objective=simpo takes no labels of 1/2; use"),
    # the reference
    (["objective=simpo", "reference.path=m"], "reference.path: objective=simpo has no reference; leave it out"),
    (["objective=orpo", "reference.path=m"], "reference.path: objective=orpo has no reference; leave it out"),
    (["lora=default", "lora.dropout=0.1"], "lora.dropout=0.1: must stay 0: the policy with dropout would not begin"),
    # batches, answers to held-out prompts
    (
        ["batch.tokens=512", "batch.examples=null"],
        "batch.tokens: an update is a number of prompts with their responses",
    ),
    (
        ["+rewards.words.program=a:b", "sampled.prompts=0"],
        "rewards: score the answers to held-out prompts, and sampled.prompts=0 asks for none",
    ),
    (
        ["model=lab", "model.path=null", "tokenizer.path=t", "data.max_length=512", "data.max_prompt_length=256"],
        "model.shape: a policy is not made from scratch here; name the fine-tuned model with model.path",
    ),
]


@pytest.mark.parametrize(("overrides", "beginning"), ALONE, ids=lambda value: str(value)[:50])
def test_one_problem(overrides: list[str], beginning: str) -> None:
    (problem,) = problems(*overrides)
    assert problem.startswith(beginning)


OF_TYPES = [
    one
    for one in TOGETHER
    if any(said in one[1] for said in ("there is no key", "Invalid value", "Value '", "mapping"))
]


@pytest.mark.parametrize(
    "several", [OF_TYPES, [one for one in TOGETHER if one not in OF_TYPES]], ids=["types", "values"]
)
def test_every_problem_of_many_is_named_and_no_other(several: list[tuple[str, str]]) -> None:
    """Composing takes a second where the machine is busy. Where types are wrong, values are not looked at."""
    found = problems(*(override for override, _ in several))
    missing = [beginning for _, beginning in several if sum(line.startswith(beginning) for line in found) != 1]
    assert missing == [] and len(found) == len(several) > 5


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.ties=half"],
        ["objective=cdpo", "objective.ties=half", "objective.label_smoothing=0"],
        ["objective=simpo", "model.dropout=0.1", "model.attention=dense"],  # it begins as no other model
        ["objective=rdpo", "objective.alpha=0"],
        ["objective=simpo", "objective.gamma=0"],
        ["objective=unlikelihood", "objective.alpha=2"],  # by token
        ["objective=unlikelihood", "objective.form=sequence", "objective.alpha=1"],
        ["objective.likelihood=0.5", "objective.likelihood_reduction=sum"],
        ["objective.pairs=best_worst"],
        ["reference.path=m", "reference.cache=false", "reference.offload=true"],
        ["sampled.prompts=0"],
        ["objective=kto", "batch.examples=1"],  # the other prompts come from the data
        ["optim.algorithm=rmsprop"],
    ],
    ids=lambda value: " ".join(value),
)
def test_accepted(overrides: list[str]) -> None:
    assert problems(*overrides) == []


def test_numbers_are_finite() -> None:
    keys = ["objective.beta", "objective.likelihood", "sampled.temperature"]
    found = problems(*(f"{key}=nan" for key in keys))
    assert all(f"{key}=nan: must be a finite number" in found for key in keys)


def test_every_job_of_a_sweep_is_checked(rlhf: Any, refused: Any) -> None:
    """As a process: what one objective takes and another does not is named before the first of them trains."""
    found = refused(rlhf("dpo", "-m", "objective=simpo,dpo,ipo", "objective.gamma=1", *GIVEN))
    assert found == [
        "objective.gamma=1.0: objective=dpo has no such parameter; it takes objective.beta",
        "objective.gamma=1.0: objective=ipo has no such parameter; it takes objective.tau",
    ]


# Which fields make a run that run


@functools.cache
def dpo(*overrides: str) -> Any:
    return config.load("dpo", [*GIVEN, *overrides])


@pytest.mark.parametrize(
    "override",
    ["reference.cache=false", "reference.offload=true", "sampled.prompts=3", "sampled.max_new_tokens=9",
     "sampled.temperature=0.5", "sampled.batch_tokens=100", "+rewards.words.program=a:b", "train.epochs=3",
     "engine=zero3", "name=other"],
)  # fmt: skip
def test_operational(override: str) -> None:
    assert dpo(override) != dpo()
    assert identity(dpo(override)) == identity(dpo())


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("objective.beta=0.5", "objective.beta: was 0.1, is now 0.5"),
        ("objective.reduction=mean", "objective.reduction: was 'sum', is now 'mean'"),
        ("objective.likelihood=1", "objective.likelihood: was 0.0, is now 1.0"),
        ("objective.likelihood_reduction=sum", "objective.likelihood_reduction: was 'mean', is now 'sum'"),
        ("objective.pairs=adjacent", "objective.pairs: was 'all', is now 'adjacent'"),
        ("objective.ties=half", "objective.ties: was 'drop', is now 'half'"),
        ("reference.path=other", "reference.path: was None, is now 'other'"),
        ("optim.algorithm=rmsprop", "optim.algorithm: was 'adamw', is now 'rmsprop'"),
        ("batch.examples=32", "batch.examples: was 64, is now 32"),
    ],
)
def test_identity(override: str, difference: str) -> None:
    assert differences(identity(dpo()), identity(dpo(override))) == [difference]


def test_another_objective_is_another_run() -> None:
    assert differences(identity(dpo()), identity(dpo("objective=ipo"))) == [
        "objective.beta: was 0.1, is now None",
        "objective.name: was 'dpo', is now 'ipo'",
        "objective.tau: was None, is now 0.1",
    ]
